//! The reins of a running VM: stop, pause, resume, and kicking vCPUs out of the guest.
//!
//! A handle is cheap to clone and outlives its VM, after whose end everything is a no-op.

use std::{
    fmt, io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
};

use vmm_sys_util::{
    eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd},
    signal::SIGRTMIN,
};

/// Who stopped a VM from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopCause {
    /// This signal was sent to the process.
    Signal(i32),
    /// The user typed the escape on the terminal.
    Console,
    /// A request, with words for the log.
    Request(String),
}

impl fmt::Display for StopCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal(number) => write!(f, "signal {number}"),
            Self::Console => f.write_str("Ctrl-A x on the terminal"),
            Self::Request(why) => f.write_str(why),
        }
    }
}

/// Why a VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked to be started over.
    Reset,
    /// This vCPU met an exception that it could not take.
    TripleFault {
        /// Its index.
        vcpu: u8,
    },
    /// KVM could not go on with this vCPU.
    KvmError {
        /// Its index.
        vcpu: u8,
        /// What happened.
        what: String,
    },
    /// The guest cannot be told of a bad page that this vCPU touched.
    Undeliverable {
        /// Its index.
        vcpu: u8,
        /// Guest-physical address of the page.
        gpa: u64,
        /// Why it cannot be told.
        why: String,
    },
    /// Stopped from outside.
    Stopped(StopCause),
    /// This program could not go on.
    Fatal(String),
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest reset itself"),
            Self::TripleFault { vcpu } => write!(f, "triple fault on vCPU {vcpu}"),
            Self::KvmError { vcpu, what } => write!(f, "KVM error on vCPU {vcpu}: {what}"),
            Self::Undeliverable { vcpu, gpa, why } => {
                write!(f, "vCPU {vcpu} touched the bad page at {gpa:#x} and cannot be told: {why}")
            }
            Self::Stopped(cause) => write!(f, "stopped by {cause}"),
            Self::Fatal(what) => write!(f, "fatal: {what}"),
        }
    }
}

/// What the vCPUs are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum State {
    Running = 0,
    Paused = 1,
    Ending = 2,
}

#[derive(Debug, Default)]
struct Inner {
    reason: Option<ExitReason>,
    /// Thread ids of the vCPUs that are alive.
    threads: Vec<Option<libc::pid_t>>,
    parked: usize,
}

#[derive(Debug)]
struct Shared {
    /// A copy of what `inner` protects, so that the run loop need not lock.
    state: AtomicU8,
    inner: Mutex<Inner>,
    changed: Condvar,
    ended: EventFd,
}

/// A handle to a VM.
#[derive(Clone, Debug)]
pub struct VmControl(Arc<Shared>);

impl VmControl {
    /// Reins for so many vCPUs, none of which runs yet.
    ///
    /// # Errors
    /// No more file descriptors.
    pub fn new(cpus: u8) -> io::Result<Self> {
        Ok(Self(Arc::new(Shared {
            state: AtomicU8::new(State::Running as u8),
            inner: Mutex::new(Inner { threads: vec![None; usize::from(cpus)], ..Inner::default() }),
            changed: Condvar::new(),
            ended: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A thread that panicked with the lock held left nothing half done: see each use.
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the VM. The first reason given is the one that counts.
    pub fn stop(&self, reason: ExitReason) {
        let mut inner = self.lock();
        if inner.reason.is_some() {
            return;
        }
        inner.reason = Some(reason);
        self.0.state.store(State::Ending as u8, Ordering::Release);
        kick_threads(&inner);
        self.0.changed.notify_all();
        if let Err(error) = self.0.ended.write(1) {
            log::error!("cannot tell the main thread that the VM ended: {error}");
        }
    }

    /// Why the VM ended, or is about to.
    #[must_use]
    pub fn exit_reason(&self) -> Option<ExitReason> {
        self.lock().reason.clone()
    }

    /// Makes every vCPU leave the guest and wait. Returns when all of them do, or the VM ends.
    ///
    /// Not to be called on a vCPU's own thread, which would wait for itself.
    pub fn pause(&self) {
        let mut inner = self.lock();
        if self.state() == State::Running {
            self.0.state.store(State::Paused as u8, Ordering::Release);
        }
        kick_threads(&inner);
        while self.state() == State::Paused && inner.parked < inner.threads.iter().flatten().count()
        {
            inner = self.0.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets paused vCPUs go on.
    pub fn resume(&self) {
        let _inner = self.lock();
        if self.state() == State::Paused {
            self.0.state.store(State::Running as u8, Ordering::Release);
        }
        self.0.changed.notify_all();
    }

    /// Whether the VM is paused.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.state() == State::Paused
    }

    /// Makes one vCPU leave the guest and pass its hook before it enters again.
    pub fn kick(&self, vcpu: u8) {
        let inner = self.lock();
        if let Some(Some(thread)) = inner.threads.get(usize::from(vcpu)) {
            kick_thread(*thread);
        }
    }

    /// Makes all vCPUs leave the guest and pass their hooks before they enter again.
    pub fn kick_all(&self) {
        kick_threads(&self.lock());
    }

    /// Becomes readable when the VM ends.
    pub(crate) fn ended(&self) -> &EventFd {
        &self.0.ended
    }

    pub(crate) fn state(&self) -> State {
        match self.0.state.load(Ordering::Acquire) {
            0 => State::Running,
            1 => State::Paused,
            _ => State::Ending,
        }
    }

    /// Called on a vCPU's thread: from now on it can be kicked.
    pub(crate) fn enrol(&self, vcpu: u8) {
        // SAFETY: has no preconditions.
        let thread = unsafe { libc::gettid() };
        if let Some(slot) = self.lock().threads.get_mut(usize::from(vcpu)) {
            *slot = Some(thread);
        }
    }

    /// Called on a vCPU's thread before it ends, so that no kick hits whoever gets its id next.
    pub(crate) fn leave(&self, vcpu: u8) {
        if let Some(slot) = self.lock().threads.get_mut(usize::from(vcpu)) {
            *slot = None;
        }
        self.0.changed.notify_all();
    }

    /// Called on a vCPU's thread: waits while the VM is paused.
    pub(crate) fn park(&self) {
        let mut inner = self.lock();
        inner.parked += 1;
        self.0.changed.notify_all();
        while self.state() == State::Paused {
            inner = self.0.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.parked -= 1;
    }
}

fn kick_threads(inner: &Inner) {
    inner.threads.iter().flatten().for_each(|thread| kick_thread(*thread));
}

fn kick_thread(thread: libc::pid_t) {
    // SAFETY: sends a signal that has a handler (installed before any thread enrols) to a thread
    // of this process that is alive: it takes itself off the list under the lock that is held.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGRTMIN()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_reason_counts() {
        let control = VmControl::new(2).unwrap();
        assert_eq!(control.exit_reason(), None);
        control.stop(ExitReason::PowerOff);
        control.stop(ExitReason::Reset);
        assert_eq!(control.exit_reason(), Some(ExitReason::PowerOff));
        assert_eq!(control.state(), State::Ending);
        control.pause();
        control.resume();
        assert_eq!(control.state(), State::Ending, "the end is final");
        assert_eq!(control.ended().read().unwrap(), 1);
    }

    #[test]
    fn pause_waits_for_whoever_is_alive() {
        let control = VmControl::new(1).unwrap();
        control.pause();
        assert!(control.is_paused(), "with nobody to wait for");
        control.resume();
        assert!(!control.is_paused());
        // A kick without threads goes nowhere.
        control.kick(0);
        control.kick(9);
        control.kick_all();
    }
}
