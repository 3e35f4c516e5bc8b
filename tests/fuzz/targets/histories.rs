//! Histories of errors, of a guest and of its vCPUs' threads, in any order, against the invariants of
//! delivery (`tests/src/history`): the ones of `tests/histories`, steered by what code they reach.
#![no_main]

use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use mce_relay::Pace;
use mce_relay::mca::{BANKS, Caps, Vendor, cap};
use mce_relay_tests::history::generate::boot;
use mce_relay_tests::history::guest::GuestStep;
use mce_relay_tests::history::model::ModelVcpu;
use mce_relay_tests::history::{History, Op, driver};

/// As in `generate`.
const PAGES: u64 = 40;

#[derive(Debug, Arbitrary)]
struct Input {
    intel: bool,
    banks: u8,
    recovers: bool,
    lmce: bool,
    vcpus: u8,
    pace: Option<(u8, u8)>,
    up: bool,
    steps: Vec<Step>,
}

#[derive(Debug, Arbitrary)]
enum Step {
    Ao(u8, u8),
    Ar(u8, u8),
    Interrupt(u8),
    Look(u8),
    Advance(u16),
    Guest(u8, u8, u8, bool),
}

impl Step {
    fn op(&self, vcpus: usize, banks: u8) -> Op {
        let of = |vcpu: u8| usize::from(vcpu) % vcpus;
        let page = |page: u8| u64::from(page) % PAGES;
        match *self {
            Self::Ao(first, pages) => Op::Ao { first: page(first), pages: 1 + page(pages) },
            Self::Ar(vcpu, at) => Op::Ar { vcpu: of(vcpu), page: page(at) },
            Self::Interrupt(vcpu) => Op::Interrupt(of(vcpu)),
            Self::Look(vcpu) => Op::Look(of(vcpu)),
            Self::Advance(millis) => Op::Advance(Duration::from_millis(u64::from(millis) % 5200)),
            Self::Guest(vcpu, step, bank, on) => {
                let vcpu = of(vcpu);
                Op::Guest(vcpu, step_of(vcpu, step, bank % banks, on))
            }
        }
    }
}

fn step_of(vcpu: usize, step: u8, bank: u8, on: bool) -> GuestStep {
    match step % 14 {
        0 => GuestStep::Start,
        // The boot processor is never taken offline.
        1 if vcpu != 0 => GuestStep::Init,
        1 | 2 => GuestStep::CloseHandler,
        3 => GuestStep::OpenHandler,
        4 => GuestStep::WipeBanks,
        5 => GuestStep::BankCtl(bank, on),
        6 => GuestStep::McgCtl(on),
        7 => GuestStep::Lmce(on),
        8 | 9 => GuestStep::HandleOneBank,
        10 => GuestStep::ClearMcip,
        11 => GuestStep::LeaveHandler,
        12 => GuestStep::Interrupts(on),
        _ => GuestStep::Poll,
    }
}

fuzz_target!(|input: Input| {
    let banks = if input.banks == 0 { BANKS } else { 1 + (input.banks - 1) % 32 };
    let vcpus = 1 + usize::from(input.vcpus % 4);
    let bit = |shown, bit| if shown { bit } else { 0 };
    let mcg_cap = u64::from(banks)
        | cap::CTL_P
        | bit(input.intel && input.recovers, cap::SER_P)
        | bit(input.intel && input.lmce, cap::LMCE_P);
    let vendor = if input.intel { Vendor::Intel } else { Vendor::Amd };
    let caps = Caps { vendor, mcg_cap, succor: !input.intel && input.recovers };
    let pace = input.pace.map_or_else(Pace::default, |(burst, rate)| Pace {
        burst: 1 + u32::from(burst % 4),
        rate: 1 + u32::from(rate % 40),
    });
    let before = if input.up { boot(vcpus) } else { Vec::new() };
    let steps = input.steps.iter().take(200).map(|step| step.op(vcpus, banks.min(BANKS)));
    let history = History { caps, vcpus, pace, ops: before.into_iter().chain(steps).collect() };
    let models = (0..vcpus).map(|vcpu| ModelVcpu::new(vcpu, &caps)).collect();
    driver::play(&history, models);
});
