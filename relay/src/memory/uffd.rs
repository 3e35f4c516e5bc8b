//! Poison by userfaultfd: a page of this process's own memory that the kernel takes for bad (UFFDIO_POISON, Linux 6.6).
//!
//! It needs no privileges and no CONFIG_MEMORY_FAILURE. Nothing is signalled until somebody touches the page; then the
//! kernel raises the same AR as for memory that really went bad. A kernel without CONFIG_MEMORY_FAILURE raises a SIGBUS
//! with BUS_ADRERR there; system calls answer EFAULT or EHWPOISON in either case.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::mapping::advise;

// include/uapi/linux/userfaultfd.h
const UFFDIO: u32 = 0xaa;
const UFFD_API: u64 = 0xaa;
/// The kernel's own faults are not handled, and so an unprivileged user may have it.
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
/// UFFDIO_POISON (Linux 6.6).
pub const UFFD_FEATURE_POISON: u64 = 1 << 14;
/// Pages that are missing.
pub const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
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

fn span(range: &Range<u64>) -> Span {
    Span { start: range.start, len: range.end - range.start }
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
    /// One that can poison.
    ///
    /// # Errors
    /// This kernel, or its seccomp filter, does not let this process have one.
    pub fn open() -> io::Result<Self> {
        Self::with_features(UFFD_FEATURE_POISON)
    }

    /// One that can do what `features` say.
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
        uffd.ioctl(UFFDIO_API, &mut Api { api: UFFD_API, features, ioctls: 0 })?;
        Ok(uffd)
    }

    /// Puts `range` into the care of this userfaultfd.
    ///
    /// # Errors
    /// A userfaultfd cannot have the care of that memory.
    pub fn register(&self, range: &Range<u64>, mode: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_REGISTER, &mut Register { range: span(range), mode, ioctls: 0 })
    }

    /// Takes `range` out of its care. What was marked stays marked.
    ///
    /// # Errors
    /// It was not in its care.
    pub fn unregister(&self, range: &Range<u64>) -> io::Result<()> {
        self.ioctl(UFFDIO_UNREGISTER, &mut span(range))
    }

    /// Marks the empty page of `len` bytes at `hva`, in a range that is registered, as bad.
    ///
    /// # Errors
    /// EEXIST where there is a page.
    pub fn mark(&self, hva: u64, len: u64) -> io::Result<()> {
        let range = span(&(hva..hva + len));
        self.ioctl(UFFDIO_POISON, &mut Poison { range, mode: 0, updated: 0 })
    }

    /// Marks the page of `len` bytes at `hva`, which is this process's, as bad. What an anonymous page held is gone.
    ///
    /// Until it is marked the page is missing, and a guest that touched it then would not survive: hold the vCPUs
    /// meanwhile.
    ///
    /// # Errors
    /// The kernel does not do it; the page is as it was, or empty.
    pub fn poison(&self, hva: u64, len: u64) -> io::Result<()> {
        let range = hva..hva + len;
        self.register(&range, UFFDIO_REGISTER_MODE_MISSING)?;
        let done = loop {
            // Only an empty page can be marked. Of locked memory it is another call (Linux 5.18).
            let emptied = advise(hva, len, libc::MADV_DONTNEED)
                .or_else(|_| advise(hva, len, MADV_DONTNEED_LOCKED));
            match emptied.and_then(|()| self.mark(hva, len)) {
                // Somebody has touched it in between.
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
                done => break done,
            }
        };
        let left = self.unregister(&range);
        done.and(left)
    }

    fn ioctl<T>(&self, request: libc::Ioctl, arg: &mut T) -> io::Result<()> {
        // SAFETY: each request reads, and writes, one struct of the type that it is made of (see the constants).
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, std::ptr::from_mut(arg)) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
