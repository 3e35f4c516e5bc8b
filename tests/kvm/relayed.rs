//! The same situations with the relay in between: nothing is lost, and nothing shuts down.

use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use mce_relay::internals::flush;
use mce_relay::mca::{mcg, record};
use mce_relay::{
    Event, ExitByte, Form, Injection, RamMap, RamRegion, Relay, State, VcpuPort, Verdict,
};

use crate::payload::{Did, Payload, Ram, Start, TARGET, handled};

#[path = "../../relay/tests/forge/mod.rs"]
mod siginfo;
use siginfo::{BUS_MCEERR_AO, BUS_MCEERR_AR};

/// A stretch of addresses where nothing is mapped, or where there is memory that is this program's for this alone.
fn region(hva: u64, gpa: u64, len: u64) -> RamRegion {
    // SAFETY: no reference of Rust's leads there.
    unsafe { RamRegion::new(hva, gpa, len) }
}

/// Sends this thread a memory failure at [`TARGET`], as the kernel would.
fn forge(code: i32, ram: &Ram) {
    siginfo::forge(code, ram.hva() + TARGET, 12);
}

/// A payload with a relay, on this thread.
pub struct Relayed {
    pub port: VcpuPort,
    pub relay: Relay,
    pub payload: Payload,
    pub events: Receiver<Event>,
}

impl Relayed {
    pub fn new(start: Start, cr4_mce: bool) -> Self {
        let mut payload = Payload::new(start, cr4_mce);
        let (send, events) = channel();
        let region = region(payload.ram.hva(), 0, Ram::LEN);
        let ram = RamMap::new(&[region]).unwrap();
        let observer = move |event: &Event| drop(send.send(event.clone()));
        let relay = Relay::builder(ram)
            .vcpus(1)
            .machine_checks(payload.guest.caps())
            .observer(observer)
            .start()
            .unwrap();
        let exit = &raw mut payload.vcpu.get_kvm_run().immediate_exit;
        // The payload leaves the guest by itself at every beat, so nobody has to kick it.
        // SAFETY: `port` is dropped before `payload`, whose kvm_run the byte lies in (field order).
        let exit = unsafe { ExitByte::new(exit) };
        let port = relay.attach(0, exit, || {}).unwrap();
        Self { port, relay, payload, events }
    }

    /// What a VMM does before KVM_RUN.
    pub fn before_run(&mut self) -> Verdict {
        self.payload.finish_io();
        self.payload.vcpu.set_kvm_immediate_exit(0);
        self.port.before_run(&mut self.payload.guest.on(&self.payload.vcpu))
    }

    /// Runs the guest with the relay until it has done `wanted`.
    pub fn run_to(&mut self, wanted: impl Fn(Did) -> bool) -> Did {
        let start = Instant::now();
        loop {
            assert_eq!(self.before_run(), Verdict::Run);
            let did = self.payload.run();
            if wanted(did) {
                return did;
            }
            assert!(matches!(did, Did::Beat | Did::Interrupted), "{did:?}: {:?}", self.state());
            assert!(start.elapsed() < Duration::from_secs(30), "it only beats: {:?}", self.state());
        }
    }

    /// Runs the guest with the relay until the page at `gpa` is in a state that `wanted` accepts.
    fn run_until(&mut self, wanted: impl Fn(&State) -> bool) {
        let start = Instant::now();
        while !self.state().is_some_and(|state| wanted(&state)) {
            assert_eq!(self.before_run(), Verdict::Run);
            let did = self.payload.run();
            assert!(matches!(did, Did::Beat | Did::Interrupted | Did::Handled { .. }), "{did:?}");
            assert!(start.elapsed() < Duration::from_secs(30), "{:?}", self.state());
        }
    }

    fn state(&self) -> Option<State> {
        self.relay.pages().first().map(|page| page.state)
    }
}

fn is_handled(did: Did) -> bool {
    matches!(did, Did::Handled { .. })
}

pub fn a_forged_ar_is_told_by_machine_check() {
    let mut relayed = Relayed::new(Start::Beat, true);
    assert_eq!(relayed.run_to(|did| did == Did::Beat), Did::Beat);
    forge(BUS_MCEERR_AR, &relayed.payload.ram);
    let expected = handled(&record(Form::AmdAr, TARGET, 8, false));
    assert_eq!(relayed.run_to(is_handled), expected);
    relayed.run_until(|state| matches!(state, State::Acknowledged { .. }));
}

pub fn a_forged_ao_to_oneself_is_logged() {
    let mut relayed = Relayed::new(Start::Beat, true);
    assert_eq!(relayed.run_to(|did| did == Did::Beat), Did::Beat);
    forge(BUS_MCEERR_AO, &relayed.payload.ram);
    relayed.run_until(|state| matches!(state, State::Injected { .. }));
    flush(&relayed.relay.handle());
    let injected = relayed.events.try_iter().find_map(|event| match event {
        Event::Injected { gpa, by: Injection::Mce { bank, status, .. }, .. } => {
            Some((gpa, bank, status))
        }
        _ => None,
    });
    let record = record(Form::Deferred, TARGET, 9, false);
    assert_eq!(injected, Some((TARGET, record.bank, record.status)), "as read back from the bank");
    // The payload looks into its banks only when it has a machine check: have it take one.
    forge(BUS_MCEERR_AR, &relayed.payload.ram);
    relayed.run_to(is_handled);
    relayed.run_until(|state| matches!(state, State::Acknowledged { .. }));
}

pub fn an_ao_waits_while_mcip() {
    let mut relayed = Relayed::new(Start::Beat, true);
    assert_eq!(relayed.run_to(|did| did == Did::Beat), Did::Beat);
    // An AR first: its machine check is in progress from its injection until the guest clears
    // MCG_STATUS, and the AO of another page comes just then.
    relayed.payload.finish_io();
    let ar = record(Form::AmdAr, 0x7000, 8, false);
    mce_relay_vmm::mce_inject::set_mce(&relayed.payload.vcpu, &ar).unwrap();
    forge(BUS_MCEERR_AO, &relayed.payload.ram);
    assert_eq!(relayed.before_run(), Verdict::Run);
    assert!(matches!(relayed.state(), Some(State::Waiting { .. })), "{:?}", relayed.state());
    assert_eq!(relayed.run_to(is_handled), handled(&ar), "the guest takes the AR unharmed");
    relayed.run_until(|state| matches!(state, State::Injected { .. }));
}

pub fn an_ao_waits_for_cr4_mce() {
    let mut relayed = Relayed::new(Start::Beat, false);
    assert_eq!(relayed.run_to(|did| did == Did::Beat), Did::Beat);
    forge(BUS_MCEERR_AO, &relayed.payload.ram);
    relayed.run_until(|state| matches!(state, State::Waiting { .. }));
    for _ in 0..100 {
        assert_eq!(relayed.run_to(|did| did == Did::Beat), Did::Beat, "it lives");
    }
    relayed.payload.restart(Start::OpenHandler);
    relayed.run_until(|state| matches!(state, State::Injected { .. }));
}

pub fn an_ao_waits_for_its_bank_to_be_enabled() {
    let mut relayed = Relayed::new(Start::DisableBank9, true);
    assert_eq!(relayed.run_to(|did| did == Did::Beat), Did::Beat);
    forge(BUS_MCEERR_AO, &relayed.payload.ram);
    relayed.run_until(|state| matches!(state, State::Waiting { .. }));
    assert_eq!(relayed.run_to(|did| did == Did::Beat), Did::Beat);
    assert!(relayed.events.try_iter().all(|event| !matches!(event, Event::Injected { .. })));
}

pub fn an_ar_before_cr4_mce_stops_the_vcpu_and_harms_nobody() {
    let mut relayed = Relayed::new(Start::Beat, false);
    assert_eq!(relayed.run_to(|did| did == Did::Beat), Did::Beat);
    forge(BUS_MCEERR_AR, &relayed.payload.ram);
    let verdict = relayed.before_run();
    assert!(matches!(verdict, Verdict::Undeliverable { gpa: TARGET, .. }), "{verdict:?}");
    assert!(matches!(relayed.state(), Some(State::Undeliverable { .. })));
    assert_eq!(relayed.payload.run(), Did::Beat, "no triple fault was asked for");
}

/// MCG_STATUS of an AMD AR.
pub const AR_MCG_STATUS: u64 = mcg::MCIP | mcg::RIPV | mcg::EIPV;
