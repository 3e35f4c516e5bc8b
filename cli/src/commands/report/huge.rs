//! Huge pages that were lost as a whole, of which events name some pages.

use std::collections::{BTreeMap, BTreeSet};

use mce_relay::{FailureKind, FoundBy};
use serde::Serialize;

use super::memory_map::PAGE_SIZE;

/// A huge page that was lost as a whole.
#[derive(Debug, Clone, Serialize)]
pub struct Huge {
    /// Its VMM's index in the list of VMMs.
    pub vmm: usize,
    /// The boot in which it became known; as a page's.
    pub boot: Option<u32>,
    /// Guest-physical address of its first byte.
    #[serde(with = "mce_relay::hex")]
    pub gpa: u64,
    /// Host virtual address of its first byte.
    #[serde(with = "mce_relay::hex")]
    pub hva: u64,
    /// Its length in bytes.
    pub len: u64,
    /// The kind of its signal.
    pub kind: FailureKind,
    /// How it became known.
    pub found_by: FoundBy,
    /// Pages that became known with it.
    pub pages: u64,
    /// Those of them that are in the list of pages.
    pub listed: u64,
    /// Those of the others that have good memory again.
    pub healed: u64,
    /// How many bytes of it are no longer part of the guest's memory.
    pub removed: u64,
    /// When it was caught; `None` if no signal named it.
    pub caught: Option<u64>,
    /// When it became known.
    pub seen: u64,
    /// Its pages that are in the list of pages, by address; some of them may have been bad before.
    #[serde(skip)]
    pub named: BTreeSet<u64>,
    /// Its pages that have good memory again and are not there.
    #[serde(skip)]
    pub healed_pages: BTreeSet<u64>,
    /// How many of its pages that are not there were removed.
    #[serde(skip)]
    pub rest_removed: u64,
}

/// The pages of a huge page that no event has named while they were bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rest {
    /// Of them: the guest was not told yet.
    pub waiting: u64,
    /// Good memory is there now.
    pub healed: u64,
    /// No longer part of the guest's memory.
    pub removed: u64,
}

impl Rest {
    /// All of them.
    #[must_use]
    pub fn pages(self) -> u64 {
        self.waiting.saturating_add(self.healed).saturating_add(self.removed)
    }
}

impl Huge {
    /// Its pages of which nothing more is known.
    #[must_use]
    pub fn rest(&self) -> Rest {
        let rest = self.pages.saturating_sub(self.listed);
        let healed = self.healed.min(rest);
        let removed = self.rest_removed.min(rest - healed);
        Rest { waiting: rest - healed - removed, healed, removed }
    }

    /// Whether the page at `gpa` was lost with it, is bad, and is not named yet.
    #[must_use]
    pub fn has_unnamed(&self, gpa: u64) -> bool {
        gpa >= self.gpa
            && gpa - self.gpa < self.len
            && self.rest().waiting > 0
            && !self.named.contains(&gpa)
            && !self.healed_pages.contains(&gpa)
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct HugePages {
    pub list: Vec<Huge>,
    /// Those that are bad now, by address.
    open: BTreeMap<u64, usize>,
}

impl HugePages {
    /// Nothing that follows is about these.
    pub fn close(&mut self) {
        self.open.clear();
    }

    /// One more.
    pub fn add(&mut self, huge: Huge) {
        self.open.insert(huge.gpa, self.list.len());
        self.list.push(huge);
    }

    /// The one with which `gpa` was lost, if no event has named that page.
    pub fn unnamed(&mut self, gpa: u64) -> Option<&mut Huge> {
        let at = *self.open.range(..=gpa).next_back()?.1;
        self.list.get_mut(at).filter(|huge| huge.has_unnamed(gpa))
    }

    /// The last one of this VMM with which `gpa` was lost, and no event has named that page.
    pub fn with(&self, gpa: u64, vmm: usize) -> Option<&Huge> {
        let lost = |huge: &&Huge| {
            huge.vmm == vmm
                && gpa >= huge.gpa
                && gpa - huge.gpa < huge.len
                && !huge.named.contains(&gpa)
        };
        self.list.iter().rev().find(lost)
    }

    /// The page at `gpa`, which no event has named before, has good memory; false if it was lost with none of them.
    pub fn heal(&mut self, gpa: u64) -> bool {
        let Some(huge) = self.unnamed(gpa) else { return false };
        huge.healed_pages.insert(gpa);
        huge.healed += 1;
        let start = huge.gpa;
        if huge.rest().waiting == 0 {
            self.open.remove(&start);
        }
        true
    }

    /// What lies from `start` to before `end` is no longer part of the guest's memory.
    pub fn remove(&mut self, start: u64, end: u64) {
        let before = self.open.range(..start).next_back();
        let found: Vec<(u64, usize)> = before
            .into_iter()
            .chain(self.open.range(start..end.max(start)))
            .map(|(gpa, at)| (*gpa, *at))
            .collect();
        for (gpa, at) in found {
            let huge = &mut self.list[at];
            let (from, to) = (start.max(gpa), end.min(gpa.saturating_add(huge.len)));
            if from >= to {
                continue;
            }
            huge.removed = huge.removed.saturating_add(to - from);
            // Those that are named, or healed, are none of the rest.
            let others =
                huge.named.range(from..to).count() + huge.healed_pages.range(from..to).count();
            let pages = ((to - from) / PAGE_SIZE).saturating_sub(others as u64);
            huge.rest_removed = huge.rest_removed.saturating_add(pages);
            if huge.rest().waiting == 0 {
                self.open.remove(&gpa);
            }
        }
    }
}
