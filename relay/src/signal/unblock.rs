//! SIGBUS is not blocked on a thread that takes part.

use std::io;
use std::ptr;

/// Lets the calling thread have SIGBUS, which whoever started it may have blocked. A thread that has it makes no call
/// that its filter may forbid.
///
/// # Errors
/// pthread_sigmask(3) fails.
pub(crate) fn unblock() -> io::Result<()> {
    // SAFETY: each set is initialised before it is read; all pointers are to live locals, or null.
    let error = unsafe {
        let mut now = std::mem::zeroed::<libc::sigset_t>();
        let read = libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), &raw mut now);
        if read == 0 && libc::sigismember(&raw const now, libc::SIGBUS) == 0 {
            return Ok(());
        }
        let mut bus = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut bus);
        libc::sigaddset(&raw mut bus, libc::SIGBUS);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const bus, ptr::null_mut())
    };
    match error {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}
