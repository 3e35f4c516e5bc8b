//! The policies that a VM was started with.

use serde::{Deserialize, Serialize};

/// What is done about an AR that the guest cannot be told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnUndeliverable {
    /// End the VM, with exit status 6.
    Stop,
    /// Pause the VM. When it is resumed, the vCPU touches the page again; if the guest still cannot be told, the VM is
    /// paused again.
    Pause,
    /// Start the guest again with good memory; as [`Self::Stop`] if the VM is not to reboot.
    Reset,
}

impl std::fmt::Display for OnUndeliverable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Stop => "stop",
            Self::Pause => "pause",
            Self::Reset => "reset",
        })
    }
}

/// How the guest is notified of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "notify")]
pub enum Notify {
    /// By an interrupt.
    Interrupt,
    /// The guest polls at this interval; Linux rounds it to whole seconds.
    Poll {
        /// The interval, in milliseconds, at least 1.
        millis: u32,
    },
}
