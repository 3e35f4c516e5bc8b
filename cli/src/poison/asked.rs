//! What was asked of the host or the VMM for one page, and until when.

use mce_relay_vmm::host::error::HostError;

use crate::client::life::Life;
use crate::poison::error::PoisonError;
use crate::poison::frame::FrameError;
use crate::poison::interrupted;

/// One page that was asked for.
pub(crate) struct Asked {
    /// The page frame that was behind it at that moment.
    pub(super) pfn: Option<u64>,
    /// Whether it was bad before, by the VMM's own look.
    pub(super) was_bad: Option<bool>,
    /// What the kernel said.
    pub(super) result: Result<(), PoisonError>,
}

impl Asked {
    pub(crate) fn new(pfn: Option<u64>, result: Result<(), PoisonError>) -> Self {
        Self { pfn, was_bad: None, result }
    }
}

/// What ends the work before all is done.
pub(crate) struct Until<'a> {
    pub(super) life: &'a Life,
    pub(super) interrupted: &'a interrupted::Interrupted,
}

impl Until<'_> {
    /// Why no more pages are tried.
    pub(crate) fn reached(&self) -> Option<PoisonError> {
        match (self.interrupted.is_set(), self.life.is_over()) {
            (true, _) => Some(PoisonError::Interrupted),
            (_, true) => Some(PoisonError::Ended),
            _ => None,
        }
    }

    /// Whether the VM's end is behind the error of a page that was not asked for.
    pub(crate) fn is_behind(&self, error: &PoisonError) -> bool {
        // The memory is gone a moment before the process is.
        let gone =
            |error: &HostError| matches!(error, HostError::Absent { .. } | HostError::File { .. });
        matches!(error, PoisonError::Frame(FrameError::Host(error)) if gone(error))
            && self.life.ends()
    }
}

/// So many pages that are not tried any more.
pub(crate) fn untried(why: &PoisonError, count: usize) -> impl Iterator<Item = Asked> {
    let by_end = matches!(why, PoisonError::Ended);
    let error = move |_| if by_end { PoisonError::Ended } else { PoisonError::Interrupted };
    (0..count).map(error).map(|error| Asked::new(None, Err(error)))
}
