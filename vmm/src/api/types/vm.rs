//! The VM that runs, and its state.

use mce_relay::mca::Vendor;
use mce_relay::{AoChannel, KillPolicy, Pace, Page, Predicted, Rescued};
use serde::{Deserialize, Serialize};

use crate::api::types::device::DeviceInfo;
use crate::api::types::pause::{Panic, PauseReason};
use crate::api::types::policy::{Notify, OnUndeliverable};

/// A stretch of guest RAM that has memory behind it; the rest reads as zeros. In bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Guest-physical address of its first byte.
    #[serde(with = "mce_relay::hex")]
    pub gpa: u64,
    /// Length.
    pub len: u64,
}

impl From<std::ops::Range<u64>> for Extent {
    fn from(range: std::ops::Range<u64>) -> Self {
        Self { gpa: range.start, len: range.end.saturating_sub(range.start) }
    }
}

/// One stretch of guest RAM. Addresses and lengths in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryBlock {
    /// Guest-physical address of its first byte.
    #[serde(with = "mce_relay::hex")]
    pub gpa: u64,
    /// Length.
    pub len: u64,
    /// Where the VMM has mapped it.
    #[serde(with = "mce_relay::hex")]
    pub hva: u64,
    /// The descriptor of the file behind it, in the VMM's process; null for anonymous memory.
    pub fd: Option<i32>,
    /// Offset of its first byte in that file.
    pub fd_offset: u64,
    /// Whether a process that maps the file has the same memory.
    pub shared: bool,
    /// Size in bytes of the pages of which the host loses each as a whole: 4096, 2 MiB or 1 GiB.
    pub page_size: u64,
}

/// What runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmInfo {
    /// Its name; null if it has none.
    pub name: Option<String>,
    /// The VMM's version.
    pub version: String,
    /// The VMM's process.
    pub pid: u32,
    /// 1 for the first boot of this process, one more after each reset of the guest.
    pub boot: u32,
    /// Number of vCPUs.
    pub vcpus: usize,
    /// The vendor whose machine-check architecture the guest sees.
    pub vendor: Vendor,
    /// IA32_MCG_CAP as the guest sees it, `0x…`.
    pub mcg_cap: String,
    /// When the kernel signals a bad page to the VMM: when it knows of it (early), or at a touch (late).
    pub mce_kill: KillPolicy,
    /// Whether the guest is to keep what is left of a huge page of which a part goes bad.
    pub rescue: bool,
    /// Which way AOs go.
    pub ao_channel: AoChannel,
    /// How the guest is notified of firmware-first records; null when it was given no error source.
    pub ghes: Option<Notify>,
    /// How fast the guest is told of AOs.
    pub ao_pace: Pace,
    /// What is done about an AR that the guest cannot be told of.
    pub on_undeliverable: OnUndeliverable,
    /// Whether the vCPUs are held, or are about to be.
    pub paused: bool,
    /// Why, if they are.
    pub pause_reason: Option<PauseReason>,
    /// What the guest has said of its own end since it was started; null as long as it has not.
    pub panic: Option<Panic>,
    /// Whether the relay's thread runs, as it always should: without it AOs are not taken.
    pub relay_alive: bool,
    /// The stretch of guest RAM into which the guest's kernel was loaded: its text and data, and memory that it frees
    /// after its start.
    pub kernel: Extent,
    /// Guest RAM, by guest-physical address.
    pub memory: Vec<MemoryBlock>,
    /// Its virtio devices, in the order of their registers.
    #[serde(default)]
    pub devices: Vec<DeviceInfo>,
}

impl VmInfo {
    /// The block of guest RAM that holds `gpa`.
    pub fn block(&self, gpa: u64) -> Option<&MemoryBlock> {
        self.memory.iter().find(|block| gpa >= block.gpa && gpa - block.gpa < block.len)
    }

    /// The ranges of guest RAM, for people.
    #[must_use]
    pub fn ram_in_words(&self) -> String {
        let mut stretches: Vec<(u64, u64)> = Vec::new();
        for block in &self.memory {
            match stretches.last_mut() {
                Some((_, end)) if *end == block.gpa => *end += block.len,
                _ => stretches.push((block.gpa, block.gpa + block.len)),
            }
        }
        let words = stretches.iter().map(|(start, end)| format!("{start:#x} to {:#x}", end - 1));
        words.collect::<Vec<_>>().join(", ")
    }
}

/// What runs, and what became of every bad page of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// What runs.
    pub vm: VmInfo,
    /// The ledger, by guest-physical address.
    pub pages: Vec<Page>,
    /// Pages that are whole and predicted to fail, by guest-physical address.
    pub predicted: Vec<Predicted>,
    /// Pages that were bad in an earlier boot and no longer are, in the order in which they were healed.
    pub past: Vec<Page>,
    /// Huge pages that the host has lost and of which the guest keeps all but the bad part, in that order, in all boots.
    #[serde(default)]
    pub rescued: Vec<Rescued>,
}

/// Whether a VM answers, and which.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ping {
    /// The VMM's version.
    pub version: String,
    /// The VMM's process.
    pub pid: u32,
    /// The VM's name; null if it has none.
    pub name: Option<String>,
}

/// The answer to a request that failed.
#[derive(Debug, Serialize, Deserialize)]
pub struct Problem {
    /// What is wrong, and what to do.
    pub error: String,
}
