//! Marks a page of this process's own memory as bad, where it is: whoever touches it gets the AR that a page which
//! really went bad raises (UFFDIO_POISON, Linux 6.6).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::mapping::advise;
use crate::types::PAGE_SIZE;

// include/uapi/linux/userfaultfd.h
const UFFDIO: u32 = 0xaa;
const UFFD_API: u64 = 0xaa;
/// The kernel's own faults are not handled, and so an unprivileged user may have it.
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const UFFD_FEATURE_POISON: u64 = 1 << 14;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
pub(crate) const UFFDIO_API: libc::Ioctl = libc::_IOWR::<Api>(UFFDIO, 0x3f);
pub(crate) const UFFDIO_REGISTER: libc::Ioctl = libc::_IOWR::<Register>(UFFDIO, 0x00);
pub(crate) const UFFDIO_UNREGISTER: libc::Ioctl = libc::_IOR::<Span>(UFFDIO, 0x01);
pub(crate) const UFFDIO_POISON: libc::Ioctl = libc::_IOWR::<Poison>(UFFDIO, 0x08);

/// include/uapi/asm-generic/mman-common.h
pub(crate) const MADV_DONTNEED_LOCKED: libc::c_int = 24;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
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
struct Poison {
    range: Span,
    mode: u64,
    updated: i64,
}

/// What marks pages: a userfaultfd, which has nothing in its care but a page that is being marked.
#[derive(Debug)]
pub(crate) struct Marker(OwnedFd);

impl Marker {
    /// # Errors
    /// The kernel has no UFFDIO_POISON, or does not let this process have a userfaultfd.
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: takes flags only.
        let fd =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) };
        let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that the kernel has just made, owned by nobody else.
        let marker = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        let mut api = Api { api: UFFD_API, features: UFFD_FEATURE_POISON, ioctls: 0 };
        marker.ioctl(UFFDIO_API, &mut api)?;
        Ok(marker)
    }

    /// Marks the page of 4 KiB at `hva` as bad. What it held is gone. Nobody else may use the page meanwhile.
    ///
    /// # Errors
    /// The kernel does not do it; the page may be empty then.
    pub(crate) fn mark(&self, hva: u64) -> io::Result<()> {
        let range = Span { start: hva, len: PAGE_SIZE };
        let mode = UFFDIO_REGISTER_MODE_MISSING;
        self.ioctl(UFFDIO_REGISTER, &mut Register { range, mode, ioctls: 0 })?;
        // Only an empty page can be marked.
        let emptied = advise(hva, PAGE_SIZE, libc::MADV_DONTNEED)
            // Of memory that is locked (Linux 5.18).
            .or_else(|_| advise(hva, PAGE_SIZE, MADV_DONTNEED_LOCKED));
        let marked = emptied
            .and_then(|()| self.ioctl(UFFDIO_POISON, &mut Poison { range, mode: 0, updated: 0 }));
        // What is marked stays so.
        let left = self.ioctl(UFFDIO_UNREGISTER, &mut { range });
        marked.and(left)
    }

    fn ioctl<T>(&self, request: libc::Ioctl, arg: &mut T) -> io::Result<()> {
        // SAFETY: each request reads, and writes, one struct of the type that it is made of (see the constants).
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, std::ptr::from_mut(arg)) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
