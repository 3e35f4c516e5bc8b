//! Reads and writes guest RAM that may be bad, without dying of it.
//!
//! A load from a poisoned page raises SIGBUS, and is executed again after the handler. The kernel's
//! own copy between processes (here: between this one and itself) answers with an error instead.

use std::io;

/// Copies what lies at `hva` into `to`.
///
/// # Errors
/// EFAULT where the memory is bad or there is none; part of `to` may have been filled then.
pub(crate) fn read(hva: u64, to: &mut [u8]) -> io::Result<()> {
    let local = libc::iovec { iov_base: to.as_mut_ptr().cast(), iov_len: to.len() };
    let remote = libc::iovec { iov_base: hva as *mut libc::c_void, iov_len: to.len() };
    // SAFETY: the kernel writes `to.len()` bytes at `to`, which is borrowed mutably, and checks
    // `remote` itself.
    let copied = unsafe {
        libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0)
    };
    whole(copied, to.len())
}

/// Copies `from` to `hva`.
///
/// # Errors
/// EFAULT where the memory is bad, read-only or there is none; part may have been written then.
///
/// # Safety
/// The bytes at `hva` belong to the guest, or to nobody: no reference of Rust's leads to them.
pub(crate) unsafe fn write(hva: u64, from: &[u8]) -> io::Result<()> {
    let local = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() };
    let remote = libc::iovec { iov_base: hva as *mut libc::c_void, iov_len: from.len() };
    // SAFETY: the kernel reads `from.len()` bytes at `from` and checks `remote` itself; that nothing
    // of Rust's is changed there is this function's contract.
    let copied = unsafe {
        libc::process_vm_writev(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0)
    };
    whole(copied, from.len())
}

/// Whether all of it was copied. The kernel copies up to the first page that it cannot reach.
fn whole(copied: isize, len: usize) -> io::Result<()> {
    match usize::try_from(copied) {
        Ok(copied) if copied == len => Ok(()),
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_both_ways_and_survives_what_is_not_there() {
        let mut page = [0_u8; 64];
        let hva = (&raw mut page) as u64;
        // SAFETY: the array outlives the call and is not read through a reference meanwhile.
        unsafe { write(hva + 8, &[1, 2, 3]).unwrap() };
        let mut back = [0; 5];
        read(hva + 7, &mut back).unwrap();
        assert_eq!(back, [0, 1, 2, 3, 0]);

        let efault = |result: io::Result<()>| result.unwrap_err().raw_os_error();
        assert_eq!(efault(read(0, &mut back)), Some(libc::EFAULT));
        // SAFETY: nothing is mapped at address zero.
        assert_eq!(efault(unsafe { write(0, &[1]) }), Some(libc::EFAULT));
    }

    #[test]
    fn half_a_copy_is_none() {
        // SAFETY: an anonymous mapping of two pages, of which the second is given back at once.
        let hva = unsafe {
            let at = libc::mmap(
                std::ptr::null_mut(),
                8192,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(at, libc::MAP_FAILED);
            assert_eq!(libc::munmap(at.byte_add(4096), 4096), 0);
            at as u64
        };
        assert!(read(hva + 4000, &mut [0; 200]).is_err());
        // SAFETY: nobody else knows the page.
        assert!(unsafe { write(hva + 4000, &[0; 200]) }.is_err());
    }
}
