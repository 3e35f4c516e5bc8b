//! What a report says, as data: `mce-relay report --json` writes it.

use std::collections::BTreeMap;

use mce_relay::{FailureKind, FoundBy, Place, State};
use serde::Serialize;

use super::huge::Huge;
use super::latency::Latencies;
use super::memory_map::MemoryMap;

/// A report. Times are microseconds since the start of the VMM, whose time of day is in [`Self::vmms`].
#[derive(Debug, Serialize)]
pub struct Report {
    /// This program's version.
    pub version: &'static str,
    /// When it was made, in seconds since 1970.
    pub made: f64,
    /// What it is about.
    pub of: Origin,
    /// What was read.
    pub log: Log,
    /// The processes whose events were read: as a rule one.
    pub vmms: Vec<Vmm>,
    /// How many pages.
    pub totals: Totals,
    /// The guest's memory, and where it is bad.
    pub memory: MemoryMap,
    /// How long it took to tell the guest.
    pub latencies: Latencies,
    /// Each page that went bad, in the order in which they became known. One that was bad, healed and went bad again is
    /// there twice.
    pub pages: Vec<Page>,
    /// Huge pages that were lost as a whole; those of their pages of which more is known are in [`Self::pages`], too.
    pub huge: Vec<Huge>,
    /// Huge pages of which the guest keeps a part.
    pub rescued: Vec<Rescue>,
    /// Whole pages that are predicted to fail.
    pub predicted: Vec<Predicted>,
    /// What else happened.
    pub happened: Vec<Happened>,
}

/// What a report is about.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Origin {
    /// The VM's name; `None` if it has none, or it is not known.
    pub vm: Option<String>,
    /// Where the events are from, in words.
    pub events: String,
    /// How the VM stands, in words, if that is known otherwise than by events.
    pub stands: Option<String>,
}

/// What was read.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Log {
    /// How many events.
    pub events: u64,
    /// How many of each type that this version does not know: its source and its name.
    pub unknown: BTreeMap<String, u64>,
    /// How many lines that are no events.
    pub broken: u64,
    /// The first of those.
    pub first_broken: Option<Broken>,
    /// Events that the file or the VM no longer has, as far as that is known.
    pub missed: u64,
    /// Pages that are in the ledger and of which there are no events any more.
    pub by_ledger: u64,
    /// Pages of which a part is from the ledger, as their first events are missing or their last ones.
    pub filled: u64,
    /// Entries of the ledger that the VM's record has left out.
    pub ledger_lacks: Lacks,
}

/// How many entries of the ledger are not in a VM's record.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Lacks {
    /// Of bad pages.
    pub pages: usize,
    /// Of predicted pages.
    pub predicted: usize,
    /// Of pages that were bad once.
    pub past: usize,
}

/// A line that is no event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Broken {
    /// Its number, from 1.
    pub line: u64,
    /// What is wrong with it.
    pub why: String,
}

/// One process of a VMM.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Vmm {
    /// When it started, in seconds since 1970, if a boot has said it.
    pub began: Option<f64>,
    /// Boots of the guest.
    pub boots: Vec<Boot>,
    /// The time of its last event.
    pub last: u64,
}

/// One boot of the guest.
#[derive(Debug, Clone, Serialize)]
pub struct Boot {
    /// Its number; 1 for the first.
    pub boot: u32,
    /// When it began; `None` if that event is missing.
    pub at: Option<u64>,
    /// The vendor that the guest sees; `None` if that is not known.
    pub vendor: Option<String>,
    /// How it ended, in words; `None` if no end of it is known.
    pub end: Option<String>,
}

/// How many pages of 4 KiB. What was only forged is counted apart.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Totals {
    /// Went bad.
    pub bad: u64,
    /// Bytes of guest memory whose contents were lost with them.
    pub bytes: u64,
    /// Of them: the guest was told at least once.
    pub told: u64,
    /// Of them: the guest has taken a record at least once.
    pub acknowledged: u64,
    /// The guest was not told yet: `seen` and `waiting`.
    pub waiting: u64,
    /// The guest could not be told the last time that it was to be, whatever became of them later.
    pub undeliverable: u64,
    /// Good memory is there now.
    pub healed: u64,
    /// No longer part of the guest's memory.
    pub removed: u64,
    /// Their first events are missing, so that nobody knows whether the guest was told of them.
    pub unknown: u64,
    /// Whole: all their signals were forged.
    pub forged: u64,
    /// Pages by whom they were lost to.
    pub lost_to: BTreeMap<LostTo, u64>,
}

/// To whom a page's contents were lost, as far as events tell it; from the worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LostTo {
    /// The guest touched it and could not be told.
    GuestUntold,
    /// The guest touched it.
    Guest,
    /// The VMM itself touched it.
    Vmm,
    /// Nobody is known to have touched it, and the guest was told.
    Told,
    /// Nobody is known to have touched it, and the guest does not know.
    Nobody,
    /// The first events of it are missing, and those that are there say nothing of it.
    Unknown,
    /// Nothing was lost: it was forged. Such a page is in none of [`Totals::lost_to`].
    Nothing,
}

impl LostTo {
    /// All to whom a page can be lost.
    pub const ALL: [Self; 6] =
        [Self::GuestUntold, Self::Guest, Self::Vmm, Self::Told, Self::Nobody, Self::Unknown];

    /// In a few words.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::GuestUntold => "guest, not told",
            Self::Guest => "guest",
            Self::Vmm => "VMM",
            Self::Told => "nobody: told before",
            Self::Nobody => "nobody yet",
            Self::Unknown => "unknown: the events begin later",
            Self::Nothing => "nothing: forged",
        }
    }
}

/// Who has touched a bad page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Toucher {
    /// The guest, on this vCPU.
    Vcpu(u64),
    /// The guest, on a vCPU that no event names.
    Guest,
    /// The VMM itself: a device, or a dump.
    Vmm,
}

/// How much of a page's course the events have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Course {
    /// From when it became known.
    Whole,
    /// The first of them are missing.
    Late,
    /// There are none: it is in the ledger.
    Ledger,
}

/// One page that went bad.
#[derive(Debug, Clone, Serialize)]
pub struct Page {
    /// Its VMM's index in [`Report::vmms`].
    pub vmm: usize,
    /// The boot in which it became known, which before the first is that one; `None` if no event has said it.
    pub boot: Option<u32>,
    /// How much of its course the events have.
    pub course: Course,
    /// The ledger has said some of it.
    pub by_ledger: bool,
    /// Guest-physical address.
    #[serde(with = "mce_relay::hex")]
    pub gpa: u64,
    /// Host virtual address, if an event has said it.
    #[serde(with = "mce_relay::hex_option")]
    pub hva: Option<u64>,
    /// The kind of its first signal; AO for a page that no signal named.
    pub first_kind: FailureKind,
    /// The kind of its last signal.
    pub kind: FailureKind,
    /// How it became known; `None` if that event is missing.
    pub found_by: Option<FoundBy>,
    /// It is whole: all its signals were forged.
    pub forged: bool,
    /// What became of it.
    #[serde(flatten)]
    pub state: State,
    /// Who has touched it.
    pub touched_by: Vec<Toucher>,
    /// To whom it was lost.
    pub lost_to: LostTo,
    /// Each time that the guest was told of which there is an event.
    pub told: Vec<Telling>,
    /// The guest was told at least once at a time of which there is no event.
    pub told_before: bool,
    /// The guest has taken a record at least once of which [`Self::told`] does not have it.
    pub taken_before: bool,
    /// By the ledger, the guest could not be told the last time.
    #[serde(skip)]
    pub untold_before: bool,
    /// Everything that happened to it.
    pub steps: Vec<Step>,
}

impl Page {
    /// A page of which nothing else is known yet.
    pub(super) fn new(
        vmm: usize,
        boot: Option<u32>,
        gpa: u64,
        kind: FailureKind,
        forged: bool,
    ) -> Self {
        Self {
            vmm,
            boot,
            course: Course::Late,
            by_ledger: false,
            gpa,
            hva: None,
            first_kind: kind,
            kind,
            found_by: None,
            forged,
            state: State::Seen,
            touched_by: Vec::new(),
            lost_to: LostTo::Nobody,
            told: Vec::new(),
            told_before: false,
            taken_before: false,
            untold_before: false,
            steps: Vec::new(),
        }
    }

    /// The name of its state, as JSON has it.
    #[must_use]
    pub fn state_name(&self) -> &'static str {
        match self.state {
            State::Seen => "seen",
            State::Waiting { .. } => "waiting",
            State::Injected { .. } => "injected",
            State::Acknowledged { .. } => "acknowledged",
            State::Undeliverable { .. } => "undeliverable",
            State::Healed => "healed",
            State::Removed => "removed",
        }
    }

    /// Notes who has touched it.
    pub(super) fn touched(&mut self, by: Toucher) {
        if !self.touched_by.contains(&by) {
            self.touched_by.push(by);
        }
    }
}

/// The guest was told of a page once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Telling {
    /// Where its record was put.
    #[serde(flatten)]
    pub place: Place,
    /// From the signal (or, if there was none, from when the page became known) to the record: microseconds. `None` if
    /// it was told again without another signal.
    pub after: Option<u64>,
    /// When its record was put where the guest finds it.
    pub injected: u64,
    /// From then until the guest had taken it: microseconds.
    pub taken_after: Option<u64>,
    /// All signals of the page had been forged until then.
    pub forged: bool,
}

/// One step of a page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// When.
    pub at: u64,
    /// The event's name.
    pub what: &'static str,
    /// More of it, in words.
    pub words: String,
}

/// A huge page that was rescued.
#[derive(Debug, Clone, Serialize)]
pub struct Rescue {
    /// Its VMM's index in [`Report::vmms`].
    pub vmm: usize,
    /// When; `None` if only the ledger has it.
    pub at: Option<u64>,
    /// What was lost and kept.
    #[serde(flatten)]
    pub what: mce_relay::Rescued,
}

/// A page that is predicted to fail.
#[derive(Debug, Clone, Serialize)]
pub struct Predicted {
    /// Its VMM's index in [`Report::vmms`].
    pub vmm: usize,
    /// Guest-physical address.
    #[serde(with = "mce_relay::hex")]
    pub gpa: u64,
    /// When it was asked for; `None` if that is not known.
    pub at: Option<u64>,
    /// When it came to its present state; `None` if that is not known.
    pub last: Option<u64>,
    /// The guest started over, or had the page no longer, before it was told: the prediction was dropped.
    pub dropped: bool,
    /// What became of it.
    #[serde(flatten)]
    pub state: State,
}

/// Something that is not of one page.
#[derive(Debug, Clone, Serialize)]
pub struct Happened {
    /// Its VMM's index in [`Report::vmms`].
    pub vmm: usize,
    /// When.
    pub at: u64,
    /// In words.
    pub words: String,
}
