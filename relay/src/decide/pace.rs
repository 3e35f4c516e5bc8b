//! How fast a guest is told of errors that it has not touched yet (AOs).
//!
//! Linux keeps what its machine-check handler or its poll has found in a pool of its own, until a
//! worker has taken each page out of use. The pool is short (6.1: 8 KiB, 32 records; 6.12: 80 records;
//! `arch/x86/kernel/cpu/mce/genpool.c`). A record that does not fit is dropped, and nothing outside the guest shows it.
//! Nor can the relay see how far the worker is. So it keeps an estimate: each record that the guest has taken counts
//! for a fixed time, and the first one after a rest for a second more, or until somebody who knows says that the guest is
//! done with the page. No record is given that would make more than [`Pace::burst`] of them.

use std::collections::VecDeque;
use std::time::Duration;

/// How many AOs the guest may have queued, and how many it handles per second.
///
/// The default is 16 records at 10 per second. 16 is half of the shortest pool; the other half is left to the guest's
/// own errors and to ARs, which are never held back. 100 ms a page is more than twice the 40 ms that a 6.1 guest on an
/// emulated processor took while it logged each page to a serial console.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Pace {
    /// Records that the guest's own queue can surely hold; at least 1 (0 is taken as 1).
    pub burst: u32,
    /// Records per second that the guest handles; at least 1 (0 is taken as 1).
    pub rate: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Self { burst: 16, rate: 10 }
    }
}

/// So many records are counted at most, or the burst if that is more: ARs are never held back, and the oldest
/// count the least.
const MOST: usize = 4096;
/// A guest whose queue was empty may take so long before it is done with the first page: its worker has to come to run,
/// while what poisons its pages keeps the host busy.
const BEGINS: Duration = Duration::from_secs(1);
/// A guest that has said with which page it is done is waited for so long before the estimate counts again. Its queue is
/// as full as it may be all the time, so that it loses pages where it is held up and told of more.
const HEARD: Duration = Duration::from_secs(2);

/// The estimate of what is in the guest's queue.
#[derive(Debug)]
pub(crate) struct Queue {
    burst: u32,
    /// Time that one record counts for.
    each: Duration,
    /// The pages of the records, and when each counts no more, ascending.
    queued: VecDeque<(u64, Duration)>,
    /// The guest says with which pages it is done, and has done so of the last ones.
    speaks: bool,
    /// When something last left it: since when it is empty, if it is.
    empty_since: Option<Duration>,
    /// Pages with which the guest is done, of records that it has not been seen to have taken.
    early: Vec<u64>,
    /// Since when the guest does not run.
    paused_since: Option<Duration>,
}

impl Queue {
    pub(crate) fn new(pace: Pace) -> Self {
        Self {
            burst: pace.burst.max(1),
            each: Duration::from_secs(1) / pace.rate.max(1),
            queued: VecDeque::new(),
            speaks: false,
            empty_since: None,
            early: Vec::new(),
            paused_since: None,
        }
    }

    /// The guest does not run from now on, until [`goes_on`](Self::goes_on): no time passes for it.
    pub(crate) fn pauses(&mut self, now: Duration) {
        self.paused_since = Some(now);
    }

    /// The guest runs again.
    pub(crate) fn goes_on(&mut self, now: Duration) {
        if let Some(since) = self.paused_since.take() {
            let paused = now.saturating_sub(since);
            let counting = self.queued.iter_mut().filter(|(_, until)| *until > since);
            counting.for_each(|(_, until)| *until = until.saturating_add(paused));
        }
    }

    /// The time up to which the guest has run.
    fn ran_until(&self, now: Duration) -> Duration {
        self.paused_since.unwrap_or(now)
    }

    /// The guest has taken the record of the page at `gpa` out of a bank and into its queue.
    pub(crate) fn taken(&mut self, gpa: u64, now: Duration) {
        if self.take_early(gpa) {
            return;
        }
        self.expire(now);
        if self.queued.len() >= MOST.max(self.burst as usize) {
            self.queued.pop_front();
        }
        let last = match self.queued.back() {
            Some((_, until)) => *until,
            None => now.saturating_add(self.begins(now)),
        };
        self.queued.push_back((gpa, last.saturating_add(self.each)));
    }

    /// The record of the page at `gpa` will not be taken after all.
    pub(crate) fn not_taken(&mut self, gpa: u64) {
        self.take_early(gpa);
    }

    /// Forgets that the guest was done with the page at `gpa` before its record was seen to be taken; true if it was.
    fn take_early(&mut self, gpa: u64) -> bool {
        let early = self.early.iter().position(|early| *early == gpa);
        early.is_some_and(|at| self.early.swap_remove(at) == gpa)
    }

    /// How long the guest takes before it begins with the first page in its queue.
    fn begins(&self, now: Duration) -> Duration {
        let has_rested = |since| now.saturating_sub(since) >= BEGINS;
        match self.empty_since {
            _ if self.speaks => HEARD,
            Some(since) if !has_rested(since) => Duration::ZERO,
            _ => BEGINS,
        }
    }

    /// Takes out what counts no more: the guest has not said that it was done.
    fn expire(&mut self, now: Duration) {
        let now = self.ran_until(now);
        while let Some((_, until)) = self.queued.front().copied()
            && until <= now
        {
            self.queued.pop_front();
            self.empty_since = Some(until);
            self.speaks = false;
        }
    }

    /// The guest is done with the page at `gpa`. What is behind it in the queue counts until the guest says so, too, or says
    /// nothing any more. True if its record was in the queue.
    pub(crate) fn finished(&mut self, gpa: u64, now: Duration) -> bool {
        self.expire(now);
        let Some(at) = self.queued.iter().position(|(queued, _)| *queued == gpa) else {
            return false;
        };
        self.queued.remove(at);
        self.empty_since = Some(now);
        self.heard(at, now);
        true
    }

    /// The guest is done with the page at `gpa`, whose record it has not been seen to have taken. False if it has said so
    /// before.
    pub(crate) fn finished_early(&mut self, gpa: u64, now: Duration) -> bool {
        if self.early.contains(&gpa) {
            return false;
        }
        self.early.push(gpa);
        self.expire(now);
        self.heard(self.queued.len(), now);
        true
    }

    /// The guest has said something of the page before the one at `next`.
    fn heard(&mut self, next: usize, now: Duration) {
        self.speaks = true;
        let mut speaks_until = now.saturating_add(HEARD);
        for (at, (_, until)) in self.queued.iter_mut().enumerate() {
            speaks_until = speaks_until.saturating_add(self.each);
            // Of what was before it the guest may say nothing ever, as of a page that was only predicted to fail.
            *until = if at < next { speaks_until.min(*until) } else { speaks_until };
        }
    }

    /// How many more records there is room for now, beside `in_flight` records that the guest has not taken yet, if its
    /// queue may hold no more than `limit`.
    pub(crate) fn room(&self, in_flight: usize, limit: u32, now: Duration) -> u32 {
        let in_flight = u32::try_from(in_flight).unwrap_or(u32::MAX);
        let now = self.ran_until(now);
        let queued = self.queued.iter().filter(|(_, until)| *until > now).count();
        let queued = u32::try_from(queued).unwrap_or(u32::MAX);
        self.burst.min(limit).saturating_sub(in_flight).saturating_sub(queued)
    }

    /// The same where one record may name many pages: a guest that says with which pages it is done gets the next ones
    /// when it is done with all. Fifteen by one record cost it less than one by each of fifteen.
    pub(crate) fn room_for_many(&self, in_flight: usize, limit: u32, now: Duration) -> u32 {
        let is_at_work = self.queued.iter().any(|(_, until)| *until > self.ran_until(now));
        if self.speaks && is_at_work { 0 } else { self.room(in_flight, limit, now) }
    }

    /// When there will be room for one more record beside `in_banks` that the guest has not taken yet; `None` when
    /// these alone fill the queue, so that time does not help.
    pub(crate) fn room_at(&self, in_banks: usize) -> Option<Duration> {
        let in_banks = u32::try_from(in_banks).unwrap_or(u32::MAX);
        let spare = self.burst.checked_sub(in_banks)?.checked_sub(1)?;
        let last = self.queued.len().checked_sub(spare as usize).and_then(|at| at.checked_sub(1));
        Some(last.map_or(Duration::ZERO, |last| self.queued[last].1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const PAGE: u64 = 0x1000;

    #[test]
    fn a_burst_goes_at_once_and_the_rest_at_the_rate_when_the_guest_has_begun() {
        let mut queue = Queue::new(Pace { burst: 4, rate: 2 });
        let mut now = SECOND;
        for _ in 0..4 {
            assert!(queue.room_at(0).unwrap() <= now);
            queue.taken(PAGE, now);
        }
        assert_eq!(queue.room_at(0), Some(now + BEGINS + SECOND / 2));
        now += BEGINS;
        for _ in 0..10 {
            now += SECOND / 2;
            assert_eq!(queue.room_at(0), Some(now));
            queue.taken(PAGE, now);
        }
        assert!(queue.room_at(0).unwrap() <= now + 10 * SECOND);
    }

    #[test]
    fn what_lies_in_banks_will_be_in_the_queue() {
        let mut queue = Queue::new(Pace { burst: 2, rate: 1 });
        assert_eq!(queue.room_at(1), Some(Duration::ZERO));
        assert_eq!(queue.room_at(2), None);
        queue.taken(PAGE, SECOND);
        assert_eq!(queue.room_at(1), Some(2 * SECOND + BEGINS));
    }

    #[test]
    fn the_room_is_what_the_burst_and_the_limit_leave() {
        let mut queue = Queue::new(Pace { burst: 16, rate: 2 });
        assert_eq!(queue.room(0, 16, SECOND), 16);
        assert_eq!((queue.room(3, 16, SECOND), queue.room(20, 16, SECOND)), (13, 0));
        assert_eq!(queue.room(0, 8, SECOND), 8);
        for _ in 0..16 {
            queue.taken(PAGE, SECOND);
        }
        assert_eq!(queue.room(0, 16, SECOND), 0);
        // The moments at which the two ways of asking see room for one more are the same.
        let at = queue.room_at(0).unwrap();
        assert_eq!(queue.room(0, 16, at), 1);
        assert_eq!(queue.room(0, 16, at - Duration::from_nanos(1)), 0);
        assert_eq!(queue.room(0, 16, 100 * SECOND), 16);
    }

    #[test]
    fn nonsense_is_taken_for_the_least() {
        let queue = Queue::new(Pace { burst: 0, rate: 0 });
        assert_eq!(queue.room_at(0), Some(Duration::ZERO));
        assert_eq!(queue.room_at(1), None);
    }

    #[test]
    fn a_guest_that_says_when_it_is_done_is_told_then_and_not_before() {
        let mut queue = Queue::new(Pace { burst: 4, rate: 2 });
        (0..4).for_each(|page| queue.taken(page, SECOND));
        assert_eq!(queue.room(0, 16, SECOND), 0);
        let mut now = SECOND + SECOND / 10;
        for page in 0..1000 {
            assert!(queue.finished(page, now));
            assert_eq!((queue.room(0, 16, now), queue.room_at(0)), (1, Some(Duration::ZERO)));
            assert_eq!(queue.room_for_many(0, 16, now), 0);
            queue.taken(page + 4, now);
            // It is held up, for longer than the estimate has it.
            now += HEARD;
            assert_eq!(queue.room(0, 16, now), 0);
        }
        // Nothing more is heard: the estimate counts, for these and for what comes.
        now += SECOND / 2;
        assert_eq!(queue.room(0, 16, now), 1);
        now += 2 * SECOND;
        assert_eq!((queue.room(0, 16, now), queue.room_for_many(0, 16, now)), (4, 4));
        queue.taken(1, now);
        assert_eq!(queue.room(0, 16, now + BEGINS + SECOND / 2), 4);
    }

    #[test]
    fn a_page_that_is_finished_before_its_record_is_seen_to_be_taken_does_not_count() {
        let mut queue = Queue::new(Pace { burst: 2, rate: 1 });
        queue.finished_early(7, SECOND);
        queue.finished_early(7, SECOND);
        queue.taken(7, SECOND);
        assert_eq!(queue.room(0, 16, SECOND), 2);
        // It does the next time.
        queue.taken(7, SECOND);
        assert_eq!(queue.room(0, 16, SECOND), 1);
        // Other pages are none of its business, such as those of which the estimate has said long ago that they are done.
        (0..100).for_each(|page| assert!(!queue.finished(1 << 20 | page, SECOND)));
        queue.taken(1 << 20, SECOND);
        assert_eq!(queue.room(0, 16, SECOND), 0);
    }

    /// How long it takes until so many pages are told, by a relay that looks so often.
    fn time_for(pace: Pace, pages: u64, look: Duration) -> Duration {
        let mut queue = Queue::new(pace);
        let mut now = SECOND;
        for page in 0..pages {
            while queue.room_at(0).unwrap() > now {
                now += look;
            }
            queue.taken(page, now);
        }
        now - SECOND
    }

    #[test]
    fn the_rate_is_kept_where_the_queue_is_empty_again_and_again() {
        let took = time_for(Pace { burst: 1, rate: 10 }, 20, SECOND / 100);
        assert!(took < 4 * SECOND, "{took:?}");
        // Sixteen at each look.
        let took = time_for(Pace { burst: 16, rate: 1000 }, 320, SECOND / 20);
        assert!(took < 3 * SECOND, "{took:?}");
        // A guest that has rested has to begin again.
        let mut queue = Queue::new(Pace { burst: 1, rate: 10 });
        for now in [SECOND, 10 * SECOND] {
            queue.taken(PAGE, now);
            assert_eq!(queue.room_at(0), Some(now + BEGINS + SECOND / 10));
        }
    }

    #[test]
    fn what_the_guest_never_speaks_of_counts_no_more_in_the_end() {
        let mut queue = Queue::new(Pace::default());
        let mut now = SECOND;
        (0..16).for_each(|page| queue.taken(page, now));
        for touch in 0..60 {
            queue.taken(1000 + touch, now);
            now += SECOND / 20;
            queue.finished(1000 + touch, now);
            now += SECOND;
        }
        assert_eq!(queue.room(0, 16, now), 16);
        // Nor does it count again by what is said later.
        assert!(queue.finished_early(99, now) && !queue.finished_early(99, now));
        assert_eq!(queue.room(0, 16, now), 16);
    }

    #[test]
    fn a_guest_that_is_paused_is_done_with_nothing() {
        let mut queue = Queue::new(Pace { burst: 4, rate: 1 });
        (0..2).for_each(|page| queue.taken(page, SECOND));
        // Of these two the first one counts no more when the pause begins.
        queue.pauses(3 * SECOND + SECOND / 2);
        let later = 3600 * SECOND;
        assert_eq!((queue.room(0, 16, later), queue.room_for_many(0, 16, later)), (3, 3));
        queue.goes_on(later);
        assert_eq!(queue.room(0, 16, later), 3);
        assert_eq!(queue.room(0, 16, later + SECOND / 2), 4);
        queue.goes_on(2 * later);
        assert_eq!(queue.room(0, 16, later + SECOND / 2), 4);
    }

    #[test]
    fn a_page_that_is_finished_but_not_taken_counts_when_it_is() {
        let mut queue = Queue::new(Pace { burst: 2, rate: 1 });
        queue.finished_early(7, SECOND);
        queue.not_taken(7);
        queue.taken(7, SECOND);
        assert_eq!(queue.room(0, 16, SECOND), 1);
    }

    #[test]
    fn a_guest_that_touches_bad_pages_for_ever_costs_no_memory_without_end() {
        let mut queue = Queue::new(Pace { burst: 16, rate: 10 });
        (0..100_000).for_each(|touch| queue.taken(touch % 512, SECOND));
        assert!(queue.queued.len() <= MOST);
        assert_eq!(queue.room(0, 16, SECOND), 0);
    }
}
