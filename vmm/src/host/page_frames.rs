//! The host's page frames: their flags, and how often they are mapped.

use std::fs::File;
use std::io::{self};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crate::host::error::{HostError, file_error};
use crate::host::flags;

pub(crate) const PAGE_SHIFT: u32 = 12;

/// A file of the kernel with eight bytes for each page.
#[derive(Debug)]
pub(crate) struct Table {
    file: File,
    path: PathBuf,
    mend: &'static str,
}

impl Table {
    pub(crate) fn open(path: PathBuf, mend: &'static str) -> Result<Self, HostError> {
        let file = File::open(&path).map_err(file_error("open", &path, mend))?;
        Ok(Self { file, path, mend })
    }

    pub(crate) fn read(&self, index: u64) -> Result<u64, HostError> {
        let mut entry = [0; 8];
        // An offset beyond any file's end fails like one beyond this file's.
        let offset = index.saturating_mul(8);
        self.file
            .read_exact_at(&mut entry, offset)
            .map_err(file_error("read", &self.path, self.mend))?;
        Ok(u64::from_ne_bytes(entry))
    }

    /// The same in a file of page frames, which ends with the last frame.
    fn of_frame(&self, pfn: u64) -> Result<u64, HostError> {
        self.read(pfn).map_err(|error| match error {
            HostError::File { source, .. }
                if matches!(
                    source.kind(),
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput
                ) =>
            {
                HostError::NoFrame { pfn }
            }
            error => error,
        })
    }
}

/// Flags of the host's page frames.
#[derive(Debug)]
pub struct PageFlags(Table);

impl PageFlags {
    /// Opens /proc/kpageflags.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open() -> Result<Self, HostError> {
        let mend = "run it as root on a kernel with CONFIG_PROC_PAGE_MONITOR";
        Table::open("/proc/kpageflags".into(), mend).map(Self)
    }

    /// Whether the host has marked page frame `pfn` as poisoned.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn is_poisoned(&self, pfn: u64) -> Result<bool, HostError> {
        Ok(self.get(pfn)? & flags::HWPOISON != 0)
    }

    /// The flags of page frame `pfn`; [`flags`] has their names.
    ///
    /// # Errors
    /// There is no such page frame, or they cannot be read.
    pub fn get(&self, pfn: u64) -> Result<u64, HostError> {
        self.0.of_frame(pfn)
    }
}

/// How often the host's page frames are mapped.
#[derive(Debug)]
pub struct PageCounts(Table);

impl PageCounts {
    /// Opens /proc/kpagecount.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open() -> Result<Self, HostError> {
        let mend = "run it as root on a kernel with CONFIG_PROC_PAGE_MONITOR";
        Table::open("/proc/kpagecount".into(), mend).map(Self)
    }

    /// How often page frame `pfn` is mapped.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn get(&self, pfn: u64) -> Result<u64, HostError> {
        self.0.of_frame(pfn)
    }
}

/// Whether the host has marked page frame `pfn` as poisoned.
///
/// # Errors
/// /proc/kpageflags cannot be read.
pub fn is_poisoned(pfn: u64) -> Result<bool, HostError> {
    PageFlags::open()?.is_poisoned(pfn)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_frame_that_is_none_is_called_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kpageflags");
        std::fs::write(&path, 7_u64.to_ne_bytes()).unwrap();
        let flags = PageFlags(Table::open(path, "no").unwrap());
        assert_eq!(flags.get(0).unwrap(), 7);
        for pfn in [1, 0xffff_ffff_ffff, u64::MAX] {
            let words = flags.get(pfn).unwrap_err().to_string();
            assert_eq!(words, format!("this host has no page frame {pfn:#x}"));
        }
    }
}
