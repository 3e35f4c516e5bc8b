//! Guest memory that the VMM's own code touches: known pages, copies that end as errors, and scratch pages. A page that is
//! marked by userfaultfd raises the same SIGBUS as one that has gone bad.
#![cfg(all(
    feature = "internals",
    feature = "vm-memory",
    any(target_arch = "x86_64", target_arch = "aarch64")
))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test says what it saw by panicking")]

mod forge;

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use mce_relay::guard::{self, Attempt, BadMemory, GuardedRegion};
use mce_relay::internals::uffd::Uffd;
use mce_relay::signal::{Signals, set_up};
use mce_relay::{Event, FailureKind, FoundBy, RamMap, RamRegion, Relay, SignalledThread};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    GuestRegionCollection, MemoryRegionAddress, MmapRegion,
};

type Memory = GuestRegionCollection<GuardedRegion>;

const PAGE: u64 = 4096;
const PAGES: u64 = 16;
const GPA: u64 = 1 << 20;

fn marker() -> Option<Uffd> {
    Uffd::open()
        .inspect_err(|error| println!("SKIPPED: needs UFFDIO_POISON (Linux 6.6): {error}"))
        .ok()
}

fn memfd(len: u64) -> File {
    // SAFETY: takes a string; the descriptor is checked by the next call, and owned by nobody else.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), 0)) };
    file.set_len(len).unwrap();
    file
}

/// Shared memory of a guest's, each page of which begins with its number.
fn shared() -> Memory {
    let mapping =
        MmapRegion::from_file(FileOffset::new(memfd(PAGES * PAGE), 0), size(PAGES * PAGE));
    let region = GuardedRegion::new(mapping.unwrap(), GuestAddress(GPA)).unwrap();
    assert!(region.has_view());
    numbered(region)
}

fn private() -> Memory {
    let region =
        GuardedRegion::new(MmapRegion::new(size(PAGES * PAGE)).unwrap(), GuestAddress(GPA));
    let region = region.unwrap();
    assert!(!region.has_view());
    numbered(region)
}

fn numbered(region: GuardedRegion) -> Memory {
    let memory = Memory::from_regions(vec![region]).unwrap();
    for page in 0..PAGES {
        memory.write_obj(page, at(page)).unwrap();
    }
    memory
}

fn size(len: u64) -> usize {
    usize::try_from(len).unwrap()
}

fn at(page: u64) -> GuestAddress {
    GuestAddress(GPA + page * PAGE)
}

/// Where the guest has the page.
fn guests(memory: &Memory, page: u64) -> *mut u8 {
    memory.get_host_address(at(page)).unwrap()
}

/// Where devices have it.
fn devices(memory: &Memory, page: u64) -> u64 {
    let slice = memory.get_slice(at(page), 1).unwrap();
    slice.ptr_guard().as_ptr().expose_provenance() as u64
}

fn hva(memory: &Memory, page: u64) -> u64 {
    guests(memory, page).expose_provenance() as u64
}

fn relay(memory: &Memory) -> (Relay, Receiver<Event>) {
    let (tx, rx) = channel();
    // SAFETY: the memory stays mapped as long as the relay runs, and vm-memory gives no references out.
    let regions = unsafe { RamRegion::all_of(memory) }.unwrap();
    let relay = Relay::builder(RamMap::new(&regions).unwrap())
        .observer(move |event: &Event| drop(tx.send(event.clone())));
    (relay.start().unwrap(), rx)
}

fn is_refused(read: Result<u64, GuestMemoryError>) -> bool {
    match read {
        Err(GuestMemoryError::IOError(error)) => error.raw_os_error() == Some(libc::EHWPOISON),
        Err(other) => panic!("{other}"),
        Ok(_) => false,
    }
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The page is lost to the guest and to devices, as by a memory failure.
fn lose(marker: &Uffd, memory: &Memory, page: u64) {
    marker.poison(devices(memory, page), PAGE).unwrap();
    marker.poison(hva(memory, page), PAGE).unwrap();
}

#[test]
fn a_device_that_meets_a_bad_page_goes_on_and_lets_nothing_out() {
    let Some(marker) = marker() else { return };
    let memory = shared();
    let (relay, events) = relay(&memory);
    let handle = relay.handle();
    until("the relay's first look, which would find the page, too", || handle.scans() > 0);
    assert_ne!(devices(&memory, 3), hva(&memory, 3));
    let attempt = Attempt::begin();
    assert_eq!(memory.read_obj::<u64>(at(3)).unwrap(), 3);
    assert!(attempt.is_clean() && !handle.is_bad(GPA..GPA + PAGES * PAGE));

    lose(&marker, &memory, 3);
    let attempt = Attempt::begin();
    assert_eq!(memory.read_obj::<u64>(at(3)).unwrap(), 0, "a scratch page");
    assert!(!attempt.is_clean());
    assert!(handle.is_bad(GPA + 3 * PAGE..GPA + 3 * PAGE + 1));
    assert!(guard::is_bad(hva(&memory, 3) + 4095, 1));
    assert!(
        is_refused(memory.read_obj::<u64>(at(3)))
            && is_refused(memory.read_obj(GuestAddress(at(4).0 - 4)))
    );
    assert_eq!(memory.read_obj::<u64>(at(2)).unwrap(), 2);
    assert_eq!(memory.read_obj::<u64>(at(4)).unwrap(), 4);
    // What devices have written since has gone nowhere, and others see that at once.
    assert!(Attempt::begin().is_clean());

    until("the page is in the ledger", || !handle.pages().is_empty());
    let [page] = &handle.pages()[..] else { panic!() };
    assert_eq!((page.gpa, page.found_by), (GPA + 3 * PAGE, FoundBy::Access));
    drop(relay);
    let seen: Vec<Event> = events.try_iter().collect();
    let (kind, thread) = (FailureKind::ActionRequired, SignalledThread::Other);
    let caught = |event: &Event| {
        matches!(event, Event::Caught { kind: k, thread: t, hva: h, .. }
            if *k == kind && *t == thread && *h == hva(&memory, 3))
    };
    assert!(seen.iter().any(caught), "{seen:?}");
}

#[test]
fn what_a_device_writes_to_a_bad_page_is_lost_and_it_knows() {
    let Some(marker) = marker() else { return };
    let memory = shared();
    let (relay, _events) = relay(&memory);
    lose(&marker, &memory, 5);
    let attempt = Attempt::begin();
    memory.write_obj(7_u32, at(5)).unwrap();
    assert!(!attempt.is_clean());
    until("the page is in the ledger", || !relay.pages().is_empty());
    assert!(is_refused(memory.read_obj(at(5))));
}

#[test]
fn a_guest_that_starts_over_has_good_memory_and_so_have_devices() {
    let Some(marker) = marker() else { return };
    let memory = shared();
    let (relay, _events) = relay(&memory);
    for page in [3, 4, 9] {
        lose(&marker, &memory, page);
        memory.read_obj::<u64>(at(page)).unwrap();
    }
    // One that nobody has touched, and that nobody knows of.
    marker.poison(devices(&memory, 12), PAGE).unwrap();
    until("the pages are in the ledger", || relay.pages().len() == 3);
    let mut ledger = relay.handle().ledger();
    drop(relay);
    assert!(is_refused(memory.read_obj(at(9))), "until then");
    let regions = unsafe {
        // SAFETY: as in `relay`.
        RamRegion::all_of(&memory)
    };
    let ram = RamMap::new(&regions.unwrap()).unwrap();
    let left = ledger.start_over(&ram, std::time::SystemTime::now());
    assert!(left.is_empty(), "{left:?}");
    let next = Relay::builder(ram).ledger(ledger).start().unwrap();
    let attempt = Attempt::begin();
    for page in [3, 4, 9] {
        assert_eq!(memory.read_obj::<u64>(at(page)).unwrap(), 0, "fresh");
        memory.write_obj(page, at(page)).unwrap();
        // SAFETY: mapped, and no reference leads there.
        let seen = unsafe { guests(&memory, page).cast::<u64>().read_volatile() };
        assert_eq!(seen, page, "the guest sees what devices write");
    }
    assert_eq!(memory.read_obj::<u64>(at(12)).unwrap(), 12);
    assert!(attempt.is_clean() && !next.handle().is_bad(GPA..GPA + PAGES * PAGE));
}

/// The kernel signals a page once for each mapping, and may know of no other than that of devices.
#[test]
fn a_page_that_is_signalled_by_the_devices_mapping_is_the_guests() {
    let memory = shared();
    let (relay, events) = relay(&memory);
    forge::forge(forge::BUS_MCEERR_AO, devices(&memory, 5), 12);
    let seen = loop {
        match events.recv_timeout(Duration::from_secs(20)).unwrap() {
            Event::Seen { gpa, hva, .. } => break (gpa, hva),
            Event::Outside { hva, .. } => panic!("{hva:#x} is the guest's, by another name"),
            _ => {}
        }
    };
    assert_eq!(seen, (GPA + 5 * PAGE, hva(&memory, 5)));
    forge::forge(forge::BUS_MCEERR_AO, hva(&memory, 5), 12);
    until("the other signal", || relay.pages().iter().any(|page| page.signals == 2));
    assert_eq!(relay.pages().len(), 1);
    assert!(is_refused(memory.read_obj(at(5))));
}

/// As where the hardware finds poison of which the kernel knew nothing: it names one of the page's mappings, and a device has
/// touched it by the other.
#[test]
fn a_touch_that_is_signalled_by_the_guests_mapping_may_be_a_devices() {
    let Some(marker) = marker() else { return };
    let memory = shared();
    let (relay, _events) = relay(&memory);
    until("the relay's first look, which would find the page, too", || relay.handle().scans() > 0);
    // It begins to read, and has no page any more.
    let slice = memory.get_slice(at(9), 8).unwrap();
    let attempt = Attempt::begin();
    lose(&marker, &memory, 9);
    forge::forge(forge::BUS_MCEERR_AR, hva(&memory, 9), 12);
    assert_eq!(slice.read_obj::<u64>(0).unwrap(), 0, "a scratch page");
    assert!(!attempt.is_clean() && is_refused(memory.read_obj(at(9))));
    until("the page is in the ledger", || !relay.pages().is_empty());
    assert_eq!(relay.pages()[0].gpa, GPA + 9 * PAGE);
    // Another thread has come to it at the same time.
    std::thread::scope(|scope| {
        scope.spawn(|| forge::forge(forge::BUS_MCEERR_AR, hva(&memory, 9), 12));
    });
    // A thread whose own code loads from the guest's mapping gets no further: nothing there is made good.
    // SAFETY: the child makes system calls that are async-signal-safe, and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // The second is handed on: the default action is in force for the third, which a real touch raises by itself.
        for _ in 0..3 {
            forge::forge(forge::BUS_MCEERR_AR, hva(&memory, 11), 12);
        }
        // SAFETY: takes a number.
        unsafe { libc::_exit(0) };
    }
    let mut status = 0;
    // SAFETY: of a child of this process, into a local.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS, "{status:#x}");
}

/// As where a handler was held up for so long that the page was exchanged meanwhile.
#[test]
fn a_page_that_is_good_by_now_is_no_failure() {
    let Some(marker) = marker() else { return };
    let memory = shared();
    let (relay, _events) = relay(&memory);
    marker.poison(devices(&memory, 6), PAGE).unwrap();
    let attempt = Attempt::begin();
    memory.read_obj::<u64>(at(6)).unwrap();
    assert!(!attempt.is_clean());
    until("devices have it again", || memory.read_obj::<u64>(at(6)).is_ok());
    assert_eq!(memory.read_obj::<u64>(at(6)).unwrap(), 6);
    assert!(relay.pages().is_empty());
}

#[test]
fn of_private_memory_known_pages_are_kept_away_from() {
    let Some(marker) = marker() else { return };
    let memory = private();
    let (relay, _events) = relay(&memory);
    marker.poison(hva(&memory, 3), PAGE).unwrap();
    assert!(relay.handle().read(GPA + 3 * PAGE, &mut [0; 8]).is_err(), "this is how it is found");
    assert!(is_refused(memory.read_obj(at(3))));
    assert_eq!(memory.read_obj::<u64>(at(4)).unwrap(), 4);
    let region = memory.find_region(at(0)).unwrap();
    assert_eq!(
        region.read_obj::<u64>(MemoryRegionAddress(5 * PAGE)).unwrap(),
        5,
        "of one page only"
    );
    assert!(region.as_volatile_slice().is_err());
}

/// Memory that no relay and no region knows of: nothing is known of its pages, and each access finds out.
fn unknown() -> MmapRegion {
    MmapRegion::new(size(PAGES * PAGE)).unwrap()
}

fn lose_unknown(marker: &Uffd, memory: &MmapRegion, page: u64) {
    marker.poison(memory.as_ptr().expose_provenance() as u64 + page * PAGE, PAGE).unwrap();
}

/// A device reads a page that is lost in its view over and over, while a relay makes it good again each time.
#[test]
fn no_scratch_page_stays_without_a_mark() {
    let Some(marker) = marker() else { return };
    let memory = shared();
    let (_relay, _events) = relay(&memory);
    let devices: Vec<u64> = (0..PAGES).map(|page| devices(&memory, page)).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for page in 0..PAGES {
                        let attempt = Attempt::begin();
                        let read = memory.read_obj::<u64>(at(page));
                        if let (Ok(number), true) = (read, attempt.is_clean()) {
                            assert_eq!(number, page, "a byte of a scratch page got out");
                        }
                    }
                }
            });
        }
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(3) {
            for hva in &devices {
                // Only in the view: the relay finds that the page is good. It may be on scratch just now.
                let _ = marker.poison(*hva, PAGE);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    for page in 0..PAGES {
        until("devices have all of it again", || {
            let attempt = Attempt::begin();
            let read = memory.read_obj::<u64>(at(page));
            attempt.is_clean() && read.is_ok_and(|number| number == page)
        });
    }
}

/// Every length, with the bad page at every place in it.
#[test]
fn a_copy_ends_where_the_bad_page_begins() {
    let Some(marker) = marker() else { return };
    set_up(Signals::Install).unwrap();
    let memory = unknown();
    let border = size(3 * PAGE);
    let all: Vec<u8> = (0..251).cycle().take(border).collect();
    let whole = memory.as_ptr();
    // SAFETY: the first three pages of this test's own mapping, here and below; no reference leads there.
    unsafe { guard::write(whole, &all) }.unwrap();
    lose_unknown(&marker, &memory, 3);
    let lens = (0..200).chain([255, 256, 511, 1023, 1024, 1025, 4095, 4096, 9000]);
    for len in lens {
        for before in (0..=len).filter(|before| *before < 140 || before % 61 == 0) {
            let (from, mut to) = (border - before, vec![0xff; len]);
            // SAFETY: as above.
            let read = unsafe { guard::read(whole.add(from), &mut to) };
            // SAFETY: as above.
            let written = unsafe { guard::write(whole.add(from), &vec![0xaa; len]) };
            assert_eq!(written, read, "the same way to the border");
            let done = match read {
                Ok(()) => len,
                Err(BadMemory { done }) => done,
            };
            assert!(done <= before && before - done <= 64, "{done} of {before} in {len}");
            assert_eq!((done == len, read.is_ok()), (before == len, before == len));
            assert_eq!(to[..done], all[from..from + done]);
            let mut back = vec![0; before];
            // SAFETY: as above.
            unsafe { guard::read(whole.add(from), &mut back) }.unwrap();
            assert!(back[..done].iter().all(|byte| *byte == 0xaa));
            // SAFETY: as above.
            unsafe { guard::write(whole.add(from), &all[from..]) }.unwrap();
        }
    }
}

#[test]
fn a_word_is_accessed_as_a_whole_or_not_at_all() {
    fn all<T: guard::Word + From<u8> + PartialEq + std::fmt::Debug>(good: *mut u8, bad: *mut u8) {
        let (good, bad) = (good.cast::<T>(), bad.cast::<T>());
        // SAFETY: aligned guest memory, to which no reference leads.
        unsafe {
            guard::store(good, T::from(41)).unwrap();
            assert_eq!(guard::load(good).unwrap(), T::from(41));
            assert_eq!(
                guard::compare_exchange(good, T::from(40), T::from(1)).unwrap(),
                T::from(41)
            );
            assert_eq!(
                guard::compare_exchange(good, T::from(41), T::from(42)).unwrap(),
                T::from(41)
            );
            assert_eq!(guard::load(good).unwrap(), T::from(42));
            guard::load(bad).unwrap_err();
            guard::store(bad, T::from(1)).unwrap_err();
            guard::compare_exchange(bad, T::from(1), T::from(2)).unwrap_err();
        }
    }
    let Some(marker) = marker() else { return };
    set_up(Signals::Install).unwrap();
    let memory = unknown();
    lose_unknown(&marker, &memory, 9);
    // SAFETY: within this test's own mapping.
    let (good, bad) = unsafe { (memory.as_ptr().add(8 << 12), memory.as_ptr().add(9 << 12)) };
    all::<u8>(good, bad);
    all::<u16>(good, bad);
    all::<u32>(good, bad);
    all::<u64>(good, bad);
}

#[test]
fn a_file_that_was_cut_short_is_an_error_too() {
    set_up(Signals::Install).unwrap();
    let file = memfd(PAGE);
    let short = file.try_clone().unwrap();
    let mapping = MmapRegion::<()>::from_file(FileOffset::new(file, 0), size(PAGE)).unwrap();
    short.set_len(0).unwrap();
    // SAFETY: mapped, with nothing behind it.
    let read = unsafe { guard::read(mapping.as_ptr(), &mut [0; 100]) };
    assert_eq!(read, Err(BadMemory { done: 0 }));
}

/// A thread that is in a system call is no copy: its EFAULT is its answer.
#[test]
fn system_calls_use_the_guests_own_mapping() {
    let Some(marker) = marker() else { return };
    let memory = shared();
    let (_relay, _events) = relay(&memory);
    lose(&marker, &memory, 3);
    let zeros = File::open("/dev/zero").unwrap();
    // SAFETY: guest memory, to which no reference leads.
    let read = unsafe {
        libc::read(std::os::fd::AsRawFd::as_raw_fd(&zeros), guests(&memory, 3).cast(), 4096)
    };
    assert_eq!((read, io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EFAULT)));
}
