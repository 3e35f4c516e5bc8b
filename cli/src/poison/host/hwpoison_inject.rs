//! The module hwpoison-inject, which takes page frame numbers.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use mce_relay_vmm::host::error::{HostError, file_error};

/// Where hwpoison-inject takes page frame numbers.
pub const CORRUPT_PFN: &str = "/sys/kernel/debug/hwpoison/corrupt-pfn";
/// Where it takes the page frame numbers of pages to be unpoisoned.
pub const UNPOISON_PFN: &str = "/sys/kernel/debug/hwpoison/unpoison-pfn";

/// hwpoison-inject, ready to poison page frames.
#[derive(Debug)]
pub struct Injector(PfnFile);

impl Injector {
    /// Opens its file.
    ///
    /// # Errors
    /// The module is not there, or this user may not use it.
    pub fn open() -> Result<Self, HostError> {
        PfnFile::open(CORRUPT_PFN).map(Self)
    }

    /// Asks it to poison page frame `pfn`. A filter may make the kernel ignore it silently: look
    /// with [`mce_relay_vmm::host::page_frames::PageFlags::is_poisoned`] afterwards.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn corrupt(&self, pfn: u64) -> Result<(), HostError> {
        self.0.write(pfn)
    }
}

/// A file of hwpoison-inject that takes page frame numbers.
#[derive(Debug)]
pub(crate) struct PfnFile {
    file: File,
    path: &'static Path,
}

impl PfnFile {
    pub(crate) fn open(path: &'static str) -> Result<Self, HostError> {
        let path = Path::new(path);
        let mend = "as root: modprobe hwpoison-inject, and mount debugfs at /sys/kernel/debug";
        let file =
            OpenOptions::new().write(true).open(path).map_err(file_error("open", path, mend))?;
        Ok(Self { file, path })
    }

    fn write(&self, pfn: u64) -> Result<(), HostError> {
        let mend = "the kernel refuses this page frame (its log says why)";
        self.put(pfn).map_err(file_error("write to", self.path, mend))
    }

    pub(crate) fn put(&self, pfn: u64) -> io::Result<()> {
        // Each number by one write of its own, at any file offset: see `simple_attr_write` in fs/libfs.c.
        (&self.file).write_all(format!("{pfn:#x}").as_bytes())
    }
}
