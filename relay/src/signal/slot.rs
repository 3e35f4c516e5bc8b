//! Where the SIGBUS handler leaves what it caught: a ring for each thread that takes part, and a
//! few places for the signals of all other threads.
//!
//! Everything here that a handler calls is async-signal-safe: atomic accesses, loops of a fixed
//! length, nothing that can panic.
//!
//! The atomics come from `crate::sync`, so that `tests/loom.rs` runs this very file on loom's and
//! goes through every interleaving and every order in which a processor may show the stores.

use crate::sync::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use crate::types::{Caught, FailureKind};

/// How many signals a slot holds between two calls of `take`. SIGBUS does not queue, so few signals come in between.
const PLACES: usize = 16;

/// One [`Caught`]. Its user has to have exclusive access.
#[derive(Debug, Default)]
struct Entry {
    hva: AtomicU64,
    ar: AtomicBool,
    lsb: AtomicU8,
}

impl Entry {
    fn set(&self, caught: Caught) {
        self.hva.store(caught.hva, Ordering::Relaxed);
        self.ar.store(matches!(caught.kind, FailureKind::ActionRequired), Ordering::Relaxed);
        self.lsb.store(caught.lsb, Ordering::Relaxed);
    }

    fn get(&self) -> Caught {
        let ar = self.ar.load(Ordering::Relaxed);
        Caught {
            kind: if ar { FailureKind::ActionRequired } else { FailureKind::ActionOptional },
            hva: self.hva.load(Ordering::Relaxed),
            lsb: self.lsb.load(Ordering::Relaxed),
        }
    }
}

/// What the handler of one thread writes, and that thread reads: a ring with one writer and one
/// reader. In truth the writer interrupts the reader, on the same thread; nothing here relies on it.
#[derive(Debug)]
pub(crate) struct Slot<const LEN: usize = PLACES> {
    /// The thread has something to look at: a signal was stored, or another thread asks. The run loop reads this once
    /// per exit.
    attention: AtomicBool,
    /// Number of entries written; only the handler adds.
    written: AtomicU32,
    /// Number of entries taken; only the thread adds, outside the handler.
    taken: AtomicU32,
    /// Signals that found the ring full.
    overrun: AtomicU32,
    ring: [Entry; LEN],
}

impl<const LEN: usize> Slot<LEN> {
    /// An empty ring that wants no attention.
    pub(crate) fn new() -> Self {
        // The counters wrap at 2^32; the place of an entry in the ring must not jump then.
        const { assert!(LEN.is_power_of_two()) };
        Self {
            attention: AtomicBool::new(false),
            written: AtomicU32::new(0),
            taken: AtomicU32::new(0),
            overrun: AtomicU32::new(0),
            ring: std::array::from_fn(|_| Entry::default()),
        }
    }

    /// Stores one signal and asks for attention; returns false when the ring is full. Called by the thread's own
    /// handler. Async-signal-safe.
    pub(crate) fn store(&self, caught: Caught) -> bool {
        let written = self.written.load(Ordering::Relaxed);
        let full = written.wrapping_sub(self.taken.load(Ordering::Acquire)) as usize >= LEN;
        if full {
            self.overrun.fetch_add(1, Ordering::Relaxed);
        } else {
            self.ring[written as usize % LEN].set(caught);
            self.written.store(written.wrapping_add(1), Ordering::Release);
        }
        self.ask_attention();
        !full
    }

    /// Makes the thread look, at the latest before it enters its guest again. For any thread. Async-signal-safe.
    pub(crate) fn ask_attention(&self) {
        // A swap, not a store, so that the thread that clears the flag has seen what came before every request, not
        // only before the last one.
        self.attention.swap(true, Ordering::Release);
    }

    /// Whether a signal was stored or another thread asked. One relaxed load.
    #[inline]
    pub(crate) fn attention(&self) -> bool {
        self.attention.load(Ordering::Relaxed)
    }

    /// Clears the flag. Call it before [`Self::take`], so that a signal that comes later sets it again.
    pub(crate) fn clear_attention(&self) {
        self.attention.swap(false, Ordering::Acquire);
    }

    /// Takes the oldest stored signal.
    pub(crate) fn take(&self) -> Option<Caught> {
        if self.is_empty() {
            return None;
        }
        let taken = self.taken.load(Ordering::Relaxed);
        let caught = self.ring[taken as usize % LEN].get();
        self.taken.store(taken.wrapping_add(1), Ordering::Release);
        Some(caught)
    }

    /// Whether no signal is stored.
    pub(crate) fn is_empty(&self) -> bool {
        self.taken.load(Ordering::Relaxed) == self.written.load(Ordering::Acquire)
    }

    /// Takes the number of signals that found the ring full.
    pub(crate) fn take_overrun(&self) -> u32 {
        self.overrun.swap(0, Ordering::Relaxed)
    }
}

/// The place is free.
const EMPTY: u8 = 0;
/// One handler writes the place, or one thread takes what is in it.
const HELD: u8 = 1;
/// The place holds a signal.
const READY: u8 = 2;

#[derive(Debug)]
struct Place {
    state: AtomicU8,
    entry: Entry,
}

impl Place {
    /// Acquires the place for the caller, if it is in state `from`; returns whether it did.
    fn hold(&self, from: u8) -> bool {
        // Acquire: the last holder's accesses to the entry are over.
        self.state.compare_exchange(from, HELD, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    fn release(&self, to: u8) {
        self.state.store(to, Ordering::Release);
    }
}

/// AOs that were signalled to a thread without a [`Slot`] (one that set early kill for itself). Handlers of any number
/// of threads write here at once, so each acquires a place first.
#[derive(Debug)]
pub(crate) struct Orphans<const LEN: usize = PLACES> {
    places: [Place; LEN],
    /// Signals that found no empty place.
    dropped: AtomicU32,
}

impl<const LEN: usize> Orphans<LEN> {
    /// All places empty.
    pub(crate) fn new() -> Self {
        let place = |_| Place { state: AtomicU8::new(EMPTY), entry: Entry::default() };
        Self { places: std::array::from_fn(place), dropped: AtomicU32::new(0) }
    }

    /// Stores one signal; where no place is empty it is dropped and counted. Async-signal-safe.
    pub(crate) fn store(&self, caught: Caught) {
        match self.places.iter().find(|place| place.hold(EMPTY)) {
            Some(place) => {
                place.entry.set(caught);
                place.release(READY);
            }
            None => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Takes a stored signal, in no particular order.
    pub(crate) fn take(&self) -> Option<Caught> {
        let place = self.places.iter().find(|place| place.hold(READY))?;
        let caught = place.entry.get();
        place.release(EMPTY);
        Some(caught)
    }

    /// Takes the number of signals that were dropped.
    pub(crate) fn take_dropped(&self) -> u32 {
        self.dropped.swap(0, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::model;

    fn ao(hva: u64) -> Caught {
        Caught { kind: FailureKind::ActionOptional, hva, lsb: 12 }
    }

    #[test]
    fn a_slot_keeps_order_and_counts_what_it_cannot_hold() {
        model(|| {
            let slot = <Slot>::new();
            assert_eq!(slot.take(), None);
            for page in 0..PLACES as u64 {
                assert!(slot.store(ao(page << 12)));
            }
            assert!(!slot.store(ao(0xbad)), "full");
            for page in 0..PLACES as u64 {
                assert_eq!(slot.take(), Some(ao(page << 12)));
            }
            assert_eq!(slot.take(), None);
            assert_eq!((slot.take_overrun(), slot.take_overrun()), (1, 0));
            let ar = Caught { kind: FailureKind::ActionRequired, hva: u64::MAX, lsb: u8::MAX };
            assert!(slot.store(ar), "room again");
            assert_eq!(slot.take(), Some(ar));
        });
    }

    #[test]
    fn the_counters_may_wrap() {
        model(|| {
            let slot = <Slot>::new();
            slot.written.store(u32::MAX, Ordering::Relaxed);
            slot.taken.store(u32::MAX, Ordering::Relaxed);
            for page in 0..PLACES as u64 {
                assert!(slot.store(ao(page)));
            }
            assert!(!slot.store(ao(0xbad)), "full");
            for page in 0..PLACES as u64 {
                assert_eq!(slot.take(), Some(ao(page)));
            }
            assert!(slot.is_empty());
        });
    }

    #[test]
    fn orphans_are_counted_where_they_cannot_be_held() {
        model(|| {
            let orphans = <Orphans>::new();
            assert_eq!(orphans.take(), None);
            (0..PLACES as u64 + 2).for_each(|page| orphans.store(ao(page)));
            for page in 0..PLACES as u64 {
                assert_eq!(orphans.take(), Some(ao(page)));
            }
            assert_eq!(orphans.take(), None);
            assert_eq!((orphans.take_dropped(), orphans.take_dropped()), (2, 0));
        });
    }
}
