//! The outcome of poisoning pages.

use std::time::Duration;

use mce_relay_vmm::api::types::means::Means;
use serde::Serialize;

use crate::client::error::ClientError;
use crate::poison::asked::Until;
use crate::poison::error::PoisonError;
use crate::poison::target::PAGE_SHIFT;

/// What was done to one page, or would be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Poisoned {
    /// Guest-physical address of the page.
    #[serde(with = "mce_relay::hex")]
    pub gpa: u64,
    /// Host virtual address of the page in the VMM.
    #[serde(with = "mce_relay::hex")]
    pub hva: u64,
    /// The host's page frame number, where it is known to this user.
    #[serde(with = "mce_relay::hex_option")]
    pub pfn: Option<u64>,
    /// The means.
    pub via: Means,
    /// The signal is forged, and does nothing to the page; `was_bad` says whether the page is whole.
    pub forged: bool,
    /// Whether the page was really bad before; `null` where that is not known.
    pub was_bad: Option<bool>,
    /// How often the page frame is mapped on this host, where that is known.
    pub mapped: Option<u64>,
    /// Bytes that are lost with the page: all of a huge page of hugetlb.
    pub extent: u64,
    /// Some of these bytes are in the range where the guest's kernel was loaded.
    pub guest_kernel: bool,
    /// An earlier page of the request in the same huge page, with which this one is lost.
    #[serde(with = "mce_relay::hex_option")]
    pub goes_with: Option<u64>,
    /// The page frame that it moved to (soft offline).
    #[serde(with = "mce_relay::hex_option")]
    pub moved_to: Option<u64>,
    /// Nothing was done (--dry-run).
    pub dry_run: bool,
}

impl Poisoned {
    /// A page of 4 KiB of which nothing else is known.
    #[must_use]
    pub fn new(gpa: u64, hva: u64, via: Means) -> Self {
        let forged = via == Means::Signal;
        Self {
            gpa,
            hva,
            pfn: None,
            via,
            forged,
            was_bad: None,
            mapped: None,
            extent: 1 << PAGE_SHIFT,
            guest_kernel: false,
            goes_with: None,
            moved_to: None,
            dry_run: false,
        }
    }

    /// What was done, in a word or two.
    #[must_use]
    pub fn done(&self) -> &'static str {
        match (self.via, self.was_bad) {
            (Means::Signal, Some(true)) => "FORGED signal (the page is really bad already)",
            (Means::Signal, None) => "FORGED signal (nothing is done to the page)",
            (via, _) => via.done(),
        }
    }
}

impl std::fmt::Display for Poisoned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { gpa, hva, pfn, via, goes_with, moved_to, dry_run, .. } = self;
        f.write_str(if *dry_run { "would be " } else { "" })?;
        f.write_str(self.done())?;
        write!(f, ": GPA {gpa:#x} = HVA {hva:#x} of the VMM")?;
        if let Some(pfn) = pfn {
            write!(f, " = host pfn {pfn:#x}")?;
        }
        write!(f, ", via {via}")?;
        if let Some(first) = goes_with {
            write!(f, ", with GPA {first:#x}")?;
        }
        match moved_to {
            Some(to) => write!(f, ", moved to host pfn {to:#x}"),
            None => Ok(()),
        }
    }
}

/// A page that could not be poisoned.
#[derive(Debug)]
pub struct NotPoisoned {
    /// Guest-physical address of the page.
    pub gpa: u64,
    /// Why.
    pub error: PoisonError,
}

/// The outcome for a list of pages.
#[derive(Debug)]
pub struct Burst {
    /// The pages that were poisoned, in the order asked for. Where a means marks page frames, the mark was seen.
    pub poisoned: Vec<Poisoned>,
    /// The others.
    pub failed: Vec<NotPoisoned>,
    /// How long poisoning took, without the checks before and after.
    pub took: Duration,
    /// Notes for the user.
    pub notes: Vec<String>,
    /// The signal that ended it before all pages were tried.
    pub interrupted: Option<u8>,
    /// Set if the VM ended before all pages were tried: how.
    pub ended: Option<ClientError>,
}

impl Burst {
    /// Adds the signal that came, or the VM's end, if there was work left then.
    pub(crate) fn cut(self, until: &Until<'_>) -> Self {
        let any = |is: fn(&PoisonError) -> bool| self.failed.iter().any(|page| is(&page.error));
        let by_signal = any(|error| matches!(error, PoisonError::Interrupted));
        let by_end = any(|error| matches!(error, PoisonError::Ended));
        let interrupted = until.interrupted.signal().filter(|_| by_signal);
        Self { interrupted, ended: by_end.then(|| until.life.ended()), ..self }
    }
}
