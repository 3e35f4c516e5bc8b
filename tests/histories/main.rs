//! Tier 1: the rules of delivery, held against random histories on a model of KVM and of a guest
//! (`tests/src/history`). `tests/kvm/replay.rs` plays the same on KVM itself.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests say what they saw by panicking")]

use std::process::ExitCode;
use std::time::Duration;

use mce_relay::Pace;
use mce_relay::mca::{BANKS, Caps, Vendor, cap};
use mce_relay_tests::history::generate::{any_caps, boot, for_all, histories};
use mce_relay_tests::history::guest::GuestStep;
use mce_relay_tests::history::model::ModelVcpu;
use mce_relay_tests::history::{Counts, History, Op, driver};
use mce_relay_tests::suite;

const HISTORIES: u32 = 40_000;
/// Enough of them for all of [`WANTED`].
const LEAST: u32 = 4_000;
/// More than they take; a slower machine plays fewer.
const TIME: Duration = Duration::from_secs(20);

/// What has to have happened somewhere, for the invariants to have been put to the test.
const WANTED: [&str; 27] = [
    "AOs told",
    "ARs told",
    "acknowledged",
    "bystanders",
    "bystanders taken back",
    "cannot be told",
    "local machine checks",
    "pages",
    "records read",
    "rendezvous",
    "taken back",
    "told again",
    "touches let go",
    "unplugged",
    "waits for CR4.MCE",
    "waits for MCG_CTL",
    "waits for MCIP",
    "waits for MCi_CTL",
    "waits for SIPI",
    "waits for VAL",
    "waits for a bank",
    "waits for an interrupt",
    "waits for the handler's end",
    "waits for a pause",
    "waits for a thread",
    "waits for the pace",
    "waits to settle",
];

fn play(history: &History) -> Counts {
    let vcpus = (0..history.vcpus).map(|vcpu| ModelVcpu::new(vcpu, &history.caps));
    driver::play(history, vcpus.collect())
}

mod model {
    use super::*;

    pub fn no_history_breaks_an_invariant() {
        let counts = for_all(histories(any_caps()), HISTORIES, LEAST, TIME, play);
        println!("    {counts}");
        let missing = WANTED.into_iter().filter(|what| counts.of(what) == 0);
        assert_eq!(missing.collect::<Vec<_>>(), Vec::<&str>::new(), "these never happened");
    }
}

/// Histories that broke an invariant once.
mod found {
    use super::*;

    fn amd(vcpus: usize, pace: Pace, ops: impl IntoIterator<Item = Op>) -> History {
        let mcg_cap = u64::from(BANKS) | cap::CTL_P;
        let caps = Caps { vendor: Vendor::Amd, mcg_cap, succor: true };
        History { caps, vcpus, pace, ops: boot(vcpus).into_iter().chain(ops).collect() }
    }

    /// One page, its AO's record and its AR's, and a guest that starts over with both in its banks: the
    /// page waits once.
    pub fn two_lost_records_of_a_page_are_told_again_as_one() {
        play(&amd(
            1,
            Pace::default(),
            [
                Op::Ao { first: 0, pages: 1 },
                Op::Look(0),
                Op::Ar { vcpu: 0, page: 0 },
                Op::Look(0),
                Op::Guest(0, GuestStep::CloseHandler),
                Op::Look(0),
            ],
        ));
    }

    /// A processor that is taken offline right after its poll: what it took is in the guest's queue,
    /// though nobody can say so, and the same pages are told again.
    pub fn lost_records_count_for_the_pace() {
        let pace = Pace { burst: 4, rate: 1 };
        play(&amd(
            2,
            pace,
            [
                Op::Ao { first: 0, pages: 4 },
                Op::Look(1),
                Op::Guest(1, GuestStep::Poll),
                Op::Guest(1, GuestStep::Init),
                Op::Look(1),
                Op::Guest(1, GuestStep::Start),
                Op::Guest(1, GuestStep::OpenHandler),
                Op::Look(1),
                Op::Look(0),
                Op::Guest(0, GuestStep::Poll),
            ],
        ));
    }
}

fn anywhere() -> Result<(), String> {
    Ok(())
}

fn main() -> ExitCode {
    suite::run(mce_relay_tests::tests![
        found::two_lost_records_of_a_page_are_told_again_as_one needs anywhere,
        found::lost_records_count_for_the_pace needs anywhere,
        model::no_history_breaks_an_invariant needs anywhere,
    ])
}
