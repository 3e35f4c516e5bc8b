//! When to look for bad pages that no signal named.
//!
//! SIGBUS does not queue: of several failures close together a thread sees one. So every AO is also
//! a hint that there may be more. The kernel marks a page before it signals it, so a look that
//! begins after a signal was taken sees every page whose own signal was swallowed by that one.
//! Failures that raise no signal at all (a page that is clean and could be dropped) show in the
//! kernel's count of failures.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use log::{debug, warn};

use crate::core::inner::{Inner, RETRY_FIRST};
use crate::core::shared::{IDLE_TICK, Shared};
use crate::event::Event;
use crate::memory::scan::{FailureCounter, Scanner};
use crate::types::{Caught, FailureKind, FoundBy, PAGE_SHIFT};

/// After a look the next one waits for this many times as long: during a burst at most a tenth of a processor is spent
/// on looking.
const REST: u32 = 9;
/// The least time between two looks, so that in a burst one look finds many pages.
const REST_LEAST: Duration = Duration::from_millis(5);

/// Bytes of host addresses that are searched in one slice, between which the relay's thread does its other work: some
/// ten milliseconds for small pages.
const SLICE: u64 = 8 << 30;

/// The search for bad pages by one relay's thread.
pub(crate) struct Search {
    scanner: Scanner,
    counter: Option<FailureCounter>,
    /// There is a reason to look.
    wanted: bool,
    /// What the current look has not covered yet, the last range first.
    rest: Vec<Range<u64>>,
    /// How long the current look has taken so far.
    took: Duration,
    /// No look begins before this.
    not_before: Instant,
    /// When the kernel's count is read next.
    count_at: Instant,
    /// The last look failed; the warning was given.
    failing: bool,
}

impl Search {
    /// `None` (with a warning) where this process may not look at its own page tables; pages whose
    /// signals are swallowed then stay unknown until the guest touches them.
    pub(crate) fn new() -> Option<Self> {
        let scanner = match Scanner::new() {
            Ok(scanner) => scanner,
            Err(error) => {
                warn!("cannot look for bad pages that no signal names: {error}");
                return None;
            }
        };
        let counter = FailureCounter::new();
        if counter.is_none() {
            debug!("the kernel's count of memory failures cannot be read");
        }
        let now = Instant::now();
        // Once at the start, for pages that went bad before the relay could be signalled.
        Some(Self {
            scanner,
            counter,
            wanted: true,
            rest: Vec::new(),
            took: Duration::ZERO,
            not_before: now,
            count_at: now,
            failing: false,
        })
    }

    /// Asks for a look: there may be bad pages that no signal named.
    pub(crate) fn hint(&mut self) {
        self.wanted = true;
    }

    /// Searches a slice of guest RAM, if there is a reason and it is not too soon. Returns true when it has found any
    /// page.
    pub(crate) fn look(&mut self, shared: &Shared) -> bool {
        let begin = Instant::now();
        if begin >= self.count_at {
            self.count_at = begin + IDLE_TICK;
            self.wanted |= self.counter.as_mut().is_some_and(FailureCounter::changed);
        }
        if self.rest.is_empty() {
            if !self.wanted || begin < self.not_before {
                return false;
            }
            // Cleared first: a hint that comes during this look asks for another one.
            self.wanted = false;
            self.took = Duration::ZERO;
            self.rest = shared.ram().hvas().collect();
            self.rest.reverse();
        }
        let slice = take_slice(&mut self.rest);
        let found = self.scanner.scan(slice.into_iter(), |hva| shared.knows(hva));
        self.took += begin.elapsed();
        if found.is_err() {
            self.rest.clear();
        }
        if self.rest.is_empty() {
            shared.scans.fetch_add(1, Ordering::Relaxed);
            self.not_before = Instant::now() + (self.took * REST).max(REST_LEAST);
        }
        match found {
            Ok(found) => {
                self.failing = false;
                shared.enter_found(&found, self.took);
                return !found.is_empty();
            }
            Err(error) if self.failing => debug!("looking for bad pages: {error}"),
            Err(error) => {
                self.failing = true;
                warn!("cannot look for bad pages that no signal names: {error}");
            }
        }
        false
    }

    /// How long the relay's thread may sleep before the next look is due.
    pub(crate) fn pause(&self) -> Duration {
        if !self.rest.is_empty() {
            return Duration::ZERO;
        }
        let now = Instant::now();
        let count = self.count_at.saturating_duration_since(now);
        if self.wanted { count.min(self.not_before.saturating_duration_since(now)) } else { count }
    }
}

/// Takes the next [`SLICE`] off `rest`, whose last range comes first.
fn take_slice(rest: &mut Vec<Range<u64>>) -> Vec<Range<u64>> {
    let (mut slice, mut room) = (Vec::new(), SLICE);
    while room > 0
        && let Some(range) = rest.pop()
    {
        let end = range.end.min(range.start.saturating_add(room));
        if end < range.end {
            rest.push(end..range.end);
        }
        room -= end - range.start;
        slice.push(range.start..end);
    }
    slice
}

impl Shared {
    /// Whether the page at `hva` is known to be bad, at every guest address that shows it.
    fn knows(&self, hva: u64) -> bool {
        self.is_known(&self.lock(), hva)
    }

    fn is_known(&self, inner: &Inner, hva: u64) -> bool {
        // The page of a forged failure may really go bad.
        let is_bad = |gpa| inner.ledger.get(gpa).is_some_and(|page| !page.is_forged());
        inner.rescues.has(hva) || self.ram().gpas(hva).all(is_bad)
    }

    /// Enters pages that were found by looking.
    fn enter_found(&self, hvas: &[u64], took: Duration) {
        if hvas.is_empty() {
            return;
        }
        let mut inner = self.lock();
        let before = inner.ledger.len();
        for &hva in hvas {
            // A vCPU may have met it in the meantime, or it is one of a huge page that is known now.
            if !self.is_known(&inner, hva) {
                let caught = Caught { kind: FailureKind::ActionOptional, hva, lsb: PAGE_SHIFT };
                self.enter_pages(&mut inner, caught, FoundBy::Scan, None);
            }
        }
        let pages = inner.ledger.len() - before;
        if pages > 0 {
            inner.retry = RETRY_FIRST;
            // A u64 holds 500,000 years of microseconds.
            let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
            inner.emit(Event::Scanned { pages, micros });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_all_of_it_in_order() {
        let ranges = [0..4096, 1 << 40..(1 << 40) + 3 * SLICE, 1 << 50..(1 << 50) + 4096];
        let mut rest: Vec<Range<u64>> = ranges.iter().rev().cloned().collect();
        let mut slices = Vec::new();
        while !rest.is_empty() {
            let slice = take_slice(&mut rest);
            assert!(slice.iter().map(|range| range.end - range.start).sum::<u64>() <= SLICE);
            slices.extend(slice);
        }
        assert_eq!(slices.len(), 6, "{slices:x?}");
        let mut joined: Vec<Range<u64>> = Vec::new();
        for range in slices {
            match joined.last_mut().filter(|last| last.end == range.start) {
                Some(last) => last.end = range.end,
                None => joined.push(range),
            }
        }
        assert_eq!(joined, ranges);
    }
}
