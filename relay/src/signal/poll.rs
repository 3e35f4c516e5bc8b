//! One file descriptor to wait for, on a thread that waits for others, too: readable once a signal is pending for that
//! thread, somebody wakes it, or its time has come.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::time::Duration;

use super::wake::{Wake, drain};

/// The descriptor, an epoll(7) instance, and what is in it. SIGBUS is blocked on the thread while it waits: a pending
/// one is what makes a signalfd(2) readable, which is never read from, as the handler takes the signal.
#[derive(Debug)]
pub(crate) struct Poll {
    epoll: OwnedFd,
    timer: OwnedFd,
    /// In the epoll instance for as long as it is open.
    _signals: OwnedFd,
    /// SIGBUS was blocked before.
    was_blocked: bool,
}

/// SIGBUS alone.
fn bus() -> libc::sigset_t {
    // SAFETY: the set is initialised by sigemptyset before it is read.
    unsafe {
        let mut bus = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut bus);
        libc::sigaddset(&raw mut bus, libc::SIGBUS);
        bus
    }
}

/// Blocks or unblocks (`how`) SIGBUS on the calling thread; whether it was blocked before.
fn mask(how: libc::c_int) -> bool {
    let bus = bus();
    // SAFETY: pthread_sigmask writes `before` before it is read, and cannot fail with a valid `how`; all pointers are
    // to live locals.
    unsafe {
        let mut before = std::mem::zeroed::<libc::sigset_t>();
        libc::pthread_sigmask(how, &raw const bus, &raw mut before);
        libc::sigismember(&raw const before, libc::SIGBUS) == 1
    }
}

/// Whether SIGBUS is blocked on the calling thread.
pub(crate) fn is_blocked() -> bool {
    // SAFETY: pthread_sigmask without a set only writes `now`, before it is read.
    unsafe {
        let mut now = std::mem::zeroed::<libc::sigset_t>();
        libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), &raw mut now);
        libc::sigismember(&raw const now, libc::SIGBUS) == 1
    }
}

/// A descriptor that a system call has just returned.
fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: callers pass what a system call that makes a descriptor has just returned: nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Poll {
    /// Of the calling thread, on which SIGBUS `was_blocked` before the relay, with `wake` in it. SIGBUS is blocked from here on, but in [`Self::begin`] to
    /// [`Self::end`].
    ///
    /// # Errors
    /// No more file descriptors.
    pub(crate) fn new(wake: &Wake, was_blocked: bool) -> io::Result<Self> {
        let bus = bus();
        // SAFETY: signalfd reads a live set; the others take no pointer. `owned` checks the results.
        let (epoll, timer, signals) = unsafe {
            (
                owned(libc::epoll_create1(libc::EPOLL_CLOEXEC))?,
                owned(libc::timerfd_create(
                    libc::CLOCK_MONOTONIC,
                    libc::TFD_CLOEXEC | libc::TFD_NONBLOCK,
                ))?,
                owned(libc::signalfd(-1, &raw const bus, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?,
            )
        };
        for fd in [wake.as_fd(), timer.as_fd(), signals.as_fd()] {
            let mut event = libc::epoll_event { events: libc::EPOLLIN.cast_unsigned(), u64: 0 };
            // SAFETY: both descriptors are open; `event` is live, and copied.
            let added = unsafe {
                libc::epoll_ctl(
                    epoll.as_raw_fd(),
                    libc::EPOLL_CTL_ADD,
                    fd.as_raw_fd(),
                    &raw mut event,
                )
            };
            if added != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        mask(libc::SIG_BLOCK);
        Ok(Self { epoll, timer, _signals: signals, was_blocked })
    }

    /// Has the handler take what is pending, and takes back what has made the descriptor readable.
    pub(crate) fn begin(&self, wake: &Wake) {
        mask(libc::SIG_UNBLOCK);
        wake.clear();
        drain(&self.timer);
    }

    /// The thread will wait: what is signalled from here on makes the descriptor readable.
    pub(crate) fn end(&self) {
        mask(libc::SIG_BLOCK);
    }

    /// Readable after `pause`, whatever else happens.
    pub(crate) fn set_timer(&self, pause: Duration) {
        let value = libc::timespec {
            // A few seconds at most.
            tv_sec: libc::time_t::try_from(pause.as_secs()).unwrap_or(1),
            // All zero would disarm it.
            tv_nsec: libc::c_long::from(pause.subsec_nanos()).max(1),
        };
        let once = libc::itimerspec {
            it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: value,
        };
        // SAFETY: reads a live local; the old value is not asked for. It cannot fail with a valid time.
        unsafe {
            libc::timerfd_settime(self.timer.as_raw_fd(), 0, &raw const once, ptr::null_mut())
        };
    }
}

impl AsFd for Poll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl Drop for Poll {
    fn drop(&mut self) {
        if !self.was_blocked {
            mask(libc::SIG_UNBLOCK);
        }
    }
}
