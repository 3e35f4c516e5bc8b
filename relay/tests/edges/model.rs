//! A vCPU as KVM keeps it, the guest's processor on it, and the threads that run them.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use mce_relay::mca::{BANKS, Caps, McaState, Record, Vendor, cap, status};
use mce_relay::{
    Event, ExitByte, Form, Injection, Mca, Pace, RamMap, RamRegion, Relay, RelayBuilder, State,
    VcpuPort, Verdict,
};

use crate::forge::{BUS_MCEERR_AO, forge};

pub(crate) const HVA: u64 = 0x7f00_0000_0000;
/// Guest-physical address of the first page at [`HVA`].
pub(crate) const GPA: u64 = 0x10_0000;
pub(crate) const PAGES: u64 = 0x100;
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A stretch of addresses where nothing is mapped, or where there is memory that is this program's for this alone.
pub(crate) fn region(hva: u64, gpa: u64, len: u64) -> RamRegion {
    // SAFETY: no reference of Rust's leads there.
    unsafe { RamRegion::new(hva, gpa, len) }
}

/// What a vCPU's processor does with its machine checks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Processor {
    /// The handler, or the poll, clears all banks.
    Online,
    /// It halts with interrupts off; of a machine check it clears MCG_STATUS and nothing else.
    Offline,
}

/// A vCPU as KVM keeps it, and the guest's processor on it.
#[derive(Clone)]
pub(crate) struct Vcpu {
    pub(crate) state: Arc<Mutex<McaState>>,
    pub(crate) processor: Arc<Mutex<Processor>>,
    /// The back end can empty banks.
    pub(crate) takes_back: bool,
    /// How often it fails to all the same, and with what.
    pub(crate) fails: Arc<Mutex<(u32, io::ErrorKind)>>,
    /// How often it was asked to.
    pub(crate) asked: Arc<AtomicU32>,
}

impl Vcpu {
    pub(crate) fn new() -> Self {
        let state = McaState::up();
        let processor = Arc::new(Mutex::new(Processor::Online));
        let fails = Arc::new(Mutex::new((0, io::ErrorKind::Other)));
        let state = Arc::new(Mutex::new(state));
        Self { state, processor, takes_back: true, fails, asked: Arc::default() }
    }

    pub(crate) fn offline() -> Self {
        let vcpu = Self::new();
        *vcpu.processor.lock().unwrap() = Processor::Offline;
        let mut state = vcpu.state.lock().unwrap();
        (state.interrupts_on, state.halted) = (false, true);
        drop(state);
        vcpu
    }

    /// The guest runs for a while.
    pub(crate) fn run(&self) {
        let mut state = self.state.lock().unwrap();
        state.mcg_status = 0;
        if *self.processor.lock().unwrap() == Processor::Online {
            state.banks.iter_mut().for_each(|bank| bank.status = 0);
        }
    }

    pub(crate) fn records(&self) -> Vec<u64> {
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

pub(crate) fn intel(extra: u64) -> Caps {
    let mcg_cap = u64::from(BANKS) | cap::CTL_P | cap::SER_P | extra;
    Caps { vendor: Vendor::Intel, mcg_cap, succor: false }
}

pub(crate) fn amd() -> Caps {
    Caps { vendor: Vendor::Amd, mcg_cap: u64::from(BANKS) | cap::CTL_P, succor: true }
}

pub(crate) fn ram() -> RamMap {
    RamMap::new(&[region(HVA, GPA, PAGES * 4096)]).unwrap()
}

/// As quick as the guest takes it.
pub(crate) fn config(vcpus: usize, caps: Caps, ram: RamMap) -> (RelayBuilder, Receiver<Event>) {
    let (tx, rx) = channel();
    let observer = move |event: &Event| drop(tx.send(event.clone()));
    let pace = Pace { burst: 1000, rate: 1_000_000 };
    let relay = Relay::builder(ram).vcpus(vcpus).machine_checks(caps);
    (relay.pace(pace).observer(observer), rx)
}

pub(crate) fn start(vcpus: usize, caps: Caps) -> (Relay, Receiver<Event>) {
    let (config, events) = config(vcpus, caps, ram());
    (config.start().unwrap(), events)
}

pub(crate) fn attach(relay: &Relay, vcpu: usize) -> VcpuPort {
    relay.attach(vcpu, ExitByte::NONE, || {}).unwrap()
}

pub(crate) fn on_own_thread(body: impl FnOnce() + Send + 'static) {
    std::thread::spawn(body).join().unwrap();
}

pub(crate) fn gpas(relay: &Relay, is: impl Fn(&State) -> bool) -> Vec<u64> {
    relay.pages().iter().filter(|page| is(&page.state)).map(|page| page.gpa).collect()
}

pub(crate) fn is_acknowledged(state: &State) -> bool {
    matches!(state, State::Acknowledged { .. })
}

/// Runs each of `vcpus` on a thread of its own until `done`, which is asked again and again; `signals` are sent by the
/// first thread, one after the other.
pub(crate) fn run_until(
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
pub(crate) fn run_until_told(
    relay: &Relay,
    port: &mut VcpuPort,
    vcpu: &mut Vcpu,
    expected: &[u64],
) {
    let start = Instant::now();
    while gpas(relay, is_acknowledged) != expected {
        assert!(start.elapsed() < PATIENCE, "{:#?}", relay.pages());
        assert_eq!(port.before_run(vcpu), Verdict::Run);
        vcpu.run();
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub(crate) fn all_told(pages: u64) -> impl Fn(&Relay) -> bool {
    move |relay| gpas(relay, is_acknowledged).len() as u64 == pages
}

pub(crate) fn aos(pages: u64) -> Vec<(i32, u64)> {
    (0..pages).map(|page| (BUS_MCEERR_AO, HVA + page * 4096)).collect()
}

pub(crate) fn forms(events: &Receiver<Event>) -> Vec<(u64, Form)> {
    let told = events.try_iter().filter_map(|event| match event {
        Event::Injected { gpa, by: Injection::Mce { form, .. }, .. } => Some((gpa, form)),
        _ => None,
    });
    told.collect()
}

/// A page of this process's own memory.
pub(crate) fn own_page() -> u64 {
    // SAFETY: a new private mapping at an address of the kernel's choice; it is never unmapped.
    let at = unsafe {
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        libc::mmap(std::ptr::null_mut(), 4096, prot, flags, -1, 0)
    };
    assert_ne!(at, libc::MAP_FAILED);
    at.expose_provenance() as u64
}
