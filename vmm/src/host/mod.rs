//! What the host kernel says of a physical page, and how it is told to poison one.
//!
//! All of it is root's: page frame numbers are hidden from everybody else.

pub mod accounts;
pub mod filter;
pub mod flags;
pub mod memcg;
pub mod pagemap;
mod unpoison;
pub mod x86_injector;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

pub use pagemap::Pagemap;
pub use unpoison::{UnpoisonError, unpoison};

/// Where hwpoison-inject takes page frame numbers.
pub const CORRUPT_PFN: &str = "/sys/kernel/debug/hwpoison/corrupt-pfn";
/// Where it takes those of pages to be healed.
pub const UNPOISON_PFN: &str = "/sys/kernel/debug/hwpoison/unpoison-pfn";
/// There only in kernels with CONFIG_MEMORY_FAILURE.
pub const EARLY_KILL_SYSCTL: &str = "/proc/sys/vm/memory_failure_early_kill";

const PAGE_SHIFT: u32 = 12;

/// Why the host could not be asked, or told.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A file of the kernel could not be used.
    #[error("cannot {what} {path}; {mend}", path = .path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What to do about it.
        mend: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The kernel does not tell page frame numbers to this user.
    #[error("the kernel hides page frame numbers from this user; run it as root (CAP_SYS_ADMIN)")]
    Hidden,
    /// There is no memory behind the address yet.
    #[error("there is no memory behind HVA {hva:#x} yet; the guest has to write to the page first")]
    Absent {
        /// The address in the VMM.
        hva: u64,
    },
    /// A host that a machine check by software would be the end of.
    #[error(
        "mce-inject is for processors of AMD's make (AuthenticAMD, HygonGenuine), and this host's are {vendor}: \
         their machine checks go to all of them, and the kernel would wait for the others and panic; \
         use --via hwpoison-inject"
    )]
    Processor {
        /// As /proc/cpuinfo has it.
        vendor: String,
    },
    /// There is no such page frame.
    #[error("this host has no page frame {pfn:#x}")]
    NoFrame {
        /// Its number.
        pfn: u64,
    },
    /// The page is bad already, or swapped out.
    #[error("it is bad already, or swapped out: nothing is mapped at HVA {hva:#x}")]
    NotMapped {
        /// The address in the VMM.
        hva: u64,
    },
}

fn file_error(
    what: &'static str,
    path: &Path,
    mend: &'static str,
) -> impl FnOnce(io::Error) -> HostError {
    let path = path.to_owned();
    move |source| HostError::File { what, path, mend, source }
}

/// A file of the kernel with eight bytes for each page.
#[derive(Debug)]
struct Table {
    file: File,
    path: PathBuf,
    mend: &'static str,
}

impl Table {
    fn open(path: PathBuf, mend: &'static str) -> Result<Self, HostError> {
        let file = File::open(&path).map_err(file_error("open", &path, mend))?;
        Ok(Self { file, path, mend })
    }

    fn read(&self, index: u64) -> Result<u64, HostError> {
        let mut entry = [0; 8];
        // What is beyond the end of a file cannot be read from it, and neither can what no file holds.
        let offset = index.saturating_mul(8);
        self.file
            .read_exact_at(&mut entry, offset)
            .map_err(file_error("read", &self.path, self.mend))?;
        Ok(u64::from_ne_bytes(entry))
    }

    /// The same of a file of page frames, which ends with the last.
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

/// What the host says of its page frames.
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

/// The page frame number behind host virtual address `hva` of process `pid`.
///
/// # Errors
/// There is no such process or page, or it is not shown to this user.
pub fn pfn(pid: u32, hva: u64) -> Result<u64, HostError> {
    Pagemap::open(pid)?.pfn(hva)
}

/// Whether the host has marked page frame `pfn` as poisoned.
///
/// # Errors
/// /proc/kpageflags cannot be read.
pub fn is_poisoned(pfn: u64) -> Result<bool, HostError> {
    PageFlags::open()?.is_poisoned(pfn)
}

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
    /// with [`PageFlags::is_poisoned`] afterwards.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn corrupt(&self, pfn: u64) -> Result<(), HostError> {
        self.0.write(pfn)
    }
}

/// A file of hwpoison-inject that takes page frame numbers.
#[derive(Debug)]
struct PfnFile {
    file: File,
    path: &'static Path,
}

impl PfnFile {
    fn open(path: &'static str) -> Result<Self, HostError> {
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

    fn put(&self, pfn: u64) -> io::Result<()> {
        // Each number in one write of its own, whatever the file's offset: see `simple_attr_write`
        // in fs/libfs.c.
        (&self.file).write_all(format!("{pfn:#x}").as_bytes())
    }
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
