//! Poison by userfaultfd: a page of this process's own memory that the kernel takes for bad.
//!
//! It needs no privileges and no CONFIG_MEMORY_FAILURE (Linux 6.6). Nothing is signalled before the page is touched;
//! then the kernel raises the same AR as for memory that really went bad.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use ioctls::{UFFDIO_API, UFFDIO_POISON, UFFDIO_REGISTER, UFFDIO_UNREGISTER};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

// include/uapi/linux/userfaultfd.h
const UFFDIO: u32 = 0xaa;
const UFFD_API: u64 = 0xaa;
/// Faults inside the kernel are not handled, so an unprivileged user may have one.
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
/// UFFDIO_POISON (Linux 6.6).
pub const UFFD_FEATURE_POISON: u64 = 1 << 14;
/// Register for faults on missing pages.
pub const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Span {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Span,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct PoisonPage {
    range: Span,
    mode: u64,
    updated: i64,
}

mod ioctls {
    use super::{Api, PoisonPage, Register, Span, UFFDIO};
    use vmm_sys_util::{ioctl_ior_nr, ioctl_iowr_nr};

    ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, 0x00, Register);
    ioctl_ior_nr!(UFFDIO_UNREGISTER, UFFDIO, 0x01, Span);
    ioctl_iowr_nr!(UFFDIO_POISON, UFFDIO, 0x08, PoisonPage);
    ioctl_iowr_nr!(UFFDIO_API, UFFDIO, 0x3f, Api);
}

/// A userfaultfd of this process.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl AsRawFd for Uffd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Uffd {
    /// A userfaultfd that can poison.
    ///
    /// # Errors
    /// This kernel, or its seccomp filter, does not let this process have one.
    pub fn open() -> io::Result<Self> {
        Self::with_features(UFFD_FEATURE_POISON)
    }

    /// A userfaultfd with these features.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn with_features(features: u64) -> io::Result<Self> {
        // SAFETY: takes flags only.
        let fd =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) };
        let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that the kernel has just made, owned by nobody else.
        let uffd = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        let mut api = Api { api: UFFD_API, features, ioctls: 0 };
        // SAFETY: the ioctl reads and writes one uffdio_api.
        check(unsafe { ioctl_with_mut_ref(&uffd.0, UFFDIO_API(), &mut api) })?;
        Ok(uffd)
    }

    /// Registers `range` with this userfaultfd.
    ///
    /// # Errors
    /// The range is not memory that can be registered.
    pub fn register(&self, range: Range<u64>, mode: u64) -> io::Result<()> {
        let range = Span { start: range.start, len: range.end - range.start };
        let mut register = Register { range, mode, ioctls: 0 };
        // SAFETY: the ioctl reads and writes one uffdio_register.
        check(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_REGISTER(), &mut register) })
    }

    /// Unregisters `range`. Pages that were marked stay marked.
    ///
    /// # Errors
    /// The range was not registered.
    pub fn unregister(&self, range: Range<u64>) -> io::Result<()> {
        let span = Span { start: range.start, len: range.end - range.start };
        // SAFETY: the ioctl reads one uffdio_range.
        check(unsafe { ioctl_with_ref(&self.0, UFFDIO_UNREGISTER(), &span) })
    }

    /// Marks the empty page of `len` bytes at `hva`, in a range that is registered, as bad.
    ///
    /// # Errors
    /// EEXIST where there is a page.
    pub fn mark(&self, hva: u64, len: u64) -> io::Result<()> {
        let range = Span { start: hva, len };
        let mut poison = PoisonPage { range, mode: 0, updated: 0 };
        // SAFETY: the ioctl reads and writes one uffdio_poison.
        check(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_POISON(), &mut poison) })
    }

    /// Drops the page of `len` bytes at `hva`, which is this process's, and marks it as bad. Its contents are lost.
    ///
    /// In between the page is missing, and KVM would end a guest that touches it: hold the vCPUs meanwhile.
    ///
    /// # Errors
    /// The kernel refuses; the page is as it was, or empty.
    pub fn poison(&self, hva: u64, len: u64) -> io::Result<()> {
        let page =
            std::ptr::with_exposed_provenance_mut(usize::try_from(hva).map_err(io::Error::other)?);
        let size = usize::try_from(len).map_err(io::Error::other)?;
        let range = hva..hva + len;
        self.register(range.clone(), UFFDIO_REGISTER_MODE_MISSING)?;
        let done = loop {
            // SAFETY: the page is guest RAM, into which no reference exists.
            let dropped = check(unsafe { libc::madvise(page, size, libc::MADV_DONTNEED) });
            match dropped.and_then(|()| self.mark(hva, len)) {
                // The page was touched in between: once more.
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
                done => break done,
            }
        };
        let left = self.unregister(range);
        done.and(left)
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_ones_own_reads_as_poisoned() {
        let uffd = match Uffd::open() {
            Ok(uffd) => uffd,
            Err(error) => {
                println!("SKIPPED: needs UFFDIO_POISON (Linux 6.6): {error}");
                return;
            }
        };
        let ram =
            crate::machine::memory::guest_ram::GuestRam::new(&[crate::config::MemoryZone::new(
                64 << 20,
            )])
            .unwrap();
        let hva = ram.blocks()[0].hva;
        uffd.poison(hva + 0x3000, 4096).unwrap();
        assert_eq!(ram.find_poison(), [0x3000]);
    }
}
