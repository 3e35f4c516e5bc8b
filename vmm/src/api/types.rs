//! What the API's requests and answers hold.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mce_relay::mca::Vendor;
use mce_relay::{AoChannel, FailureKind, Handle, KillPolicy, Pace, Page, Predicted};
use serde::{Deserialize, Serialize};

use crate::button::PowerButton;
use crate::by_hand::Injector;
use crate::client::OfProcess;
use crate::config::OnUndeliverable;
use crate::control::{Panic, PauseReason, VmControl};
use crate::ghes::Notify;
use crate::memory::{GuestRam, RamBlock};
use crate::poison::Means;

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
    /// The pages that the host keeps it in, and loses as a whole.
    pub page_size: u64,
}

impl From<&RamBlock> for MemoryBlock {
    fn from(block: &RamBlock) -> Self {
        let RamBlock { gpa, len, hva, fd_offset, fd, shared, page_size } = *block;
        Self { gpa, len, hva, fd, fd_offset, shared, page_size }
    }
}

/// What runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmInfo {
    /// What it is called; null for one without a name.
    pub name: Option<String>,
    /// The VMM's version.
    pub version: String,
    /// The VMM's process.
    pub pid: u32,
    /// 1 for the first boot of this process, one more after each reset of the guest.
    pub boot: u32,
    /// Number of vCPUs.
    pub vcpus: usize,
    /// Whose machine-check architecture the guest sees.
    pub vendor: Vendor,
    /// IA32_MCG_CAP as the guest sees it, `0x…`.
    pub mcg_cap: String,
    /// When the kernel tells the VMM of a bad page.
    pub mce_kill: KillPolicy,
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
    /// FallbackReason, if they are.
    pub pause_reason: Option<PauseReason>,
    /// What the guest has said of its own end since it was started; null as long as it has not.
    pub panic: Option<Panic>,
    /// Whether the relay's thread is there, as it always should be: without it nobody takes AOs.
    pub relay_alive: bool,
    /// The stretch of guest RAM into which the guest's kernel was loaded: its text and data, and what it gives
    /// back after its start.
    pub kernel: Extent,
    /// Guest RAM, by guest-physical address.
    pub memory: Vec<MemoryBlock>,
}

impl OfProcess for VmInfo {
    fn pid(&self) -> u32 {
        self.pid
    }
}

impl VmInfo {
    /// The block of guest RAM that holds `gpa`.
    pub fn block(&self, gpa: u64) -> Option<&MemoryBlock> {
        self.memory.iter().find(|block| gpa >= block.gpa && gpa - block.gpa < block.len)
    }

    /// Where there is guest RAM, for people.
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
    /// Pages that were bad in an earlier boot and are so no longer, in the order of their healing.
    pub past: Vec<Page>,
}

impl OfProcess for Status {
    fn pid(&self) -> u32 {
        self.vm.pid
    }
}

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
    #[serde(default, deserialize_with = "crate::inject::small")]
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

/// Whether a VM answers, and which.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ping {
    /// The VMM's version.
    pub version: String,
    /// The VMM's process.
    pub pid: u32,
    /// What the VM is called; null for one without a name.
    pub name: Option<String>,
}

impl OfProcess for Ping {
    fn pid(&self) -> u32 {
        self.pid
    }
}

/// The answer to a request that failed.
#[derive(Debug, Serialize, Deserialize)]
pub struct Problem {
    /// What is wrong, and what to do.
    pub error: String,
}

/// The virtual machine as the API sees it; it changes with every boot.
#[derive(Clone)]
pub struct Running {
    /// What runs; whether it is paused, and whether it has panicked, is looked up when somebody asks.
    pub info: VmInfo,
    /// Its relay, with the ledger.
    pub relay: Handle,
    /// Its reins.
    pub control: VmControl,
    /// Its memory.
    pub ram: Arc<GuestRam>,
    /// The way to its vCPUs for machine checks by hand.
    pub injector: Injector,
    /// Its power button.
    pub button: PowerButton,
}

impl Running {
    /// What runs now.
    #[must_use]
    pub fn info(&self) -> VmInfo {
        let (pause_reason, panic) = (self.control.paused(), self.control.panicked());
        let (paused, relay_alive) = (pause_reason.is_some(), self.relay.is_alive());
        VmInfo { paused, pause_reason, panic, relay_alive, ..self.info.clone() }
    }
}

/// Shared between the VM's owner and the API's threads.
#[derive(Clone, Default)]
pub struct Current {
    name: Option<Arc<str>>,
    held: Arc<Mutex<Held>>,
}

#[derive(Default)]
struct Held {
    /// `None` between two boots.
    running: Option<Running>,
    /// The ledger of the last boot, this one's if there is one, and what ran.
    last: Option<(Handle, VmInfo)>,
}

impl Current {
    /// Of a VM that is called so.
    #[must_use]
    pub fn new(name: Option<&str>) -> Self {
        Self { name: name.map(Into::into), held: Arc::default() }
    }

    /// What the VM is called.
    #[must_use]
    pub fn name(&self) -> Option<String> {
        self.name.as_deref().map(str::to_owned)
    }

    /// Says what runs now.
    pub fn set(&self, running: Option<Running>) {
        let mut held = self.lock();
        if let Some(running) = &running {
            held.last = Some((running.relay.clone(), running.info.clone()));
        }
        held.running = running;
    }

    /// What runs now.
    #[must_use]
    pub fn get(&self) -> Option<Running> {
        self.lock().running.clone()
    }

    /// What runs now or ran last, with its ledger.
    #[must_use]
    pub fn last(&self) -> Option<(Handle, VmInfo)> {
        match self.get() {
            Some(running) => Some((running.relay.clone(), running.info())),
            None => self.lock().last.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        // Plain assignments are all that ever happens under the lock.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// For tests: a VM without RAM.
#[cfg(test)]
pub(crate) fn an_info() -> VmInfo {
    VmInfo {
        name: None,
        version: String::new(),
        pid: 1,
        boot: 1,
        vcpus: 1,
        vendor: Vendor::Amd,
        mcg_cap: "0x10a".into(),
        mce_kill: KillPolicy::Early,
        ao_channel: AoChannel::Auto,
        ghes: None,
        ao_pace: Pace::default(),
        on_undeliverable: OnUndeliverable::Stop,
        paused: false,
        pause_reason: None,
        panic: None,
        relay_alive: true,
        kernel: Extent { gpa: 0x100_0000, len: 0x200_0000 },
        memory: Vec::new(),
    }
}
