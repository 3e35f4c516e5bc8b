//! A second mapping of guest memory, for devices.

use std::io;
use std::os::fd::RawFd;

/// A mapping of `len` bytes of a file, MAP_SHARED; it goes when this is dropped.
#[derive(Debug)]
pub(super) struct View {
    pub(super) hva: u64,
    pub(super) len: u64,
    pub(super) fd: RawFd,
    pub(super) offset: u64,
}

fn address(hva: u64) -> *mut libc::c_void {
    // A host address fits a pointer.
    std::ptr::with_exposed_provenance_mut(usize::try_from(hva).unwrap_or(0))
}

/// mmap(2) of a whole number of pages; the errno of the thread stays as it is. Async-signal-safe.
fn map(at: u64, len: u64, flags: libc::c_int, fd: RawFd, offset: u64) -> Result<u64, i32> {
    let (Ok(size), Ok(offset)) = (usize::try_from(len), libc::off_t::try_from(offset)) else {
        return Err(libc::EOVERFLOW);
    };
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: __errno_location points to this thread's errno. The mapping is a new one, or (MAP_FIXED) takes the place of
    // a stretch of a view, to which no Rust reference leads: vm-memory reaches it by volatile accesses only.
    unsafe {
        let errno = *libc::__errno_location();
        let mapped = libc::mmap(address(at), size, prot, flags, fd, offset);
        let error = *libc::__errno_location();
        *libc::__errno_location() = errno;
        if mapped == libc::MAP_FAILED { Err(error) } else { Ok(mapped.expose_provenance() as u64) }
    }
}

impl View {
    /// Maps `len` bytes of the file behind `fd` from `offset` on. The file stays open as long as this is.
    ///
    /// # Errors
    /// The kernel does not do it.
    pub(super) fn new(fd: RawFd, offset: u64, len: u64) -> io::Result<Self> {
        let hva = map(0, len, libc::MAP_SHARED | libc::MAP_NORESERVE, fd, offset);
        let hva = hva.map_err(io::Error::from_raw_os_error)?;
        // A dump of the process needs the memory once.
        // SAFETY: advice on the mapping that was just made.
        unsafe {
            libc::madvise(address(hva), usize::try_from(len).unwrap_or(0), libc::MADV_DONTDUMP)
        };
        Ok(Self { hva, len, fd, offset })
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's own, scratch pages included, and its owner has let all slices of it go.
        unsafe { libc::munmap(address(self.hva), usize::try_from(self.len).unwrap_or(0)) };
    }
}

/// Puts zeros that are the view's alone at `hva`. False where the kernel does not do it. Async-signal-safe.
pub(super) fn scratch(hva: u64, len: u64) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    map(hva, len, flags, -1, 0).is_ok()
}

/// Puts what the guest has at `hva` to `view`, and drops whatever the process's page tables say there. `file` is the file,
/// and the offset in it, that the guest's mapping is of, if it still is.
///
/// # Errors
/// The kernel does not do it; what was there stays, or nothing is mapped there.
pub(super) fn restore(hva: u64, view: u64, len: u64, file: Option<(RawFd, u64)>) -> io::Result<()> {
    let size = usize::try_from(len).map_err(io::Error::other)?;
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: an old size of 0 maps the same shared memory once more (mremap(2)), over a stretch of a view, to which no
    // Rust reference leads.
    let mapped = unsafe { libc::mremap(address(hva), 0, size, flags, address(view)) };
    if mapped != libc::MAP_FAILED {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    // hugetlb memory cannot be mapped so.
    let Some((fd, offset)) = file else { return Err(error) };
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED;
    map(view, len, flags, fd, offset).map(drop).map_err(io::Error::from_raw_os_error)
}

/// Forgets what the process's page tables say of the view: the next access asks the file.
pub(super) fn forget(hva: u64, len: u64) {
    // SAFETY: a shared mapping of a file keeps its content, which no Rust reference leads to.
    unsafe { libc::madvise(address(hva), usize::try_from(len).unwrap_or(0), libc::MADV_DONTNEED) };
}
