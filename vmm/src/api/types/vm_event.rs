//! Events of the virtual machine itself, as docs/events.md describes them.

use log::Level;
use serde::{Deserialize, Serialize};

use crate::api::types::pause::{Panic, PauseReason};

/// Something that happened to the virtual machine itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "event", content = "properties")]
pub enum VmEvent {
    /// A boot begins.
    Booting {
        /// 1 for the first boot of this process.
        boot: u32,
        /// Seconds since 1970, to place the other timestamps by.
        unix_time: f64,
        /// What the guest was shown as IA32_MCG_CAP.
        mcg_cap: String,
        /// The vendor that the guest sees.
        vendor: mce_relay::mca::Vendor,
    },
    /// The guest has ended, or was ended.
    Ended {
        /// How.
        how: String,
        /// The exit status of `mce-relay run` for it.
        status: u8,
    },
    /// The guest is started again, with good memory.
    Reset {
        /// Why.
        reason: String,
        /// The user's policy reset it, not the guest itself.
        by_policy: bool,
    },
    /// The vCPUs leave the guest and wait.
    Paused {
        /// Why.
        #[serde(flatten)]
        reason: PauseReason,
        /// How the user can resume it.
        #[serde(skip)]
        way_on: String,
    },
    /// The vCPUs run again.
    Resumed {},
    /// The guest reports that its kernel has panicked.
    Panicked {
        /// What the user can do next.
        #[serde(skip)]
        way_on: String,
    },
    /// The guest reports that its kernel has panicked and its crash kernel takes over.
    CrashLoaded {},
}

impl VmEvent {
    /// The log level: an event that nobody asked for and that may need action is logged without `-v`.
    pub(crate) fn level(&self) -> Level {
        match self {
            Self::Paused { reason: PauseReason::Undeliverable(_), .. }
            | Self::Reset { by_policy: true, .. }
            | Self::Panicked { .. }
            | Self::CrashLoaded {} => Level::Warn,
            _ => Level::Info,
        }
    }
}

impl std::fmt::Display for VmEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Booting { boot, mcg_cap, vendor, .. } => {
                write!(f, "boot {boot}: {vendor}-style guest, MCG_CAP {mcg_cap}")
            }
            Self::Ended { how, status } => write!(f, "ended: {how} (exit status {status})"),
            Self::Reset { reason, .. } => write!(f, "{reason}; starting the guest again"),
            Self::Paused { reason, way_on } if way_on.is_empty() => write!(f, "paused: {reason}"),
            Self::Paused { reason, way_on } => write!(f, "paused: {reason}; {way_on}"),
            Self::Resumed {} => f.write_str("resumed"),
            Self::Panicked { way_on } if way_on.is_empty() => Panic::Panicked.fmt(f),
            Self::Panicked { way_on } => write!(f, "{}; {way_on}", Panic::Panicked),
            Self::CrashLoaded {} => Panic::CrashLoaded.fmt(f),
        }
    }
}
