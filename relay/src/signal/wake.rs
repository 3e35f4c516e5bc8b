//! How the relay's thread sleeps: until a signal is stored for it, another thread wakes it, or the time is over.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::time::Duration;

use super::thread_slot::ThreadSlot;

/// An eventfd by which other threads wake a sleeping one.
#[derive(Debug)]
pub(crate) struct Wake(OwnedFd);

impl Wake {
    /// A new one.
    ///
    /// # Errors
    /// No more file descriptors.
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: eventfd takes no pointer; the result is checked below.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that eventfd has just made, owned by nobody else.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Ends the sleep of the thread that sleeps, or its next sleep at once.
    pub(crate) fn wake(&self) {
        let one = 1u64;
        // SAFETY: writes eight bytes from a live u64 to a descriptor we own. It can only fail on a
        // full counter, and then the thread is being woken already.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// Sleeps until a signal is stored in `slot`, [`Self::wake`] is called, or `pause` is over. SIGBUS is blocked only
    /// from the last look at the slot to the sleep, so that a signal in between ends the sleep.
    pub(crate) fn sleep(&self, slot: &ThreadSlot, pause: Duration) {
        let timeout = libc::timespec {
            // A few seconds at most.
            tv_sec: libc::time_t::try_from(pause.as_secs()).unwrap_or(1),
            tv_nsec: libc::c_long::from(pause.subsec_nanos()),
        };
        let mut fd = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the sets are initialised by sigemptyset before they are read; every pointer is to a
        // live local; ppoll restores the mask it replaced.
        unsafe {
            let mut bus = std::mem::zeroed::<libc::sigset_t>();
            let mut before = std::mem::zeroed::<libc::sigset_t>();
            libc::sigemptyset(&raw mut bus);
            libc::sigaddset(&raw mut bus, libc::SIGBUS);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const bus, &raw mut before);
            if slot.is_empty() {
                libc::sigdelset(&raw mut before, libc::SIGBUS);
                libc::ppoll(&raw mut fd, 1, &raw const timeout, &raw const before);
            }
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const bus, ptr::null_mut());
        }
        self.clear();
    }

    /// The next wait is not ended by what has woken this one.
    pub(crate) fn clear(&self) {
        drain(&self.0);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Takes the count that an eventfd or a timerfd holds, which does not block.
pub(super) fn drain(fd: &OwnedFd) {
    let mut count = 0u64;
    // SAFETY: reads eight bytes into a live u64 from a descriptor that is open while it is borrowed; whether there
    // was anything to read does not matter.
    unsafe { libc::read(fd.as_raw_fd(), (&raw mut count).cast(), 8) };
}
