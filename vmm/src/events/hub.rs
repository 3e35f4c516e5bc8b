//! The ring of events, and its followers.
//!
//! A thread that reports an event puts it into one ring and goes on. Every consumer (the log, the event monitor's file,
//! each client of the API) reads that ring at its own pace. So a follower that is slow, or stuck, costs neither memory
//! nor events of others: when it reads again it is told how many events it has missed.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::counts::Counts;
use crate::events::entry::Entry;
use crate::events::entry::{Next, What};

/// How many events are kept for followers: some seconds' worth at the highest rate seen.
pub const KEPT: usize = 16_384;

struct Ring {
    /// The last [`KEPT`] events.
    kept: VecDeque<Arc<Entry>>,
    /// Number of the first kept event, counted from the start of the VMM.
    first: u64,
    ended: bool,
    /// Tasks that wait for the next event, each with its follower's id. Threads wait on the condition variable.
    wakers: Vec<(u64, Waker)>,
    /// Id of the next follower.
    id: u64,
}

struct Shared {
    start: Instant,
    ring: Mutex<Ring>,
    news: Condvar,
    counts: Counts,
}

/// The ring. Cheap to clone.
#[derive(Clone)]
pub struct Hub(Arc<Shared>);

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub").finish_non_exhaustive()
    }
}

impl Default for Hub {
    fn default() -> Self {
        let ring =
            Ring { kept: VecDeque::new(), first: 0, ended: false, wakers: Vec::new(), id: 0 };
        Self(Arc::new(Shared {
            start: Instant::now(),
            ring: Mutex::new(ring),
            news: Condvar::new(),
            counts: Counts::default(),
        }))
    }
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, Ring> {
        // Nothing under the lock can panic half-way through a change.
        self.0.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reports an event. Quick: it waits for no follower.
    pub fn emit(&self, what: What) {
        self.0.counts.count(&what);
        let mut ring = self.lock();
        // Under the lock, so that times are in the order of the events.
        let time = self.0.start.elapsed();
        ring.kept.push_back(Arc::new(Entry { time, what }));
        if ring.kept.len() > KEPT {
            ring.kept.pop_front();
            ring.first += 1;
        }
        let wakers = std::mem::take(&mut ring.wakers);
        drop(ring);
        self.0.news.notify_all();
        wakers.into_iter().for_each(|(_, waker)| waker.wake());
    }

    /// How many events of each kind there were.
    #[must_use]
    pub fn counts(&self) -> &Counts {
        &self.0.counts
    }

    /// Ends the events: each follower reads what is left, and then [`Next::End`].
    pub fn end(&self) {
        let mut ring = self.lock();
        ring.ended = true;
        let wakers = std::mem::take(&mut ring.wakers);
        drop(ring);
        self.0.news.notify_all();
        wakers.into_iter().for_each(|(_, waker)| waker.wake());
    }

    /// Follows all events, from the first one that is still kept.
    #[must_use]
    pub fn follow(&self) -> Follower {
        let mut ring = self.lock();
        let next = ring.first;
        self.follower(&mut ring, next)
    }

    fn follower(&self, ring: &mut Ring, next: u64) -> Follower {
        ring.id += 1;
        Follower { hub: self.clone(), next, id: ring.id }
    }

    /// How many tasks wait for the next event.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.lock().wakers.len()
    }

    /// Follows the events that happen from now on.
    #[must_use]
    pub fn follow_from_now(&self) -> Follower {
        let mut ring = self.lock();
        let next = ring.first + ring.kept.len() as u64;
        self.follower(&mut ring, next)
    }
}

/// A reader of the ring.
#[derive(Debug)]
pub struct Follower {
    hub: Hub,
    /// Number of the event that is next.
    next: u64,
    id: u64,
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.hub.lock().wakers.retain(|(id, _)| *id != self.id);
    }
}

impl Follower {
    fn take_from(&mut self, ring: &Ring) -> Option<Next> {
        let Some(at) = self.next.checked_sub(ring.first) else {
            let events = ring.first - self.next;
            self.next = ring.first;
            return Some(Next::Missed { events, time: self.hub.0.start.elapsed() });
        };
        // An event beyond usize does not exist either.
        match usize::try_from(at).ok().and_then(|at| ring.kept.get(at)) {
            Some(entry) => {
                self.next += 1;
                Some(Next::Event(Arc::clone(entry)))
            }
            None if ring.ended => Some(Next::End),
            None => None,
        }
    }

    /// The next event, if there is one already.
    pub fn take(&mut self) -> Option<Next> {
        let hub = self.hub.clone();
        let ring = hub.lock();
        self.take_from(&ring)
    }

    /// The next event, waiting for it without limit. For threads.
    pub fn wait(&mut self) -> Next {
        let hub = self.hub.clone();
        let mut ring = hub.lock();
        loop {
            if let Some(next) = self.take_from(&ring) {
                return next;
            }
            ring = hub.0.news.wait(ring).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for `time`, or until there will be no more events; returns whether that is so. For threads that have
    /// periodic work.
    pub fn rest(&self, time: Duration) -> bool {
        let ring = self.hub.lock();
        let rested = self.hub.0.news.wait_timeout_while(ring, time, |ring| !ring.ended);
        let (ring, _) = rested.unwrap_or_else(PoisonError::into_inner);
        ring.ended
    }

    /// The next event, or a wake-up of the task when there is one. For tasks.
    pub fn poll(&mut self, context: &Context<'_>) -> Poll<Next> {
        let hub = self.hub.clone();
        let mut ring = hub.lock();
        match self.take_from(&ring) {
            Some(next) => Poll::Ready(next),
            None => {
                ring.wakers.retain(|(id, _)| *id != self.id);
                ring.wakers.push((self.id, context.waker().clone()));
                Poll::Pending
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::vm_event::VmEvent;

    fn resumed() -> What {
        What::Vm(VmEvent::Resumed {})
    }

    #[test]
    fn everybody_gets_everything_in_order() {
        let hub = Hub::default();
        let mut early = hub.follow();
        assert!(early.take().is_none());
        for boot in 0..10 {
            let (mcg_cap, vendor) = (String::new(), mce_relay::mca::Vendor::Amd);
            hub.emit(What::Vm(VmEvent::Booting { boot, unix_time: 0.0, mcg_cap, vendor }));
        }
        let mut now = hub.follow_from_now();
        let mut late = hub.follow();
        hub.end();
        for follower in [&mut early, &mut late] {
            for expected in 0..10 {
                let Next::Event(entry) = follower.wait() else { panic!("no event {expected}") };
                assert!(
                    matches!(entry.what, What::Vm(VmEvent::Booting { boot, .. }) if boot == expected)
                );
            }
            assert!(matches!(follower.wait(), Next::End));
        }
        assert!(matches!(now.wait(), Next::End));
    }

    #[test]
    fn who_stands_still_is_told_what_it_missed_and_goes_on() {
        let hub = Hub::default();
        let mut stuck = hub.follow();
        for _ in 0..KEPT + 100 {
            hub.emit(resumed());
        }
        assert_eq!(hub.lock().kept.len(), KEPT, "memory is bounded");
        assert!(matches!(stuck.take(), Some(Next::Missed { events: 100, .. })));
        let rest = std::iter::from_fn(|| stuck.take()).count();
        assert_eq!(rest, KEPT);
    }

    #[test]
    fn a_rest_ends_with_its_time_or_with_the_events() {
        let hub = Hub::default();
        let follower = hub.follow();
        hub.emit(resumed());
        assert!(!follower.rest(Duration::from_millis(1)));
        let thread = std::thread::spawn(move || follower.rest(Duration::MAX));
        hub.end();
        assert!(thread.join().unwrap());
    }

    #[test]
    fn a_thread_that_waits_is_woken() {
        let hub = Hub::default();
        let mut follower = hub.follow();
        let thread = std::thread::spawn(move || follower.wait());
        hub.emit(resumed());
        assert!(matches!(thread.join().unwrap(), Next::Event(_)));
    }
}
