//! The firmware-first channel as a VMM uses it: a real status block in memory of our own, a model of a
//! guest's driver that takes records out of it, and forged signals.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test says what it saw by panicking")]

mod forge;

use std::io;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use forge::{BUS_MCEERR_AO, BUS_MCEERR_AR};
use mce_relay::mca::{BANKS, Caps, McaState, Record, Vendor, cap};
use mce_relay::{
    AoChannel, Bell, ErrorSource, Event, ExitByte, FallbackReason, Mca, Pace, Place, RamMap,
    RamRegion, Relay, RelayBuilder, RetireError, StartError, State, UndeliverableReason, VcpuPort,
    Verdict, WaitReason,
};

/// Guest RAM: the block's page, and pages to go bad.
const RAM: u64 = 0x10_0000;
const LEN: usize = 64 << 12;
/// Of a relay whose guest takes every record in the end, however slow the machine is.
const PATIENT: Duration = Duration::from_secs(15);
/// Of one whose guest does not.
const IMPATIENT: Duration = Duration::from_millis(300);

/// A stretch of addresses where nothing is mapped, or where there is memory that is this program's for this alone.
fn region(hva: u64, gpa: u64, len: u64) -> RamRegion {
    // SAFETY: no reference of Rust's leads there.
    unsafe { RamRegion::new(hva, gpa, len) }
}

/// Memory that outlives every thread of its test: it is never given back.
fn memory() -> u64 {
    // SAFETY: a fresh mapping; the result is checked.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            LEN,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert_ne!(at, libc::MAP_FAILED);
    at as u64
}

/// What the bell says of the guest, and what the guest does when it rings.
#[derive(Clone)]
struct Driver {
    hva: u64,
    /// 0 has not taken the source, 1 has, 2 cannot be seen, 3 the bell is broken.
    heard: Arc<AtomicU8>,
    /// 0 takes records, 1 lets them lie, 2 writes over them, 3 takes them without waiting.
    does: Arc<AtomicU8>,
    rings: Arc<AtomicU32>,
    /// Addresses of every record that was taken.
    records: Arc<Mutex<Vec<Vec<u64>>>>,
}

impl Driver {
    fn new(hva: u64) -> Self {
        Self {
            hva,
            heard: Arc::new(AtomicU8::new(1)),
            does: Arc::default(),
            rings: Arc::default(),
            records: Arc::default(),
        }
    }

    fn block(&self) -> *mut u32 {
        (self.hva + ErrorSource::BLOCK_OFFSET) as *mut u32
    }

    fn status(&self) -> u32 {
        // SAFETY: the page is mapped for good; nobody has a reference to it.
        unsafe { self.block().read_volatile() }
    }

    fn set_status(&self, status: u32) {
        // SAFETY: as above.
        unsafe { self.block().write_volatile(status) }
    }

    /// As Linux does: reads the record, acts on it, zeroes the status word.
    fn take(&self) {
        let status = self.status();
        if status == 0 {
            return;
        }
        let count = (status >> 4) as usize;
        // SAFETY: as above; a record of `count` entries lies there.
        let gpas = unsafe {
            let entry = |index: usize| self.block().byte_add(20 + index * 152 + 88).cast::<u64>();
            (0..count).map(|index| entry(index).read_unaligned()).collect()
        };
        self.records.lock().unwrap().push(gpas);
        self.set_status(0);
    }
}

impl Bell for Driver {
    fn ring(&mut self) -> io::Result<()> {
        self.rings.fetch_add(1, Ordering::SeqCst);
        match self.does.load(Ordering::SeqCst) {
            _ if self.heard.load(Ordering::SeqCst) == 3 => {
                return Err(io::Error::other("no bell"));
            }
            0 => {
                let driver = self.clone();
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(3));
                    driver.take();
                });
            }
            2 => self.set_status(0xdead_beef),
            3 => self.take(),
            _ => {}
        }
        Ok(())
    }

    fn is_heard(&mut self) -> Option<bool> {
        match self.heard.load(Ordering::SeqCst) {
            0 => Some(false),
            2 => None,
            _ => Some(true),
        }
    }
}

/// A vCPU whose guest clears its banks at once, and has set up its machine checks if `open`.
struct Model {
    state: McaState,
    told: Vec<u64>,
}

impl Mca for Model {
    fn state(&mut self) -> io::Result<McaState> {
        Ok(self.state)
    }

    fn inject(&mut self, record: &Record) -> io::Result<()> {
        self.told.push(record.addr);
        self.state.banks[usize::from(record.bank)].status = record.status;
        if record.mcg_status != 0 {
            self.state.mcg_status = record.mcg_status;
        }
        Ok(())
    }
}

struct Machine {
    relay: Relay,
    driver: Driver,
    port: VcpuPort,
    model: Model,
    events: Arc<Mutex<Vec<Event>>>,
}

fn amd() -> Caps {
    Caps { vendor: Vendor::Amd, mcg_cap: u64::from(BANKS) | cap::CTL_P, succor: true }
}

fn config(hva: u64, caps: Caps, ao_channel: AoChannel) -> RelayBuilder {
    let region = region(hva, RAM, LEN as u64);
    let pace = Pace { burst: 16, rate: 1000 };
    let ram = RamMap::new(&[region]).unwrap();
    Relay::builder(ram).vcpus(1).machine_checks(caps).pace(pace).ao_channel(ao_channel)
}

impl Machine {
    fn new(caps: Caps, ao_channel: AoChannel) -> Self {
        Self::with(caps, ao_channel, Pace { burst: 16, rate: 1000 }, PATIENT)
    }

    fn impatient(ao_channel: AoChannel) -> Self {
        Self::with(amd(), ao_channel, Pace { burst: 16, rate: 1000 }, IMPATIENT)
    }

    fn with(caps: Caps, ao_channel: AoChannel, pace: Pace, patience: Duration) -> Self {
        let hva = memory();
        let driver = Driver::new(hva);
        let source = ErrorSource::new(RAM, driver.clone()).patience(patience);
        let events = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&events);
        let observer = move |event: &Event| all.lock().unwrap().push(event.clone());
        let relay = config(hva, caps, ao_channel).error_source(source).pace(pace);
        let relay = relay.observer(observer).start().unwrap();
        let port = relay.attach(0, ExitByte::NONE, || {}).unwrap();
        let state = McaState::up();
        Self { relay, driver, port, model: Model { state, told: Vec::new() }, events }
    }

    fn hva(&self, page: u64) -> u64 {
        self.driver.hva + (page << 12)
    }

    fn forge(&self, code: i32, page: u64) {
        forge::forge(code, self.hva(page), 12);
    }

    /// The vCPU goes round, and its guest clears what it finds, until `done`.
    fn run_until(&mut self, done: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < Duration::from_secs(20), "{:#?}", self.relay.pages());
            assert_eq!(self.port.before_run(&mut self.model), Verdict::Run);
            self.model.state.banks.iter_mut().for_each(|bank| bank.status = 0);
            self.model.state.mcg_status = 0;
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Runs until every page is acknowledged; the place each was told of at.
    fn settle(&mut self, pages: usize) -> Vec<Place> {
        let place = |state: &State| match state {
            State::Acknowledged { place } => Some(*place),
            _ => None,
        };
        self.run_until(|machine| {
            let all = machine.relay.pages();
            all.len() == pages && all.iter().all(|page| place(&page.state).is_some())
        });
        self.relay.pages().iter().filter_map(|page| place(&page.state)).collect()
    }

    fn fell_back(&self, why: FallbackReason) -> bool {
        let wanted = WaitReason::NotByFirmware { why };
        let events = self.events.lock().unwrap();
        events.iter().any(|event| matches!(event, Event::Waiting { wait, .. } if *wait == wanted))
    }

    fn records(&self) -> Vec<Vec<u64>> {
        self.driver.records.lock().unwrap().clone()
    }
}

/// Runs `body` on a thread of its own: a policy and a slot belong to a thread.
fn on_own_thread(body: impl FnOnce() + Send + 'static) {
    std::thread::spawn(body).join().unwrap();
}

fn by_record(places: &[Place]) -> bool {
    places.iter().all(|place| matches!(place, Place::Ghes { .. }))
}

fn by_machine_check(places: &[Place]) -> bool {
    places.iter().all(|place| matches!(place, Place::Mce { .. }))
}

#[test]
fn every_page_is_in_one_record_and_in_no_bank() {
    on_own_thread(|| {
        let mut machine = Machine::new(amd(), AoChannel::Auto);
        // SAFETY: the page is mapped for good.
        let register = unsafe {
            ((machine.driver.hva + ErrorSource::ADDRESS_OFFSET) as *const u64).read_volatile()
        };
        assert_eq!(register, RAM + ErrorSource::BLOCK_OFFSET, "the error status address register");
        for page in 1..=40 {
            machine.forge(BUS_MCEERR_AO, page);
            // A slot holds fewer signals than that.
            machine
                .run_until(|machine| machine.relay.pages().len() == usize::try_from(page).unwrap());
        }
        assert!(by_record(&machine.settle(40)));
        let told: Vec<u64> = machine.records().concat();
        assert_eq!(told, (1..=40).map(|page| RAM + (page << 12)).collect::<Vec<_>>(), "in order");
        assert!(machine.model.told.is_empty());
    });
}

#[test]
fn a_guest_that_does_not_take_the_record_is_told_by_machine_check_once() {
    on_own_thread(|| {
        for (does, heard, why) in [
            (1, 1, FallbackReason::NotTaken),
            (1, 2, FallbackReason::NotTaken),
            (2, 1, FallbackReason::Overwritten),
            (0, 0, FallbackReason::NoSource),
            (0, 3, FallbackReason::NotNotified),
        ] {
            let mut machine = Machine::impatient(AoChannel::Ghes);
            machine.driver.does.store(does, Ordering::SeqCst);
            machine.driver.heard.store(heard, Ordering::SeqCst);
            machine.forge(BUS_MCEERR_AO, 1);
            machine.forge(BUS_MCEERR_AO, 2);
            assert!(by_machine_check(&machine.settle(2)), "{why}");
            assert!(machine.fell_back(why), "{why}: {:#?}", machine.events.lock().unwrap());
            assert_eq!(machine.model.told, [RAM + 0x1000, RAM + 0x2000], "{why}");
            assert!(machine.records().is_empty());
            assert_eq!(machine.driver.status(), 0, "{why}: what nobody takes is withdrawn");
        }
    });
}

#[test]
fn records_keep_to_the_pace() {
    on_own_thread(|| {
        let mut machine =
            Machine::with(amd(), AoChannel::Ghes, Pace { burst: 4, rate: 2 }, PATIENT);
        for page in 1..=6 {
            machine.forge(BUS_MCEERR_AO, page);
        }
        let told = |machine: &Machine| machine.records().concat().len();
        machine.run_until(|machine| told(machine) >= 4);
        let burst = Instant::now();
        assert_eq!(told(&machine), 4, "no more than that at once");
        machine.settle(6);
        assert!(
            burst.elapsed() > Duration::from_millis(700),
            "two a second: {:?}",
            burst.elapsed()
        );
    });
}

#[test]
fn a_guest_that_is_done_with_its_pages_gets_the_next_record_at_once() {
    on_own_thread(|| {
        let pace = Pace { burst: 16, rate: 1 };
        let mut machine = Machine::with(amd(), AoChannel::Ghes, pace, PATIENT);
        (1..=16).for_each(|page| machine.forge(BUS_MCEERR_AO, page));
        let told = |machine: &Machine| machine.records().concat();
        machine.run_until(|machine| told(machine).len() >= 16);
        (17..=30).for_each(|page| machine.forge(BUS_MCEERR_AO, page));
        machine.run_until(|machine| machine.relay.pages().len() == 30);
        assert_eq!(told(&machine).len(), 16, "the estimate has the rest told in 16 s");
        let since = Instant::now();
        for gpa in told(&machine) {
            machine.relay.handle().guest_finished(gpa);
        }
        machine.settle(30);
        assert!(since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
    });
}

#[test]
fn a_record_whose_body_was_changed_does_not_count_as_taken() {
    on_own_thread(|| {
        let mut machine = Machine::new(amd(), AoChannel::Ghes);
        machine.driver.does.store(1, Ordering::SeqCst);
        machine.forge(BUS_MCEERR_AO, 1);
        machine.run_until(|machine| machine.driver.status() != 0);
        // SAFETY: the page is mapped for good; the address in the first entry.
        unsafe { machine.driver.block().byte_add(20 + 88).write_volatile(0) };
        machine.driver.set_status(0);
        assert!(by_machine_check(&machine.settle(1)));
        assert!(machine.fell_back(FallbackReason::Overwritten));
    });
}

#[test]
fn taken_at_once_is_taken() {
    on_own_thread(|| {
        let mut machine = Machine::new(amd(), AoChannel::Ghes);
        machine.driver.does.store(3, Ordering::SeqCst);
        machine.forge(BUS_MCEERR_AO, 1);
        assert_eq!(machine.settle(1), [Place::Ghes { record: 1 }]);
        // What is behind a status word of zero is the guest's.
        // SAFETY: the page is mapped for good; the address in the first entry.
        unsafe { machine.driver.block().byte_add(20 + 88).write_volatile(1) };
        machine.forge(BUS_MCEERR_AO, 2);
        assert_eq!(machine.settle(2), [1, 2].map(|record| Place::Ghes { record }));
    });
}

#[test]
fn the_bell_is_rung_again_while_a_record_lies() {
    on_own_thread(|| {
        let patience = Duration::from_secs(2);
        let mut machine =
            Machine::with(amd(), AoChannel::Ghes, Pace { burst: 16, rate: 1000 }, patience);
        machine.driver.does.store(1, Ordering::SeqCst);
        // A guest that is paused is not out of time.
        machine.forge(BUS_MCEERR_AO, 1);
        machine.run_until(|machine| machine.driver.rings.load(Ordering::SeqCst) == 1);
        let (driver, events) = (machine.driver.clone(), Arc::clone(&machine.events));
        machine.port.park(|| {
            std::thread::sleep(2 * patience);
            driver.does.store(0, Ordering::SeqCst);
            while driver.rings.load(Ordering::SeqCst) < 2 {
                std::thread::sleep(Duration::from_millis(1));
            }
            drop(events);
        });
        assert_eq!(machine.settle(1), [Place::Ghes { record: 1 }]);
    });
}

#[test]
fn a_page_in_the_block_that_is_touched_is_not_told_of_again() {
    on_own_thread(|| {
        let mut machine = Machine::impatient(AoChannel::Ghes);
        machine.driver.does.store(1, Ordering::SeqCst);
        machine.forge(BUS_MCEERR_AO, 1);
        machine.run_until(|machine| machine.driver.status() != 0);
        machine.forge(BUS_MCEERR_AR, 1);
        machine.forge(BUS_MCEERR_AO, 2);
        machine.run_until(|machine| {
            machine.fell_back(FallbackReason::Silent) || machine.driver.status() == 0
        });
        assert!(by_machine_check(&machine.settle(2)));
        assert_eq!(machine.model.told, [RAM + 0x1000, RAM + 0x2000], "the AR, and the other page");
    });
}

#[test]
fn a_block_that_cannot_be_reached_harms_nobody() {
    on_own_thread(|| {
        let mut machine = Machine::new(amd(), AoChannel::Ghes);
        machine.forge(BUS_MCEERR_AO, 1);
        assert!(by_record(&machine.settle(1)));
        // SAFETY: nobody reads the page any more but by the kernel's copy.
        let gone = unsafe { libc::munmap(machine.driver.hva as *mut _, 4096) };
        assert_eq!(gone, 0);
        machine.forge(BUS_MCEERR_AO, 2);
        machine.run_until(|machine| machine.fell_back(FallbackReason::Unreachable));
        machine.settle(2);
        assert_eq!(machine.model.told, [RAM + 0x2000]);
    });
}

#[test]
fn auto_leaves_intel_style_guests_to_the_machine_check() {
    on_own_thread(|| {
        let mcg_cap = u64::from(BANKS) | cap::CTL_P | cap::SER_P;
        let intel = Caps { vendor: Vendor::Intel, mcg_cap, succor: false };
        let mut machine = Machine::new(intel, AoChannel::Auto);
        machine.forge(BUS_MCEERR_AO, 1);
        assert!(by_machine_check(&machine.settle(1)));
        assert_eq!(machine.driver.rings.load(Ordering::SeqCst), 0);
    });
}

#[test]
fn a_page_that_is_predicted_to_fail_is_told_of_as_such() {
    on_own_thread(|| {
        let mut machine = Machine::new(amd(), AoChannel::Auto);
        let handle = machine.relay.handle();
        handle.retire(RAM + 0x1234).unwrap();
        let state = |machine: &Machine| machine.relay.handle().predicted()[0].state;
        machine.run_until(|machine| matches!(state(machine), State::Acknowledged { .. }));
        assert_eq!(machine.records(), [[RAM + 0x1000]]);
        assert!(machine.relay.pages().is_empty(), "it is not bad");
        handle.retire(RAM + 0x1000).expect("it may be asked for again");

        assert_eq!(handle.retire(0), Err(RetireError::NotRam { gpa: 0 }));
        machine.forge(BUS_MCEERR_AO, 2);
        machine.settle(1);
        let gpa = RAM + 0x2000;
        assert_eq!(handle.retire(gpa), Err(RetireError::Known { gpa }));

        // It goes bad while it waits to be told of.
        drop(machine);
        let mut machine =
            Machine::with(amd(), AoChannel::Auto, Pace::default(), Duration::from_secs(3));
        machine.driver.does.store(1, Ordering::SeqCst);
        let handle = machine.relay.handle();
        machine.forge(BUS_MCEERR_AO, 3);
        machine.run_until(|machine| machine.driver.status() != 0);
        handle.retire(gpa).unwrap();
        assert_eq!(handle.retire(gpa), Err(RetireError::Known { gpa }), "it is being told of");
        machine.forge(BUS_MCEERR_AO, 2);
        machine.run_until(|machine| machine.relay.pages().len() == 2);
        assert_eq!(state(&machine), State::Undeliverable { why: UndeliverableReason::WentBad });
        machine.settle(2);

        // A guest without the driver.
        drop(machine);
        let mut machine = Machine::impatient(AoChannel::Auto);
        machine.driver.heard.store(0, Ordering::SeqCst);
        machine.relay.handle().retire(gpa).unwrap();
        let why = UndeliverableReason::NoTaker { why: FallbackReason::NoSource };
        machine.run_until(|machine| state(machine) == State::Undeliverable { why });
    });
}

#[test]
fn without_a_source_there_is_no_such_channel() {
    on_own_thread(|| {
        let hva = memory();
        let relay = config(hva, amd(), AoChannel::Ghes).start().unwrap();
        assert_eq!(relay.handle().retire(RAM), Err(RetireError::NoSource));
        drop(relay);
        for page in [0, RAM + 8, RAM + LEN as u64] {
            let source = ErrorSource::new(page, Driver::new(hva)).patience(PATIENT);
            let started = config(hva, amd(), AoChannel::Auto).error_source(source).start();
            let error = started.err().expect("not a page of guest RAM");
            assert!(matches!(error, StartError::SourcePage { page: named } if named == page));
        }
    });
}
