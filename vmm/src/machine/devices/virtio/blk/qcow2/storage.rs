//! The file of a qcow2 image, as imago uses it.

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;

/// It differs from imago's own in one thing: a read that ends before what the file is known to have fails. imago's gives
/// zeros for what is behind the end, so that of an image that is cut short under a guest the guest would read zeros, and
/// believe them.
#[derive(Debug)]
pub struct ImageFile {
    inner: imago::file::File,
    /// The same open file.
    file: File,
}

impl ImageFile {
    /// The image in `file`.
    ///
    /// # Errors
    /// It has no length, or there are no more file descriptors.
    pub fn new(file: File) -> io::Result<Self> {
        let inner = imago::file::File::try_from(file.try_clone()?)?;
        Ok(Self { inner, file })
    }
}

impl fmt::Display for ImageFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl Storage for ImageFile {
    fn mem_align(&self) -> usize {
        self.inner.mem_align()
    }

    fn req_align(&self) -> usize {
        self.inner.req_align()
    }

    fn zero_align(&self) -> usize {
        self.inner.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.inner.discard_align()
    }

    fn size(&self) -> io::Result<u64> {
        self.inner.size()
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let end = offset.saturating_add(bufv.len()).min(self.inner.size()?);
        // SAFETY: what the caller owes is the same.
        unsafe { self.inner.pure_readv(bufv, offset)? };
        // Nothing reads or writes at the file's position.
        let len = (&self.file).seek(SeekFrom::End(0))?;
        if len < end {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: what the caller owes is the same.
        unsafe { self.inner.pure_writev(bufv, offset) }
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: what the caller owes is the same.
        unsafe { self.inner.pure_write_zeroes(offset, length) }
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: what the caller owes is the same.
        unsafe { self.inner.pure_write_allocated_zeroes(offset, length) }
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: what the caller owes is the same.
        unsafe { self.inner.pure_discard(offset, length) }
    }

    fn flush(&self) -> io::Result<()> {
        self.inner.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn settle_writes(&self) -> io::Result<()> {
        self.inner.settle_writes()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: what the caller owes is the same.
        unsafe { self.inner.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.inner.get_storage_helper()
    }

    fn resize(&self, new_size: u64, prealloc_mode: PreallocateMode) -> io::Result<()> {
        self.inner.resize(new_size, prealloc_mode)
    }
}
