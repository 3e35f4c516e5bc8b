//! Makes histories, and plays many of them.

use std::cell::RefCell;
use std::fmt::Debug;
use std::time::{Duration, Instant};

use mce_relay::Pace;
use mce_relay::mca::{BANKS, Caps, Vendor, cap};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestError, TestRunner};

use super::guest::GuestStep;
use super::{Counts, History, Op};

/// Pages that go bad. Few enough that the same one is met again by AO and AR.
const PAGES: u64 = 40;
/// Steps of a history before the guest becomes well.
const OPS: usize = 100;
/// The same histories each time; `PROPTEST_RNG_SEED` and `PROPTEST_CASES` ask for others, and more.
const SEED: u64 = 3;
/// How long a history that fails is made smaller.
const SHRINK_MILLIS: u32 = 60_000;

/// What guests of `vendor` are shown, with `banks` banks: all that there is, or not.
pub fn caps(vendor: Vendor, banks: impl Strategy<Value = u8>) -> impl Strategy<Value = Caps> {
    let most = prop::bool::weighted(0.9);
    (banks, most, any::<bool>()).prop_map(move |(banks, recovers, lmce)| {
        let intel = vendor == Vendor::Intel;
        let bit = |shown, bit| if shown { bit } else { 0 };
        let mcg_cap = u64::from(banks)
            | cap::CTL_P
            | bit(intel && recovers, cap::SER_P)
            | bit(intel && lmce, cap::LMCE_P);
        Caps { vendor, mcg_cap, succor: !intel && recovers }
    })
}

/// Any vendor, mostly with the usual number of banks.
pub fn any_caps() -> impl Strategy<Value = Caps> {
    let banks = || prop_oneof![8 => Just(BANKS), 1 => 1..BANKS, 1 => BANKS..=32];
    prop_oneof![caps(Vendor::Amd, banks()), caps(Vendor::Intel, banks())]
}

fn pace() -> impl Strategy<Value = Pace> {
    let small = (1..=4u32, 1..=40u32).prop_map(|(burst, rate)| Pace { burst, rate });
    prop_oneof![Just(Pace::default()), small]
}

fn time() -> impl Strategy<Value = Duration> {
    let millis = prop_oneof![6 => 0..100u64, 3 => 900..1100u64, 1 => 4900..5200u64];
    millis.prop_map(Duration::from_millis)
}

/// One of a guest's steps on `vcpu`.
pub fn guest_step(vcpu: usize) -> impl Strategy<Value = GuestStep> {
    // The banks that carry ARs and AOs of Intel guests are worth more than the others.
    let bank = prop_oneof![7..BANKS, 0..BANKS];
    prop_oneof![
        3 => Just(GuestStep::Start),
        1 => Just(if vcpu == 0 { GuestStep::CloseHandler } else { GuestStep::Init }),
        4 => Just(GuestStep::OpenHandler),
        1 => Just(GuestStep::CloseHandler),
        2 => Just(GuestStep::WipeBanks),
        2 => (bank, any::<bool>()).prop_map(|(bank, on)| GuestStep::BankCtl(bank, on)),
        1 => any::<bool>().prop_map(GuestStep::McgCtl),
        2 => any::<bool>().prop_map(GuestStep::Lmce),
        12 => Just(GuestStep::HandleOneBank),
        2 => Just(GuestStep::ClearMcip),
        8 => Just(GuestStep::LeaveHandler),
        1 => any::<bool>().prop_map(GuestStep::Interrupts),
        6 => Just(GuestStep::Poll),
        1 => Just(GuestStep::Offline),
    ]
}

fn op(vcpus: usize) -> impl Strategy<Value = Op> {
    let page = 0..PAGES;
    prop_oneof![
        4 => page.clone().prop_map(|first| Op::Ao { first, pages: 1 }),
        1 => (page.clone(), 1..PAGES).prop_map(|(first, pages)| Op::Ao { first, pages }),
        3 => (0..vcpus, page).prop_map(|(vcpu, page)| Op::Ar { vcpu, page }),
        1 => (0..vcpus).prop_map(Op::Interrupt),
        12 => (0..vcpus).prop_map(Op::Look),
        5 => time().prop_map(Op::Advance),
        1 => (0..vcpus, any::<bool>()).prop_map(|(vcpu, on)| Op::Pause(vcpu, on)),
        1 => (0..vcpus, prop::bool::weighted(0.3)).prop_map(|(vcpu, on)| Op::Late(vcpu, on)),
        1 => (0..vcpus, any::<bool>()).prop_map(|(vcpu, on)| Op::Plug(vcpu, on)),
        1 => (0..PAGES, any::<bool>()).prop_map(|(page, on)| Op::Ram(page, on)),
        20 => (0..vcpus).prop_flat_map(|vcpu| guest_step(vcpu).prop_map(move |step| Op::Guest(vcpu, step))),
    ]
}

/// A guest that has set up its machine checks, and has been looked at, a while ago.
pub fn boot(vcpus: usize) -> Vec<Op> {
    let steps = [
        GuestStep::Start,
        GuestStep::OpenHandler,
        GuestStep::WipeBanks,
        GuestStep::Interrupts(true),
    ];
    let vcpu = |vcpu| steps.map(|step| Op::Guest(vcpu, step)).into_iter().chain([Op::Look(vcpu)]);
    let wait = Op::Advance(Duration::from_secs(2));
    (0..vcpus).flat_map(vcpu).chain([wait]).collect()
}

/// Histories of guests that were shown any of `caps`. Three of four begin with a guest that is up.
pub fn histories(caps: impl Strategy<Value = Caps>) -> impl Strategy<Value = History> {
    (caps, 1..=4usize, pace(), prop::bool::weighted(0.75)).prop_flat_map(
        |(caps, vcpus, pace, up)| {
            prop::collection::vec(op(vcpus), 1..OPS).prop_map(move |ops| {
                let before = if up { boot(vcpus) } else { Vec::new() };
                History { caps, vcpus, pace, ops: before.into_iter().chain(ops).collect() }
            })
        },
    )
}

/// Plays `cases` values of `strategy`, fewer when `time` is over but `least` in any case, and adds up
/// what happened.
///
/// # Panics
/// One of them does; the words are its own, and the value, made as small as it goes.
pub fn for_all<T: Debug>(
    strategy: impl Strategy<Value = T>,
    cases: u32,
    least: u32,
    time: Duration,
    play: impl Fn(&T) -> Counts,
) -> Counts {
    let asked = Config::default();
    let seed =
        if asked.rng_seed == RngSeed::Random { RngSeed::Fixed(SEED) } else { asked.rng_seed };
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { asked.cases } else { cases };
    let mut runner = TestRunner::new(Config {
        rng_seed: seed,
        max_shrink_time: SHRINK_MILLIS,
        failure_persistence: None,
        ..asked
    });
    let (start, counts) = (Instant::now(), RefCell::new(Counts::default()));
    for case in 0..cases {
        if case >= least && start.elapsed() >= time {
            break;
        }
        let value = strategy.new_tree(&mut runner).expect("a value");
        let result = runner.run_one(value, |value| {
            counts.borrow_mut().add(&play(&value));
            Ok(())
        });
        match result {
            Ok(_) => {}
            Err(TestError::Fail(reason, value)) => panic!("{reason}\n{value:?}"),
            Err(TestError::Abort(reason)) => panic!("{reason}"),
        }
    }
    counts.into_inner()
}
