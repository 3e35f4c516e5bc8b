//! Why pages are not poisoned.

use std::io;
use std::path::PathBuf;

use mce_relay_vmm::host::error::HostError;
use mce_relay_vmm::host::memory_failure;
use mce_relay_vmm::words::counted;

use crate::client::error::ClientError;
use crate::poison::frame::FrameError;
use crate::poison::host::filter::FilterError;
use crate::poison::host::memcg::{MemcgError, NoMemcg};

/// Why a page was not poisoned.
#[derive(Debug, thiserror::Error)]
pub enum PoisonError {
    /// The VM does not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The host's kernel cannot be asked or told.
    #[error(transparent)]
    Host(#[from] HostError),
    /// There is no page of the host behind the address, or it must not be poisoned.
    #[error("GPA {gpa:#x}{}", other_pages(.others))]
    Page {
        /// Guest-physical address of the page.
        gpa: u64,
        /// How many other pages that were asked for cannot be poisoned, either.
        others: usize,
        /// The cause.
        #[source]
        source: FrameError,
    },
    /// The page frame cannot be poisoned.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The page is bad already, so nothing is done.
    #[error("GPA {gpa:#x} is bad already{}; nothing was done", other_pages(.others))]
    AlreadyBad {
        /// Guest-physical address of the page.
        gpa: u64,
        /// How many other pages of the request are bad already, too.
        others: usize,
    },
    /// The VM's memory cgroup cannot be found out.
    #[error(transparent)]
    Memcg(#[from] MemcgError),
    /// No filter would keep the kernel from poisoning another process's page.
    #[error(
        "{why}, so nothing keeps a page frame safe that becomes somebody else's between the look at it and the \
         poison; start the VM in a memory cgroup of its own (systemd-run --scope mce-relay run …), or take the \
         risk with --force"
    )]
    Unprotected {
        /// Why there is no filter.
        why: NoMemcg,
    },
    /// The kernel cannot poison memory.
    #[error(
        "this host's kernel has no memory failure handling (CONFIG_MEMORY_FAILURE: {path} is missing); \
         boot one that has it, or use the lab (make lab)",
        path = memory_failure::EARLY_KILL_SYSCTL
    )]
    NoMemoryFailure,
    /// The address is not RAM of that guest.
    #[error("GPA {gpa:#x} is not guest RAM; this guest has {ram}")]
    OutsideRam {
        /// The address asked for.
        gpa: u64,
        /// The ranges of guest RAM.
        ram: String,
    },
    /// hwpoison-inject's filters cannot be used.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The VM has not that many pages that could go bad.
    #[error(
        "{} asked for at random, and this guest has {there} that have memory of its own and are whole, at most one of \
         them in each huge page",
        pages(.wanted)
    )]
    TooFew {
        /// How many were asked for.
        wanted: usize,
        /// How many there are.
        there: usize,
    },
    /// The VMM was asked and refused.
    #[error("{0}")]
    Vmm(String),
    /// It is part of a huge page, of which another page was to be poisoned.
    #[error("it would have gone with GPA {first:#x}, which was not poisoned")]
    NotWith {
        /// Guest-physical address of that page.
        first: u64,
    },
    /// The user interrupted the command.
    #[error("interrupted before this page was reached; it is as it was")]
    Interrupted,
    /// The VMM ended while it was asked.
    #[error("the VM ended before it said whether this was done")]
    NotKnown,
    /// The VM has ended.
    #[error("the VM had ended before this page was reached")]
    Ended,
    /// A page that was to move did not.
    #[error("the kernel took the request, but the page is where it was (page frame {pfn:#x})")]
    NotMoved {
        /// The page frame.
        pfn: u64,
    },
    /// The VMM's memory cannot be opened.
    #[error("cannot open the VM's memory {path}; run it as root", path = .path.display())]
    Memory {
        /// The path in /proc.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The page cannot be mapped here.
    #[error("cannot map the page at offset {offset:#x} of the VM's memory")]
    Map {
        /// Offset in the VM's memory file.
        offset: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// madvise was refused.
    #[error("madvise was refused; it needs root (CAP_SYS_ADMIN) and CONFIG_MEMORY_FAILURE")]
    Madvise(#[source] io::Error),
    /// The kernel accepted the request without effect.
    #[error(
        "the kernel took the request, but page frame {pfn:#x} is not marked as poisoned; \
         a hwpoison filter may hold it back (/sys/kernel/debug/hwpoison/corrupt-filter-*), and its log says more"
    )]
    NotDone {
        /// The page frame.
        pfn: u64,
    },
    /// The kernel returned an error after it had marked the page.
    #[error(
        "page frame {pfn:#x} is marked as poisoned, but the kernel could not handle its failure, \
         so the VM may not have been told"
    )]
    MarkedOnly {
        /// The page frame.
        pfn: u64,
        /// What the kernel said.
        #[source]
        source: Box<PoisonError>,
    },
}

fn other_pages(others: &usize) -> String {
    match others {
        0 => String::new(),
        1 => " (and one other page)".to_owned(),
        others => format!(" (and {others} other pages)"),
    }
}

fn pages(count: &usize) -> String {
    counted(*count as u64, "page")
}
