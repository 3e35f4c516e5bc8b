//! Events on their way to the observer, in their order and without the relay's lock.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use super::host::call_host;
use crate::event::Event;

/// Who is told of events.
pub(crate) type Observer = Box<dyn Fn(&Event) + Send + Sync>;

/// See the module.
pub(crate) struct Outbox {
    queue: Mutex<VecDeque<Event>>,
    /// Locked by whoever delivers.
    observer: Mutex<Observer>,
}

impl Outbox {
    pub(crate) fn new(observer: Observer) -> Self {
        Self { queue: Mutex::default(), observer: Mutex::new(observer) }
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<Event>> {
        // Whole entries are put in and taken out.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, event: Event) {
        self.queue().push_back(event);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue().is_empty()
    }

    /// Gives the observer what waits. Where another thread is at it, or this one further up, that one goes on with it.
    pub(crate) fn deliver(&self) {
        while !self.is_empty() {
            let observer = match self.observer.try_lock() {
                Ok(observer) => observer,
                // A panic of the observer's is caught before it gets here.
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            loop {
                let event = self.queue().pop_front();
                let Some(event) = event else { break };
                call_host("observer", || observer(&event));
            }
            // What came between the last look and here is looked for once more.
            drop(observer);
        }
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
                    outbox.push(Event::Overrun { signals: 1_000_000 });
                    outbox.deliver();
                }
            }))
        });
        outbox.push(event(0));
        outbox.deliver();
        assert_eq!(*seen.lock().unwrap(), [0, 1_000_000]);
        std::thread::scope(|scope| {
            for thread in 1..5 {
                scope.spawn(move || {
                    for number in 0..1000 {
                        outbox.push(event(thread * 10_000 + number));
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
    fn a_panic_of_the_observers_is_its_own() {
        let outbox = Outbox::new(Box::new(|_| panic!("the observer's")));
        outbox.push(event(1));
        outbox.push(event(2));
        outbox.deliver();
        assert!(outbox.is_empty());
    }
}
