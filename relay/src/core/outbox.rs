//! Events on their way to the observer, in their order and without the relay's lock.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::ThreadId;

use super::host::call_host;
use crate::event::Event;

/// The host's callback for events.
pub(crate) type Observer = Box<dyn Fn(&Event) + Send + Sync>;

/// See the module.
pub(crate) struct Outbox {
    queue: Mutex<VecDeque<Event>>,
    /// Locked by the thread that delivers.
    observer: Mutex<Observer>,
    /// The thread that delivers.
    by: Mutex<Option<ThreadId>>,
}

impl Outbox {
    pub(crate) fn new(observer: Observer) -> Self {
        Self { queue: Mutex::default(), observer: Mutex::new(observer), by: Mutex::default() }
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<Event>> {
        // Whole entries are put in and taken out.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These come behind those that wait.
    pub(crate) fn extend(&self, events: Vec<Event>) {
        if !events.is_empty() {
            self.queue().extend(events);
        }
    }

    fn is_empty(&self) -> bool {
        self.queue().is_empty()
    }

    /// Delivers what waits, and returns when all of it has been delivered, by whichever thread: before the process is
    /// ended, a vCPU is kept out of the guest, or the observer is dropped. Must not be called by the observer, for
    /// which it would wait.
    pub(crate) fn flush(&self) {
        let by = *self.by.lock().unwrap_or_else(PoisonError::into_inner);
        if by == Some(std::thread::current().id()) {
            return;
        }
        self.give_all(self.observer.lock().unwrap_or_else(PoisonError::into_inner));
        self.deliver();
    }

    /// Delivers what waits. If another thread is delivering, or this one further up its stack, that one goes on with
    /// it.
    pub(crate) fn deliver(&self) {
        while !self.is_empty() {
            match self.observer.try_lock() {
                Ok(observer) => self.give_all(observer),
                // A panic of the observer's is caught before it gets here.
                Err(TryLockError::Poisoned(poisoned)) => self.give_all(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) => return,
            }
            // What came between the last look and here is looked for once more.
        }
    }

    fn give_all(&self, observer: MutexGuard<'_, Observer>) {
        let set = |by| *self.by.lock().unwrap_or_else(PoisonError::into_inner) = by;
        set(Some(std::thread::current().id()));
        loop {
            let event = self.queue().pop_front();
            let Some(event) = event else { break };
            call_host("observer", || observer(&event));
        }
        set(None);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::{Arc, OnceLock};

    use super::*;

    fn event(signals: u32) -> Event {
        Event::Overrun { signals }
    }

    #[test]
    fn events_come_in_order_from_any_thread_and_from_within() {
        static OUTBOX: OnceLock<Outbox> = OnceLock::new();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (of, inside) = (Arc::clone(&seen), AtomicU32::new(0));
        let outbox = OUTBOX.get_or_init(|| {
            Outbox::new(Box::new(move |event| {
                let Event::Overrun { signals } = *event else { return };
                of.lock().unwrap().push(signals);
                if signals == 0 && inside.fetch_add(1, Ordering::Relaxed) == 0 {
                    let outbox = OUTBOX.get().unwrap();
                    outbox.extend(vec![Event::Overrun { signals: 1_000_000 }]);
                    outbox.deliver();
                }
            }))
        });
        outbox.extend(vec![event(0)]);
        outbox.deliver();
        assert_eq!(*seen.lock().unwrap(), [0, 1_000_000]);
        std::thread::scope(|scope| {
            for thread in 1..5 {
                scope.spawn(move || {
                    for number in 0..1000 {
                        outbox.extend(vec![event(thread * 10_000 + number)]);
                        outbox.deliver();
                    }
                });
            }
        });
        let seen = seen.lock().unwrap();
        assert_eq!(seen.len(), 2 + 4 * 1000, "none is lost, and none waits");
        for thread in 1..5 {
            let of: Vec<u32> = seen.iter().copied().filter(|n| n / 10_000 == thread).collect();
            assert!(of.is_sorted() && of.len() == 1000);
        }
    }

    #[test]
    fn a_flush_waits_for_who_is_at_it() {
        let told = Arc::new(AtomicU32::new(0));
        let of = Arc::clone(&told);
        let outbox = Outbox::new(Box::new(move |_| {
            std::thread::sleep(std::time::Duration::from_millis(50));
            of.fetch_add(1, Ordering::Relaxed);
        }));
        std::thread::scope(|scope| {
            outbox.extend(vec![event(1), event(2)]);
            scope.spawn(|| outbox.deliver());
            while outbox.queue().len() == 2 {
                std::thread::yield_now();
            }
            outbox.extend(vec![event(3)]);
            outbox.deliver();
            assert!(told.load(Ordering::Relaxed) < 3, "another thread is at it");
            outbox.flush();
            assert_eq!(told.load(Ordering::Relaxed), 3);
        });
    }

    #[test]
    fn a_panic_of_the_observers_is_its_own() {
        let outbox = Outbox::new(Box::new(|_| panic!("the observer's")));
        outbox.extend(vec![event(1)]);
        outbox.extend(vec![event(2)]);
        outbox.deliver();
        assert!(outbox.is_empty());
    }
}
