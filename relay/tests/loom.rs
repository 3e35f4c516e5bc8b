//! What the SIGBUS handler shares with others, in every interleaving and with every order of stores
//! that the memory model allows: `src/signal/slot.rs` itself, on loom's atomics.
//!
//! The models are stricter than the truth. A handler interrupts its own thread, so that thread sees
//! its stores in order; here it is another thread, which sees no more than acquire and release say.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test says what it saw by panicking")]

use std::sync::Arc;

use loom::sync::atomic::AtomicBool;
use loom::thread;

/// Where `slot` finds what a failure is.
mod types {
    pub(crate) use mce_relay::FailureKind;
    pub(crate) use mce_relay::internals::Caught;
}

#[path = "../src/signal/slot.rs"]
#[allow(dead_code, reason = "the models use no more of it than the handler and its readers do")]
mod slot;

/// Where `slot` gets its atomics.
mod sync {
    use loom::cell::UnsafeCell;
    pub(crate) use loom::model;
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};

    /// An entry's address. loom does not let a load see a store that is made after it, as a
    /// processor may; so that no entry is overwritten while it is read, nobody may write here
    /// unless acquire and release put all other uses before or after it.
    #[derive(Debug, Default)]
    pub(crate) struct AtomicU64(UnsafeCell<u64>);

    // SAFETY: loom runs one thread at a time and ends the test when two accesses race.
    unsafe impl Sync for AtomicU64 {}

    impl AtomicU64 {
        pub(crate) fn load(&self, _: Ordering) -> u64 {
            // SAFETY: as above.
            self.0.with(|value| unsafe { *value })
        }

        pub(crate) fn store(&self, new: u64, _: Ordering) {
            // SAFETY: as above.
            self.0.with_mut(|value| unsafe { *value = new });
        }
    }
}

use slot::{Orphans, Slot};
use sync::{Ordering, model};
use types::Caught;

/// One of a few signals that differ from each other, and from an empty entry, in all they have.
fn signal(number: u8) -> Caught {
    let kind = if number.is_multiple_of(2) {
        types::FailureKind::ActionRequired
    } else {
        types::FailureKind::ActionOptional
    };
    Caught { kind, hva: 0x7f00_0000_1000 + u64::from(number), lsb: 12 + number }
}

/// The number of a signal, which is as it was stored.
fn number(caught: Caught) -> u8 {
    let number = caught.lsb.wrapping_sub(12);
    assert!(number < 8 && caught == signal(number), "torn: {caught:?}");
    number
}

/// What a thread does that was asked for attention.
fn look<const LEN: usize>(slot: &Slot<LEN>, taken: &mut Vec<u8>) {
    slot.clear_attention();
    taken.extend(std::iter::from_fn(|| slot.take()).map(number));
}

/// What a thread does each time it comes round.
fn come_round<const LEN: usize>(slot: &Slot<LEN>, taken: &mut Vec<u8>) {
    if slot.attention() {
        look(slot, taken);
    }
}

#[test]
fn a_signal_is_taken_or_asks_for_attention() {
    model(|| {
        let slot = Arc::new(Slot::<4>::new());
        let handler = thread::spawn({
            let slot = Arc::clone(&slot);
            move || (0..3).for_each(|number| assert!(slot.store(signal(number))))
        });
        let mut taken = Vec::new();
        come_round(&slot, &mut taken);
        look(&slot, &mut taken);
        handler.join().unwrap();

        let left = !slot.is_empty();
        assert!(!left || slot.attention(), "a signal is left and nobody looks: took {taken:?}");
        come_round(&slot, &mut taken);
        assert_eq!(taken, [0, 1, 2], "each once, in order");
        assert_eq!(slot.take_overrun(), 0);
    });
}

#[test]
fn a_full_ring_counts_and_overwrites_nothing() {
    model(|| {
        let slot = Arc::new(Slot::<2>::new());
        let handler = thread::spawn({
            let slot = Arc::clone(&slot);
            move || (0..4).filter(|number| slot.store(signal(*number))).collect::<Vec<u8>>()
        });
        let mut taken = Vec::new();
        look(&slot, &mut taken);
        taken.extend(slot.take().map(number));
        let stored = handler.join().unwrap();

        come_round(&slot, &mut taken);
        assert_eq!(taken, stored, "what was stored, each once, in order");
        assert_eq!(slot.take_overrun() as usize, 4 - stored.len(), "and the others are counted");
    });
}

#[test]
fn a_request_is_not_lost_between_signals() {
    model(|| {
        let slot = Arc::new(Slot::<2>::new());
        // What the other thread wants seen; in truth it is behind a lock, here nothing else helps.
        let wanted = Arc::new(AtomicBool::new(false));
        let handler = thread::spawn({
            let slot = Arc::clone(&slot);
            move || assert!(slot.store(signal(0)))
        });
        let asker = thread::spawn({
            let (slot, wanted) = (Arc::clone(&slot), Arc::clone(&wanted));
            move || {
                wanted.store(true, Ordering::Relaxed);
                slot.ask_attention();
            }
        });
        let (mut taken, mut seen) = (Vec::new(), false);
        for _ in 0..2 {
            come_round(&slot, &mut taken);
            seen |= wanted.load(Ordering::Relaxed);
        }
        handler.join().unwrap();
        asker.join().unwrap();

        let done = seen && taken == [0];
        assert!(done || slot.attention(), "lost: took {taken:?}, request seen: {seen}");
    });
}

/// Handlers of `PRODUCERS` threads at once, each with one signal; this thread is one of them. This
/// thread and `takers` more take one each meanwhile.
fn orphans<const PLACES: usize, const PRODUCERS: u8>(takers: usize) {
    model(move || {
        let orphans = Arc::new(Orphans::<PLACES>::new());
        let producing: Vec<_> = (1..PRODUCERS)
            .map(|number| {
                let orphans = Arc::clone(&orphans);
                thread::spawn(move || orphans.store(signal(number)))
            })
            .collect();
        let taking: Vec<_> = (0..takers)
            .map(|_| {
                let orphans = Arc::clone(&orphans);
                thread::spawn(move || orphans.take())
            })
            .collect();
        orphans.store(signal(0));
        let mut taken = vec![orphans.take()];
        producing.into_iter().for_each(|thread| thread.join().unwrap());
        taken.extend(taking.into_iter().map(|thread| thread.join().unwrap()));

        taken.extend((0..PLACES).map(|_| orphans.take()));
        let mut taken: Vec<u8> = taken.into_iter().flatten().map(number).collect();
        taken.sort_unstable();
        assert!(taken.is_sorted_by(|one, next| one < next), "taken twice: {taken:?}");
        assert!(taken.len() >= PLACES, "dropped where there was room: {taken:?}");
        let dropped = usize::from(PRODUCERS) - taken.len();
        assert_eq!(orphans.take_dropped() as usize, dropped, "taken: {taken:?}");
        assert_eq!(orphans.take(), None);
    });
}

#[test]
fn two_orphans_and_one_place() {
    orphans::<1, 2>(0);
}

#[test]
fn three_orphans_and_one_place() {
    orphans::<1, 3>(0);
}

#[test]
fn three_orphans_and_two_places() {
    orphans::<2, 3>(0);
}

#[test]
fn two_orphans_and_two_takers() {
    orphans::<1, 2>(1);
}
