//! Huge pages of which a part goes bad, as this process can pretend them without privileges: guest memory is a mapping of a
//! memfd that is said to be in pages of 2 MiB, all of it marked as bad; the owner's file is /proc/self/mem at a second
//! mapping of the same memfd, of which one page is marked: reading that is EIO, as reading a bad frame of hugetlbfs is.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test says what it saw by panicking")]

mod forge;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::ptr;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use forge::{BUS_MCEERR_AO, BUS_MCEERR_AR, forge};
use mce_relay::internals::mark;
use mce_relay::mca::{BANKS, Caps, McaState, Record, Vendor, cap};
use mce_relay::{
    AccessError, Event, ExitByte, FoundBy, Handle, HugePage, Mca, MemoryOwner, Page, RamMap,
    RamRegion, Relay, Rescue, RescueRefusal, Rescued, State, Verdict,
};

const HUGE: u64 = 2 << 20;
const GPA: u64 = 1 << 30;
const CAPS: Caps = Caps { vendor: Vendor::Amd, mcg_cap: cap::CTL_P | BANKS as u64, succor: true };

/// Two huge pages of guest memory, which the host has lost, and what the kernel still gives of them.
struct Memory {
    hva: u64,
    file: u64,
}

impl Memory {
    /// Each page of 4 KiB begins with its number; of the second huge page those in `bad` are gone.
    fn new(bad: &[u64]) -> Option<Self> {
        // SAFETY: takes a string; the descriptor is checked below, and owned by nobody else.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), 0)) };
        file.set_len(2 * HUGE).unwrap();
        let (hva, other) = (map(&file), map(&file));
        for page in 0..2 * HUGE / 4096 {
            // SAFETY: memory that was just mapped, and is this test's alone.
            unsafe { *ptr::with_exposed_provenance_mut::<u64>(address(hva + page * 4096)) = page };
        }
        let marked = (hva + HUGE..hva + 2 * HUGE)
            .step_by(4096)
            .chain(bad.iter().map(|page| other + HUGE + page * 4096))
            .try_for_each(mark);
        match marked {
            Ok(()) => Some(Self { hva, file: other }),
            Err(error) => {
                println!("SKIPPED: needs UFFDIO_POISON (Linux 6.6): {error}");
                None
            }
        }
    }

    fn owner(&self) -> Owner {
        let file = File::open("/proc/self/mem").unwrap();
        Owner { hva: self.hva, at: self.file, file, refuses: None, told: Arc::default() }
    }

    /// The host address of the page `page` of the second huge page.
    fn page(&self, page: u64) -> u64 {
        self.hva + HUGE + page * 4096
    }
}

fn address(hva: u64) -> usize {
    usize::try_from(hva).unwrap()
}

/// Maps all of `file` at a multiple of 2 MiB.
fn map(file: &File) -> u64 {
    let (prot, len) = (libc::PROT_READ | libc::PROT_WRITE, address(2 * HUGE));
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping, of which a part is replaced at once.
    let at = unsafe {
        let room = libc::mmap(ptr::null_mut(), 2 * len, prot, anonymous, -1, 0);
        assert_ne!(room, libc::MAP_FAILED);
        let at = room.expose_provenance().next_multiple_of(address(HUGE));
        let at = ptr::with_exposed_provenance_mut(at);
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        libc::mmap(at, len, prot, flags, file.as_raw_fd(), 0)
    };
    assert_ne!(at, libc::MAP_FAILED);
    at.expose_provenance() as u64
}

struct Owner {
    hva: u64,
    at: u64,
    file: File,
    refuses: Option<RescueRefusal>,
    told: Arc<Mutex<Vec<Rescued>>>,
}

impl MemoryOwner for Owner {
    fn release(&mut self, page: HugePage) -> Result<(BorrowedFd<'_>, u64), RescueRefusal> {
        assert_eq!(page, HugePage { hva: self.hva + HUGE, len: HUGE });
        match self.refuses {
            Some(why) => Err(why),
            None => Ok((self.file.as_fd(), self.at + HUGE)),
        }
    }

    fn replaced(&mut self, rescued: &Rescued) {
        self.told.lock().unwrap().push(*rescued);
    }
}

fn start(memory: &Memory, owner: Owner) -> (Relay, Receiver<Event>) {
    let (tx, rx) = channel();
    // SAFETY: the memory stays mapped, and no reference leads there.
    let region = unsafe { RamRegion::new(memory.hva, GPA, 2 * HUGE) }.in_pages_of(21);
    let relay = Relay::builder(RamMap::new(&[region]).unwrap())
        .vcpus(1)
        .machine_checks(CAPS)
        .policy(mce_relay::KillPolicy::Late)
        .rescue(Rescue::new(owner))
        .observer(move |event: &Event| drop(tx.send(event.clone())));
    (relay.start().unwrap(), rx)
}

/// The number that the page of 4 KiB at `gpa` begins with.
fn number(handle: &Handle, gpa: u64) -> Result<u64, AccessError> {
    let mut bytes = [0; 8];
    handle.read(gpa, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn all_but(handle: &Handle, bad: &[u64]) {
    for page in 0..512 {
        let read = number(handle, GPA + HUGE + page * 4096);
        match bad.contains(&page) {
            true => assert!(matches!(read, Err(AccessError::Poisoned { .. })), "{page}: {read:?}"),
            false => assert_eq!(read.unwrap(), 512 + page),
        }
    }
}

fn bad_pages(handle: &Handle) -> Vec<u64> {
    handle.pages().iter().map(|page: &Page| (page.gpa - GPA - HUGE) / 4096).collect()
}

/// A vCPU that takes whatever it is told.
struct Model(McaState);

impl Model {
    fn new() -> Self {
        Self(McaState { cr4_mce: true, interrupts_on: true, ..McaState::up() })
    }
}

impl Mca for Model {
    fn state(&mut self) -> io::Result<McaState> {
        Ok(self.0)
    }

    fn inject(&mut self, record: &Record) -> io::Result<()> {
        self.0.banks[usize::from(record.bank)].status = record.status;
        self.0.mcg_status = record.mcg_status;
        Ok(())
    }
}

#[test]
fn an_access_of_the_vmms_finds_all_that_is_good() {
    let bad = [0, 7, 511];
    let Some(memory) = Memory::new(&bad) else { return };
    let owner = memory.owner();
    let told = Arc::clone(&owner.told);
    let (relay, events) = start(&memory, owner);
    let handle = relay.handle();
    assert_eq!(number(&handle, GPA + HUGE + 3 * 4096).unwrap(), 512 + 3, "it waits, and reads");
    assert_eq!(bad_pages(&handle), bad);
    all_but(&handle, &bad);
    assert_eq!(number(&handle, GPA + 5 * 4096).unwrap(), 5, "its neighbour is as it was");
    let [rescued] = handle.inspect(|ledger| ledger.rescued().to_vec())[..] else { panic!() };
    assert_eq!((rescued.gpa, rescued.extent), (GPA + HUGE, HUGE));
    assert_eq!((rescued.kept, rescued.gone, rescued.held_micros), (509, 3, None));
    drop(relay);
    assert_eq!(*told.lock().unwrap(), [rescued]);
    let seen: Vec<Event> = events.try_iter().collect();
    let at = seen.iter().position(|event| *event == Event::Rescued(rescued)).unwrap();
    let pages = seen.iter().filter(|event| matches!(event, Event::Seen { extent: 4096, .. }));
    assert_eq!(pages.count(), 3);
    assert!(!seen[..at].iter().any(|event| matches!(event, Event::Seen { .. })), "{seen:?}");
}

/// On a vCPU's thread: its touch of `hva`, until it may go on.
fn touch(handle: &Handle, hva: u64) -> (Model, Verdict) {
    let mut port = handle.attach(0, ExitByte::NONE, || {}).unwrap();
    let mut vcpu = Model::new();
    assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
    forge(BUS_MCEERR_AR, hva, 12);
    let verdict = port.before_run(&mut vcpu);
    (vcpu, verdict)
}

#[test]
fn a_touch_of_a_good_part_is_no_error() {
    let Some(memory) = Memory::new(&[7]) else { return };
    let (relay, events) = start(&memory, memory.owner());
    let (vcpu, verdict) = touch(&relay.handle(), memory.page(9));
    assert_eq!(verdict, Verdict::Run);
    assert_eq!(vcpu.0.mcg_status, 0, "it goes on as if nothing had been");
    let handle = relay.handle();
    assert_eq!(bad_pages(&handle), [7]);
    assert_eq!(handle.pages()[0].found_by, FoundBy::Scan);
    let held = handle.inspect(|ledger| ledger.rescued()[0].held_micros);
    assert!(held.is_some_and(|micros| micros < 5_000_000), "{held:?}");
    drop(relay);
    assert!(!events.try_iter().any(|event| matches!(event, Event::Injected { .. })));
}

#[test]
fn a_touch_of_the_bad_part_is_told() {
    let Some(memory) = Memory::new(&[7]) else { return };
    let (relay, _events) = start(&memory, memory.owner());
    let (vcpu, verdict) = touch(&relay.handle(), memory.page(7) + 8);
    assert_eq!(verdict, Verdict::Run);
    assert_ne!(vcpu.0.mcg_status, 0, "{:?}", relay.pages());
    let handle = relay.handle();
    assert_eq!(bad_pages(&handle), [7]);
    assert!(matches!(handle.pages()[0].state, State::Injected { .. }));
}

#[test]
fn a_signal_that_is_late_is_none() {
    let Some(memory) = Memory::new(&[7]) else { return };
    let (relay, events) = start(&memory, memory.owner());
    let handle = relay.handle();
    number(&handle, GPA + HUGE).unwrap();
    events.try_iter().for_each(drop);
    let (vcpu, verdict) = touch(&handle, memory.page(9));
    assert_eq!((verdict, vcpu.0.mcg_status), (Verdict::Run, 0));
    // One that speaks of the huge page, and one of a page that goes bad after that.
    forge_elsewhere(memory.page(10), 21);
    mark(memory.page(11)).unwrap();
    forge_elsewhere(memory.page(11), 12);
    let start = Instant::now();
    while bad_pages(&handle).len() < 2 {
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", bad_pages(&handle));
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(bad_pages(&handle), [7, 11]);
    assert_eq!(handle.inspect(|ledger| ledger.rescued().len()), 1);
}

/// An AO that a thread outside the relay takes.
fn forge_elsewhere(hva: u64, lsb: i16) {
    std::thread::spawn(move || forge(BUS_MCEERR_AO, hva, lsb)).join().unwrap();
}

#[test]
fn what_must_stay_is_lost_as_a_whole() {
    let Some(memory) = Memory::new(&[7]) else { return };
    let owner = Owner { refuses: Some(RescueRefusal::Shared), ..memory.owner() };
    let (relay, events) = start(&memory, owner);
    let handle = relay.handle();
    assert!(number(&handle, GPA + HUGE).is_err());
    assert_eq!(bad_pages(&handle), (0..512).collect::<Vec<_>>());
    number(&handle, GPA + HUGE + 4096).unwrap_err();
    drop(relay);
    let refused: Vec<Event> =
        events.try_iter().filter(|event| matches!(event, Event::NotRescued { .. })).collect();
    let (gpa, hva, why) = (GPA + HUGE, memory.hva + HUGE, RescueRefusal::Shared);
    assert_eq!(refused, [Event::NotRescued { gpa, hva, extent: HUGE, why }], "once");
}

#[test]
fn a_file_that_gives_nothing_is_no_rescue() {
    let all: Vec<u64> = (0..512).collect();
    let Some(memory) = Memory::new(&all) else { return };
    let (relay, events) = start(&memory, memory.owner());
    let handle = relay.handle();
    assert!(number(&handle, GPA + HUGE + 4096).is_err());
    assert_eq!(bad_pages(&handle), all);
    drop(relay);
    let why = events.try_iter().find_map(|event| match event {
        Event::NotRescued { why, .. } => Some(why),
        _ => None,
    });
    assert_eq!(why, Some(RescueRefusal::NothingLeft));
}

/// As after a migration whose source had lost the page: the file here has something else.
#[test]
fn what_was_only_marked_is_lost_as_a_whole() {
    let Some(memory) = Memory::new(&[]) else { return };
    let (relay, events) = start(&memory, memory.owner());
    let handle = relay.handle();
    assert!(number(&handle, GPA + HUGE + 4096).is_err());
    assert_eq!(bad_pages(&handle).len(), 512);
    drop(relay);
    let refused = |event| matches!(event, Event::NotRescued { why: RescueRefusal::NoneBad, .. });
    assert!(events.try_iter().any(refused));
}

#[test]
fn an_owner_that_panics_is_no_end() {
    struct Panics;
    impl MemoryOwner for Panics {
        fn release(&mut self, _: HugePage) -> Result<(BorrowedFd<'_>, u64), RescueRefusal> {
            panic!("the host's");
        }
    }
    let Some(memory) = Memory::new(&[7]) else { return };
    // SAFETY: as in `start`.
    let region = unsafe { RamRegion::new(memory.hva, GPA, 2 * HUGE) }.in_pages_of(21);
    let relay = Relay::builder(RamMap::new(&[region]).unwrap()).rescue(Rescue::new(Panics));
    let relay = relay.policy(mce_relay::KillPolicy::Late).start().unwrap();
    let handle = relay.handle();
    assert!(number(&handle, GPA + HUGE).is_err());
    assert_eq!(bad_pages(&handle).len(), 512);
    assert!(handle.is_alive());
}

#[test]
fn a_reserve_that_is_not_to_be_had_is_said() {
    let Some(memory) = Memory::new(&[7]) else { return };
    let rescue = Rescue::new(memory.owner()).reserve(1 << 60);
    let relay = Relay::builder(RamMap::new(&[]).unwrap()).rescue(rescue).start();
    let error = relay.err().unwrap().to_string();
    assert!(error.contains("1099511627776 MiB"), "{error}");
    let rescue = Rescue::new(memory.owner()).reserve(1);
    drop(Relay::builder(RamMap::new(&[]).unwrap()).rescue(rescue).start().unwrap());
}
