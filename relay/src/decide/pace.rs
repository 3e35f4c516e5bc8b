//! How fast a guest is told of errors that it has not touched yet (AOs).
//!
//! Linux keeps what its machine-check handler or its poll has found in a pool of its own, until a
//! worker has taken each page out of use. The pool is short (6.1: 8 KiB, 32 records; 6.12: 80 records;
//! `arch/x86/kernel/cpu/mce/genpool.c`). A record that does not fit is dropped, and nothing outside the guest shows it.
//! Nor can a VMM see how far the worker is. So the relay keeps an estimate: each record that the guest has taken counts
//! for a fixed time, and no record is given that would make more than [`Pace::burst`] of them.

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

/// The estimate of what is in the guest's queue.
#[derive(Debug)]
pub(crate) struct Queue {
    burst: u32,
    /// Time that one record counts for.
    each: Duration,
    /// When the queue will be empty.
    empty_at: Duration,
}

impl Queue {
    pub(crate) fn new(pace: Pace) -> Self {
        Self {
            burst: pace.burst.max(1),
            each: Duration::from_secs(1) / pace.rate.max(1),
            empty_at: Duration::ZERO,
        }
    }

    /// The guest has taken a record out of a bank and into its queue.
    pub(crate) fn taken(&mut self, now: Duration) {
        self.empty_at = self.empty_at.max(now).saturating_add(self.each);
    }

    /// How many more records there is room for now, beside `in_flight` records that the guest has not taken yet, if its
    /// queue may hold no more than `limit`.
    pub(crate) fn room(&self, in_flight: usize, limit: u32, now: Duration) -> u32 {
        let in_flight = u32::try_from(in_flight).unwrap_or(u32::MAX);
        let ahead = self.empty_at.saturating_sub(now).as_nanos();
        let queued = ahead.div_ceil(self.each.as_nanos().max(1));
        let queued = u32::try_from(queued).unwrap_or(u32::MAX);
        self.burst.min(limit).saturating_sub(in_flight).saturating_sub(queued)
    }

    /// When there will be room for one more record beside `in_banks` that the guest has not taken yet; `None` when
    /// these alone fill the queue, so that time does not help.
    pub(crate) fn room_at(&self, in_banks: usize) -> Option<Duration> {
        let in_banks = u32::try_from(in_banks).unwrap_or(u32::MAX);
        let spare = self.burst.checked_sub(in_banks)?.checked_sub(1)?;
        Some(self.empty_at.saturating_sub(self.each.saturating_mul(spare)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_burst_goes_at_once_and_the_rest_at_the_rate() {
        let mut queue = Queue::new(Pace { burst: 4, rate: 2 });
        let mut now = SECOND;
        for _ in 0..4 {
            assert!(queue.room_at(0).unwrap() <= now);
            queue.taken(now);
        }
        assert_eq!(queue.room_at(0), Some(now + SECOND / 2));
        now += SECOND / 2;
        queue.taken(now);
        assert_eq!(queue.room_at(0), Some(now + SECOND / 2));
        assert!(queue.room_at(0).unwrap() <= now + 10 * SECOND);
    }

    #[test]
    fn what_lies_in_banks_will_be_in_the_queue() {
        let mut queue = Queue::new(Pace { burst: 2, rate: 1 });
        assert_eq!(queue.room_at(1), Some(Duration::ZERO));
        assert_eq!(queue.room_at(2), None);
        queue.taken(SECOND);
        assert_eq!(queue.room_at(1), Some(2 * SECOND));
    }

    #[test]
    fn the_room_is_what_the_burst_and_the_limit_leave() {
        let mut queue = Queue::new(Pace { burst: 16, rate: 2 });
        assert_eq!(queue.room(0, 16, SECOND), 16);
        assert_eq!((queue.room(3, 16, SECOND), queue.room(20, 16, SECOND)), (13, 0));
        assert_eq!(queue.room(0, 8, SECOND), 8);
        for _ in 0..16 {
            queue.taken(SECOND);
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
}
