//! Every poisoned page, and what became of it: the only state the relay keeps.

use std::collections::BTreeMap;
use std::time::SystemTime;

use crate::delivery::{Cannot, Wait};
use crate::mca::{Form, Kind};

/// What is known of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case", tag = "state"))]
pub enum State {
    /// Known to the relay; nothing has been tried yet.
    Seen,
    /// Waits to be told.
    Waiting {
        /// For what.
        wait: Wait,
    },
    /// The record is in the guest's bank; the guest has not cleared it yet.
    Injected {
        /// The vCPU that was given it.
        vcpu: usize,
        /// The bank it lies in.
        bank: u8,
        /// The form it was told in.
        form: Form,
    },
    /// The guest has cleared the bank and MCIP.
    Acknowledged {
        /// The vCPU that was given it.
        vcpu: usize,
        /// The bank it lay in.
        bank: u8,
    },
    /// The guest cannot be told.
    Undeliverable {
        /// Why not.
        why: Cannot,
    },
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Seen => f.write_str("seen"),
            Self::Waiting { wait } => write!(f, "waiting: {wait}"),
            Self::Injected { vcpu, bank, form } => {
                write!(f, "injected: {form} in bank {bank} of vCPU {vcpu}")
            }
            Self::Acknowledged { vcpu, bank } => {
                write!(f, "acknowledged: bank {bank} of vCPU {vcpu} cleared")
            }
            Self::Undeliverable { why } => write!(f, "undeliverable: {why}"),
        }
    }
}

/// One poisoned 4 KiB page of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Page {
    /// Guest-physical address.
    #[cfg_attr(feature = "serde", serde(with = "crate::event::hex"))]
    pub gpa: u64,
    /// Host virtual address.
    #[cfg_attr(feature = "serde", serde(with = "crate::event::hex"))]
    pub hva: u64,
    /// `log2` of the extent the signal named, 12 for one page.
    pub lsb: u8,
    /// The kind of the last signal.
    pub kind: Kind,
    /// Number of signals that named the page.
    pub signals: u32,
    /// When the page was first seen.
    #[cfg_attr(feature = "serde", serde(with = "crate::event::unix_time"))]
    pub seen_at: SystemTime,
    /// When `state` was last changed.
    #[cfg_attr(feature = "serde", serde(with = "crate::event::unix_time"))]
    pub changed_at: SystemTime,
    /// What became of it.
    #[cfg_attr(feature = "serde", serde(flatten))]
    pub state: State,
}

/// The pages, by guest-physical address.
#[derive(Debug, Default)]
pub struct Ledger {
    pages: BTreeMap<u64, Page>,
}

impl Ledger {
    /// Enters a signal of `kind` for the page at `gpa`. True when the page was not known.
    pub fn enter(&mut self, gpa: u64, hva: u64, lsb: u8, kind: Kind, now: SystemTime) -> bool {
        let mut new = false;
        let page = self.pages.entry(gpa).or_insert_with(|| {
            new = true;
            Page {
                gpa,
                hva,
                lsb,
                kind,
                signals: 0,
                seen_at: now,
                changed_at: now,
                state: State::Seen,
            }
        });
        page.signals = page.signals.saturating_add(1);
        page.kind = kind;
        new
    }

    /// Sets what became of the page at `gpa`. True when that is news.
    pub fn set(&mut self, gpa: u64, state: State, now: SystemTime) -> bool {
        match self.pages.get_mut(&gpa) {
            Some(page) if page.state != state => {
                page.state = state;
                page.changed_at = now;
                true
            }
            _ => false,
        }
    }

    /// The page at `gpa`, if it is known to be bad.
    pub fn get(&self, gpa: u64) -> Option<&Page> {
        self.pages.get(&gpa)
    }

    /// All pages, by guest-physical address.
    pub fn pages(&self) -> impl Iterator<Item = &Page> {
        self.pages.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_new_once_and_news_once() {
        let now = SystemTime::UNIX_EPOCH;
        let mut ledger = Ledger::default();
        assert!(ledger.enter(0x1000, 0x7000, 12, Kind::ActionOptional, now));
        assert!(!ledger.enter(0x1000, 0x7000, 12, Kind::ActionRequired, now));
        let page = ledger.get(0x1000).unwrap();
        assert_eq!((page.signals, page.kind), (2, Kind::ActionRequired));

        let waiting = State::Waiting { wait: Wait::Mcip { vcpu: 0 } };
        assert!(ledger.set(0x1000, waiting, now));
        assert!(!ledger.set(0x1000, waiting, now), "the same again is no news");
        assert!(!ledger.set(0x2000, waiting, now), "an unknown page has no state");
        assert_eq!(ledger.pages().count(), 1);
    }
}
