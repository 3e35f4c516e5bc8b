//! A vCPU's registers that come with an exit, so that nobody has to ask for them (KVM_CAP_SYNC_REGS).
//!
//! KVM stores them in `kvm_run` at the end of each KVM_RUN while `kvm_valid_regs` says so. Whoever kicks the vCPU sets it,
//! and the vCPU's thread clears it when it takes them; so they cost nothing while nothing is wrong. As nobody else
//! clears it, what is there to be taken is always of the last exit.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{
    KVM_CAP_SYNC_REGS, KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, kvm_run,
};

use super::guest::{VcpuValues, event_in_flight};
use super::ioctl;

/// What is asked for.
const WANTED: u32 = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;
/// A bit of RFLAGS that is always set (SDM vol. 1, 3.4.3): without it there is nothing of KVM's.
const RFLAGS_ALWAYS: u64 = 1 << 1;

/// The registers that come with a vCPU's exits, for the vCPU's thread.
#[derive(Debug)]
pub struct ExitRegisters {
    run: *mut kvm_run,
}

/// Asks for registers with the next exit of a vCPU, from any thread. After a touch of bad memory (AR) nobody has kicked: the
/// vCPU's thread may ask by itself and make a KVM_RUN with `immediate_exit` set, which is one system call in place of three.
#[derive(Debug, Clone)]
pub struct ExitRequest {
    valid_regs: *mut u64,
}

// SAFETY: the pointer is used by one atomic store alone.
unsafe impl Send for ExitRequest {}
// SAFETY: as above.
unsafe impl Sync for ExitRequest {}

impl ExitRegisters {
    /// Whether KVM gives registers with the exits of the vCPUs of `vm`. It does not for guests whose registers are hidden from
    /// the host.
    ///
    /// # Errors
    /// `vm` is not the descriptor of a VM.
    pub fn are_offered(vm: &impl AsRawFd) -> io::Result<bool> {
        let offered = ioctl::check_extension(vm, KVM_CAP_SYNC_REGS)?;
        Ok(u32::try_from(offered).is_ok_and(|offered| offered & WANTED == WANTED))
    }

    /// Of the vCPU whose `kvm_run` is at `run`. What came with exits before this is dropped. Where KVM does not offer them
    /// ([`Self::are_offered`]) a KVM_RUN that is asked for them fails with EINVAL.
    ///
    /// # Safety
    /// `run` is where the vCPU's descriptor is mapped, and stays mapped until this and all of its requests are dropped. Nobody
    /// else reads or writes the fields `kvm_valid_regs` and `s` of it.
    #[must_use]
    pub unsafe fn new(run: *mut libc::c_void) -> Self {
        let new = Self { run: run.cast() };
        // They may be of before a reset.
        new.take();
        new
    }

    /// What a kick asks with.
    #[must_use]
    pub fn request(&self) -> ExitRequest {
        // SAFETY: within the mapping, by the promise made to `new`.
        ExitRequest { valid_regs: unsafe { &raw mut (*self.run).kvm_valid_regs } }
    }

    /// Whether somebody has asked since they were last taken.
    #[must_use]
    pub fn are_asked_for(&self) -> bool {
        self.asked().load(Ordering::Relaxed) != 0
    }

    fn asked(&self) -> &AtomicU64 {
        // SAFETY: within the mapping, by the promise made to `new`: of the process only this and requests use this field, by
        // atomic accesses, and the kernel reads it.
        unsafe { AtomicU64::from_ptr(&raw mut (*self.run).kvm_valid_regs) }
    }

    /// What came with the last KVM_RUN, if it was asked for and nobody has taken it yet. They do not include the state of a
    /// vCPU that waits ([`VcpuValues::mp_state`]). Call it on the vCPU's thread in each round of its loop, as KVM goes on storing
    /// them until somebody does: behind the KVM_RUN that completes an exit's I/O, and before whatever changes the vCPU's
    /// registers or events; or call it then and drop what it returns.
    pub fn take(&self) -> Option<VcpuValues> {
        if !self.are_asked_for() {
            return None;
        }
        // A request that comes between the two is lost: its exit comes without registers, which are then asked of KVM.
        self.asked().store(0, Ordering::Relaxed);
        // SAFETY: within the mapping, by the promise made to `new`. The kernel writes it in this thread's KVM_RUN alone.
        let (regs, sregs, events) = unsafe {
            let synced = &raw mut (*self.run).s.regs;
            let rflags = &raw mut (*synced).regs.rflags;
            let regs = (&raw const (*synced).regs).read_volatile();
            rflags.write_volatile(0);
            let sregs = (&raw const (*synced).sregs).read_volatile();
            (regs, sregs, (&raw const (*synced).events).read_volatile())
        };
        // KVM stores them in the order regs, sregs, events, and looks at the request for each.
        (regs.rflags & RFLAGS_ALWAYS != 0).then(|| VcpuValues {
            cr4: sregs.cr4,
            rflags: regs.rflags,
            rip: regs.rip,
            event_in_flight: event_in_flight(&events),
            mp_state: None,
        })
    }
}

impl ExitRequest {
    /// Asks for registers with the next exit. Call it before the kick. One relaxed store.
    pub fn ask(&self) {
        // SAFETY: mapped, by the promise made to `ExitRegisters::new`. Other threads use it by atomic accesses, and the kernel
        // reads it.
        unsafe { AtomicU64::from_ptr(self.valid_regs) }.store(WANTED.into(), Ordering::Relaxed);
    }
}
