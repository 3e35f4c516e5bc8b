//! Every poisoned page, and what became of it: the only state the relay keeps.

use std::collections::BTreeMap;
use std::time::SystemTime;

use crate::delivery::{Cannot, Wait};
use crate::mca::{Form, Kind};

/// How the relay came to know of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum FoundBy {
    /// The kernel signalled it.
    Signal,
    /// No signal named it: it was found by looking ([`crate::scan`]).
    Scan,
}

impl std::fmt::Display for FoundBy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Signal => "signal",
            Self::Scan => "scan",
        })
    }
}

/// What is known of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case", tag = "state"))]
pub enum State {
    /// Known to the relay; its turn has not come.
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
            Self::Seen => f.write_str("seen: its turn has not come"),
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
    /// The kind of the last signal; AO for a page that no signal named.
    pub kind: Kind,
    /// How the page became known.
    pub found_by: FoundBy,
    /// Number of signals that named the page.
    pub signals: u32,
    /// What became of it.
    #[cfg_attr(feature = "serde", serde(flatten))]
    pub state: State,
    /// When it came to each state, last.
    pub times: Times,
}

/// When a page came to each state, the last time; `None` where it never did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Times {
    /// It became known.
    #[cfg_attr(feature = "serde", serde(with = "crate::event::unix_time"))]
    pub seen: SystemTime,
    /// It had to wait, for what it waits for now or waited for last.
    #[cfg_attr(feature = "serde", serde(with = "crate::event::unix_time_option"))]
    pub waiting: Option<SystemTime>,
    /// It was injected.
    #[cfg_attr(feature = "serde", serde(with = "crate::event::unix_time_option"))]
    pub injected: Option<SystemTime>,
    /// The guest was seen to have taken it.
    #[cfg_attr(feature = "serde", serde(with = "crate::event::unix_time_option"))]
    pub acknowledged: Option<SystemTime>,
    /// It was found that the guest cannot be told.
    #[cfg_attr(feature = "serde", serde(with = "crate::event::unix_time_option"))]
    pub undeliverable: Option<SystemTime>,
}

/// The pages, by guest-physical address.
#[derive(Debug, Default)]
pub struct Ledger {
    pages: BTreeMap<u64, Page>,
}

impl Ledger {
    /// Enters the page at `gpa`. True when it was not known.
    pub fn enter(
        &mut self,
        gpa: u64,
        hva: u64,
        lsb: u8,
        kind: Kind,
        found_by: FoundBy,
        now: SystemTime,
    ) -> bool {
        let mut new = false;
        let page = self.pages.entry(gpa).or_insert_with(|| {
            new = true;
            let times = Times {
                seen: now,
                waiting: None,
                injected: None,
                acknowledged: None,
                undeliverable: None,
            };
            Page { gpa, hva, lsb, kind, found_by, signals: 0, state: State::Seen, times }
        });
        if found_by == FoundBy::Signal {
            page.signals = page.signals.saturating_add(1);
            page.kind = kind;
        }
        new
    }

    /// Sets what became of the page at `gpa`. True when that is news.
    pub fn set(&mut self, gpa: u64, state: State, now: SystemTime) -> bool {
        let Some(page) = self.pages.get_mut(&gpa).filter(|page| page.state != state) else {
            return false;
        };
        page.state = state;
        match state {
            State::Seen => page.times.seen = now,
            State::Waiting { .. } => page.times.waiting = Some(now),
            State::Injected { .. } => page.times.injected = Some(now),
            State::Acknowledged { .. } => page.times.acknowledged = Some(now),
            State::Undeliverable { .. } => page.times.undeliverable = Some(now),
        }
        true
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
        let signal = FoundBy::Signal;
        assert!(ledger.enter(0x1000, 0x7000, 12, Kind::ActionOptional, signal, now));
        assert!(!ledger.enter(0x1000, 0x7000, 12, Kind::ActionRequired, signal, now));
        assert!(!ledger.enter(0x1000, 0x7000, 12, Kind::ActionOptional, FoundBy::Scan, now));
        let page = ledger.get(0x1000).unwrap();
        assert_eq!((page.signals, page.kind), (2, Kind::ActionRequired));

        let waiting = State::Waiting { wait: Wait::Mcip { vcpu: 0 } };
        assert!(ledger.set(0x1000, waiting, now));
        assert!(!ledger.set(0x1000, waiting, now), "the same again is no news");
        assert!(!ledger.set(0x2000, waiting, now), "an unknown page has no state");
        assert_eq!(ledger.pages().count(), 1);
        let later = now + std::time::Duration::from_secs(1);
        assert!(ledger.set(0x1000, State::Acknowledged { vcpu: 0, bank: 9 }, later));
        let times = ledger.get(0x1000).unwrap().times;
        assert_eq!((times.waiting, times.acknowledged), (Some(now), Some(later)));
        assert_eq!((times.injected, times.undeliverable), (None, None));
    }
}
