//! Why the host's kernel could not be asked or told something.

use std::io::{self};
use std::path::{Path, PathBuf};

/// Why the host's kernel could not be asked or told something.
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
    /// A host that would not survive a machine check by software.
    #[error(
        "mce-inject is for processors of AMD's make (AuthenticAMD, HygonGenuine), and this host's are {vendor}: \
         their machine checks go to all of them, and the kernel would wait for the others and panic; \
         use --via hwpoison-inject, or --via einj where the firmware has it"
    )]
    Processor {
        /// As /proc/cpuinfo has it.
        vendor: String,
    },
    /// Firmware that injects no errors of memory.
    #[error(
        "this host's firmware injects no \"Memory Uncorrectable non-fatal\" errors ({} has those that it does); \
         use --via hwpoison-inject", path.display()
    )]
    ErrorTypes {
        /// The file that lists them.
        path: PathBuf,
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

/// The error of a file: `what` was tried with it, and `mend` says what to do.
pub fn file_error(
    what: &'static str,
    path: &Path,
    mend: &'static str,
) -> impl FnOnce(io::Error) -> HostError {
    let path = path.to_owned();
    move |source| HostError::File { what, path, mend, source }
}
