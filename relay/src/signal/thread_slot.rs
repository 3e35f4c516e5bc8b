//! The calling thread's slot, as the handler finds it.

use std::io;
use std::marker::PhantomData;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, Ordering, compiler_fence};

use super::slot::Slot;
use crate::types::Caught;

/// Whether the process has a handler that stores memory failures in the slots. Without one no thread may rely on its
/// slot.
static READY: AtomicBool = AtomicBool::new(false);

/// Notes that the process has such a handler.
pub(crate) fn set_ready() {
    READY.store(true, Ordering::Release);
}

thread_local! {
    // Const-initialised and without destructors, so that the handler reads them without running any
    // code of the thread-local machinery. Atomic, because the handler may run between any two
    // instructions of this thread.

    /// The calling thread's slot, or null.
    static SLOT: AtomicPtr<Slot> = const { AtomicPtr::new(ptr::null_mut()) };
    /// `kvm_run.immediate_exit` of the vCPU that the calling thread runs, or null.
    static IMMEDIATE_EXIT: AtomicPtr<u8> = const { AtomicPtr::new(ptr::null_mut()) };
}

/// The calling thread's slot, or null. Async-signal-safe.
pub(crate) fn own_slot() -> *const Slot {
    SLOT.with(|slot| slot.load(Ordering::Acquire))
}

/// Whether the calling thread takes memory failures for a relay.
pub(crate) fn is_attached() -> bool {
    !own_slot().is_null()
}

/// Makes the calling thread's KVM_RUN end at once. A VMM calls it in the handler of the signal by which it kicks its
/// vCPU threads. Async-signal-safe; does nothing on a thread that is not attached.
pub fn request_exit() {
    let exit = IMMEDIATE_EXIT.with(|exit| exit.load(Ordering::Acquire));
    if !exit.is_null() {
        // SAFETY: `ExitByte::new`'s caller keeps the byte mapped for as long as this thread is
        // attached, and no other thread of this process accesses it.
        unsafe { AtomicU8::from_ptr(exit) }.store(1, Ordering::Relaxed);
    }
}

/// `kvm_run.immediate_exit` of a vCPU. The SIGBUS handler sets it, so that a KVM_RUN that is about to start ends at
/// once.
#[derive(Debug)]
pub struct ExitByte(*mut u8);

impl ExitByte {
    /// No byte, for a thread that is not in a KVM_RUN, or whose run ends soon by itself.
    pub const NONE: Self = Self(ptr::null_mut());

    /// The byte at `immediate_exit`.
    ///
    /// # Safety
    /// Until the port that is attached with it is dropped, the byte stays mapped, and only the kernel and the thread
    /// that the port is attached on (its signal handlers included) write it.
    #[must_use]
    pub unsafe fn new(immediate_exit: *mut u8) -> Self {
        Self(immediate_exit)
    }
}

/// The calling thread's slot: while this lives, memory failures that are signalled to the thread are stored. It has to
/// be dropped on the thread that made it, so it is not `Send`.
#[derive(Debug)]
pub(crate) struct ThreadSlot {
    slot: Arc<Slot>,
    exit: *mut u8,
    not_send: PhantomData<*const ()>,
}

impl ThreadSlot {
    /// Attaches the calling thread. After a signal the handler ends the KVM_RUN that `exit` belongs to.
    ///
    /// # Errors
    /// The handler is not installed, or the thread is attached already.
    pub(crate) fn attach(exit: ExitByte) -> io::Result<Self> {
        if !READY.load(Ordering::Acquire) {
            return Err(io::Error::other("the SIGBUS handler is not installed"));
        }
        if !own_slot().is_null() {
            return Err(io::Error::other("this thread takes memory failures already"));
        }
        let slot = Arc::new(Slot::new());
        IMMEDIATE_EXIT.with(|byte| byte.store(exit.0, Ordering::Release));
        SLOT.with(|own| own.store(Arc::as_ptr(&slot).cast_mut(), Ordering::Release));
        Ok(Self { slot, exit: exit.0, not_send: PhantomData })
    }

    /// Whether a signal was stored or another thread asked. One relaxed load.
    #[inline]
    pub(crate) fn attention(&self) -> bool {
        self.slot.attention()
    }

    /// Clears the byte that makes this thread's KVM_RUN end at once.
    #[inline]
    pub(crate) fn clear_exit(&self) {
        if !self.exit.is_null() {
            // SAFETY: as in `request_exit`.
            unsafe { AtomicU8::from_ptr(self.exit) }.store(0, Ordering::Relaxed);
            // The caller looks at the reason of a kick after this. The handler that sets the byte runs on this very
            // thread.
            compiler_fence(Ordering::SeqCst);
        }
    }

    /// Clears the attention flag. Call it before [`Self::take`], so that a signal that comes later sets it again.
    pub(crate) fn clear_attention(&self) {
        self.slot.clear_attention();
    }

    /// Takes the oldest stored signal.
    pub(crate) fn take(&self) -> Option<Caught> {
        self.slot.take()
    }

    /// Whether no signal is stored.
    pub(crate) fn is_empty(&self) -> bool {
        self.slot.is_empty()
    }

    /// Takes the number of signals that found the ring full.
    pub(crate) fn take_overrun(&self) -> u32 {
        self.slot.take_overrun()
    }

    /// The slot, for threads that want this one's attention.
    pub(crate) fn shared(&self) -> Arc<Slot> {
        Arc::clone(&self.slot)
    }
}

impl Drop for ThreadSlot {
    fn drop(&mut self) {
        // The handler runs on this very thread, so after these stores it finds neither pointer, and the memory behind
        // them may be freed.
        SLOT.with(|own| own.store(ptr::null_mut(), Ordering::Release));
        IMMEDIATE_EXIT.with(|exit| exit.store(ptr::null_mut(), Ordering::Release));
    }
}
