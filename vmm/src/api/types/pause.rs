//! Why a VM is paused, and what its guest says of a panic.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A vCPU touched a bad page, and the guest cannot be told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undeliverable {
    /// The vCPU's index.
    pub vcpu: u8,
    /// Guest-physical address of the page.
    #[serde(with = "mce_relay::hex")]
    pub gpa: u64,
    /// Why the guest cannot be told.
    pub why: String,
    /// Where the vCPU was: its RIP, if it is known.
    #[serde(with = "mce_relay::hex_option")]
    pub rip: Option<u64>,
}

impl fmt::Display for Undeliverable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vcpu, gpa, why, rip } = self;
        write!(f, "vCPU {vcpu} touched the bad page at {gpa:#x} ")?;
        match rip {
            Some(rip) => write!(f, "(RIP {rip:#x})")?,
            None => f.write_str("(RIP unknown)")?,
        }
        write!(f, " and cannot be told: {why}")
    }
}

/// Why a VM is paused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "reason")]
pub enum PauseReason {
    /// A request by the API.
    Request,
    /// Pages are being marked as bad, during which the guest must not run. It ends in a moment.
    Marking,
    /// A vCPU touched a bad page, the guest cannot be told, and the user's policy for that is to pause.
    Undeliverable(Undeliverable),
}

impl fmt::Display for PauseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Request => f.write_str("on request"),
            Self::Marking => f.write_str("while pages are marked as bad"),
            Self::Undeliverable(what) => what.fmt(f),
        }
    }
}

/// What a guest's kernel reports of its own panic, by the device for that (pvpanic).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Panic {
    /// It has panicked. Most kernels then hang, or reset the machine.
    Panicked,
    /// It has panicked, and a second kernel (kdump) takes over to write a dump.
    CrashLoaded,
}

impl fmt::Display for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Panicked => "the guest's kernel has panicked",
            Self::CrashLoaded => "the guest's kernel has panicked, and its crash kernel takes over",
        })
    }
}
