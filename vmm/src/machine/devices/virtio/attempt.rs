//! Whether guest memory was whole while a device used it.

use std::io;

pub use mce_relay::guard::Attempt;
use vm_memory::GuestMemoryError;

/// So many pages of others go bad at most while one piece of work is done.
pub(super) const MAX_ATTEMPTS: u32 = 64;

/// Does `work`, which reads or writes guest memory, until no page has turned out to be bad meanwhile: that may have been one
/// that another device has touched. A page of the work's own is not given out a second time, so that this ends with an
/// error then.
///
/// # Errors
/// The work's.
pub fn checked<T>(
    mut work: impl FnMut() -> Result<T, GuestMemoryError>,
) -> Result<T, GuestMemoryError> {
    for _ in 0..MAX_ATTEMPTS {
        let attempt = Attempt::begin();
        let done = work();
        if attempt.is_clean() {
            return done;
        }
    }
    Err(GuestMemoryError::IOError(io::Error::from_raw_os_error(libc::EHWPOISON)))
}
