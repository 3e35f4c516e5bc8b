//! Signals of which no event has said yet which page of the guest they are about.

use std::collections::BTreeMap;

use mce_relay::{FailureKind, SignalledThread};

use super::memory_map::PAGE_SIZE;
use super::model::Step;

/// `log2` of a page's length.
const PAGE_SHIFT: u8 = 12;

/// A signal whose page is not known yet.
#[derive(Debug, Clone)]
pub(super) struct Signal {
    pub at: u64,
    pub kind: FailureKind,
    pub forged: bool,
    pub thread: SignalledThread,
    pub lsb: u8,
}

impl Signal {
    /// As a step of a page.
    pub fn step(&self) -> Step {
        let Self { at, kind, forged, thread, lsb } = self;
        let label = if *forged { "FORGED " } else { "" };
        let lost = match *lsb > PAGE_SHIFT {
            true => format!(", {} KiB lost", (1_u64 << (*lsb).min(63)) >> 10),
            false => String::new(),
        };
        Step { at: *at, what: "caught", words: format!("{label}{kind}, on {thread}{lost}") }
    }
}

/// A huge page that was rescued, and whose pages that are gone follow.
#[derive(Debug)]
struct Rescue {
    /// Its end.
    end: u64,
    /// How many of its pages are still to follow.
    gone: u64,
    /// When it was first signalled.
    first: Option<u64>,
    /// Its signals, each with the page whose address it had.
    own: Vec<(u64, Signal)>,
}

/// Signals, by host virtual address.
#[derive(Debug, Default)]
pub(super) struct Signals {
    pages: BTreeMap<u64, Vec<Signal>>,
    /// Rescued huge pages, by address.
    rescues: BTreeMap<u64, Rescue>,
}

/// What signals say of a page that became known.
#[derive(Debug, Default)]
pub(super) struct About {
    /// Those that named it.
    pub own: Vec<Signal>,
    /// When the huge page was first signalled that it was lost with.
    pub with: Option<u64>,
}

impl About {
    /// When it was first signalled, if it was.
    pub fn first(&self) -> Option<u64> {
        self.own.first().map(|signal| signal.at).or(self.with)
    }
}

/// The page that holds `hva`.
fn page_of(hva: u64) -> u64 {
    hva & !(PAGE_SIZE - 1)
}

impl Signals {
    /// One more.
    pub fn caught(&mut self, hva: u64, signal: Signal) {
        self.pages.entry(page_of(hva)).or_default().push(signal);
    }

    /// Those for `hva` are of no page of the guest.
    pub fn outside(&mut self, hva: u64) {
        self.pages.remove(&page_of(hva));
    }

    /// Takes those of the page at `hva`, in the order in which they came.
    pub fn of_page(&mut self, hva: u64) -> Vec<Signal> {
        self.pages.remove(&page_of(hva)).unwrap_or_default()
    }

    /// Takes what is said of a page that became known with an extent of `extent` bytes. `signalled`: by a signal.
    ///
    /// An AR is of the page whose address it has, and of no other of the extent: that one was touched.
    pub fn of_known(&mut self, hva: u64, extent: u64, signalled: bool) -> About {
        let own = self.of_page(hva);
        if extent > PAGE_SIZE {
            return match own.is_empty() {
                true => About { own: self.of_extent(hva & !(extent - 1), extent), with: None },
                false => About { own, with: None },
            };
        }
        let found = self.rescues.range_mut(..=hva).next_back();
        let Some((&start, rescue)) = found.filter(|(_, rescue)| hva < rescue.end && signalled)
        else {
            return About { own, with: None };
        };
        let (mine, others) = std::mem::take(&mut rescue.own)
            .into_iter()
            .partition::<Vec<_>, _>(|(page, _)| *page == page_of(hva));
        rescue.own = others;
        let mut all: Vec<Signal> = mine.into_iter().map(|(_, signal)| signal).chain(own).collect();
        all.sort_by_key(|signal| signal.at);
        let with = rescue.first.filter(|_| all.is_empty());
        rescue.gone = rescue.gone.saturating_sub(1);
        if rescue.gone == 0 {
            self.rescues.remove(&start);
        }
        About { own: all, with }
    }

    /// Takes those AOs that named the whole extent at `start`.
    fn of_extent(&mut self, start: u64, extent: u64) -> Vec<Signal> {
        let mut all = Vec::new();
        for (_, signals) in self.pages.range_mut(start..start.saturating_add(extent)) {
            let whole = |signal: &mut Signal| {
                signal.kind == FailureKind::ActionOptional && signal.lsb > PAGE_SHIFT
            };
            all.extend(signals.extract_if(.., whole));
        }
        self.pages.retain(|_, signals| !signals.is_empty());
        all.sort_by_key(|signal| signal.at);
        all
    }

    /// The huge page at `hva` was rescued but for `gone` pages, which follow.
    pub fn rescued(&mut self, hva: u64, extent: u64, gone: u64) {
        let end = hva.saturating_add(extent);
        let pages: Vec<u64> = self.pages.range(hva..end.max(hva)).map(|(page, _)| *page).collect();
        let mut own = Vec::new();
        for page in pages {
            let signals = self.pages.remove(&page).unwrap_or_default();
            own.extend(signals.into_iter().map(|signal| (page, signal)));
        }
        let first = own.iter().map(|(_, signal)| signal.at).min();
        if gone > 0 {
            self.rescues.insert(hva, Rescue { end, gone, first, own });
        }
    }
}
