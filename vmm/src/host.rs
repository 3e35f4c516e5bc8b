//! What the host kernel says of a physical page, and how it is told to poison one.
//!
//! All of it is root's: page frame numbers are hidden from everybody else.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Where hwpoison-inject takes page frame numbers.
pub const CORRUPT_PFN: &str = "/sys/kernel/debug/hwpoison/corrupt-pfn";
/// Where it takes those of pages to be healed.
pub const UNPOISON_PFN: &str = "/sys/kernel/debug/hwpoison/unpoison-pfn";
/// There only in kernels with CONFIG_MEMORY_FAILURE.
pub const EARLY_KILL_SYSCTL: &str = "/proc/sys/vm/memory_failure_early_kill";

const PAGE_SHIFT: u32 = 12;
// Documentation/admin-guide/mm/pagemap.rst
const PM_PRESENT: u64 = 1 << 63;
const PM_SWAP: u64 = 1 << 62;
const PM_PFN: u64 = (1 << 55) - 1;
// include/uapi/linux/kernel-page-flags.h
const KPF_HWPOISON: u64 = 1 << 19;

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
    /// The page is bad already, or swapped out.
    #[error("the page at HVA {hva:#x} is not mapped: it is poisoned already, or swapped out")]
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

fn read_u64(path: &Path, index: u64, mend: &'static str) -> Result<u64, HostError> {
    let file = File::open(path).map_err(file_error("open", path, mend))?;
    let mut entry = [0; 8];
    file.read_exact_at(&mut entry, index * 8).map_err(file_error("read", path, mend))?;
    Ok(u64::from_ne_bytes(entry))
}

/// The page frame number behind host virtual address `hva` of process `pid`.
///
/// # Errors
/// There is no such process or page, or it is not shown to this user.
pub fn pfn(pid: u32, hva: u64) -> Result<u64, HostError> {
    let path = PathBuf::from(format!("/proc/{pid}/pagemap"));
    let mend = "run it as root, on the host that runs the VM";
    let entry = read_u64(&path, hva >> PAGE_SHIFT, mend)?;
    match entry & PM_PFN {
        _ if entry & PM_PRESENT == 0 && entry & PM_SWAP != 0 => Err(HostError::NotMapped { hva }),
        _ if entry & PM_PRESENT == 0 => Err(HostError::Absent { hva }),
        0 => Err(HostError::Hidden),
        pfn => Ok(pfn),
    }
}

/// Whether the host has marked page frame `pfn` as poisoned.
///
/// # Errors
/// /proc/kpageflags cannot be read.
pub fn is_poisoned(pfn: u64) -> Result<bool, HostError> {
    let path = Path::new("/proc/kpageflags");
    let mend = "run it as root on a kernel with CONFIG_PROC_PAGE_MONITOR";
    Ok(read_u64(path, pfn, mend)? & KPF_HWPOISON != 0)
}

/// Asks hwpoison-inject to poison page frame `pfn`. A filter may make the kernel ignore it
/// silently: look with [`is_poisoned`] afterwards.
///
/// # Errors
/// The module is not there, or the kernel refuses.
pub fn corrupt(pfn: u64) -> Result<(), HostError> {
    write_pfn(CORRUPT_PFN, pfn)
}

/// Asks hwpoison-inject to heal page frame `pfn`.
///
/// # Errors
/// The module is not there, or the kernel refuses: it does so from the first real hardware error on.
pub fn unpoison(pfn: u64) -> Result<(), HostError> {
    write_pfn(UNPOISON_PFN, pfn)
}

fn write_pfn(path: &str, pfn: u64) -> Result<(), HostError> {
    let path = Path::new(path);
    let mend = "as root: modprobe hwpoison-inject, and mount debugfs at /sys/kernel/debug";
    let mut file =
        OpenOptions::new().write(true).open(path).map_err(file_error("open", path, mend))?;
    let mend = "the kernel refuses this page frame (its log says why)";
    file.write_all(format!("{pfn:#x}").as_bytes()).map_err(file_error("write to", path, mend))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_was_never_written_is_absent() {
        let path = "/proc/self/pagemap";
        if File::open(path).is_err() {
            println!("skipped: no {path}");
            return;
        }
        assert!(matches!(pfn(std::process::id(), 0x1000), Err(HostError::Absent { hva: 0x1000 })));
    }

    #[test]
    fn a_process_that_is_not_there_is_named() {
        let error = pfn(u32::MAX, 0).unwrap_err().to_string();
        assert!(error.contains("/proc/4294967295/pagemap"), "{error}");
    }
}
