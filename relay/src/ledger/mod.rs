//! Every poisoned page, and what became of it: the only state the relay keeps.

use std::ops::Range;
use std::time::SystemTime;

mod columns;
mod page;
mod past;
mod table;

use crate::memory::fresh;
use crate::memory::map::RamMap;
use crate::types::{FailureKind, FoundBy, PAGE_SHIFT, Rescued, State, UndeliverableReason};
pub use page::{Page, Predicted, Times};
use past::Past;
use table::Table;

/// How many pages that are no longer bad are kept: the latest. Earlier ones are only counted.
pub const PAST: usize = 65_536;
const _: () = assert!(PAST <= 1 << 16, "each may have an offset of its own, which a u16 numbers");

/// A bad page cannot be replaced by good memory yet: the guest has not been told of it, and would lose its contents
/// without knowing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest has not been told that GPA {gpa:#x} is bad; it has to be, before it may use other memory there"
)]
pub struct Untold {
    /// Guest-physical address of the page.
    pub gpa: u64,
}

/// The pages, by guest-physical address. It outlives a boot: give the next relay the last one's.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    pages: Table,
    past: Past,
    /// Each as a page of this memory.
    predicted: Table,
    rescued: Vec<Rescued>,
}

impl Ledger {
    /// Enters the page at `gpa`. Returns true when it was not known.
    pub fn enter(
        &mut self,
        gpa: u64,
        hva: u64,
        lsb: u8,
        kind: FailureKind,
        found_by: FoundBy,
        now: SystemTime,
    ) -> bool {
        let known = self.pages.get(gpa);
        let new = known.is_none();
        let mut page = known.unwrap_or_else(|| {
            let times = Times::new(now);
            Page { gpa, hva, lsb, kind, found_by, signals: 0, state: State::Seen, times }
        });
        if new
            && let Some(predicted) = self.predicted.get(gpa)
            && matches!(predicted.state, State::Seen | State::Waiting { .. })
        {
            self.set_predicted(
                gpa,
                State::Undeliverable { why: UndeliverableReason::WentBad },
                now,
            );
        }
        if page.is_forged() && found_by != FoundBy::Forged {
            // A page that was only forged before has really gone bad.
            page.found_by = found_by;
        }
        if matches!(found_by, FoundBy::Signal | FoundBy::Forged) {
            page.signals = page.signals.saturating_add(1);
            page.kind = kind;
        }
        self.pages.put(&page);
        new
    }

    /// Sets the state of the page at `gpa`. Returns true when that changes it.
    pub fn set(&mut self, gpa: u64, state: State, now: SystemTime) -> bool {
        self.change(gpa, state, now).is_some_and(|(_, news)| news)
    }

    /// As [`Self::set`]; returns the page as it was, and whether its state changed.
    pub(crate) fn change(
        &mut self,
        gpa: u64,
        state: State,
        now: SystemTime,
    ) -> Option<(Page, bool)> {
        let before = self.pages.get(gpa)?;
        // A late report about a page that is no longer part of the guest's memory changes nothing.
        let news = before.state != state && before.state != State::Removed;
        if news {
            let mut page = before.clone();
            page.state = state;
            page.times.note(&before.state, &state, now);
            self.pages.put(&page);
        }
        Some((before, news))
    }

    /// The huge pages that were rescued, in that order, in all boots.
    pub fn rescued(&self) -> &[Rescued] {
        &self.rescued
    }

    /// One more.
    pub(crate) fn note_rescue(&mut self, rescued: Rescued) {
        self.rescued.push(rescued);
    }

    /// Enters the page at `gpa` as predicted to fail. False when it is bad already, or when that the
    /// guest be told of it has been asked for and not been answered yet.
    pub fn predict(&mut self, gpa: u64, now: SystemTime) -> bool {
        let open = |page: Page| {
            !matches!(page.state, State::Acknowledged { .. } | State::Undeliverable { .. })
        };
        if self.pages.contains(gpa) || self.predicted.get(gpa).is_some_and(open) {
            return false;
        }
        self.predicted.put(&Page {
            gpa,
            // One offset for all of them.
            hva: gpa,
            lsb: PAGE_SHIFT,
            kind: FailureKind::ActionOptional,
            found_by: FoundBy::Scan,
            signals: 0,
            state: State::Seen,
            times: Times::new(now),
        });
        true
    }

    /// Sets how far telling the guest has come that the page at `gpa` is predicted to fail. Returns true when that
    /// changes it.
    pub fn set_predicted(&mut self, gpa: u64, state: State, now: SystemTime) -> bool {
        let Some(mut page) = self.predicted.get(gpa).filter(|page| page.state != state) else {
            return false;
        };
        page.times.note(&page.state, &state, now);
        page.state = state;
        self.predicted.put(&page);
        true
    }

    /// The guest starts over and has good memory at `gpa`: the page is no longer bad, and its entry moves to
    /// [`Self::past`]. Returns false when it was not bad. Call it between two boots; for a guest that keeps running
    /// there is [`Self::replace`].
    pub fn heal(&mut self, gpa: u64, now: SystemTime) -> bool {
        let Some(mut page) = self.pages.remove(gpa) else { return false };
        if page.state != State::Removed {
            page.times.note(&page.state, &State::Healed, now);
            page.state = State::Healed;
        }
        self.past.push(&page, PAST);
        true
    }

    /// A guest that keeps running (restored from a snapshot into fresh memory, say) has good memory at `gpa`, and has
    /// been told that the page's contents are lost. Returns false when the page was not bad.
    ///
    /// # Errors
    /// The guest has not been told. The page stays in the ledger, and the relay that is started with this ledger tells
    /// the guest; until then every access to the page has to fail (by UFFDIO_POISON, say).
    pub fn replace(&mut self, gpa: u64, now: SystemTime) -> Result<bool, Untold> {
        match self.state_of(gpa) {
            Some(State::Acknowledged { .. } | State::Removed | State::Healed) => {
                Ok(self.heal(gpa, now))
            }
            Some(_) => Err(Untold { gpa }),
            None => Ok(false),
        }
    }

    /// The guest starts over in the same memory, `ram`: gives it good memory for every bad page, and notes that. Huge pages
    /// are replaced as a whole, so no vCPU may be running, nothing of the next boot may be loaded yet, and the relay has to
    /// have been dropped. Returns the pages for which there is no good memory, by guest-physical address: leave them out of
    /// the guest's memory map and [set](Self::set) them [`State::Removed`], or do not start it. What was predicted to
    /// fail is forgotten.
    ///
    /// A host that maps all of guest memory anew for each boot calls [`Self::heal`] for each page instead.
    pub fn start_over(&mut self, ram: &RamMap, now: SystemTime) -> Vec<u64> {
        self.forget_predictions();
        let pages: Vec<Page> = self.pages().filter(|page| page.state != State::Removed).collect();
        let mut lost = Vec::new();
        for page in pages {
            let replace = |hva| fresh::replace(ram, hva).is_ok();
            if page.is_forged() || ram.hva(page.gpa).is_some_and(replace) {
                self.heal(page.gpa, now);
            } else {
                lost.push(page.gpa);
            }
        }
        lost
    }

    /// Drops all predictions: the guest starts over in other memory. Call it between two boots.
    pub fn forget_predictions(&mut self) {
        self.predicted = Table::default();
    }

    /// Drops the predictions for `gpas`, which are no longer the guest's memory.
    pub(crate) fn unpredict(&mut self, gpas: Range<u64>) {
        let gone: Vec<u64> = self.predicted.range(gpas).map(|page| page.gpa).collect();
        // From behind, where nothing has to move up.
        for gpa in gone.into_iter().rev() {
            self.predicted.remove(gpa);
        }
    }

    /// The pages that were bad and no longer are, in the order in which they were healed, or removed and put back: the
    /// last 65,536 of them.
    pub fn past(&self) -> impl ExactSizeIterator<Item = Page> {
        self.past_behind(0)
    }

    /// As [`Self::past`], without the first `skipped`, which take no time.
    pub fn past_behind(&self, skipped: usize) -> impl ExactSizeIterator<Item = Page> {
        self.past.iter(skipped)
    }

    /// How many pages dropped out of [`Self::past`] because newer ones took their place.
    pub fn past_dropped(&self) -> u64 {
        self.past.dropped()
    }

    /// The pages that the guest has not been told of, or whose record it has not taken, by guest-physical address.
    pub(crate) fn untold(&self) -> impl Iterator<Item = Page> {
        let is_open =
            |page: &Page| page.state.is_untold() || matches!(page.state, State::Injected { .. });
        self.pages().filter(is_open)
    }

    /// What has become of the page at `gpa`, if it is known to be bad.
    pub(crate) fn state_of(&self, gpa: u64) -> Option<State> {
        self.pages.get(gpa).map(|page| page.state)
    }

    /// The pages that were predicted to fail, by guest-physical address.
    pub fn predicted(&self) -> impl Iterator<Item = Predicted> {
        self.predicted_within(0..u64::MAX)
    }

    /// How many pages were predicted to fail.
    pub fn predicted_len(&self) -> usize {
        self.predicted.len()
    }

    /// The predicted pages in `gpas`.
    pub fn predicted_within(&self, gpas: Range<u64>) -> impl Iterator<Item = Predicted> {
        let predicted = |Page { gpa, state, times, .. }| Predicted { gpa, state, times };
        self.predicted.range(gpas).map(predicted)
    }

    /// The page at `gpa`, if it is known to be bad.
    pub fn get(&self, gpa: u64) -> Option<Page> {
        self.pages.get(gpa)
    }

    /// Whether the page at `gpa` is known to be bad.
    pub fn contains(&self, gpa: u64) -> bool {
        self.pages.contains(gpa)
    }

    /// How many pages are known to be bad.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether no page is known to be bad.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All pages, by guest-physical address.
    pub fn pages(&self) -> impl Iterator<Item = Page> {
        self.within(0..u64::MAX)
    }

    /// The pages in `gpas`, by guest-physical address.
    pub fn within(&self, gpas: Range<u64>) -> impl Iterator<Item = Page> {
        self.pages.range(gpas)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Form, Place, WaitReason};

    #[test]
    fn a_page_is_new_once_and_news_once() {
        let now = SystemTime::UNIX_EPOCH;
        let mut ledger = Ledger::default();
        assert!(ledger.is_empty());
        let signal = FoundBy::Signal;
        assert!(ledger.enter(0x1000, 0x7000, 12, FailureKind::ActionOptional, signal, now));
        assert!(!ledger.enter(0x1000, 0x7000, 12, FailureKind::ActionRequired, signal, now));
        assert!(!ledger.enter(0x1000, 0x7000, 12, FailureKind::ActionOptional, FoundBy::Scan, now));
        let page = ledger.get(0x1000).unwrap();
        assert_eq!((page.signals, page.kind), (2, FailureKind::ActionRequired));

        let waiting = State::Waiting { wait: WaitReason::Mcip { vcpu: 0 } };
        assert!(ledger.set(0x1000, waiting, now));
        assert!(!ledger.set(0x1000, waiting, now), "the same again is no news");
        assert!(!ledger.set(0x2000, waiting, now), "an unknown page has no state");
        assert_eq!((ledger.len(), ledger.pages().count()), (1, 1));
        let later = now + std::time::Duration::from_secs(1);
        let place = Place::Mce { vcpu: 0, bank: 9, form: Form::Deferred };
        assert!(ledger.set(0x1000, State::Acknowledged { place }, later));
        let times = ledger.get(0x1000).unwrap().times;
        assert_eq!((times.waiting, times.acknowledged), (Some(now), Some(later)));
        assert_eq!(times.waiting_since(), now);

        // It waits again, first for one thing and then for another.
        let again = later + std::time::Duration::from_secs(3600);
        assert!(ledger.set(0x1000, waiting, again));
        let other = State::Waiting { wait: WaitReason::Mcip { vcpu: 1 } };
        assert!(ledger.set(0x1000, other, again + std::time::Duration::from_secs(5)));
        assert_eq!(ledger.get(0x1000).unwrap().times.waiting_since(), again);
        assert_eq!((times.injected, times.undeliverable), (None, None));
    }

    #[test]
    fn what_is_healed_is_kept_and_may_go_bad_again() {
        let now = SystemTime::UNIX_EPOCH;
        let mut ledger = Ledger::default();
        let (ao, signal) = (FailureKind::ActionOptional, FoundBy::Signal);
        ledger.enter(0x1000, 0x7000, 12, ao, signal, now);
        ledger.enter(0x2000, 0x8000, 12, ao, signal, now);
        assert!(ledger.heal(0x1000, now));
        assert!(!ledger.heal(0x1000, now), "it is good already");
        assert!(ledger.get(0x1000).is_none());
        let past: Vec<_> = ledger.past().map(|page| (page.gpa, page.state)).collect();
        assert_eq!(past, [(0x1000, State::Healed)]);
        assert!(ledger.enter(0x1000, 0x7000, 12, ao, signal, now), "new again");

        assert!(ledger.set(0x2000, State::Removed, now));
        assert!(!ledger.set(0x2000, State::Seen, now), "what is gone stays gone");
        assert!(ledger.heal(0x2000, now));
        assert_eq!(ledger.past().last().unwrap().state, State::Removed, "it never was healed");
    }

    #[test]
    fn a_guest_that_starts_over_has_good_memory() {
        let marker = match crate::memory::uffd::Uffd::open() {
            Ok(marker) => marker,
            Err(error) => return println!("SKIPPED: needs UFFDIO_POISON (Linux 6.6): {error}"),
        };
        let now = SystemTime::UNIX_EPOCH;
        let memory = crate::memory::stand_in::StandIn::new(
            2 << 20,
            crate::memory::stand_in::Sharing::Private,
        )
        .unwrap();
        let hva = memory.hva();
        crate::memory::access::write(hva + 0x9000, b"old").unwrap();
        marker.poison(hva + 0x5000, 4096).unwrap();
        let region = crate::RamRegion::unwritten(hva, 0x10_0000, 2 << 20);
        let ram = RamMap::new(&[region]).unwrap();
        let mut ledger = Ledger::default();
        let (ao, signal) = (FailureKind::ActionOptional, FoundBy::Signal);
        ledger.enter(0x10_5000, hva + 0x5000, 12, ao, signal, now);
        // A page that is no longer guest RAM.
        ledger.enter(0x90_0000, 0x7000, 12, ao, signal, now);
        assert_eq!(ledger.start_over(&ram, now), [0x90_0000]);
        assert!(!ledger.contains(0x10_5000) && ledger.past().len() == 1);
        let mut bytes = [1; 3];
        crate::memory::access::read(hva + 0x5000, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 3]);
        crate::memory::access::read(hva + 0x9000, &mut bytes).unwrap();
        assert_eq!(&bytes, b"old", "its neighbours stay");
    }
}
