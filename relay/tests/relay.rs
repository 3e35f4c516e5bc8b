//! The relay as a VMM uses it, with forged signals and a model of a vCPU in place of KVM.
//!
//! `rt_tgsigqueueinfo(2)` lets a thread send itself any siginfo, so the whole way from the handler
//! to the injection runs here without privileges and without a bad page.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test says what it saw by panicking")]

mod forge;

use std::io;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use forge::{BUS_MCEERR_AO, BUS_MCEERR_AR, forge};
use mce_relay::internals::flush;
use mce_relay::mca::{BANKS, Caps, McaState, Record, Vendor, cap, mcg, status};
use mce_relay::{
    Event, ExitByte, FailureKind, Form, Injection, Ledger, Mca, Pace, RamMap, RamRegion, Reach,
    Relay, State, UndeliverableReason, Verdict, WaitReason, signal,
};

const HVA: u64 = 0x7f00_0000_0000;

/// A stretch of addresses where nothing is mapped, or where there is memory that is this program's for this alone.
fn region(hva: u64, gpa: u64, len: u64) -> RamRegion {
    // SAFETY: no reference of Rust's leads there.
    unsafe { RamRegion::new(hva, gpa, len) }
}

/// What KVM keeps of one vCPU, with the parts of `KVM_X86_SET_MCE` that matter.
#[derive(Clone)]
struct Model(Arc<Mutex<McaState>>);

impl Model {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(McaState::up())))
    }

    /// The guest's handler: clears the banks, then MCG_STATUS.
    fn handle(&self) {
        let mut state = self.0.lock().unwrap();
        state.banks.iter_mut().for_each(|bank| bank.status = 0);
        state.mcg_status = 0;
    }
}

impl Mca for Model {
    fn state(&mut self) -> io::Result<McaState> {
        Ok(*self.0.lock().unwrap())
    }

    fn inject(&mut self, record: &Record) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        assert!(!state.mcip() && state.cr4_mce, "KVM would shut the guest down");
        let bank = &mut state.banks[usize::from(record.bank)];
        assert!(!bank.valid(), "KVM would mark an overflow");
        bank.status = record.status;
        if record.status & status::UC != 0 {
            state.mcg_status = record.mcg_status;
        }
        Ok(())
    }
}

fn start(caps: Caps, vcpus: usize) -> (Relay, Receiver<Event>) {
    start_paced(caps, vcpus, Pace::default())
}

fn start_paced(caps: Caps, vcpus: usize, pace: Pace) -> (Relay, Receiver<Event>) {
    let (tx, rx) = channel();
    let ram = RamMap::new(&[region(HVA, 0x10_0000, 0x10_0000)]).unwrap();
    let observer = move |event: &Event| drop(tx.send(event.clone()));
    let relay = Relay::builder(ram).vcpus(vcpus).machine_checks(caps);
    (relay.pace(pace).observer(observer).start().unwrap(), rx)
}

fn intel() -> Caps {
    let mcg_cap = u64::from(BANKS) | cap::CTL_P | cap::SER_P;
    Caps { vendor: Vendor::Intel, mcg_cap, succor: false }
}

fn amd() -> Caps {
    Caps { vendor: Vendor::Amd, mcg_cap: u64::from(BANKS) | cap::CTL_P, succor: true }
}

fn attach(relay: &Relay, vcpu: usize) -> mce_relay::VcpuPort {
    relay.attach(vcpu, ExitByte::NONE, || {}).unwrap()
}

/// Waits for an event.
fn wait_for(events: &Receiver<Event>, wanted: impl Fn(&Event) -> bool) {
    loop {
        let event = events.recv_timeout(Duration::from_secs(10));
        if wanted(&event.unwrap_or_else(|error| panic!("the event did not come: {error}"))) {
            return;
        }
    }
}

/// Runs `body` on a thread of its own: a policy and a slot belong to a thread.
fn on_own_thread(body: impl FnOnce() + Send + 'static) {
    std::thread::spawn(body).join().unwrap();
}

#[test]
fn an_ar_is_told_on_the_thread_that_met_it() {
    on_own_thread(|| {
        let (relay, events) = start(amd(), 1);
        let model = Model::new();
        let mut port = attach(&relay, 0);
        forge(BUS_MCEERR_AR, HVA + 0x3000, 12);
        assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
        let state = *model.0.lock().unwrap();
        assert_eq!(state.mcg_status, mcg::MCIP | mcg::RIPV | mcg::EIPV);

        model.handle();
        let mut acknowledged = |events: &Receiver<Event>| loop {
            assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
            match events.recv_timeout(Duration::from_secs(5)).expect("an acknowledgement") {
                Event::Acknowledged { gpa, .. } => break gpa,
                Event::Injected { by: Injection::Mce { form, reach, .. }, .. } => {
                    assert_eq!((form, reach), (Form::AmdAr, Reach::Local));
                }
                _ => {}
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        assert_eq!(acknowledged(&events), 0x10_3000);
        assert!(matches!(relay.pages()[0].state, State::Acknowledged { .. }));
    });
}

/// A hypervisor that drops the record of some call; it counts the times that a bank is read back.
struct Drops {
    model: Model,
    calls: u32,
    dropped: Vec<u32>,
    read_back: u32,
}

impl Mca for Drops {
    fn state(&mut self) -> io::Result<McaState> {
        self.model.state()
    }

    fn inject(&mut self, record: &Record) -> io::Result<()> {
        self.calls += 1;
        match self.dropped.contains(&self.calls) {
            true => Ok(()),
            false => self.model.inject(record),
        }
    }

    fn read_back(&mut self, bank: u8) -> io::Result<(u64, u64)> {
        self.read_back += 1;
        self.model.read_back(bank)
    }
}

#[test]
fn the_first_record_of_a_form_is_read_back_until_one_is_there() {
    on_own_thread(|| {
        let (relay, _events) = start(amd(), 1);
        let model = Model::new();
        let (calls, read_back, dropped) = (0, 0, vec![1, 2]);
        let mut vcpu = Drops { model: model.clone(), calls, dropped, read_back };
        let mut port = attach(&relay, 0);
        for (page, expected) in (0_u32..).zip([1, 2, 3, 3, 3]) {
            forge(BUS_MCEERR_AR, HVA + u64::from(page) * 0x1000, 12);
            let is_told = port.before_run(&mut vcpu) == Verdict::Run;
            assert_eq!((is_told, vcpu.read_back), (page > 1, expected), "page {page}");
            let state = relay.pages()[page as usize].state;
            assert_eq!(matches!(state, State::Injected { .. }), page > 1, "page {page}");
            model.handle();
            while port.before_run(&mut vcpu) != Verdict::Run {}
        }
        // What another vCPU behind this port does is not known.
        drop(port);
        let mut port = attach(&relay, 0);
        forge(BUS_MCEERR_AR, HVA + 0x8000, 12);
        assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
        assert_eq!((vcpu.read_back, vcpu.calls), (4, 6));
    });
}

#[test]
fn an_ao_waits_for_the_handler_and_is_told_then() {
    on_own_thread(|| {
        let (relay, events) = start(amd(), 1);
        let model = Model::new();
        model.0.lock().unwrap().mcg_status = mcg::MCIP;
        let mut port = attach(&relay, 0);
        forge(BUS_MCEERR_AO, HVA + 0x5000, 12);
        assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
        assert!(matches!(relay.pages()[0].state, State::Waiting { .. }));
        assert!(!events.try_iter().any(|event| matches!(event, Event::Injected { .. })));

        model.handle();
        for _ in 0..500 {
            assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
            if matches!(relay.pages()[0].state, State::Injected { .. }) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("not told: {:?}", relay.pages());
    });
}

/// A guest with twenty pages in its queue, each of which counts for a second.
#[test]
fn a_guest_that_is_done_with_its_pages_is_told_of_the_next_at_once() {
    on_own_thread(|| {
        let (relay, _events) = start_paced(intel(), 1, Pace { burst: 1, rate: 1 });
        let (kick, kicked) = channel();
        let model = Model::new();
        let kick = Mutex::new(kick);
        let kick = move || kick.lock().unwrap().send(()).unwrap_or_default();
        let mut port = relay.attach(0, ExitByte::NONE, kick).unwrap();
        for page in 0..20 {
            forge(BUS_MCEERR_AR, HVA + (page << 12), 12);
            assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
            model.handle();
        }
        forge(BUS_MCEERR_AO, HVA + (20 << 12), 12);
        assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
        assert!(matches!(relay.pages()[20].state, State::Waiting { wait: WaitReason::Pace }));
        while kicked.try_recv().is_ok() {}
        (0..20).for_each(|page| relay.handle().guest_finished(0x10_0000 + (page << 12) + 8));
        kicked.recv_timeout(Duration::from_secs(10)).expect("it waits for the estimate");
        assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
        assert!(matches!(relay.pages()[20].state, State::Injected { .. }), "{:?}", relay.pages());
    });
}

/// The time that the estimate has for two pages (a second each, and one to begin) passes in a pause.
#[test]
fn a_guest_that_was_paused_is_told_no_more_than_it_was_told_before() {
    on_own_thread(|| {
        let (relay, _events) = start_paced(intel(), 1, Pace { burst: 2, rate: 1 });
        let model = Model::new();
        let mut port = attach(&relay, 0);
        let is_told = |page: usize| relay.pages()[page].times.injected.is_some();
        let mut run_until = |told: usize| {
            for _ in 0..1000 {
                assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
                model.handle();
                if is_told(told) {
                    // What was told is seen to be taken.
                    assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
                    return;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            panic!("not told: {:?}", relay.pages());
        };
        (0..3).for_each(|page| forge(BUS_MCEERR_AO, HVA + (page << 12), 12));
        run_until(0);
        run_until(1);
        assert!(!is_told(2), "{:?}", relay.pages());
        port.park(|| std::thread::sleep(Duration::from_millis(3500)));
        // Of a page that nobody knows: the relay's thread looks whose turn it is.
        relay.handle().guest_finished(0);
        for _ in 0..50 {
            assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(!is_told(2), "{:?}", relay.pages());
    });
}

#[test]
fn a_page_signalled_again_is_not_a_new_page() {
    on_own_thread(|| {
        let (relay, events) = start(intel(), 1);
        let model = Model::new();
        let mut port = attach(&relay, 0);
        for _ in 0..3 {
            forge(BUS_MCEERR_AO, HVA, 12);
            assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
        }
        flush(&relay.handle());
        let injected = events.try_iter().filter(|e| matches!(e, Event::Injected { .. })).count();
        assert_eq!((injected, relay.pages().len(), relay.pages()[0].signals), (1, 1, 3));
    });
}

#[test]
fn an_address_outside_guest_ram_is_reported_and_told_to_nobody() {
    on_own_thread(|| {
        let (relay, events) = start(amd(), 1);
        let model = Model::new();
        let mut port = attach(&relay, 0);
        forge(BUS_MCEERR_AO, 0x1000, 12);
        assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
        wait_for(&events, |e| matches!(e, Event::Outside { hva: 0x1000, .. }));
        assert!(relay.pages().is_empty());
    });
}

/// The kernel signals one thread of the process, whichever VM's memory it is.
#[test]
fn of_two_relays_each_has_what_is_its_own() {
    on_own_thread(|| {
        const OTHERS: u64 = HVA + 0x100_0000_0000;
        let (own, events) = start_with(&[region(HVA, 0, 0x10_000)], Ledger::default());
        let (other, others) = start_with(&[region(OTHERS, 0, 0x10_000)], Ledger::default());
        let mut ports = [attach(&own, 0)];
        let model = Model::new();
        forge(BUS_MCEERR_AO, OTHERS + 0x5000, 12);
        assert_eq!(ports[0].before_run(&mut model.clone()), Verdict::Run);
        wait_for(&others, |event| matches!(event, Event::Seen { gpa: 0x5000, .. }));
        assert_eq!(own.pages(), []);
        assert_eq!(other.pages()[0].gpa, 0x5000);
        assert!(!events.try_iter().any(|event| matches!(event, Event::Outside { .. })));

        // One that has gone has nothing any more.
        drop(other);
        forge(BUS_MCEERR_AO, OTHERS + 0x6000, 12);
        assert_eq!(ports[0].before_run(&mut model.clone()), Verdict::Run);
        wait_for(&events, |event| matches!(event, Event::Outside { .. }));
    });
}

#[test]
fn an_ar_in_a_guest_that_cannot_be_told_stops_the_vcpu() {
    on_own_thread(|| {
        let (relay, _events) = start(amd(), 1);
        let model = Model::new();
        model.0.lock().unwrap().cr4_mce = false;
        let mut port = attach(&relay, 0);
        forge(BUS_MCEERR_AR, HVA, 12);
        let verdict = port.before_run(&mut model.clone());
        assert!(matches!(verdict, Verdict::Undeliverable { gpa: 0x10_0000, .. }), "{verdict:?}");
        assert!(matches!(relay.pages()[0].state, State::Undeliverable { .. }));
    });
}

/// A vCPU whose state the hypervisor does not say, or says no more.
struct Silent;

impl Mca for Silent {
    fn state(&mut self) -> io::Result<McaState> {
        Err(io::Error::from_raw_os_error(libc::ENOMEM))
    }

    fn inject(&mut self, record: &Record) -> io::Result<()> {
        panic!("{record:?} for a vCPU in no known state");
    }
}

#[test]
fn an_ar_of_a_vcpu_in_no_known_state_stops_it_and_an_ao_waits() {
    on_own_thread(|| {
        let (relay, events) = start(amd(), 1);
        let mut port = attach(&relay, 0);
        let (ao, ar) = (0x10_5000, 0x10_3000);
        forge(BUS_MCEERR_AO, HVA + 0x5000, 12);
        assert_eq!(port.before_run(&mut Silent), Verdict::Run, "an AO does not stop it");
        forge(BUS_MCEERR_AR, HVA + 0x3000, 12);
        let why = UndeliverableReason::NoState;
        let untold = Verdict::Undeliverable { gpa: ar, why, rip: None };
        assert_eq!(port.before_run(&mut Silent), untold);
        wait_for(&events, |event| {
            let ar = Event::Undeliverable {
                gpa: ar,
                kind: FailureKind::ActionRequired,
                vcpu: 0,
                why,
                rip: None,
                forged: false,
            };
            *event == ar
        });
        let state = |gpa| relay.pages().iter().find(|page| page.gpa == gpa).unwrap().state;
        assert_eq!(state(ar), State::Undeliverable { why });
        assert!(!matches!(state(ao), State::Undeliverable { .. }), "{}", state(ao));

        // It says again what state it is in; the relay's thread has it look.
        let model = Model::new();
        for _ in 0..500 {
            assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
            if matches!(state(ao), State::Injected { .. }) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the AO was not told: {:?}", relay.pages());
    });
}

#[test]
fn a_rendezvous_reaches_all_threads_or_none() {
    on_own_thread(|| {
        let (relay, events) = start(intel(), 2);
        let relay = Arc::new(relay);
        let models = [Model::new(), Model::new()];
        // The second vCPU is in its handler: nobody may be given anything.
        models[1].0.lock().unwrap().mcg_status = mcg::MCIP;
        let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
        // A vCPU whose thread is not there yet takes no part, so both have to be.
        let attached = Arc::new(std::sync::Barrier::new(2));
        let threads: Vec<_> = (0..2)
            .map(|vcpu| {
                let (relay, model, done) =
                    (Arc::clone(&relay), models[vcpu].clone(), Arc::clone(&done));
                let attached = Arc::clone(&attached);
                std::thread::spawn(move || {
                    let mut port = attach(&relay, vcpu);
                    attached.wait();
                    if vcpu == 0 {
                        forge(BUS_MCEERR_AO, HVA + 0x8000, 12);
                    }
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
                        std::thread::sleep(Duration::from_millis(1));
                    }
                })
            })
            .collect();
        let wait_for = |what: fn(&Event) -> bool| {
            while !what(&events.recv_timeout(Duration::from_secs(10)).expect("an event")) {}
        };
        wait_for(|event| matches!(event, Event::Waiting { .. }));
        assert_eq!(models[0].0.lock().unwrap().mcg_status, 0, "not the first one alone");
        models[1].handle();
        wait_for(|event| {
            let Event::Injected { by: Injection::Mce { reach, .. }, .. } = event else {
                return false;
            };
            *reach == Reach::Rendezvous
        });
        let both_in = || models.iter().all(|model| model.0.lock().unwrap().mcip());
        for _ in 0..500 {
            if both_in() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(both_in(), "both vCPUs were given a machine check");
        models.iter().for_each(Model::handle);
        wait_for(|event| matches!(event, Event::Acknowledged { .. }));
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

/// Gatherings follow each other closely, vCPUs come late to some and are in their handlers at
/// others: each ends, and every page is told and acknowledged.
#[test]
fn hundreds_of_rendezvous_of_eight_vcpus_all_end() {
    on_own_thread(|| {
        const PAGES: u64 = 100;
        const ARS: u64 = 200;
        const VCPUS: usize = 8;
        let pace = Pace { burst: 1000, rate: 100_000 };
        let (relay, _events) = start_paced(intel(), VCPUS, pace);
        let relay = Arc::new(relay);
        let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let attached = Arc::new(std::sync::Barrier::new(VCPUS + 1));
        let threads: Vec<_> = (0..VCPUS as u64)
            .map(|vcpu| {
                let (relay, done) = (Arc::clone(&relay), Arc::clone(&done));
                let attached = Arc::clone(&attached);
                std::thread::spawn(move || {
                    let mut port = attach(&relay, usize::try_from(vcpu).unwrap());
                    let mut model = Model::new();
                    attached.wait();
                    if vcpu == 0 {
                        for page in 0..PAGES {
                            forge(BUS_MCEERR_AO, HVA + page * 4096, 12);
                            assert_eq!(port.before_run(&mut model), Verdict::Run);
                        }
                    }
                    let mut turn = 0u64;
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        turn += 1;
                        // Some vCPUs touch bad pages, and gather again and again until the
                        // others have left their handlers.
                        if vcpu >= 2 && turn <= ARS && !model.0.lock().unwrap().mcip() {
                            forge(BUS_MCEERR_AR, HVA + (PAGES + (turn % 100)) * 4096, 12);
                        }
                        assert_eq!(port.before_run(&mut model), Verdict::Run);
                        if turn.is_multiple_of(3 + 4 * vcpu) {
                            model.handle();
                        }
                        std::thread::sleep(Duration::from_micros(100 * (vcpu + 1)));
                    }
                })
            })
            .collect();
        attached.wait();
        let acknowledged = || {
            let is = |page: &mce_relay::Page| matches!(page.state, State::Acknowledged { .. });
            relay.pages().iter().filter(|page| is(page)).count()
        };
        let start = std::time::Instant::now();
        while acknowledged() < 100 || acknowledged() < relay.pages().len() {
            assert!(start.elapsed() < Duration::from_secs(60), "{} acknowledged", acknowledged());
            std::thread::sleep(Duration::from_millis(20));
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

/// A vCPU that is paused is not waited for, and the error is told when it goes on.
#[test]
fn a_rendezvous_is_put_off_while_a_vcpu_is_paused() {
    on_own_thread(|| {
        let (relay, events) = start(intel(), 2);
        let relay = Arc::new(relay);
        let (resume, paused) = channel::<()>();
        let parked = Arc::new(std::sync::Barrier::new(2));
        let other = {
            let (relay, parked) = (Arc::clone(&relay), Arc::clone(&parked));
            std::thread::spawn(move || {
                let mut port = attach(&relay, 1);
                let mut model = Model::new();
                port.park(|| {
                    parked.wait();
                    paused.recv().unwrap();
                });
                for _ in 0..1000 {
                    assert_eq!(port.before_run(&mut model), Verdict::Run);
                    if model.0.lock().unwrap().mcip() {
                        return;
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
                panic!("not called");
            })
        };
        parked.wait();
        let mut port = attach(&relay, 0);
        let mut model = Model::new();
        forge(BUS_MCEERR_AO, HVA, 12);
        assert_eq!(port.before_run(&mut model), Verdict::Run);
        let waits = State::Waiting { wait: WaitReason::Paused { vcpu: 1 } };
        assert_eq!(relay.pages()[0].state, waits);

        resume.send(()).unwrap();
        while !model.0.lock().unwrap().mcip() {
            assert_eq!(port.before_run(&mut model), Verdict::Run);
            std::thread::sleep(Duration::from_millis(1));
        }
        other.join().unwrap();
        drop(events);
    });
}

#[test]
fn attaching_twice_is_refused() {
    on_own_thread(|| {
        let (relay, _events) = start(amd(), 1);
        let port = attach(&relay, 0);
        let again = relay.attach(0, ExitByte::NONE, || {});
        assert!(again.is_err());
        drop(port);
        drop(attach(&relay, 0));
        assert!(relay.attach(1, ExitByte::NONE, || {}).is_err());
        signal::request_exit();
    });
}

/// Two pages of this process's own memory, for what really reads and writes.
fn own_memory() -> u64 {
    // SAFETY: a new private mapping at an address of the kernel's choice; it is never unmapped.
    let at = unsafe {
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        libc::mmap(std::ptr::null_mut(), 8192, prot, flags, -1, 0)
    };
    assert_ne!(at, libc::MAP_FAILED);
    at.expose_provenance() as u64
}

fn start_with(ram: &[RamRegion], ledger: Ledger) -> (Relay, Receiver<Event>) {
    let (tx, rx) = channel();
    let observer = move |event: &Event| drop(tx.send(event.clone()));
    let pace = Pace { burst: 1000, rate: 1_000_000 };
    let relay = Relay::builder(RamMap::new(ram).unwrap()).vcpus(1).machine_checks(amd());
    (relay.pace(pace).ledger(ledger).observer(observer).start().unwrap(), rx)
}

#[test]
fn one_signal_for_a_huge_page_enters_all_of_it() {
    for (page_shift, pages) in [(21, 512), (30, 262_144)] {
        on_own_thread(move || {
            // KVM_RUN says 12 whatever the page is.
            let len = 2 << page_shift;
            let region = region(0x40_0000_0000, 0, len).in_pages_of(page_shift);
            let (relay, events) = start_with(&[region], Ledger::default());
            let mut port = attach(&relay, 0);
            let touched = (1 << page_shift) + 0x5000;
            forge(BUS_MCEERR_AR, region.hva() + touched + 0x123, 12);
            let model = Model::new();
            assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
            flush(&relay.handle());
            let seen: Vec<Event> =
                events.try_iter().filter(|event| matches!(event, Event::Seen { .. })).collect();
            let [Event::Seen { gpa, extent, pages: entered, .. }] = seen[..] else {
                panic!("one event for all of it: {seen:?}")
            };
            assert_eq!((gpa, extent, entered), (touched, 1 << page_shift, pages));
            let ledger = relay.pages();
            assert_eq!(ledger.len(), pages);
            assert!(ledger.iter().all(|page| page.lsb == page_shift));
            let kinds = ledger.iter().filter(|page| page.kind == FailureKind::ActionRequired);
            assert_eq!(kinds.map(|page| page.gpa).collect::<Vec<_>>(), [touched]);
            // The touch of another of its pages is one page's matter.
            forge(BUS_MCEERR_AR, region.hva() + touched + 0x1000, 12);
            model.handle();
            assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
            flush(&relay.handle());
            let again: Vec<Event> =
                events.try_iter().filter(|event| matches!(event, Event::Again { .. })).collect();
            assert!(matches!(again[..], [Event::Again { gpa, .. }] if gpa == touched + 0x1000));
        });
    }
}

#[test]
fn memory_is_read_and_written_through_the_relay() {
    on_own_thread(|| {
        let region = region(own_memory(), 0x10_0000, 8192);
        let (relay, _events) = start_with(&[region], Ledger::default());
        let handle = relay.handle();
        assert_eq!(handle.write(0x10_0ffe, b"abcd").unwrap(), 4);
        let mut back = [0; 8];
        assert_eq!(handle.read(0x10_0ffc, &mut back).unwrap(), 8);
        assert_eq!(&back, b"\0\0abcd\0\0");
        let error = handle.read(0x10_2000, &mut back).unwrap_err();
        assert_eq!(error.to_string(), "GPA 0x102000 is not guest RAM");
        assert!(relay.pages().is_empty());
    });
}

#[test]
fn memory_comes_and_goes_while_the_relay_runs() {
    on_own_thread(|| {
        let (first, second) =
            (region(HVA, 0, 0x10_000), region(HVA + 0x10_0000, 0x10_0000, 0x10_000));
        let (relay, events) = start_with(&[first], Ledger::default());
        let (handle, model) = (relay.handle(), Model::new());
        let mut port = attach(&relay, 0);
        let mut caught = |hva: u64| {
            forge(BUS_MCEERR_AO, hva, 12);
            assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
        };
        // Not yet.
        caught(second.hva());
        wait_for(&events, |event| matches!(event, Event::Outside { .. }));

        handle.add_ram(second).unwrap();
        assert!(handle.add_ram(second).is_err(), "twice");
        caught(second.hva() + 0x3000);
        caught(first.hva() + 0x2000);
        let gpas = || relay.pages().iter().map(|page| page.gpa).collect::<Vec<_>>();
        assert_eq!(gpas(), [0x2000, 0x10_3000]);

        assert_eq!(handle.remove_ram(second.gpa()).unwrap(), second);
        assert!(handle.remove_ram(second.gpa()).is_err(), "gone already");
        assert_eq!(relay.pages()[1].state, State::Removed);
        let gone = |event| matches!(event, Event::Removed { gpa: 0x10_0000, len: 0x10_000 });
        flush(&relay.handle());
        assert!(events.try_iter().any(gone));
        caught(second.hva() + 0x4000);
        // No more.
        wait_for(&events, |event| matches!(event, Event::Outside { .. }));
        assert_eq!(gpas(), [0x2000, 0x10_3000]);

        // What is plugged in there next is other memory.
        handle.add_ram(region(HVA + 0x20_0000, second.gpa(), second.len())).unwrap();
        assert_eq!(gpas(), [0x2000]);
        assert_eq!(handle.past()[0].gpa, 0x10_3000);
        caught(HVA + 0x20_3000);
        assert_eq!(gpas(), [0x2000, 0x10_3000], "it goes bad like any other");
    });
}

#[test]
fn memory_comes_and_goes_under_a_storm_of_signals() {
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    on_own_thread(|| {
        let stays = region(HVA, 0, 0x10_0000);
        let (relay, _events) = start_with(&[stays], Ledger::default());
        let (handle, done) = (relay.handle(), Arc::new(AtomicBool::new(false)));
        let stop = Arc::clone(&done);
        let times = Arc::new(AtomicU32::new(0));
        let so_far = Arc::clone(&times);
        let plugs = std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let region = region(HVA + 0x1000_0000, 0x1000_0000, 0x10_0000);
                handle.add_ram(region).unwrap();
                handle.remove_ram(region.gpa()).unwrap();
                so_far.fetch_add(1, Ordering::Relaxed);
            }
        });
        // A busy machine may start the thread when the storm would be over.
        while times.load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        let model = Model::new();
        let mut port = attach(&relay, 0);
        for page in 0..256 {
            for base in [HVA, HVA + 0x1000_0000] {
                forge(BUS_MCEERR_AO, base + page * 4096, 12);
                assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
                model.handle();
            }
        }
        done.store(true, Ordering::Relaxed);
        plugs.join().unwrap();
        let kept = relay.pages().iter().filter(|page| page.gpa < 0x1000_0000).count();
        assert_eq!(kept, 256, "none of the memory that stayed was lost");
    });
}

#[test]
fn the_next_boot_knows_what_was_and_tells_only_what_is() {
    on_own_thread(|| {
        let region = region(HVA, 0, 0x10_000);
        let (relay, _events) = start_with(&[region], Ledger::default());
        let model = Model::new();
        let mut port = attach(&relay, 0);
        for hva in [HVA + 0x1000, HVA + 0x2000] {
            forge(BUS_MCEERR_AO, hva, 12);
            assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
        }
        drop(port);
        let handle = relay.handle();
        drop(relay);
        let mut ledger = handle.ledger();
        assert!(ledger.heal(0x1000, std::time::SystemTime::now()));
        assert!(ledger.set(0x2000, State::Removed, std::time::SystemTime::now()));

        let (relay, events) = start_with(&[region], ledger);
        let model = Model::new();
        let mut port = attach(&relay, 0);
        assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
        assert!(!events.try_iter().any(|event| matches!(event, Event::Injected { .. })));
        assert_eq!(relay.handle().past().len(), 1);
        assert_eq!(relay.pages().iter().map(|page| page.gpa).collect::<Vec<_>>(), [0x2000]);
        forge(BUS_MCEERR_AO, HVA + 0x1000, 12);
        assert_eq!(port.before_run(&mut model.clone()), Verdict::Run);
        let seen = |event| matches!(event, Event::Seen { gpa: 0x1000, .. });
        flush(&relay.handle());
        assert!(events.try_iter().any(seen), "bad again");
    });
}
