//! This process's own mappings, by numbers.

use std::{io, ptr};

/// madvise(2) on memory of the caller's own, to which no reference leads.
pub(super) fn advise(hva: u64, len: u64, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: as the caller says.
    match unsafe { libc::madvise(address(hva)?, size(len)?, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `hva` as system calls want it.
pub(super) fn address(hva: u64) -> io::Result<*mut libc::c_void> {
    usize::try_from(hva).map(ptr::with_exposed_provenance_mut).map_err(io::Error::other)
}

/// `len` as system calls want it.
pub(super) fn size(len: u64) -> io::Result<usize> {
    usize::try_from(len).map_err(io::Error::other)
}
