//! What a VM was told to do.

use serde::{Deserialize, Serialize};

/// What is done about an AR that the guest cannot be told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnUndeliverable {
    /// End the VM, with exit status 6.
    Stop,
    /// Pause the VM; when it goes on, the vCPU touches the page again, and if the guest still cannot be told,
    /// the VM is paused again.
    Pause,
    /// Start the guest again with good memory; where it is not to be started again, as [`Self::Stop`].
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

/// How the guest comes to know of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "notify")]
pub enum Notify {
    /// By an interrupt.
    Interrupt,
    /// It looks every so many milliseconds. Linux rounds that to whole seconds.
    Poll {
        /// The interval, in milliseconds, at least 1.
        millis: u32,
    },
}
