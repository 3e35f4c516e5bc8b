//! The SIGBUS handler, the per-thread slots it writes, and the handing-on of what is not ours.
//!
//! The handler of a memory failure does plain atomic stores and returns. Each thread that takes
//! part has a slot; the handler finds it by a const-initialised thread-local pointer, copies
//! (code, address, lsb) into it, sets the thread's `immediate_exit` byte so that a KVM_RUN that is
//! about to start ends at once, and is done. Writer and reader of a slot are the same thread, the
//! writer being the handler that interrupts it, so a slot is a single-producer ring.
//!
//! Everything else (other codes, an AR where nobody can act) goes to the handler that was there
//! before, or to the default action with the true `siginfo`.

use std::cell::{Cell, UnsafeCell};
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering};

use libc::{c_int, c_void, sigaction, siginfo_t};

use crate::mca::Kind;

/// `si_code` of an action-required memory failure (`include/uapi/asm-generic/siginfo.h`).
pub const BUS_MCEERR_AR: c_int = 4;
/// `si_code` of an action-optional memory failure.
pub const BUS_MCEERR_AO: c_int = 5;

/// Signals a slot holds between two looks. SIGBUS does not queue, so one look follows few signals.
const RING: usize = 16;

/// A memory failure as the kernel signalled it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caught {
    /// AO or AR.
    pub kind: Kind,
    /// `si_addr`, a host virtual address; not necessarily page-aligned.
    pub hva: u64,
    /// `si_addr_lsb`, `log2` of the extent that is gone.
    pub lsb: u8,
}

impl Caught {
    fn pack(code: c_int, lsb: i16) -> u32 {
        let kind = if code == BUS_MCEERR_AR { 0x100 } else { 0 };
        // An lsb is at most 63; a nonsensical one is kept to its low byte.
        kind | (u32::from(lsb.cast_unsigned()) & 0xff)
    }

    fn unpack(hva: u64, packed: u32) -> Self {
        let kind = if packed & 0x100 != 0 { Kind::ActionRequired } else { Kind::ActionOptional };
        Self { kind, hva, lsb: (packed & 0xff).to_le_bytes()[0] }
    }
}

#[derive(Debug, Default)]
struct Entry {
    hva: AtomicU64,
    packed: AtomicU32,
}

/// What the handler of one thread writes, and that thread (and whoever kicks it) reads.
#[derive(Debug)]
pub(crate) struct Slot {
    /// Something wants this thread's attention: a signal was stored, or another thread asks.
    /// The one load the run loop pays while nothing is wrong.
    attention: AtomicBool,
    /// Entries written; only the handler adds.
    written: AtomicU32,
    /// Entries taken; only the thread adds, outside the handler.
    taken: AtomicU32,
    /// Signals that found the ring full.
    overrun: AtomicU32,
    ring: [Entry; RING],
    /// `kvm_run.immediate_exit` of the thread's vCPU, or null.
    immediate_exit: AtomicPtr<u8>,
}

impl Slot {
    fn new(immediate_exit: *mut u8) -> Self {
        Self {
            attention: AtomicBool::new(false),
            written: AtomicU32::new(0),
            taken: AtomicU32::new(0),
            overrun: AtomicU32::new(0),
            ring: Default::default(),
            immediate_exit: AtomicPtr::new(immediate_exit),
        }
    }

    /// Stores one signal; false when the ring is full. Async-signal-safe: atomic stores only.
    fn store(&self, hva: u64, packed: u32) -> bool {
        let written = self.written.load(Ordering::Relaxed);
        let full = written.wrapping_sub(self.taken.load(Ordering::Acquire)) as usize >= RING;
        if full {
            self.overrun.fetch_add(1, Ordering::Relaxed);
        } else {
            let entry = &self.ring[written as usize % RING];
            entry.hva.store(hva, Ordering::Relaxed);
            entry.packed.store(packed, Ordering::Relaxed);
            self.written.store(written.wrapping_add(1), Ordering::Release);
        }
        self.attention.store(true, Ordering::Release);
        self.request_exit();
        !full
    }

    /// Async-signal-safe.
    fn request_exit(&self) {
        let exit = self.immediate_exit.load(Ordering::Relaxed);
        if !exit.is_null() {
            // SAFETY: `ThreadSlot::attach`'s caller keeps the byte mapped for as long as the slot
            // is attached, and every access to it from Rust is atomic or by the kernel.
            unsafe { AtomicU8::from_ptr(exit) }.store(1, Ordering::Relaxed);
        }
    }

    fn take(&self) -> Option<Caught> {
        let taken = self.taken.load(Ordering::Relaxed);
        if taken == self.written.load(Ordering::Acquire) {
            return None;
        }
        let entry = &self.ring[taken as usize % RING];
        let caught =
            Caught::unpack(entry.hva.load(Ordering::Relaxed), entry.packed.load(Ordering::Relaxed));
        self.taken.store(taken.wrapping_add(1), Ordering::Release);
        Some(caught)
    }

    pub(crate) fn ask_attention(&self) {
        self.attention.store(true, Ordering::Release);
    }
}

thread_local! {
    /// The calling thread's slot. Const-initialised and without a destructor, so that the handler
    /// reads it without running any code of the thread-local machinery.
    static SLOT: Cell<*const Slot> = const { Cell::new(ptr::null()) };
}

/// AOs that reached a thread without a slot (one that set early kill for itself). Any thread may
/// write here, so a place is claimed first and published by its `ready` flag.
static ORPHANS: Orphans = Orphans {
    claimed: AtomicU32::new(0),
    ready: [const { AtomicBool::new(false) }; RING],
    hva: [const { AtomicU64::new(0) }; RING],
    packed: [const { AtomicU32::new(0) }; RING],
};

struct Orphans {
    claimed: AtomicU32,
    ready: [AtomicBool; RING],
    hva: [AtomicU64; RING],
    packed: [AtomicU32; RING],
}

impl Orphans {
    /// Async-signal-safe. A place still in use is overwritten by nobody: the signal is dropped, and
    /// the page stays to be found by its next touch.
    fn store(&self, hva: u64, packed: u32) {
        let place = self.claimed.fetch_add(1, Ordering::Relaxed) as usize % RING;
        if !self.ready[place].load(Ordering::Acquire) {
            self.hva[place].store(hva, Ordering::Relaxed);
            self.packed[place].store(packed, Ordering::Relaxed);
            self.ready[place].store(true, Ordering::Release);
        }
    }

    fn take(&self) -> Option<Caught> {
        (0..RING).find(|place| self.ready[*place].load(Ordering::Acquire)).map(|place| {
            let caught = Caught::unpack(
                self.hva[place].load(Ordering::Relaxed),
                self.packed[place].load(Ordering::Relaxed),
            );
            self.ready[place].store(false, Ordering::Release);
            caught
        })
    }
}

/// Takes an AO that reached a thread outside the relay.
pub(crate) fn take_orphan() -> Option<Caught> {
    ORPHANS.take()
}

/// The calling thread's membership: while it lives, memory failures signalled to this thread are
/// stored. It must be dropped on the thread that made it, so it is not `Send`.
#[derive(Debug)]
pub(crate) struct ThreadSlot {
    slot: Arc<Slot>,
    not_send: PhantomData<*const ()>,
}

impl ThreadSlot {
    /// Attaches the calling thread. `immediate_exit` is `kvm_run.immediate_exit` of the vCPU that
    /// this thread runs, or null.
    ///
    /// # Safety
    /// `immediate_exit` is null or stays valid for one-byte writes until the value is dropped.
    ///
    /// # Errors
    /// The handler is not installed, or the thread is attached already.
    pub(crate) unsafe fn attach(immediate_exit: *mut u8) -> io::Result<Self> {
        if PREVIOUS.get().is_none() {
            return Err(io::Error::other("the SIGBUS handler is not installed"));
        }
        if !SLOT.get().is_null() {
            return Err(io::Error::other("this thread takes memory failures already"));
        }
        let slot = Arc::new(Slot::new(immediate_exit));
        SLOT.set(Arc::as_ptr(&slot));
        Ok(Self { slot, not_send: PhantomData })
    }

    /// Whether a signal was stored or another thread asked. One relaxed load.
    #[inline]
    pub(crate) fn attention(&self) -> bool {
        self.slot.attention.load(Ordering::Relaxed)
    }

    /// Lowers the attention flag; call before [`Self::take`], so that what comes later raises it again.
    pub(crate) fn clear_attention(&self) {
        self.slot.attention.swap(false, Ordering::AcqRel);
    }

    /// Takes the oldest stored signal.
    pub(crate) fn take(&self) -> Option<Caught> {
        self.slot.take()
    }

    /// Whether a signal is stored.
    pub(crate) fn is_empty(&self) -> bool {
        self.slot.taken.load(Ordering::Relaxed) == self.slot.written.load(Ordering::Acquire)
    }

    /// Takes the number of signals that found the ring full.
    pub(crate) fn take_overrun(&self) -> u32 {
        self.slot.overrun.swap(0, Ordering::Relaxed)
    }

    /// The slot, for threads that want this one's attention.
    pub(crate) fn shared(&self) -> Arc<Slot> {
        Arc::clone(&self.slot)
    }
}

impl Drop for ThreadSlot {
    fn drop(&mut self) {
        // The handler runs on this very thread, so after this store it cannot find the slot, and
        // the memory behind it may go.
        SLOT.set(ptr::null());
        self.slot.immediate_exit.store(ptr::null_mut(), Ordering::Relaxed);
    }
}

/// Makes the calling thread's KVM_RUN end at once. For the handler of the signal a VMM kicks its
/// vCPU threads with: async-signal-safe, and without effect on a thread that is not attached.
pub fn request_exit() {
    let slot = SLOT.get();
    if !slot.is_null() {
        // SAFETY: the pointer is that of this thread's own `ThreadSlot`, which resets it before the
        // slot can be freed.
        unsafe { &*slot }.request_exit();
    }
}

/// The disposition that was there before ours, written once before the handler can run.
static PREVIOUS: OnceLock<Previous> = OnceLock::new();

struct Previous(UnsafeCell<sigaction>);

// SAFETY: written before it is published by the OnceLock, only read afterwards.
unsafe impl Send for Previous {}
// SAFETY: as above; there is no mutable access after publication.
unsafe impl Sync for Previous {}

/// Installs the SIGBUS handler for this process, once; later calls do nothing.
///
/// # Errors
/// `sigaction(2)` fails.
pub fn install() -> io::Result<()> {
    static INSTALLING: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one_at_a_time = INSTALLING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if PREVIOUS.get().is_some() {
        return Ok(());
    }
    let mut old = MaybeUninit::<sigaction>::uninit();
    // SAFETY: a null new action only reads the old one into `old`.
    if unsafe { sigaction(libc::SIGBUS, ptr::null(), old.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so the kernel has filled `old`.
    let old = unsafe { old.assume_init() };
    // The handler needs the old action from its first run on, so it is published first.
    let _ = PREVIOUS.set(Previous(UnsafeCell::new(old)));

    // SAFETY: sigaction is plain data; all zero is a valid value to start from.
    let mut new: sigaction = unsafe { std::mem::zeroed() };
    new.sa_sigaction = on_sigbus as extern "C" fn(c_int, *mut siginfo_t, *mut c_void) as usize;
    // ONSTACK: std gives every thread an alternate stack, and a poisoned stack page must not be
    // the end of the handler. RESTART: other threads' system calls need not notice.
    new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: `new` is a complete action whose handler is async-signal-safe.
    if unsafe { sigaction(libc::SIGBUS, &raw const new, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// `siginfo` of a memory failure; libc does not give access to `si_addr_lsb`.
#[repr(C)]
struct MceInfo {
    signo: c_int,
    errno: c_int,
    code: c_int,
    addr: *mut c_void,
    addr_lsb: i16,
}

extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo with SA_SIGINFO, and its layout for SIGBUS begins
    // as MceInfo does (include/uapi/asm-generic/siginfo.h).
    let mce = unsafe { &*info.cast::<MceInfo>() };
    if !store(mce) {
        hand_on(signal, info, context);
    }
}

/// Whether the signal was a memory failure that somebody will take care of.
fn store(mce: &MceInfo) -> bool {
    let ours = mce.code == BUS_MCEERR_AR || mce.code == BUS_MCEERR_AO;
    if !ours {
        return false;
    }
    let hva = mce.addr as u64;
    let packed = Caught::pack(mce.code, mce.addr_lsb);
    let slot = SLOT.get();
    if !slot.is_null() {
        // SAFETY: the pointer is that of this thread's own `ThreadSlot`, which resets it before
        // the slot can be freed.
        let stored = unsafe { &*slot }.store(hva, packed);
        // A thread that takes AR after AR without coming round to look is not in KVM_RUN: its own
        // code loads from the bad page, over and over. Nothing here can mend that.
        return stored || mce.code == BUS_MCEERR_AO;
    }
    if mce.code == BUS_MCEERR_AO {
        ORPHANS.store(hva, packed);
        return true;
    }
    false
}

/// Gives the signal to the previous handler, or to the default action.
fn hand_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let Some(previous) = PREVIOUS.get() else {
        return;
    };
    // SAFETY: published before the handler was installed and never written since.
    let previous = unsafe { &*previous.0.get() };
    // SAFETY: the kernel passes a valid siginfo with SA_SIGINFO.
    let sent = unsafe { (*info).si_code } <= 0;
    match previous.sa_sigaction {
        // A fault raises the signal again when the instruction is executed again, with the true
        // siginfo, and then finds the default action.
        libc::SIG_DFL => set_default(signal),
        libc::SIG_IGN if sent => return,
        libc::SIG_IGN => set_default(signal),
        handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: the previous owner registered it as a handler of this form for this signal.
            let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: as above, of the one-argument form.
            let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
    // A signal somebody sent does not come again by itself: where the default action is in force
    // now (std's handler leaves it so), it has to be raised to take effect.
    if sent && is_default(signal) {
        // SAFETY: raise is async-signal-safe.
        unsafe { libc::raise(signal) };
    }
}

fn set_default(signal: c_int) {
    // SAFETY: sigaction is plain data, all zero is SIG_DFL with no flags.
    let default: sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: sigaction is async-signal-safe and `default` is a complete action.
    unsafe { sigaction(signal, &raw const default, ptr::null_mut()) };
}

fn is_default(signal: c_int) -> bool {
    let mut now = MaybeUninit::<sigaction>::uninit();
    // SAFETY: only reads the action in force into `now`; async-signal-safe.
    let read = unsafe { sigaction(signal, ptr::null(), now.as_mut_ptr()) } == 0;
    // SAFETY: filled by the successful call.
    read && unsafe { now.assume_init() }.sa_sigaction == libc::SIG_DFL
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(code: c_int) -> u32 {
        Caught::pack(code, 12)
    }

    #[test]
    fn a_slot_keeps_order_and_counts_what_it_cannot_hold() {
        let slot = Slot::new(ptr::null_mut());
        assert_eq!(slot.take(), None);
        for hva in 0..RING as u64 {
            assert!(slot.store(hva << 12, packed(BUS_MCEERR_AO)));
        }
        assert!(!slot.store(0xbad, packed(BUS_MCEERR_AO)), "full");
        assert_eq!(slot.overrun.load(Ordering::Relaxed), 1);
        for hva in 0..RING as u64 {
            let caught = slot.take().unwrap();
            assert_eq!(caught, Caught { kind: Kind::ActionOptional, hva: hva << 12, lsb: 12 });
        }
        assert_eq!(slot.take(), None);
        assert!(slot.store(0x1000, packed(BUS_MCEERR_AR)), "room again");
        assert_eq!(slot.take().unwrap().kind, Kind::ActionRequired);
    }

    #[test]
    fn a_stored_signal_asks_for_an_exit() {
        let mut exit = 0u8;
        let slot = Slot::new(&raw mut exit);
        slot.store(0x1000, packed(BUS_MCEERR_AO));
        assert!(slot.attention.load(Ordering::Relaxed));
        assert_eq!(exit, 1);
    }

    #[test]
    fn the_counters_may_wrap() {
        let slot = Slot::new(ptr::null_mut());
        slot.written.store(u32::MAX, Ordering::Relaxed);
        slot.taken.store(u32::MAX, Ordering::Relaxed);
        assert!(slot.store(0x1000, packed(BUS_MCEERR_AO)));
        assert!(slot.store(0x2000, packed(BUS_MCEERR_AO)));
        assert_eq!(slot.take().unwrap().hva, 0x1000);
        assert_eq!(slot.take().unwrap().hva, 0x2000);
    }
}
