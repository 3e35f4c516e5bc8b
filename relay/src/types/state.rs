//! What is known of a page: how it was found, what became of it, where its record lies.

use super::reason::{UndeliverableReason, WaitReason};

/// The form of record by which a guest is told of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Form {
    /// Intel: software-recoverable, action optional, by machine check.
    #[cfg_attr(feature = "serde", serde(rename = "SRAO"))]
    Srao,
    /// Intel: software-recoverable, action required, by machine check.
    #[cfg_attr(feature = "serde", serde(rename = "SRAR"))]
    Srar,
    /// AMD: deferred error, logged in a bank and found by the guest's poll.
    #[cfg_attr(feature = "serde", serde(rename = "deferred"))]
    Deferred,
    /// AMD: consumed poison, contained by SUCCOR, by machine check.
    #[cfg_attr(feature = "serde", serde(rename = "AMD-AR"))]
    AmdAr,
}

impl Form {
    /// Whether it raises a machine check; a deferred record does not.
    pub fn raises_mc(self) -> bool {
        !matches!(self, Self::Deferred)
    }
}

impl std::fmt::Display for Form {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Srao => "SRAO",
            Self::Srar => "SRAR",
            Self::Deferred => "deferred",
            Self::AmdAr => "AMD AR",
        })
    }
}

/// How the relay found out about a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum FoundBy {
    /// The kernel signalled it.
    Signal,
    /// No signal named it: it was found by looking at the page tables.
    Scan,
    /// The VMM's own read or write failed ([`crate::Handle::read`]).
    Access,
    /// A forged signal ([`crate::Handle::forge`]): the page is whole.
    Forged,
}

impl std::fmt::Display for FoundBy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Signal => "signal",
            Self::Scan => "scan",
            Self::Access => "access",
            Self::Forged => "forged signal",
        })
    }
}

/// Where a record was put for the guest to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case", tag = "channel"))]
pub enum Place {
    /// Into a bank of a vCPU.
    Mce {
        /// The vCPU that was given it.
        vcpu: u32,
        /// The bank.
        bank: u8,
        /// The form it was told in.
        form: Form,
    },
    /// Into the status block of the ACPI error source.
    Ghes {
        /// Number of the record, which may name several pages; 1 for the first.
        record: u32,
    },
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Mce { vcpu, bank, form } => write!(f, "{form} in bank {bank} of vCPU {vcpu}"),
            Self::Ghes { record } => write!(f, "firmware-first record {record}"),
        }
    }
}

/// What is known of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case", tag = "state"))]
pub enum State {
    /// Known to the relay; the guest has not been told.
    Seen,
    /// The guest cannot be told yet.
    Waiting {
        /// What the relay waits for.
        wait: WaitReason,
    },
    /// The record is where the guest finds it; the guest has not taken it yet.
    Injected {
        /// Where it lies.
        #[cfg_attr(feature = "serde", serde(flatten))]
        place: Place,
    },
    /// The guest has taken it: cleared the bank and MCIP, or zeroed the status word.
    Acknowledged {
        /// Where it lay.
        #[cfg_attr(feature = "serde", serde(flatten))]
        place: Place,
    },
    /// The guest cannot be told at all.
    Undeliverable {
        /// Why not.
        why: UndeliverableReason,
    },
    /// The guest started over, and has good memory there now.
    Healed,
    /// No longer part of the guest's memory: there was no good memory to replace it with, or it was unplugged.
    Removed,
}

impl State {
    /// Whether the guest does not know that a page in this state is bad: it was not told yet, or could not be told.
    #[must_use]
    pub fn is_untold(&self) -> bool {
        matches!(self, Self::Seen | Self::Waiting { .. } | Self::Undeliverable { .. })
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Seen => f.write_str("seen: not told yet"),
            Self::Waiting { wait } => write!(f, "waiting: {wait}"),
            Self::Injected { place } => write!(f, "injected: {place}"),
            Self::Acknowledged { place: Place::Mce { vcpu, bank, .. } } => {
                write!(f, "acknowledged: bank {bank} of vCPU {vcpu} cleared")
            }
            Self::Acknowledged { place: Place::Ghes { record } } => {
                write!(f, "acknowledged: firmware-first record {record} taken")
            }
            Self::Undeliverable { why } => write!(f, "undeliverable: {why}"),
            Self::Healed => f.write_str("healed: good memory is there now"),
            Self::Removed => f.write_str("removed: no longer part of the guest's memory"),
        }
    }
}
