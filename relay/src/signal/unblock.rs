//! Unblocks SIGBUS on a thread that takes part.

use std::io;
use std::ptr;

/// Unblocks SIGBUS on the calling thread, which may have inherited a mask with it. Where it is not blocked, only the
/// mask is read, as the thread's seccomp filter may forbid the rest.
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
