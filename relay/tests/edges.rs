//! The relay off the middle of the road: processors that are offline, unplugged or do not come round, touches that
//! come in twos, pauses, memory that comes and goes, hosts that misbehave.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test says what it saw by panicking")]

mod forge;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant, SystemTime};

use forge::{BUS_MCEERR_AO, BUS_MCEERR_AR, forge};
use mce_relay::internals::flush;
use mce_relay::mca::{BANKS, Caps, McaState, Record, Vendor, cap, status};
use mce_relay::{
    AttachError, Bell, ErrorSource, Event, ExitByte, FailureKind, Form, FoundBy, Handle, Injection,
    Ledger, Mca, NoMachineChecks, Pace, RamError, RamMap, RamRegion, Relay, RelayBuilder, State,
    UndeliverableReason, VcpuPort, Verdict,
};

const HVA: u64 = 0x7f00_0000_0000;
/// Guest-physical address of the first page at [`HVA`].
const GPA: u64 = 0x10_0000;
const PAGES: u64 = 0x100;
const PATIENCE: Duration = Duration::from_secs(30);

/// A stretch of addresses where nothing is mapped, or where there is memory that is this program's for this alone.
fn region(hva: u64, gpa: u64, len: u64) -> RamRegion {
    // SAFETY: no reference of Rust's leads there.
    unsafe { RamRegion::new(hva, gpa, len) }
}

/// What a vCPU's processor does with its machine checks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Processor {
    /// The handler, or the poll, clears all banks.
    Online,
    /// It halts with interrupts off; of a machine check it clears MCG_STATUS and nothing else.
    Offline,
}

/// A vCPU as KVM keeps it, and the guest's processor on it.
#[derive(Clone)]
struct Vcpu {
    state: Arc<Mutex<McaState>>,
    processor: Arc<Mutex<Processor>>,
    /// The back end can empty banks.
    takes_back: bool,
    /// How often it fails to all the same, and with what.
    fails: Arc<Mutex<(u32, io::ErrorKind)>>,
    /// How often it was asked to.
    asked: Arc<AtomicU32>,
}

impl Vcpu {
    fn new() -> Self {
        let state = McaState::up();
        let processor = Arc::new(Mutex::new(Processor::Online));
        let fails = Arc::new(Mutex::new((0, io::ErrorKind::Other)));
        let state = Arc::new(Mutex::new(state));
        Self { state, processor, takes_back: true, fails, asked: Arc::default() }
    }

    fn offline() -> Self {
        let vcpu = Self::new();
        *vcpu.processor.lock().unwrap() = Processor::Offline;
        let mut state = vcpu.state.lock().unwrap();
        (state.interrupts_on, state.halted) = (false, true);
        drop(state);
        vcpu
    }

    /// The guest runs for a while.
    fn run(&self) {
        let mut state = self.state.lock().unwrap();
        state.mcg_status = 0;
        if *self.processor.lock().unwrap() == Processor::Online {
            state.banks.iter_mut().for_each(|bank| bank.status = 0);
        }
    }

    fn records(&self) -> Vec<u64> {
        let state = self.state.lock().unwrap();
        state.banks.iter().map(|bank| bank.status).filter(|status| *status != 0).collect()
    }
}

impl Mca for Vcpu {
    fn state(&mut self) -> io::Result<McaState> {
        Ok(*self.state.lock().unwrap())
    }

    fn inject(&mut self, record: &Record) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        assert!(!state.mcip() && state.cr4_mce, "KVM would shut the guest down");
        let bank = &mut state.banks[usize::from(record.bank)];
        let over = if bank.valid() { status::OVER } else { 0 };
        assert!(
            over == 0 || record.status & status::EN == 0,
            "an error that the guest would see as lost"
        );
        bank.status = record.status | over;
        if record.status & status::UC != 0 {
            state.mcg_status = record.mcg_status;
        }
        Ok(())
    }

    fn take_back(&mut self, bank: u8) -> io::Result<()> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        if !self.takes_back {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut fails = self.fails.lock().unwrap();
        if fails.0 > 0 {
            fails.0 -= 1;
            return Err(fails.1.into());
        }
        let mut state = self.state.lock().unwrap();
        assert!(!state.mcip(), "from under a handler");
        state.banks[usize::from(bank)].status = 0;
        Ok(())
    }
}

fn intel(extra: u64) -> Caps {
    let mcg_cap = u64::from(BANKS) | cap::CTL_P | cap::SER_P | extra;
    Caps { vendor: Vendor::Intel, mcg_cap, succor: false }
}

fn amd() -> Caps {
    Caps { vendor: Vendor::Amd, mcg_cap: u64::from(BANKS) | cap::CTL_P, succor: true }
}

fn ram() -> RamMap {
    RamMap::new(&[region(HVA, GPA, PAGES * 4096)]).unwrap()
}

/// As quick as the guest takes it.
fn config(vcpus: usize, caps: Caps, ram: RamMap) -> (RelayBuilder, Receiver<Event>) {
    let (tx, rx) = channel();
    let observer = move |event: &Event| drop(tx.send(event.clone()));
    let pace = Pace { burst: 1000, rate: 1_000_000 };
    let relay = Relay::builder(ram).vcpus(vcpus).machine_checks(caps);
    (relay.pace(pace).observer(observer), rx)
}

fn start(vcpus: usize, caps: Caps) -> (Relay, Receiver<Event>) {
    let (config, events) = config(vcpus, caps, ram());
    (config.start().unwrap(), events)
}

fn attach(relay: &Relay, vcpu: usize) -> VcpuPort {
    relay.attach(vcpu, ExitByte::NONE, || {}).unwrap()
}

fn on_own_thread(body: impl FnOnce() + Send + 'static) {
    std::thread::spawn(body).join().unwrap();
}

fn gpas(relay: &Relay, is: impl Fn(&State) -> bool) -> Vec<u64> {
    relay.pages().iter().filter(|page| is(&page.state)).map(|page| page.gpa).collect()
}

fn is_acknowledged(state: &State) -> bool {
    matches!(state, State::Acknowledged { .. })
}

/// Runs each of `vcpus` on a thread of its own until `done`, which is asked again and again; `signals` are sent by the
/// first thread, one after the other.
fn run_until(
    relay: Relay,
    vcpus: &[Vcpu],
    signals: Vec<(i32, u64)>,
    done: impl Fn(&Relay) -> bool,
) {
    let relay = Arc::new(relay);
    let over = Arc::new(AtomicBool::new(false));
    let attached = Arc::new(Barrier::new(vcpus.len() + 1));
    let mut signals = Some(signals);
    let threads: Vec<_> = vcpus
        .iter()
        .enumerate()
        .map(|(index, vcpu)| {
            let (relay, over, mut vcpu) = (Arc::clone(&relay), Arc::clone(&over), vcpu.clone());
            let (attached, signals) = (Arc::clone(&attached), signals.take().unwrap_or_default());
            std::thread::spawn(move || {
                let mut port = attach(&relay, index);
                attached.wait();
                let mut signals = signals.into_iter();
                while !over.load(Ordering::Relaxed) {
                    if let Some((code, hva)) = signals.next() {
                        forge(code, hva, 12);
                    }
                    assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
                    vcpu.run();
                    std::thread::sleep(Duration::from_millis(1));
                }
            })
        })
        .collect();
    attached.wait();
    let start = Instant::now();
    while !done(&relay) {
        assert!(start.elapsed() < PATIENCE, "{:#?}", relay.pages());
        std::thread::sleep(Duration::from_millis(5));
    }
    over.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().unwrap();
    }
}

/// Runs `vcpu` on this thread until the guest has been told of just the pages at `expected`.
fn run_until_told(relay: &Relay, port: &mut VcpuPort, vcpu: &mut Vcpu, expected: &[u64]) {
    let start = Instant::now();
    while gpas(relay, is_acknowledged) != expected {
        assert!(start.elapsed() < PATIENCE, "{:#?}", relay.pages());
        assert_eq!(port.before_run(vcpu), Verdict::Run);
        vcpu.run();
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn all_told(pages: u64) -> impl Fn(&Relay) -> bool {
    move |relay| gpas(relay, is_acknowledged).len() as u64 == pages
}

fn aos(pages: u64) -> Vec<(i32, u64)> {
    (0..pages).map(|page| (BUS_MCEERR_AO, HVA + page * 4096)).collect()
}

#[test]
fn a_bystander_that_is_offline_holds_up_nobody() {
    for takes_back in [true, false] {
        on_own_thread(move || {
            let (relay, _events) = start(2, intel(0));
            let vcpus = [Vcpu::new(), Vcpu { takes_back, ..Vcpu::offline() }];
            run_until(relay, &vcpus, aos(8), all_told(8));
        });
    }
}

#[test]
fn the_boot_processor_may_be_the_one_that_is_offline() {
    for (caps, name) in [(intel(0), "rendezvous"), (intel(cap::LMCE_P), "LMCE"), (amd(), "AMD")] {
        on_own_thread(move || {
            println!("{name}");
            let (relay, events) = start(3, caps);
            let vcpus = [Vcpu::offline(), Vcpu::new(), Vcpu::offline()];
            vcpus.iter().for_each(|vcpu| vcpu.state.lock().unwrap().lmce = caps.has(cap::LMCE_P));
            run_until(relay, &vcpus, aos(20), all_told(20));
            for event in events.try_iter() {
                if let Event::Acknowledged { place, .. } = event {
                    assert!(place.to_string().contains("vCPU 1"), "{place}");
                }
            }
        });
    }
}

/// The records are laid where the processor polls, and then it is taken offline.
#[test]
fn what_lies_in_an_offline_processors_banks_is_told_elsewhere() {
    let busy = io::ErrorKind::ResourceBusy;
    // How often emptying a bank fails, how often it is asked for, how many records stay.
    for (fails, error, asked, stay) in
        [(0, busy, 3, 0), (2, busy, 5, 0), (9, busy, 3, 3), (9, io::ErrorKind::Unsupported, 1, 3)]
    {
        told_elsewhere((fails, error), asked, stay);
    }
}

fn told_elsewhere(fails: (u32, io::ErrorKind), asked: u32, stay: usize) {
    on_own_thread(move || {
        let (relay, events) = start(2, amd());
        let (mut first, mut second) = (Vcpu::new(), Vcpu::new());
        *first.fails.lock().unwrap() = fails;
        let mut port = attach(&relay, 0);
        // A guest that is up for a second may be laid records into.
        assert_eq!(port.before_run(&mut first), Verdict::Run);
        std::thread::sleep(Duration::from_millis(1100));
        for (code, hva) in aos(3) {
            forge(code, hva, 12);
            assert_eq!(port.before_run(&mut first), Verdict::Run);
        }
        assert_eq!(first.records().len(), 3);
        // It goes offline with them.
        *first.processor.lock().unwrap() = Processor::Offline;
        {
            let mut state = first.state.lock().unwrap();
            (state.interrupts_on, state.halted) = (false, true);
        }
        let relay = Arc::new(relay);
        let over = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (relay, over) = (Arc::clone(&relay), Arc::clone(&over));
            move || {
                let mut port = attach(&relay, 1);
                while !over.load(Ordering::Relaxed) {
                    assert_eq!(port.before_run(&mut second), Verdict::Run);
                    second.run();
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        });
        let start = Instant::now();
        while gpas(&relay, is_acknowledged).len() < 3 {
            assert!(start.elapsed() < PATIENCE, "{:#?}", relay.pages());
            assert_eq!(port.before_run(&mut first), Verdict::Run);
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(first.records().len(), stay, "what the processor would read when it is back");
        assert_eq!(first.asked.load(Ordering::Relaxed), asked, "{fails:?}");
        over.store(true, Ordering::Relaxed);
        thread.join().unwrap();
        flush(&relay.handle());
        let elsewhere = events.try_iter().filter(|event| {
            matches!(event, Event::Waiting { wait, .. } if wait.to_string().contains("offline"))
        });
        assert_eq!(elsewhere.count(), 3);
    });
}

#[test]
fn an_unplugged_vcpus_records_and_touches_are_told_elsewhere() {
    on_own_thread(|| {
        let (relay, _events) = start(2, amd());
        let relay = Arc::new(relay);
        let unplugged = std::thread::spawn({
            let relay = Arc::clone(&relay);
            move || {
                let mut vcpu = Vcpu::new();
                let mut port = attach(&relay, 1);
                assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
                std::thread::sleep(Duration::from_millis(1100));
                // A record in a bank, and a touch that is in the slot when the port goes.
                forge(BUS_MCEERR_AO, HVA, 12);
                assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
                assert_eq!(vcpu.records().len(), 1);
                forge(BUS_MCEERR_AR, HVA + 0x1000, 12);
                drop(port);
            }
        });
        unplugged.join().unwrap();
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
        run_until_told(&relay, &mut port, &mut vcpu, &[GPA, GPA + 0x1000]);
    });
}

#[test]
fn a_vcpu_that_does_not_come_round_holds_nobody_for_long() {
    on_own_thread(|| {
        let (relay, events) = start(2, intel(0));
        let relay = Arc::new(relay);
        let (let_go, held) = channel::<()>();
        let is_attached = Arc::new(Barrier::new(2));
        let stuck = std::thread::spawn({
            let (relay, is_attached) = (Arc::clone(&relay), Arc::clone(&is_attached));
            move || {
                let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 1));
                is_attached.wait();
                // In a device of the VMM's, say.
                held.recv().unwrap();
                let start = Instant::now();
                while !vcpu.state.lock().unwrap().mcip() {
                    assert!(start.elapsed() < PATIENCE, "not called");
                    assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        });
        is_attached.wait();
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
        forge(BUS_MCEERR_AO, HVA, 12);
        let mut longest = Duration::ZERO;
        for _ in 0..20 {
            let start = Instant::now();
            assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
            longest = longest.max(start.elapsed());
            std::thread::sleep(Duration::from_millis(20));
        }
        println!("held for {longest:?} at most");
        assert!(longest < Duration::from_secs(5), "held for {longest:?}");
        let waits = |event: &Event| matches!(event, Event::Waiting { wait, .. } if wait.to_string().contains("does not come"));
        flush(&relay.handle());
        assert!(events.try_iter().any(|event| waits(&event)));
        let_go.send(()).unwrap();
        let start = Instant::now();
        while !vcpu.state.lock().unwrap().mcip() {
            assert!(start.elapsed() < PATIENCE, "{:#?}", relay.pages());
            assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
            std::thread::sleep(Duration::from_millis(1));
        }
        stuck.join().unwrap();
    });
}

fn forms(events: &Receiver<Event>) -> Vec<(u64, Form)> {
    let told = events.try_iter().filter_map(|event| match event {
        Event::Injected { gpa, by: Injection::Mce { form, .. }, .. } => Some((gpa, form)),
        _ => None,
    });
    told.collect()
}

/// The guest touched one of the two; nobody knows which.
#[test]
fn a_page_at_two_addresses_is_one_ar_and_one_ao() {
    on_own_thread(|| {
        let alias = 0x4000_0000;
        let regions = [region(HVA, GPA, 0x4000), region(HVA, alias, 0x4000)];
        let (config, events) = config(1, intel(cap::LMCE_P), RamMap::new(&regions).unwrap());
        let relay = config.start().unwrap();
        let mut vcpu = Vcpu::new();
        vcpu.state.lock().unwrap().lmce = true;
        let mut port = attach(&relay, 0);
        let mut told = |touches: bool, count: usize| {
            if touches {
                forge(BUS_MCEERR_AR, HVA + 0x2000, 12);
            }
            let (start, mut told) = (Instant::now(), Vec::new());
            while told.len() < count {
                assert!(start.elapsed() < PATIENCE, "{:#?}", relay.pages());
                assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
                vcpu.run();
                flush(&relay.handle());
                told.extend(forms(&events));
                std::thread::sleep(Duration::from_millis(1));
            }
            told
        };
        let first = told(true, 2);
        assert_eq!(first, [(GPA + 0x2000, Form::Srar), (alias + 0x2000, Form::Srao)]);
        // It was the other one.
        assert_eq!(told(true, 1), [(alias + 0x2000, Form::Srar)]);
    });
}

#[test]
fn of_two_touches_at_once_one_is_told_and_the_other_is_not_lost() {
    for caps in [intel(cap::LMCE_P), amd()] {
        on_own_thread(move || {
            let (relay, events) = start(1, caps);
            let mut vcpu = Vcpu::new();
            vcpu.state.lock().unwrap().lmce = true;
            let mut port = attach(&relay, 0);
            assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
            std::thread::sleep(Duration::from_millis(1100));
            forge(BUS_MCEERR_AR, HVA, 12);
            forge(BUS_MCEERR_AR, HVA + 0x1000, 12);
            let start = Instant::now();
            while gpas(&relay, is_acknowledged).len() < 2 {
                assert!(start.elapsed() < PATIENCE, "{:#?}", relay.pages());
                assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
                vcpu.run();
                std::thread::sleep(Duration::from_millis(2));
            }
            flush(&relay.handle());
            let told = forms(&events);
            let kinds: Vec<bool> =
                told.iter().map(|(_, form)| matches!(form, Form::Srar | Form::AmdAr)).collect();
            assert_eq!(kinds, [true, false], "{told:x?}");
        });
    }
}

/// An AR belongs to the instruction that met the page.
#[test]
fn a_touch_that_a_pause_has_let_go_is_no_machine_check_later() {
    on_own_thread(|| {
        let (relay, events) = start(2, intel(0));
        let relay = Arc::new(relay);
        let (resume, paused) = channel::<()>();
        let parked = Arc::new(Barrier::new(2));
        let over = Arc::new(AtomicBool::new(false));
        let other = std::thread::spawn({
            let (relay, parked, over) =
                (Arc::clone(&relay), Arc::clone(&parked), Arc::clone(&over));
            move || {
                let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 1));
                port.park(|| {
                    parked.wait();
                    paused.recv().unwrap();
                });
                while !over.load(Ordering::Relaxed) {
                    assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
                    vcpu.run();
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        });
        parked.wait();
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
        forge(BUS_MCEERR_AR, HVA, 12);
        assert_eq!(port.before_run(&mut vcpu), Verdict::Run, "it is to pause, too");
        flush(&relay.handle());
        assert_eq!(forms(&events), []);
        port.park(|| resume.send(()).unwrap());
        // It goes on somewhere else, and is told of the page as of one that nobody touches.
        run_until_told(&relay, &mut port, &mut vcpu, &[GPA]);
        flush(&relay.handle());
        assert_eq!(forms(&events), [(GPA, Form::Srao)]);
        over.store(true, Ordering::Relaxed);
        other.join().unwrap();
    });
}

/// Its thread is held up by something of the host's.
#[test]
fn an_ao_does_not_wait_for_a_vcpu_that_does_not_come() {
    on_own_thread(|| {
        let (relay, _events) = start(2, intel(cap::LMCE_P));
        let relay = Arc::new(relay);
        let (attached, is_attached) = channel();
        let (let_go, held) = channel::<()>();
        let other = std::thread::spawn({
            let relay = Arc::clone(&relay);
            move || {
                let _port = attach(&relay, 0);
                attached.send(()).unwrap();
                held.recv().unwrap();
            }
        });
        is_attached.recv().unwrap();
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 1));
        vcpu.state.lock().unwrap().lmce = true;
        forge(BUS_MCEERR_AO, HVA, 12);
        run_until_told(&relay, &mut port, &mut vcpu, &[GPA]);
        let_go.send(()).unwrap();
        other.join().unwrap();
    });
}

/// A vCPU is seen at first as one that waits for its start-up IPI, then started by the guest, which nobody sees.
fn started_unseen(vcpu: &mut Vcpu, port: &mut VcpuPort) {
    let set = |vcpu: &Vcpu, started: bool| {
        let mut state = vcpu.state.lock().unwrap();
        (state.waits_for_sipi, state.cr4_mce, state.interrupts_on) = (!started, started, started);
    };
    set(vcpu, false);
    assert_eq!(port.before_run(vcpu), Verdict::Run);
    set(vcpu, true);
}

/// To an offline processor an SRAO is nothing, and to the others it is a machine check from nowhere: they panic.
#[test]
fn the_error_of_a_rendezvous_goes_to_a_processor_that_is_online() {
    for spins in [false, true] {
        on_own_thread(move || {
            let (relay, _events) = start(2, intel(0));
            let relay = Arc::new(relay);
            let over = Arc::new(AtomicBool::new(false));
            let (ready, is_ready) = channel();
            let online = std::thread::spawn({
                let (relay, over) = (Arc::clone(&relay), Arc::clone(&over));
                move || {
                    let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 1));
                    started_unseen(&mut vcpu, &mut port);
                    ready.send(()).unwrap();
                    for look in 0.. {
                        if over.load(Ordering::Relaxed) {
                            break;
                        }
                        // It, too, has interrupts off at most looks.
                        vcpu.state.lock().unwrap().interrupts_on = !spins || look % 3 == 0;
                        assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
                        vcpu.run();
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
            });
            let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
            assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
            is_ready.recv().unwrap();
            *vcpu.processor.lock().unwrap() = Processor::Offline;
            (vcpu.state.lock().unwrap().interrupts_on, vcpu.state.lock().unwrap().halted) =
                (false, true);
            for page in 0..4 {
                forge(BUS_MCEERR_AO, HVA + page * 4096, 12);
                let start = Instant::now();
                while gpas(&relay, is_acknowledged).len() as u64 <= page {
                    assert!(start.elapsed() < PATIENCE, "{:#?}", relay.pages());
                    assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
                    let is_error = |record: &u64| record & status::EN != 0;
                    assert!(
                        !vcpu.records().iter().any(is_error),
                        "page {page}: {:x?}",
                        vcpu.records()
                    );
                    if spins && vcpu.state.lock().unwrap().mcip() {
                        // As after a crash: `halt(); for (;;) cpu_relax();`.
                        vcpu.state.lock().unwrap().halted = false;
                    }
                    vcpu.run();
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            over.store(true, Ordering::Relaxed);
            online.join().unwrap();
        });
    }
}

/// A page of this process's own memory.
fn own_page() -> u64 {
    // SAFETY: a new private mapping at an address of the kernel's choice; it is never unmapped.
    let at = unsafe {
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        libc::mmap(std::ptr::null_mut(), 4096, prot, flags, -1, 0)
    };
    assert_ne!(at, libc::MAP_FAILED);
    at.expose_provenance() as u64
}

#[test]
fn an_mmio_exit_of_good_memory_is_no_touch_of_a_bad_page() {
    on_own_thread(|| {
        let ram = RamMap::new(&[region(own_page(), GPA, 4096)]).unwrap();
        let (config, _events) = config(1, amd(), ram);
        let relay = config.start().unwrap();
        let mut port = attach(&relay, 0);
        assert!(!port.mmio_hit(GPA + 8), "a read-only slot, say");
        assert!(!port.mmio_hit(0xfee0_0000), "a device");
        assert_eq!(port.before_run(&mut Vcpu::new()), Verdict::Run);
        assert!(relay.pages().is_empty());
    });
}

/// As of guest_memfd: KVM says EHWPOISON, and nothing is mapped here that could be asked.
#[test]
fn a_memory_fault_is_a_touch_where_the_host_says_that_the_page_is_bad() {
    on_own_thread(|| {
        let (good, bad) = (own_page(), HVA);
        let regions = [region(good, 0, 4096), region(bad, GPA, 0x4000)];
        let (config, events) = config(1, amd(), RamMap::new(&regions).unwrap());
        let relay = config.start().unwrap();
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
        assert!(!port.memory_fault(8, 8, libc::EFAULT), "the host says nothing of it");
        assert!(!port.memory_fault(0xfee0_0000, 4096, libc::EHWPOISON), "no RAM");
        for size in [0, 1, 1 << 30, u64::MAX] {
            assert!(
                !port.memory_fault(u64::MAX - 8, size, libc::EHWPOISON),
                "the end of all addresses"
            );
        }
        assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
        assert!(relay.pages().is_empty());
        assert!(port.memory_fault(GPA + 0x1008, 8, libc::EHWPOISON));
        assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
        flush(&relay.handle());
        assert_eq!(forms(&events), [(GPA + 0x1000, Form::AmdAr)]);
    });
}

/// A huge page that the kernel could not split, or keeps: it stays mapped, or can be mapped again, and 4 KiB of it are
/// lost.
#[test]
fn what_is_still_mapped_of_a_huge_page_is_not_lost() {
    const HUGE: u64 = 2 << 20;
    const LEN: usize = 2 << 20;
    /// Pages that are mapped, and pages that there are.
    const MAPPED: u64 = 256;
    const THERE: u64 = 384;
    let (prot, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
    // SAFETY: a new file of this test's alone; a new mapping at an address of the kernel's choice, which is never
    // unmapped, and in it one of the file.
    let (file, first) = unsafe {
        let file = libc::memfd_create(c"huge".as_ptr(), libc::MFD_CLOEXEC);
        assert_eq!(libc::ftruncate(file, THERE.cast_signed() * 4096), 0);
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let at = libc::mmap(std::ptr::null_mut(), 2 * LEN, prot, private, -1, 0);
        assert_ne!(at, libc::MAP_FAILED);
        let first = at.map_addr(|at| at.next_multiple_of(LEN));
        assert_eq!(libc::mmap(first, LEN, prot, shared, file, 0), first);
        (file, first.cast::<u8>())
    };
    let start = first.expose_provenance() as u64;
    let touch = |pages: std::ops::Range<u64>| {
        for page in pages {
            let offset = usize::try_from(page * 4096).unwrap();
            // SAFETY: inside the mapping above, and of the file.
            unsafe { first.add(offset).write_volatile(1) };
        }
    };
    touch(0..MAPPED);
    // The last of these maps what there is.
    for (page_shift, lsb, lost_from) in [(21, 12, MAPPED), (21, 21, MAPPED), (12, 21, THERE)] {
        on_own_thread(move || {
            let huge = region(start, HUGE, HUGE).in_pages_of(page_shift);
            let (config, events) = config(1, amd(), RamMap::new(&[huge]).unwrap());
            let relay = config.start().unwrap();
            let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
            forge(BUS_MCEERR_AR, start + 0x5000, lsb);
            assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
            let known: Vec<u64> = relay.pages().iter().map(|page| page.gpa - HUGE).collect();
            // What is mapped is whole, and of what is not, and cannot be, nobody can say so.
            let expected = [0x5000].into_iter().chain((lost_from..512).map(|page| page * 4096));
            assert_eq!(known, expected.collect::<Vec<u64>>(), "{page_shift} {lsb}");
            let lost = usize::try_from(1 + 512 - lost_from).unwrap();
            let touched = events.try_iter().any(|event| {
                matches!(event, Event::Seen { gpa, extent: HUGE, pages, .. }
                    if gpa == HUGE + 0x5000 && pages == lost)
            });
            assert!(touched);
        });
    }
    // SAFETY: the file above.
    assert_eq!(unsafe { libc::ftruncate(file, HUGE.cast_signed()) }, 0);
    touch(0..512);
    on_own_thread(move || {
        let huge = region(start, HUGE, HUGE).in_pages_of(21);
        let (config, _events) = config(1, amd(), RamMap::new(&[huge]).unwrap());
        let relay = config.start().unwrap();
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
        forge(BUS_MCEERR_AR, start + 0x5000, 12);
        assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
        let pages = relay.pages();
        assert_eq!(
            pages.iter().map(|page| (page.gpa, page.lsb)).collect::<Vec<_>>(),
            [(HUGE + 0x5000, 12)]
        );
    });
}

/// The kernel does not know at which address memory is that this process has not mapped.
#[test]
fn a_touch_without_an_address_is_not_somebody_elses() {
    on_own_thread(|| {
        let (relay, events) = start(1, amd());
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
        for _ in 0..10 {
            forge(BUS_MCEERR_AR, 0, 0);
            assert_eq!(
                port.before_run(&mut vcpu),
                Verdict::Run,
                "given up, it would end this process"
            );
        }
        assert!(port.memory_fault(GPA, 4096, libc::EHWPOISON), "KVM says it at the next entry");
        assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
        flush(&relay.handle());
        assert_eq!(forms(&events), [(GPA, Form::AmdAr)]);
    });
}

fn sigbus_is_blocked() -> bool {
    // SAFETY: a null new mask only reads the one in force into the live local.
    unsafe {
        let mut mask = std::mem::zeroed::<libc::sigset_t>();
        libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut mask);
        libc::sigismember(&raw const mask, libc::SIGBUS) == 1
    }
}

/// KVM_RUN would try again for ever: its AR is not forced.
#[test]
fn sigbus_that_somebody_has_blocked_is_unblocked() {
    on_own_thread(|| {
        // SAFETY: the set is initialised before it is read.
        unsafe {
            let mut bus = std::mem::zeroed::<libc::sigset_t>();
            libc::sigemptyset(&raw mut bus);
            libc::sigaddset(&raw mut bus, libc::SIGBUS);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const bus, std::ptr::null_mut());
        }
        assert!(sigbus_is_blocked());
        let (relay, _events) = start(1, amd());
        let mut port = attach(&relay, 0);
        assert!(!sigbus_is_blocked());
        forge(BUS_MCEERR_AR, HVA, 12);
        assert_eq!(port.before_run(&mut Vcpu::new()), Verdict::Run);
        assert_eq!(relay.pages().len(), 1);
    });
}

#[test]
fn a_page_that_was_never_told_waits_in_the_next_relay() {
    on_own_thread(|| {
        let now = SystemTime::now();
        let mut ledger = Ledger::default();
        for page in 0..2 {
            let (gpa, hva) = (GPA + page * 4096, HVA + page * 4096);
            assert!(ledger.enter(gpa, hva, 12, FailureKind::ActionOptional, FoundBy::Signal, now));
        }
        let place = mce_relay::Place::Mce { vcpu: 0, bank: 9, form: Form::Srao };
        assert!(ledger.set(GPA, State::Acknowledged { place }, now));
        // Of a restored guest the told one is good again, and the other cannot be called so.
        assert_eq!(ledger.replace(GPA, now), Ok(true));
        let untold = ledger.replace(GPA + 4096, now).unwrap_err();
        assert!(untold.to_string().contains("0x101000"), "{untold}");
        let (config, events) = config(1, intel(cap::LMCE_P), ram());
        let relay = config.ledger(ledger).start().unwrap();
        let mut vcpu = Vcpu::new();
        vcpu.state.lock().unwrap().lmce = true;
        let mut port = attach(&relay, 0);
        assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
        flush(&relay.handle());
        assert_eq!(forms(&events), [(GPA + 4096, Form::Srao)]);
    });
}

/// A kick that takes a lock of the VMM's, under which another thread uses the relay.
#[test]
fn a_kick_may_take_a_lock_of_the_hosts() {
    on_own_thread(|| {
        let (relay, _events) = start(1, amd());
        let relay = Arc::new(relay);
        let lock = Arc::new(Mutex::new(()));
        let kicks = Arc::new(AtomicU32::new(0));
        let kick = {
            let (lock, kicks) = (Arc::clone(&lock), Arc::clone(&kicks));
            move || {
                drop(lock.lock());
                kicks.fetch_add(1, Ordering::Relaxed);
            }
        };
        let port = relay.attach(0, ExitByte::NONE, Box::new(kick)).unwrap();
        let (done, told) = channel();
        let user = std::thread::spawn({
            let (relay, lock, kicks) = (Arc::clone(&relay), Arc::clone(&lock), Arc::clone(&kicks));
            move || {
                while kicks.load(Ordering::Relaxed) < 50 {
                    let _held = lock.lock();
                    assert!(relay.pages().is_empty());
                }
                done.send(()).unwrap();
            }
        });
        // Meanwhile the relay's thread has the vCPU called.
        let start = Instant::now();
        while told.try_recv().is_err() {
            assert!(start.elapsed() < PATIENCE, "they wait for each other");
            relay.handle().forge(GPA, Some(0)).unwrap();
        }
        user.join().unwrap();
        drop(port);
    });
}

#[test]
fn a_host_that_panics_does_not_take_the_relay_along() {
    on_own_thread(|| {
        let (tx, events) = channel();
        let observer = move |event: &Event| {
            tx.send(event.clone()).unwrap();
            assert!(!matches!(event, Event::Caught { .. }), "a host's own defect");
        };
        let relay = Relay::builder(ram())
            .vcpus(1)
            .machine_checks(amd())
            .observer(observer)
            .start()
            .unwrap();
        let kick = || panic!("a host's own defect");
        let port = relay.attach(0, ExitByte::NONE, Box::new(kick)).unwrap();
        for page in 0..3 {
            relay.handle().forge(GPA + page * 4096, None).unwrap();
        }
        let start = Instant::now();
        while relay.pages().len() < 3 {
            assert!(start.elapsed() < PATIENCE, "{:?}", relay.pages());
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(relay.handle().is_alive());
        drop(port);
        let handle = relay.handle();
        drop(relay);
        assert!(events.try_iter().count() >= 3, "each was given");
        assert!(!handle.is_alive(), "it has ended");
    });
}

/// The thread is not there in the child, and its locks may be held for ever.
#[test]
fn a_forked_child_that_drops_a_relay_ends() {
    on_own_thread(|| {
        let (relay, _events) = start(1, amd());
        let port = attach(&relay, 0);
        // SAFETY: the child drops what this test made, and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            drop(port);
            drop(relay);
            // SAFETY: ends the process.
            unsafe { libc::_exit(0) };
        }
        let start = Instant::now();
        let mut status = 0;
        // SAFETY: a child that has not been waited for; `status` is a live local.
        while unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } == 0 {
            if start.elapsed() > PATIENCE {
                // SAFETY: as above.
                unsafe { libc::kill(child, libc::SIGKILL) };
                panic!("the child does not end");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(status, 0);
        assert!(relay.handle().is_alive());
    });
}

struct Silent;

impl Bell for Silent {
    fn ring(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn the_error_sources_page_stays() {
    on_own_thread(|| {
        let regions = [region(own_page(), 0, 4096), region(HVA, GPA, 4096)];
        let (config, _events) = config(1, amd(), RamMap::new(&regions).unwrap());
        let source = ErrorSource::new(0, Silent).patience(Duration::from_secs(1));
        let relay = config.error_source(source).start().unwrap();
        let error = relay.handle().remove_ram(0).unwrap_err();
        assert_eq!(error, RamError::Source { gpa: 0, page: 0 });
        assert_eq!(relay.handle().remove_ram(GPA).unwrap(), regions[1]);
    });
}

/// A pause is on, and another vCPU's thread is held up: who has touched a page pauses, and is not kept from it.
#[test]
fn a_pause_counts_for_more_than_a_vcpu_that_does_not_come() {
    on_own_thread(|| {
        let (relay, _events) = start(3, intel(0));
        let relay = Arc::new(relay);
        let (is_there, there) = channel();
        let (let_go, held) = channel::<()>();
        let stuck = std::thread::spawn({
            let (relay, is_there) = (Arc::clone(&relay), is_there.clone());
            move || {
                let _port = attach(&relay, 0);
                is_there.send(()).unwrap();
                held.recv().unwrap();
            }
        });
        let (resume, resumed) = channel::<()>();
        let paused = std::thread::spawn({
            let relay = Arc::clone(&relay);
            move || {
                let mut port = attach(&relay, 1);
                port.park(|| {
                    is_there.send(()).unwrap();
                    resumed.recv().unwrap();
                });
            }
        });
        there.recv().unwrap();
        there.recv().unwrap();
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 2));
        // It has been found out that the first does not come.
        forge(BUS_MCEERR_AO, HVA, 12);
        let start = Instant::now();
        forge(BUS_MCEERR_AR, HVA + 0x1000, 12);
        assert_eq!(
            port.before_run(&mut vcpu),
            Verdict::Run,
            "it pauses, and touches the page again"
        );
        assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
        resume.send(()).unwrap();
        let_go.send(()).unwrap();
        stuck.join().unwrap();
        paused.join().unwrap();
    });
}

#[test]
fn attaching_says_what_is_wrong() {
    on_own_thread(|| {
        let (relay, _events) = start(1, amd());
        let refused = |vcpu| relay.attach(vcpu, ExitByte::NONE, || {}).err().unwrap();
        let error = refused(5);
        assert!(matches!(error, AttachError::NoVcpu { vcpu: 5, vcpus: 1 }), "{error}");
        let _port = attach(&relay, 0);
        let error = refused(0);
        assert!(matches!(error, AttachError::Attached { vcpu: 0 }), "{error}");
    });
}

/// MCG_CAP without CTL_P: there is no MCG_CTL that could be off.
#[test]
fn a_guest_without_mcg_ctl_is_told() {
    let caps = Caps { mcg_cap: u64::from(BANKS) | cap::SER_P, ..intel(0) };
    let values: Vec<u64> =
        caps.state_msrs().iter().map(|msr| if msr % 4 == 0 { u64::MAX } else { 0 }).collect();
    assert_eq!(caps.state(&values).mcg_ctl, u64::MAX);
}

/// What a snapshot may write by write(2).
#[test]
fn the_parts_of_a_range_that_are_whole() {
    on_own_thread(|| {
        let (relay, _events) = start(1, amd());
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
        let handle = relay.handle();
        let parts = |gpas: std::ops::Range<u64>| -> Vec<(u64, u64)> {
            handle.whole_parts(gpas).iter().map(|part| (part.start, part.end)).collect()
        };
        assert_eq!(parts(GPA..GPA + 0x4000), [(GPA, GPA + 0x4000)]);
        for page in [0, 3, 4, 6] {
            forge(BUS_MCEERR_AO, HVA + page * 4096, 12);
            assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
        }
        let page = |number: u64| GPA + number * 4096;
        assert_eq!(
            parts(page(0)..page(8)),
            [(page(1), page(3)), (page(5), page(6)), (page(7), page(8))]
        );
        // In the middle of pages.
        assert_eq!(parts(page(3) + 8..page(5) + 8), [(page(5), page(5) + 8)]);
        assert_eq!(parts(page(2) + 8..page(3) + 8), [(page(2) + 8, page(3))]);
        assert!(parts(page(3)..page(5)).is_empty());
    });
}

/// A layer below the run loop takes MMIO exits itself, and has no port.
#[test]
fn an_mmio_exit_is_a_touch_whoever_saw_it() {
    on_own_thread(|| {
        let regions = [region(own_page(), 0, 4096)];
        let (config, _events) = config(1, amd(), RamMap::new(&regions).unwrap());
        let relay = config.start().unwrap();
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
        assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
        let handle = relay.handle();
        assert!(!handle.mmio_hit(0, 8), "it is whole");
        assert!(!handle.mmio_hit(0, 0xfee0_0000), "no RAM");
        assert!(!port.wants_attention() && relay.pages().is_empty());
    });
}

/// A VMM on an architecture without machine checks: nothing can be told, and nothing is lost.
#[test]
fn a_relay_without_machine_checks() {
    for code in [BUS_MCEERR_AO, BUS_MCEERR_AR] {
        on_own_thread(move || {
            let (tx, events) = channel();
            let observer = move |event: &Event| drop(tx.send(event.clone()));
            let relay = Relay::builder(ram()).vcpus(1).observer(observer).start().unwrap();
            let mut port = attach(&relay, 0);
            forge(code, HVA, 12);
            let verdict = port.before_run(&mut NoMachineChecks);
            let no_entry = matches!(verdict, Verdict::Undeliverable { gpa: GPA, .. });
            assert_eq!(no_entry, code == BUS_MCEERR_AR, "{verdict:?}");
            let why = UndeliverableReason::NoForm;
            assert_eq!(gpas(&relay, |state| *state == State::Undeliverable { why }), [GPA]);
            drop(relay);
            assert!(events.try_iter().any(|event| matches!(event, Event::Undeliverable { .. })));
        });
    }
}

/// A back end that panics has refused: the guest was not told.
#[test]
fn a_back_end_that_panics_has_told_nobody() {
    struct Panics(Vcpu);
    impl Mca for Panics {
        fn state(&mut self) -> io::Result<McaState> {
            self.0.state()
        }

        fn inject(&mut self, _: &Record) -> io::Result<()> {
            panic!("the host's own defect")
        }
    }
    on_own_thread(|| {
        let (relay, _events) = start(1, amd());
        let mut port = attach(&relay, 0);
        let mut vcpu = Panics(Vcpu::new());
        forge(BUS_MCEERR_AR, HVA, 12);
        let verdict = port.before_run(&mut vcpu);
        assert!(matches!(verdict, Verdict::Undeliverable { gpa: GPA, .. }), "{verdict:?}");
        // It comes round once more, and finds an empty bank.
        relay.handle().forge(GPA + 0x1000, None).unwrap();
        let start = Instant::now();
        while relay.pages().len() < 2 {
            assert!(start.elapsed() < PATIENCE);
            let _ = port.before_run(&mut vcpu);
        }
        let why = UndeliverableReason::Refused;
        assert_eq!(gpas(&relay, |state| *state == State::Undeliverable { why }), [GPA]);
    });
}

/// Who only looks may hold a lock that the observer takes: it is called by those who have something to say.
#[test]
fn who_only_looks_calls_nobody() {
    on_own_thread(|| {
        let threads: Arc<Mutex<Vec<std::thread::ThreadId>>> = Arc::default();
        let seen = Arc::clone(&threads);
        let observer = move |_: &Event| {
            seen.lock().unwrap().push(std::thread::current().id());
            std::thread::sleep(Duration::from_micros(100));
        };
        let relay = Relay::builder(ram()).vcpus(1).machine_checks(amd()).observer(observer);
        let relay = relay.start().unwrap();
        let (handle, over) = (relay.handle(), Arc::new(AtomicBool::new(false)));
        let looks = std::thread::spawn({
            let over = Arc::clone(&over);
            move || {
                while !over.load(Ordering::Relaxed) {
                    drop((handle.pages(), handle.whole_parts(GPA..GPA + 0x1000)));
                    assert!(!handle.mmio_hit(0, 0xfee0_0000));
                }
                std::thread::current().id()
            }
        });
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
        for page in 0..PAGES {
            forge(BUS_MCEERR_AO, HVA + page * 4096, 12);
            assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
        }
        over.store(true, Ordering::Relaxed);
        let looked = looks.join().unwrap();
        drop(relay);
        let threads = threads.lock().unwrap();
        assert!(threads.len() > 256 && !threads.contains(&looked), "{}", threads.len());
    });
}

/// The observer may use the relay, and whoever waits for it holds up nobody else.
#[test]
fn an_observer_may_use_the_relay() {
    on_own_thread(|| {
        let handle: Arc<Mutex<Option<Handle>>> = Arc::default();
        let (own, (tx, events)) = (Arc::clone(&handle), channel());
        let observer = move |event: &Event| {
            let known = own.lock().unwrap().as_ref().map_or(0, |handle| handle.pages().len());
            let _ = tx.send((event.clone(), known));
        };
        let relay = Relay::builder(ram()).vcpus(1).machine_checks(amd()).observer(observer);
        let relay = relay.start().unwrap();
        *handle.lock().unwrap() = Some(relay.handle());
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
        forge(BUS_MCEERR_AR, HVA, 12);
        assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
        flush(&relay.handle());
        let seen: Vec<_> = events.try_iter().collect();
        let is_injected = |(event, known): &(Event, usize)| {
            matches!(event, Event::Injected { .. }) && *known == 1
        };
        assert!(seen.iter().any(is_injected), "{seen:?}");
        *handle.lock().unwrap() = None;
    });
}
