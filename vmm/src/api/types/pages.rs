//! Requests about pages, and the outcome for each page.

use mce_relay::FailureKind;
use serde::{Deserialize, Serialize};

use crate::api::types::means::Means;

/// Which pages the guest is to stop using.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retire {
    /// Guest-physical addresses, each `"0x…"`.
    pub gpas: Vec<Gpa>,
}

/// A guest-physical address, `"0x…"` in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Gpa(#[serde(with = "mce_relay::hex")] pub u64);

/// Whether the guest is being asked to stop using a page.
#[derive(Debug, Serialize, Deserialize)]
pub struct Retiring {
    /// Guest-physical address of the page.
    pub gpa: Gpa,
    /// Why the guest is not asked, or null.
    pub error: Option<String>,
}

/// Pages that the VMM itself is to make go bad; see [`Means`] for which means the VMM uses.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Poison {
    /// Guest-physical addresses, each `"0x…"`.
    pub gpas: Vec<Gpa>,
    /// The means.
    pub via: Means,
    /// For a forged signal its kind; an AO if it is left out.
    #[serde(default = "ao")]
    pub kind: FailureKind,
    /// For forged ARs: the vCPU that is to have touched the page.
    #[serde(default, deserialize_with = "crate::api::types::manual_mce::small")]
    pub vcpu: u8,
}

fn ao() -> FailureKind {
    FailureKind::ActionOptional
}

/// The outcome for one of them.
#[derive(Debug, Serialize, Deserialize)]
pub struct Poisoning {
    /// Guest-physical address of the page.
    pub gpa: Gpa,
    /// Whether the page was really bad before, by the kernel or the ledger; null where it was not looked at.
    pub was_bad: Option<bool>,
    /// Why it was not done, or null.
    pub error: Option<String>,
}
