//! The request to poison one page, and what ends the work early.

use mce_relay_vmm::host::error::HostError;

use crate::client::life::Life;
use crate::poison::error::PoisonError;
use crate::poison::frame::FrameError;
use crate::poison::interrupted;

/// The result of a request for one page.
pub(crate) struct Asked {
    /// The page frame behind it at that moment.
    pub(super) pfn: Option<u64>,
    /// Whether it was bad before, as the VMM found.
    pub(super) was_bad: Option<bool>,
    /// The kernel's or the VMM's answer.
    pub(super) result: Result<(), PoisonError>,
}

impl Asked {
    pub(crate) fn new(pfn: Option<u64>, result: Result<(), PoisonError>) -> Self {
        Self { pfn, was_bad: None, result }
    }
}

/// The conditions that end the work early.
pub(crate) struct Until<'a> {
    pub(super) life: &'a Life,
    pub(super) interrupted: &'a interrupted::Interrupted,
}

impl Until<'_> {
    /// Why no more pages are tried, if one of them holds.
    pub(crate) fn reached(&self) -> Option<PoisonError> {
        match (self.interrupted.is_set(), self.life.is_over()) {
            (true, _) => Some(PoisonError::Interrupted),
            (_, true) => Some(PoisonError::Ended),
            _ => None,
        }
    }

    /// Whether the VM's end explains the error of a page that was not tried.
    pub(crate) fn is_behind(&self, error: &PoisonError) -> bool {
        // The process's memory goes a moment before the process does.
        let gone =
            |error: &HostError| matches!(error, HostError::Absent { .. } | HostError::File { .. });
        matches!(error, PoisonError::Frame(FrameError::Host(error)) if gone(error))
            && self.life.ends()
    }
}

/// Entries for `count` pages that are not tried any more.
pub(crate) fn untried(why: &PoisonError, count: usize) -> impl Iterator<Item = Asked> {
    let by_end = matches!(why, PoisonError::Ended);
    let error = move |_| if by_end { PoisonError::Ended } else { PoisonError::Interrupted };
    (0..count).map(error).map(|error| Asked::new(None, Err(error)))
}
