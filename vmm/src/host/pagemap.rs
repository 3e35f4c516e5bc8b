//! A process's page table, as /proc/PID/pagemap shows it: what is behind its virtual addresses.
//!
//! The crate procfs decodes the entries. They are read here by pread, as the filter of a VMM's threads allows nothing
//! else, and as several threads use one file.

use std::borrow::Borrow;
use std::fs::File;
use std::io::{self};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use procfs::process::{MemoryPageFlags, PageInfo};

use super::error::HostError;
use super::page_frames::{PAGE_SHIFT, Table};

/// Bytes of an entry.
const ENTRY: u64 = 8;
/// Entries that are read at once.
const BATCH: u64 = 8192;

/// What a process has at a page of its address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Memory.
    Present {
        /// The page frame number; `None` where this user is not shown it.
        pfn: Option<u64>,
        /// No other mapping of it exists. The kernel does not set this for the zero page.
        exclusive: bool,
    },
    /// Not in memory: the page is swapped out, marked by userfaultfd, or bad.
    Elsewhere {
        /// Offset on the swap device; of a bad page its frame number (`make_hwpoison_entry` in
        /// `include/linux/swapops.h`). `None` for a mark of userfaultfd, or where this user is not shown it.
        offset: Option<u64>,
    },
    /// Nothing; also a bad page of hugetlb before Linux 6.7.
    Empty,
}

impl From<u64> for Entry {
    fn from(entry: u64) -> Self {
        let known = |number: u64| Some(number).filter(|number| *number != 0);
        match PageInfo::parse_info(entry) {
            PageInfo::MemoryPage(flags) if flags.contains(MemoryPageFlags::PRESENT) => {
                Self::Present {
                    pfn: known(flags.get_page_frame_number().0),
                    exclusive: flags.contains(MemoryPageFlags::MMAP_EXCLUSIVE),
                }
            }
            PageInfo::MemoryPage(_) => Self::Empty,
            PageInfo::SwapPage(flags) => Self::Elsewhere { offset: known(flags.get_swap_offset()) },
        }
    }
}

/// The page table of a process, read one entry at a time, so each value is current.
#[derive(Debug)]
pub struct Pagemap(Table);

impl Pagemap {
    /// The page table of process `pid`.
    ///
    /// # Errors
    /// There is no such process, or it is not shown to this user.
    pub fn open(pid: u32) -> Result<Self, HostError> {
        Table::open(path(pid), "run it as root, on the host that runs the VM").map(Self)
    }

    /// What is at host virtual address `hva`.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn entry(&self, hva: u64) -> Result<Entry, HostError> {
        Ok(self.0.read(hva >> PAGE_SHIFT)?.into())
    }

    /// The page frame number behind host virtual address `hva`.
    ///
    /// # Errors
    /// There is no such page, or it is not shown to this user.
    pub fn pfn(&self, hva: u64) -> Result<u64, HostError> {
        match self.entry(hva)? {
            Entry::Present { pfn, .. } => pfn.ok_or(HostError::Hidden),
            Entry::Elsewhere { .. } => Err(HostError::NotMapped { hva }),
            Entry::Empty => Err(HostError::Absent { hva }),
        }
    }
}

/// The page table of a process, read many entries at a time, so a value may be a moment old.
#[derive(Debug)]
pub struct Entries<F = File> {
    file: F,
    /// The entries that were read last, and the page number of the first.
    read: Vec<u8>,
    first: u64,
}

impl Entries {
    /// The entries of process `pid`.
    ///
    /// # Errors
    /// There is no such process, or it is not shown to this user.
    pub fn open(pid: u32) -> io::Result<Self> {
        File::open(path(pid)).map(Self::of)
    }
}

impl<F: Borrow<File>> Entries<F> {
    /// The entries in `file`, an open /proc/PID/pagemap.
    pub fn of(file: F) -> Self {
        Self { file, read: Vec::new(), first: 0 }
    }

    /// The entry of host virtual address `hva`; entries behind it are read along.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn at(&mut self, hva: u64) -> io::Result<Entry> {
        let page = hva >> PAGE_SHIFT;
        let known = self.first..self.first + self.read.len() as u64 / ENTRY;
        if !known.contains(&page) {
            self.read.resize(usize::try_from(BATCH * ENTRY).map_err(io::Error::other)?, 0);
            let read = self.file.borrow().read_at(&mut self.read, page * ENTRY)?;
            self.read.truncate(read);
            self.first = page;
        }
        let (entries, _) = self.read.as_chunks::<8>();
        let entry = usize::try_from(page - self.first).ok().and_then(|at| entries.get(at));
        let entry = entry.ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(u64::from_ne_bytes(*entry).into())
    }
}

fn path(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/pagemap"))
}

/// The page frame number behind host virtual address `hva` of process `pid`.
///
/// # Errors
/// There is no such process or page, or it is not shown to this user.
pub fn pfn(pid: u32, hva: u64) -> Result<u64, HostError> {
    Pagemap::open(pid)?.pfn(hva)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Documentation/admin-guide/mm/pagemap.rst
    const PRESENT: u64 = 1 << 63;
    const SWAP: u64 = 1 << 62;
    const EXCLUSIVE: u64 = 1 << 56;
    const SOFT_DIRTY: u64 = 1 << 55;

    #[test]
    fn entries() {
        let present = |pfn, exclusive| Entry::Present { pfn, exclusive };
        for (raw, meant) in [
            (0, Entry::Empty),
            (SOFT_DIRTY, Entry::Empty),
            (PRESENT | SOFT_DIRTY | 0x10_b7aa, present(Some(0x10_b7aa), false)),
            (PRESENT | EXCLUSIVE | 0x10_b7aa, present(Some(0x10_b7aa), true)),
            (PRESENT | EXCLUSIVE, present(None, true)),
            (SWAP | SOFT_DIRTY | 0x42 << 5 | 27, Entry::Elsewhere { offset: Some(0x42) }),
            (SWAP | 31, Entry::Elsewhere { offset: None }),
            (SWAP, Entry::Elsewhere { offset: None }),
        ] {
            assert_eq!(Entry::from(raw), meant, "{raw:#x}");
        }
    }

    #[test]
    fn ones_own() {
        let me = std::process::id();
        let memory = Box::new([1_u8; 3 * 4096]);
        let inside = memory.as_ptr() as u64 + 4096;
        let (pagemap, mut entries) = (Pagemap::open(me).unwrap(), Entries::open(me).unwrap());
        for entry in [pagemap.entry(inside).unwrap(), entries.at(inside).unwrap()] {
            assert!(matches!(entry, Entry::Present { .. }), "{entry:?}");
        }
        assert_eq!(entries.at(0x1000).unwrap(), Entry::Empty);
        assert!(matches!(pagemap.pfn(0x1000), Err(HostError::Absent { hva: 0x1000 })));
        // The end of what a process can have.
        assert!(entries.at(1 << 62).is_err());
    }

    #[test]
    fn a_process_that_is_not_there_is_named() {
        let error = Pagemap::open(u32::MAX).unwrap_err().to_string();
        assert!(error.contains("/proc/4294967295/pagemap"), "{error}");
    }
}
