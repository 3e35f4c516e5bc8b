//! Reads and writes guest RAM that may be bad, without a SIGBUS that ends the process.
//!
//! A load from a poisoned page raises SIGBUS, and is executed again after the handler. The kernel's
//! own copy between processes (here: between this one and itself) answers with an error instead.
//!
//! The direction of the copy matters. A page may be bad before the kernel knows it, and then the copy itself raises a
//! machine check. The kernel recovers if the copy reads the page by a user address (x86: `EX_TYPE_UACCESS`,
//! arch/x86/kernel/cpu/mce/severity.c); if it reads the page by its own mapping, the host panics. `process_vm_writev`
//! reads its local side by user addresses, and `process_vm_readv` reads the remote side by the kernel's mapping. So to
//! read guest memory it is the local side of a `process_vm_writev` to this very process. To write it, it is the remote
//! side: a store does not consume bad data.

use std::io;

use crate::memory::map::RamMap;
use crate::memory::scan::is_poisoned;
use crate::types::PAGE_SIZE;

/// Why guest memory could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The page is bad.
    #[error("poisoned at GPA {gpa:#x}")]
    Poisoned {
        /// Guest-physical address of the first byte that could not be reached.
        gpa: u64,
    },
    /// The address is not guest RAM.
    #[error("GPA {gpa:#x} is not guest RAM")]
    NotRam {
        /// Guest-physical address of the first such byte.
        gpa: u64,
    },
    /// There is no memory behind the address, and poison is not the reason: a file behind guest RAM
    /// was cut short, or a pool of huge pages is empty.
    #[error("no memory behind GPA {gpa:#x}")]
    NoMemory {
        /// Guest-physical address of the first byte that could not be reached.
        gpa: u64,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
}

/// Reads guest memory at `gpa` into `to`, up to the first byte that cannot be reached. Returns how many bytes were
/// read, at least 1 unless `to` is empty.
///
/// # Errors
/// Not even the first byte could be read.
pub fn read_ram(ram: &RamMap, gpa: u64, to: &mut [u8]) -> Result<usize, AccessError> {
    let (hva, len) = stretch(ram, gpa, to.len())?;
    reached(gpa, hva, read_some(hva, &mut to[..len]))
}

/// Writes `from` to guest memory at `gpa`, up to the first byte that cannot be reached. Returns how many bytes were
/// written.
///
/// # Errors
/// Not even the first byte could be written.
pub fn write_ram(ram: &RamMap, gpa: u64, from: &[u8]) -> Result<usize, AccessError> {
    let (hva, len) = stretch(ram, gpa, from.len())?;
    reached(gpa, hva, write_some(hva, &from[..len]))
}

/// The host address of `gpa`, and how many of the `len` bytes from there lie in the same region.
fn stretch(ram: &RamMap, gpa: u64, len: usize) -> Result<(u64, usize), AccessError> {
    let region = ram.region(gpa).ok_or(AccessError::NotRam { gpa })?;
    let inside = gpa - region.gpa();
    let left = usize::try_from(region.len() - inside).unwrap_or(usize::MAX);
    Ok((region.hva() + inside, len.min(left)))
}

fn reached(gpa: u64, hva: u64, copied: io::Result<usize>) -> Result<usize, AccessError> {
    copied.map_err(|source| match is_poisoned(hva & !(PAGE_SIZE - 1)) {
        true => AccessError::Poisoned { gpa },
        false => AccessError::NoMemory { gpa, source },
    })
}

/// Copies the bytes at host address `hva` into `to`.
///
/// # Errors
/// EFAULT where the memory is bad or there is none; part of `to` may have been filled then.
pub(crate) fn read(hva: u64, to: &mut [u8]) -> io::Result<()> {
    let len = to.len();
    whole(read_some(hva, to)?, len)
}

/// As `read`, up to the first page that cannot be reached. Returns how many bytes were read.
fn read_some(hva: u64, to: &mut [u8]) -> io::Result<usize> {
    let from = libc::iovec { iov_base: hva as *mut libc::c_void, iov_len: to.len() };
    let to = libc::iovec { iov_base: to.as_mut_ptr().cast(), iov_len: to.len() };
    // SAFETY: the kernel writes as many bytes as `to` has, which is borrowed mutably, and checks the addresses of
    // `from`, which it only reads, itself.
    let copied =
        unsafe { libc::process_vm_writev(libc::getpid(), &raw const from, 1, &raw const to, 1, 0) };
    usize::try_from(copied).map_err(|_| io::Error::last_os_error())
}

/// Copies `from` to host address `hva`.
///
/// # Errors
/// EFAULT where the memory is bad, read-only or there is none; part may have been written then.
///
/// `hva` is an address of guest RAM, whose bytes no Rust reference leads to (the contract of `RamRegion`), or nothing
/// is mapped there.
pub(crate) fn write(hva: u64, from: &[u8]) -> io::Result<()> {
    whole(write_some(hva, from)?, from.len())
}

/// As `write`, up to the first page that cannot be reached. Returns how many bytes were written.
fn write_some(hva: u64, from: &[u8]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() };
    let remote = libc::iovec { iov_base: hva as *mut libc::c_void, iov_len: from.len() };
    // SAFETY: the kernel reads `from.len()` bytes at `from` and checks `remote` itself; that no Rust reference leads to
    // the bytes it changes is what `write` asks of its callers.
    let copied = unsafe {
        libc::process_vm_writev(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0)
    };
    usize::try_from(copied).map_err(|_| io::Error::last_os_error())
}

/// Whether all of it was copied. The kernel copies up to the first page that it cannot reach.
fn whole(copied: usize, len: usize) -> io::Result<()> {
    match copied == len {
        true => Ok(()),
        false => Err(io::Error::from_raw_os_error(libc::EFAULT)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_both_ways_and_survives_what_is_not_there() {
        let mut page = [0_u8; 64];
        let hva = (&raw mut page) as u64;
        write(hva + 8, &[1, 2, 3]).unwrap();
        let mut back = [0; 5];
        read(hva + 7, &mut back).unwrap();
        assert_eq!(back, [0, 1, 2, 3, 0]);

        let efault = |result: io::Result<()>| result.unwrap_err().raw_os_error();
        assert_eq!(efault(read(0, &mut back)), Some(libc::EFAULT));
        assert_eq!(efault(write(0, &[1])), Some(libc::EFAULT));
    }

    #[test]
    fn guest_memory_is_read_up_to_where_it_ends() {
        let mut pages = vec![7_u8; 3 * 4096];
        let hva = (pages.as_mut_ptr() as u64).next_multiple_of(4096);
        let ram = RamMap::new(&[crate::RamRegion::unwritten(hva, 0x10_0000, 4096)]).unwrap();
        let mut back = [0; 100];
        assert_eq!(read_ram(&ram, 0x10_0ff0, &mut back).unwrap(), 16);
        assert_eq!(back[..17], [&[7; 16][..], &[0]].concat());
        assert_eq!(write_ram(&ram, 0x10_0ff8, &[1; 9]).unwrap(), 8);
        assert_eq!(read_ram(&ram, 0x10_0fff, &mut back).unwrap(), 1);
        assert_eq!(back[0], 1);
        for gpa in [0, 0xf_ffff, 0x10_1000] {
            let error = read_ram(&ram, gpa, &mut back).unwrap_err();
            assert!(matches!(error, AccessError::NotRam { gpa: of } if of == gpa), "{error}");
        }
        let nowhere = RamMap::new(&[crate::RamRegion::unwritten(0, 0, 4096)]).unwrap();
        let error = read_ram(&nowhere, 0, &mut back).unwrap_err();
        assert!(matches!(error, AccessError::NoMemory { gpa: 0, .. }), "{error}");
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
        assert!(write(hva + 4000, &[0; 200]).is_err());
    }
}
