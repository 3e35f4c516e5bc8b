//! Pages that a request is about, and what became of each.

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
    /// Why it is not, or null.
    pub error: Option<String>,
}

/// Pages that the VMM itself is to have go bad; see [`Means`] for which means are its.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Poison {
    /// Guest-physical addresses, each `"0x…"`.
    pub gpas: Vec<Gpa>,
    /// By what means.
    pub via: Means,
    /// For forged signals: which. An AO where it is left out.
    #[serde(default = "ao")]
    pub kind: FailureKind,
    /// For forged ARs: the vCPU that is to have touched the page.
    #[serde(default, deserialize_with = "crate::api::types::manual_mce::small")]
    pub vcpu: u8,
}

fn ao() -> FailureKind {
    FailureKind::ActionOptional
}

/// What became of one of them.
#[derive(Debug, Serialize, Deserialize)]
pub struct Poisoning {
    /// Guest-physical address of the page.
    pub gpa: Gpa,
    /// Whether the page was really bad before, by the kernel or the ledger; null where it was not looked at.
    pub was_bad: Option<bool>,
    /// Why it was not done, or null.
    pub error: Option<String>,
}
