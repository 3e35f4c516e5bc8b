//! Takes a page frame that software poisoned back into use.

use std::io;

use mce_relay_vmm::host::error::HostError;
use mce_relay_vmm::host::page_frames::PageFlags;

use super::hwpoison_inject::{PfnFile, UNPOISON_PFN};

/// Why a page frame is not taken back into use.
#[derive(Debug, thiserror::Error)]
pub enum UnpoisonError {
    /// The host cannot be asked or told.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The page frame is not poisoned.
    #[error("page frame {pfn:#x} is not poisoned, so there is nothing to give back")]
    NotPoisoned {
        /// The page frame.
        pfn: u64,
    },
    /// The kernel does not do it any more.
    #[error(
        "page frame {pfn:#x} stays out of use: since this host's boot there was a hardware error of its \
         memory (or one of --via einj, or what mce-inject made the kernel take for one), and from then on the kernel gives \
         nothing back before it is booted again; \"Unpoison\" in its log says more"
    )]
    Hardware {
        /// The page frame.
        pfn: u64,
    },
    /// The page frame is in use.
    #[error(
        "page frame {pfn:#x} stays out of use: somebody still has it mapped, or it is of a kind that the \
         kernel does not give back (slab, page table, reserved); end the VM whose page it was first"
    )]
    Busy {
        /// The page frame.
        pfn: u64,
    },
    /// Another error.
    #[error("page frame {pfn:#x} stays out of use; \"Unpoison\" in the kernel's log may say why")]
    Refused {
        /// The page frame.
        pfn: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel reported success, but the page frame is still marked.
    #[error(
        "the kernel took the request, but page frame {pfn:#x} is still marked as poisoned; \"Unpoison\" in its \
         log says why"
    )]
    StillPoisoned {
        /// The page frame.
        pfn: u64,
    },
}

/// Makes the host take page frame `pfn` back into use, and checks that it did.
///
/// # Errors
/// See [`UnpoisonError`].
pub fn unpoison(pfn: u64) -> Result<(), UnpoisonError> {
    let file = PfnFile::open(UNPOISON_PFN)?;
    let flags = PageFlags::open()?;
    if !flags.is_poisoned(pfn)? {
        return Err(UnpoisonError::NotPoisoned { pfn });
    }
    // `unpoison_memory` in mm/memory-failure.c returns each of these.
    file.put(pfn).map_err(|source| match source.raw_os_error() {
        Some(libc::EOPNOTSUPP) => UnpoisonError::Hardware { pfn },
        Some(libc::EBUSY) => UnpoisonError::Busy { pfn },
        _ => UnpoisonError::Refused { pfn, source },
    })?;
    match flags.is_poisoned(pfn)? {
        true => Err(UnpoisonError::StillPoisoned { pfn }),
        false => Ok(()),
    }
}
