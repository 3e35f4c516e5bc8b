//! Huge pages of which a part goes bad, as this process can pretend them without privileges: guest memory is a mapping of a
//! memfd that is said to be in pages of 2 MiB, all of it marked as bad; the owner's file is /proc/self/mem at a second
//! mapping of the same memfd, of which one page is marked: reading that is EIO, as reading a bad frame of hugetlbfs is.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test says what it saw by panicking")]

mod forge;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use forge::{BUS_MCEERR_AO, BUS_MCEERR_AR, forge};
use mce_relay::internals::uffd::Uffd;
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
        Owner {
            hva: self.hva,
            at: self.file,
            file,
            refuses: None,
            delay: Duration::ZERO,
            told: Arc::default(),
            kept: Arc::default(),
            begun: Arc::default(),
        }
    }

    /// The host address of the page `page` of the second huge page.
    fn page(&self, page: u64) -> u64 {
        self.hva + HUGE + page * 4096
    }
}

/// Marks the page of 4 KiB at `hva` as bad.
fn mark(hva: u64) -> io::Result<()> {
    Uffd::open()?.poison(hva, 4096)
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
    /// How long it takes it to let a page go.
    delay: Duration,
    told: Arc<Mutex<Vec<Rescued>>>,
    kept: Arc<Mutex<Vec<RescueRefusal>>>,
    begun: Arc<AtomicBool>,
}

impl MemoryOwner for Owner {
    fn release(&mut self, page: HugePage) -> Result<(BorrowedFd<'_>, u64), RescueRefusal> {
        assert_eq!(page, HugePage { hva: self.hva + HUGE, len: HUGE });
        self.begun.store(true, Ordering::SeqCst);
        std::thread::sleep(self.delay);
        match self.refuses {
            Some(why) => Err(why),
            None => Ok((self.file.as_fd(), self.at + HUGE)),
        }
    }

    fn replaced(&mut self, rescued: &Rescued) {
        self.told.lock().unwrap().push(*rescued);
    }

    fn kept(&mut self, page: HugePage, why: &RescueRefusal) {
        assert_eq!(page, HugePage { hva: self.hva + HUGE, len: HUGE });
        self.kept.lock().unwrap().push(*why);
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
    let kept = Arc::clone(&owner.kept);
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
    assert_eq!(*kept.lock().unwrap(), [], "it was not let go");
}

#[test]
fn a_file_that_gives_nothing_is_no_rescue() {
    let all: Vec<u64> = (0..512).collect();
    let Some(memory) = Memory::new(&all) else { return };
    let owner = memory.owner();
    let kept = Arc::clone(&owner.kept);
    let (relay, events) = start(&memory, owner);
    let handle = relay.handle();
    assert!(number(&handle, GPA + HUGE + 4096).is_err());
    assert_eq!(bad_pages(&handle), all);
    drop(relay);
    assert_eq!(*kept.lock().unwrap(), [RescueRefusal::NothingLeft]);
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
    // As much as there is no number for once it is rounded up.
    let rescue = Rescue::new(memory.owner()).reserve(u64::MAX);
    assert!(Relay::builder(RamMap::new(&[]).unwrap()).rescue(rescue).start().is_err());
    let rescue = Rescue::new(memory.owner()).reserve(1);
    drop(Relay::builder(RamMap::new(&[]).unwrap()).rescue(rescue).start().unwrap());
}

const fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Writes and reads the first word of the page of 4 KiB at `hva`.
fn word(hva: u64) -> *mut u64 {
    ptr::with_exposed_provenance_mut(address(hva))
}

/// A vCPU that has been let go meanwhile may be anywhere when it is known that the page is gone.
#[test]
fn a_touch_is_not_told_elsewhere() {
    let Some(memory) = Memory::new(&[7]) else { return };
    let (relay, _events) = start(&memory, Owner { delay: millis(400), ..memory.owner() });
    let handle = relay.handle();
    let mut port = handle.attach(0, ExitByte::NONE, || {}).unwrap();
    let mut vcpu = Model::new();
    assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
    forge(BUS_MCEERR_AR, memory.page(7), 12);
    assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
    assert!(bad_pages(&handle).is_empty(), "it is still being rescued");
    // In KVM_RUN a timer's interrupt comes first, and the guest's scheduler takes another task.
    let start = Instant::now();
    while bad_pages(&handle).is_empty() {
        assert!(start.elapsed() < Duration::from_secs(10));
        std::thread::sleep(millis(5));
    }
    assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
    let told_as_ar = vcpu.0.mcg_status & mce_relay::mca::mcg::EIPV != 0;
    assert!(!told_as_ar, "an AR at an instruction that touched nothing: {:?}", handle.pages());
}

/// RAM that is removed while it is being rescued: what comes to lie there afterwards is let alone.
#[test]
fn removed_ram_is_let_alone() {
    let Some(memory) = Memory::new(&[7]) else { return };
    let (relay, _events) = start(&memory, Owner { delay: millis(300), ..memory.owner() });
    let handle = relay.handle();
    let reader = std::thread::spawn(move || number(&handle, GPA + HUGE + 4096));
    std::thread::sleep(millis(100));
    relay.handle().remove_ram(GPA).unwrap();
    let nine = word(memory.page(9));
    let at = word(memory.page(0)).cast();
    // SAFETY: the memory is this test's own again.
    unsafe {
        assert_eq!(libc::munmap(at, address(HUGE)), 0);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        assert_eq!(libc::mmap(at, address(HUGE), prot, flags, -1, 0), at);
        nine.write_volatile(0xaa);
    }
    let _ = reader.join().unwrap();
    std::thread::sleep(millis(300));
    // SAFETY: as above.
    assert_eq!(unsafe { nine.read_volatile() }, 0xaa, "overwritten");
}

#[test]
fn half_a_huge_page_that_the_guest_has_twice_is_not_all_of_it() {
    let Some(memory) = Memory::new(&[7, 300]) else { return };
    let owner = memory.owner();
    let told = Arc::clone(&owner.told);
    // SAFETY: the memory stays mapped, and no reference leads there.
    let half = |gpa| unsafe { RamRegion::new(memory.hva + HUGE, gpa, HUGE / 2) }.in_pages_of(21);
    let map = RamMap::new(&[half(GPA + HUGE), half(2 * GPA)]).unwrap();
    let relay = Relay::builder(map).policy(mce_relay::KillPolicy::Late);
    let relay = relay.rescue(Rescue::new(owner)).start().unwrap();
    number(&relay.handle(), GPA + HUGE + 4096).unwrap_err();
    drop(relay);
    assert!(told.lock().unwrap().is_empty(), "memory that is not the guest's was replaced");
}

/// The region is given to the guest elsewhere, and nobody says that a part of it is ordinary memory by now.
#[test]
fn a_stand_in_is_not_read_from_the_file_again() {
    let Some(memory) = Memory::new(&[7]) else { return };
    let (relay, _events) = start(&memory, memory.owner());
    let handle = relay.handle();
    number(&handle, GPA + HUGE).unwrap();
    handle.write(GPA + HUGE + 9 * 4096, &0x1234_u64.to_le_bytes()).unwrap();
    let region = handle.remove_ram(GPA).unwrap();
    // SAFETY: as in `start`.
    let moved = unsafe { RamRegion::new(region.hva(), 8 * GPA, region.len()) }.in_pages_of(21);
    handle.add_ram(moved).unwrap();
    mark(memory.page(11)).unwrap();
    number(&handle, 8 * GPA + HUGE + 11 * 4096).unwrap_err();
    assert_eq!(number(&handle, 8 * GPA + HUGE + 9 * 4096).unwrap(), 0x1234, "stale");
}

/// The same of the next boot's relay.
#[test]
fn the_next_relay_does_not_read_it_either() {
    let Some(memory) = Memory::new(&[7]) else { return };
    let (relay, _events) = start(&memory, memory.owner());
    number(&relay.handle(), GPA + HUGE).unwrap();
    drop(relay);
    let (relay, _events) = start(&memory, memory.owner());
    let handle = relay.handle();
    handle.write(GPA + HUGE + 9 * 4096, &0x1234_u64.to_le_bytes()).unwrap();
    mark(memory.page(11)).unwrap();
    number(&handle, GPA + HUGE + 11 * 4096).unwrap_err();
    assert_eq!(number(&handle, GPA + HUGE + 9 * 4096).unwrap(), 0x1234, "stale");
    assert_eq!(bad_pages(&handle), [7, 11]);
}

#[test]
fn what_is_still_mapped_is_not_replaced() {
    let Some(memory) = Memory::new(&[7]) else { return };
    let nine = word(memory.page(9));
    // SAFETY: the memory is this test's; the file gives it fresh pages.
    unsafe {
        assert_eq!(
            libc::madvise(word(memory.page(0)).cast(), address(HUGE), libc::MADV_DONTNEED),
            0
        );
        nine.write_volatile(1);
    }
    let (relay, events) = start(&memory, memory.owner());
    forge_elsewhere(memory.page(7), 21);
    let start = Instant::now();
    let mut count = 1;
    // A guest that counts there.
    while !events.try_iter().any(|event| matches!(event, Event::Seen { .. })) {
        assert!(start.elapsed() < Duration::from_secs(10));
        count += 1;
        // SAFETY: as above.
        unsafe {
            assert_eq!(nine.read_volatile(), count - 1, "a store is lost");
            nine.write_volatile(count);
        }
    }
    assert!(relay.handle().inspect(|ledger| ledger.rescued().is_empty()));
}

#[test]
fn who_asks_for_the_whole_parts_waits_for_a_rescue() {
    let Some(memory) = Memory::new(&[7]) else { return };
    let owner = Owner { delay: millis(50), ..memory.owner() };
    let begun = Arc::clone(&owner.begun);
    let (relay, _events) = start(&memory, owner);
    forge_elsewhere(memory.page(7), 21);
    while !begun.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    let bad = GPA + HUGE + 7 * 4096;
    let (first, second) = (GPA..bad, bad + 4096..GPA + 2 * HUGE);
    assert_eq!(relay.handle().whole_parts(GPA..GPA + 2 * HUGE), [first, second]);
}

#[test]
fn no_reader_is_told_that_a_good_page_is_bad() {
    for round in 0..30 {
        let Some(memory) = Memory::new(&[7]) else { return };
        let (relay, _events) = start(&memory, memory.owner());
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let handle = relay.handle();
                scope.spawn(move || {
                    let start = Instant::now();
                    while start.elapsed() < millis(8) {
                        let read = number(&handle, GPA + HUGE + 9 * 4096);
                        assert_eq!(read.unwrap(), 512 + 9, "round {round}");
                    }
                });
            }
        });
        drop(relay);
        for at in [memory.hva, memory.file] {
            // SAFETY: nobody uses it any more.
            unsafe { libc::munmap(word(at).cast(), address(2 * HUGE)) };
        }
    }
}
