//! Attempts to get a byte of a scratch page, or of other memory than the guest's, out of a device with a clean `Attempt`.
#![cfg(all(
    feature = "internals",
    feature = "vm-memory",
    any(target_arch = "x86_64", target_arch = "aarch64")
))]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::undocumented_unsafe_blocks,
    reason = "a test"
)]
#![allow(clippy::cast_possible_truncation, reason = "a test")]

mod guarded;

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use guarded::{
    GPA, Memory, PAGE, alone, at, devices, go_on, guests, held_rescuer,
    hold_scratch_of_this_thread, huge, hva, mapped_at, marker, memfd, next, numbered, of_mapping,
    relay, shared_at, signal, until, validated,
};
use mce_relay::guard::{self, Attempt};
use mce_relay::signal::{Handled, Signals, set_up};
use mce_relay::{RamMap, RamRegion, Relay};
use vm_memory::{Bytes, FileOffset, MmapRegion};

/// Guest memory wherever the kernel puts it, each page of which begins with its number and 100.
fn shared(pages: u64) -> Memory {
    let len = pages * PAGE;
    let file = FileOffset::new(memfd(len, 0), 0);
    numbered(of_mapping(MmapRegion::from_file(file, len as usize).unwrap()), pages)
}

/// Two threads touch one page. One is held up between the number and the scratch page. The relay takes back the mark that
/// the other has made (the page is good by now), and then the first one's scratch page comes: not marked, and for ever.
#[test]
fn a_handler_that_is_held_up_leaves_no_scratch_page_that_nobody_knows_of() {
    let _alone = alone();
    let marker = marker();
    let memory = shared(16);
    let relay = relay(&memory);
    // The other thread has its slice already when the page is marked; it is refused one afterwards.
    let view = devices(&memory, 6);
    marker.poison(view, PAGE).unwrap();
    let (tx, rx) = channel();
    let keeps = memory.clone();
    let slow = std::thread::spawn(move || {
        let _memory = keeps;
        tx.send(hold_scratch_of_this_thread()).unwrap();
        let attempt = Attempt::begin();
        unsafe { (view as *const u64).read_volatile() };
        assert!(!attempt.is_clean(), "its own attempt is not clean");
    });
    let held = rx.recv().unwrap();
    let id = next(&held).unwrap();
    // It is marked and counted, and the scratch page is not there yet.
    let attempt = Attempt::begin();
    unsafe { (view as *const u64).read_volatile() };
    assert!(!attempt.is_clean());
    // Now the relay may take the mark back, if it does not wait for the handler.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(2) && memory.read_obj::<u64>(at(6)).is_err() {
        std::thread::sleep(Duration::from_millis(1));
    }
    go_on(&held, id).unwrap();
    slow.join().unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    let read = validated(&memory, 6);
    println!("guest {}, device {read:?}, ledger {:?}", guests(&memory, 6), relay.pages());
    if let Ok(read) = read {
        assert_eq!(read, guests(&memory, 6), "a byte of a scratch page got out");
    }
}

/// A huge page: the page at 3 is known to be lost; a late signal tells of another one in it that is good.
#[test]
fn a_late_signal_does_not_take_the_marks_of_others() {
    let _alone = alone();
    let marker = marker();
    let memory = shared_at(512, 0);
    let relay = relay(&memory);
    let handle = relay.handle();
    // As in a stand-in: only the guest's own mapping has the marker.
    marker.poison(hva(&memory, 3), PAGE).unwrap();
    assert!(handle.read(GPA + 3 * PAGE, &mut [0; 8]).is_err());
    until("the page is in the ledger", || handle.pages().len() == 1);
    assert!(handle.is_bad(GPA + 3 * PAGE..GPA + 4 * PAGE));
    // A device touched page 9 of the huge page before.
    let view = devices(&memory, 9);
    assert_eq!(signal(view, 21), Handled::Handled);
    assert!(!Attempt::begin().is_clean() || guard::is_bad(hva(&memory, 9), 1));
    until("the relay has seen it", || memory.read_obj::<u64>(at(9)).is_ok());
    let read = validated(&memory, 3);
    println!("ledger has {} page(s), device reads {read:?}", handle.pages().len());
    assert!(
        handle.is_bad(GPA + 3 * PAGE..GPA + 4 * PAGE),
        "the mark of a page in the ledger is lost"
    );
}

/// The handler marks 2 MiB from the region's beginning on, the relay takes back 2 MiB at a multiple of 2 MiB.
#[test]
fn good_pages_of_a_region_that_is_not_aligned_come_back() {
    let _alone = alone();
    let memory = shared_at(1024, 5 * PAGE);
    let _relay = relay(&memory);
    assert_eq!(signal(devices(&memory, 9), 21), Handled::Handled);
    until("the relay has seen it", || memory.read_obj::<u64>(at(9)).is_ok());
    std::thread::sleep(Duration::from_millis(1500));
    let refused = (0..1024).filter(|page| memory.read_obj::<u64>(at(*page)).is_err()).count();
    assert_eq!(refused, 0, "good pages that devices cannot use, and that no ledger has");
}

/// A run of marks goes over the border of two mappings, of which the second is a stand-in that stays.
fn over_a_border(stand_ins: &[u64]) {
    let _alone = alone();
    let marker = marker();
    let memory = shared(16);
    let first = relay(&memory);
    for &page in stand_ins {
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        let at = hva(&memory, page) as *mut libc::c_void;
        let at = unsafe { libc::mmap(at, 4096, prot, flags | libc::MAP_FIXED, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
    }
    for page in [6, 7] {
        marker.poison(devices(&memory, page), PAGE).unwrap();
        marker.poison(hva(&memory, page), PAGE).unwrap();
        let _ = validated(&memory, page);
    }
    until("the pages are in the ledger", || first.pages().len() == 2);
    let mut ledger = first.handle().ledger();
    drop(first);
    let ram = RamMap::new(&unsafe { RamRegion::all_of(&memory) }.unwrap()).unwrap();
    // The guest starts over: its memory is good again.
    let left = ledger.start_over(&ram, std::time::SystemTime::now());
    assert!(left.is_empty(), "{left:?}");
    let _next = Relay::builder(ram).ledger(ledger).start().unwrap();
    let mut wrong = 0;
    for page in [6, 7] {
        unsafe { (hva(&memory, page) as *mut u64).write_volatile(page + 9000) };
        let read = validated(&memory, page);
        println!("page {page}: the guest has {}, the device reads {read:?}", guests(&memory, page));
        wrong += u32::from(!matches!(read, Ok(read) if read == page + 9000));
    }
    assert_eq!(wrong, 0, "other memory than the guest's");
}

#[test]
fn devices_get_the_guests_memory_back_over_two_stand_ins() {
    over_a_border(&[6, 7]);
}

#[test]
fn devices_get_the_guests_memory_back_over_one_stand_in() {
    over_a_border(&[7]);
}

/// A relay that was started before devices had a view makes private stand-ins; or the VMM maps private memory itself.
#[test]
fn devices_get_no_file_in_the_place_of_private_memory() {
    let _alone = alone();
    let marker = marker();
    let memory = shared(16);
    let _relay = relay(&memory);
    let (prot, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    unsafe {
        let at = hva(&memory, 6) as *mut libc::c_void;
        assert_ne!(libc::mmap(at, 4096, prot, flags | libc::MAP_FIXED, -1, 0), libc::MAP_FAILED);
        at.cast::<u64>().write_volatile(9006);
    }
    marker.poison(devices(&memory, 6), PAGE).unwrap();
    let _ = validated(&memory, 6);
    // It cannot be mapped a second time.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(3) {
        match validated(&memory, 6) {
            Ok(read) => assert_eq!(read, guests(&memory, 6), "other memory than the guest's"),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// More stretches than half of the table.
#[test]
fn marks_stay_when_memory_is_added_to_a_large_machine() {
    let _alone = alone();
    let region =
        |n: u64| unsafe { RamRegion::new(0x2000_0000_0000 + n * 4 * PAGE, n * 4 * PAGE, PAGE) };
    let regions: Vec<_> = (0..300).map(region).collect();
    let relay = Relay::builder(RamMap::new(&regions).unwrap()).start().unwrap();
    let handle = relay.handle();
    let bad = 299 * 4 * PAGE;
    // Nothing is mapped there: reading finds out, but is no memory failure. An AO says it is one.
    let hva = 0x2000_0000_0000 + bad;
    std::thread::spawn(move || forge_ao(hva)).join().unwrap();
    until("the page is in the ledger", || handle.pages().len() == 1);
    assert!(handle.is_bad(bad..bad + 1));
    handle.add_ram(region(400)).unwrap();
    assert!(handle.is_bad(bad..bad + 1), "the ledger has it: {:?}", handle.pages());
}

fn forge_ao(addr: u64) {
    let mut info = [0_u32; 32];
    (info[0], info[2]) = (libc::SIGBUS as u32, 5);
    (info[4], info[5], info[6]) = (addr as u32, (addr >> 32) as u32, 12);
    let sent = unsafe {
        let (pid, tid) = (libc::getpid(), libc::gettid());
        libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, tid, libc::SIGBUS, info.as_ptr())
    };
    assert_eq!(sent, 0);
}

/// The buffer of a copy is this process's own, and has gone bad: that is not the guest's memory, and no copy ends well.
#[test]
fn the_vmms_own_bad_memory_is_not_taken_for_the_guests() {
    let _alone = alone();
    set_up(Signals::Install).unwrap();
    let marker = marker();
    let memory = shared(16);
    let own = MmapRegion::<()>::new(4096).unwrap();
    marker.poison(own.as_ptr() as u64, PAGE).unwrap();
    let child = unsafe { libc::fork() };
    if child == 0 {
        // What is bad is inherited.
        let to = unsafe { std::slice::from_raw_parts_mut(own.as_ptr(), 64) };
        let read = unsafe { guard::read(hva(&memory, 3) as *const u8, to) };
        unsafe { libc::_exit(i32::from(read.is_err())) };
    }
    let mut status = 0;
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    let (good_guest_memory_is_called_bad, killed_by) = (libc::WIFEXITED(status), status & 0x7f);
    assert!(!good_guest_memory_is_called_bad, "exit code {}", libc::WEXITSTATUS(status));
    assert_eq!(killed_by, libc::SIGBUS, "as of any memory of the VMM's own");
}

/// A child that drops what it has inherited, while a thread of its parent reads the table.
#[test]
fn a_child_that_drops_its_copy_ends() {
    let _alone = alone();
    let memory = shared(16);
    let _relay = relay(&memory);
    // Something is marked, so that is_bad looks at the areas.
    std::thread::spawn({
        let hva = hva(&memory, 2);
        move || forge_ao(hva)
    })
    .join()
    .unwrap();
    until("marked", || guard::is_bad(hva(&memory, 2), 1));
    let stop = Arc::new(AtomicBool::new(false));
    let at = hva(&memory, 0);
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let _ = guard::is_bad(at, 16 * PAGE);
                }
            })
        })
        .collect();
    let mut hung = 0;
    for _ in 0..200 {
        let child = unsafe { libc::fork() };
        if child == 0 {
            unsafe {
                // The last reference: as a VMM that unwinds in the child.
                drop(std::ptr::read(&raw const memory));
                libc::_exit(0);
            }
        }
        let start = Instant::now();
        let mut status = 0;
        loop {
            let done = unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) };
            if done == child {
                break;
            }
            if start.elapsed() > Duration::from_secs(2) {
                hung += 1;
                unsafe { libc::kill(child, libc::SIGKILL) };
                unsafe { libc::waitpid(child, &raw mut status, 0) };
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        if hung > 0 {
            break;
        }
    }
    stop.store(true, Ordering::Relaxed);
    readers.into_iter().for_each(|reader| reader.join().unwrap());
    assert_eq!(hung, 0, "children that never end");
}

/// A device touches a good part of the huge page while it is being rescued: its signal is looked at after that.
#[test]
fn what_a_device_touched_during_a_rescue_does_not_unmark_what_is_gone() {
    let _alone = alone();
    let (memory, other) = huge();
    let (relay, begun, go) = held_rescuer(&memory, other);
    let handle = relay.handle();
    let view = devices(&memory, 9);
    // A device finds that it is bad, as the kernel says it of hugetlb.
    assert_eq!(signal(devices(&memory, 5), 21), Handled::Handled);
    let _ = Attempt::begin();
    begun.recv_timeout(Duration::from_secs(10)).unwrap();
    // Another one meanwhile.
    assert_eq!(signal(view, 21), Handled::Handled);
    go.send(()).unwrap();
    until("the rescue", || !handle.pages().is_empty());
    std::thread::sleep(Duration::from_millis(2500));
    let bad: Vec<u64> = handle.pages().iter().map(|page| (page.gpa - GPA) / PAGE).collect();
    let read = validated(&memory, 7);
    println!(
        "ledger {bad:?}; a device reads {read:?} of the page that is gone; is_bad {}",
        handle.is_bad(at(7).0..at(7).0 + 1)
    );
    let refused = (0..512).filter(|page| validated(&memory, *page).is_err()).count();
    println!("refused: {refused}");
    assert!(read.is_err(), "zeros of a page that is gone got out");
}

/// Devices poll the page that is gone while the rescue ends.
#[test]
fn a_rescue_gives_no_moment_in_which_what_is_gone_reads_as_zeros() {
    let _alone = alone();
    let mut out = 0;
    for _ in 0..40 {
        let (memory, other) = huge();
        let (relay, begun, go) = held_rescuer(&memory, other);
        let handle = relay.handle();
        assert_eq!(signal(devices(&memory, 5), 21), Handled::Handled);
        begun.recv_timeout(Duration::from_secs(10)).unwrap();
        let (stop, zeros) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let devices: Vec<_> = (0..2)
            .map(|_| {
                let (memory, stop, zeros) = (memory.clone(), Arc::clone(&stop), Arc::clone(&zeros));
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        if let Ok(read) = validated(&memory, 7) {
                            assert_eq!(read, 0);
                            zeros.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                })
            })
            .collect();
        go.send(()).unwrap();
        until("the rescue", || !handle.pages().is_empty());
        stop.store(true, Ordering::Relaxed);
        devices.into_iter().for_each(|device| device.join().unwrap());
        let round = zeros.load(Ordering::Relaxed);
        out += round;
        if round > 0 {
            let then = validated(&memory, 7).map_err(|_| ());
            std::thread::sleep(Duration::from_millis(1500));
            let pages: Vec<_> =
                handle.pages().iter().map(|p| ((p.gpa - GPA) / PAGE, p.found_by)).collect();
            println!(
                "{round} reads of zeros; then {then:?}, later {:?}; ledger {pages:?}",
                validated(&memory, 7).map_err(|_| ())
            );
        }
    }
    assert_eq!(out, 0, "validated reads of a page that is gone");
}

/// `guard::read` says that it is an error where the file has no memory any more.
#[test]
fn where_the_file_was_cut_short_is_an_error() {
    let _alone = alone();
    set_up(Signals::Install).unwrap();
    let file = memfd(2 * PAGE, 0);
    let mapping =
        MmapRegion::<()>::from_file(FileOffset::new(file.try_clone().unwrap(), 0), 8192).unwrap();
    file.set_len(PAGE).unwrap();
    let mut read = [1; 64];
    unsafe { guard::read(mapping.as_ptr().add(64), &mut read) }.unwrap();
    assert_eq!(read, [0; 64]);
    let gone = unsafe { guard::read(mapping.as_ptr().add(4096 - 16), &mut read) }.unwrap_err();
    assert!(gone.done <= 16, "{gone:?}");
}

/// The kernel writes from the view by itself (vm-memory's `write_volatile_to`): no rule is broken before it is too late.
#[test]
fn more_orphans_than_there_is_room_for_leave_no_good_page_refused() {
    let _alone = alone();
    let marker = marker();
    let memory = shared(256);
    let relay = relay(&memory);
    let views: Vec<u64> = (0..200).map(|page| devices(&memory, page)).collect();
    for view in &views {
        marker.poison(*view, PAGE).unwrap();
    }
    // All of them are good in the guest's mapping.
    for view in views {
        unsafe { (view as *const u64).read_volatile() };
    }
    std::thread::sleep(Duration::from_millis(4000));
    let refused = (0..200).filter(|page| memory.read_obj::<u64>(at(*page)).is_err()).count();
    assert_eq!(refused, 0, "good pages stay refused; ledger {}", relay.pages().len());
}

/// As `a_handler_that_is_held_up…`, with nothing that holds it up but the machine.
#[test]
fn many_threads_on_one_page_leave_no_scratch_page_that_nobody_knows_of() {
    let _alone = alone();
    let marker = marker();
    let memory = shared(16);
    let _relay = relay(&memory);
    let view = devices(&memory, 6);
    let (mut wrong, mut first) = (0, None);
    let start = Instant::now();
    let mut rounds = 0;
    while start.elapsed() < Duration::from_secs(20) {
        rounds += 1;
        marker.poison(view, PAGE).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let attempt = Attempt::begin();
                    unsafe { (view as *const u64).read_volatile() };
                    let _ = attempt.is_clean();
                });
            }
        });
        let _ = Attempt::begin();
        let begun = Instant::now();
        while memory.read_obj::<u64>(at(6)).is_err()
            && begun.elapsed() < Duration::from_millis(1500)
        {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(5));
        if validated(&memory, 6).is_ok_and(|read| read != 106) {
            wrong += 1;
            first = first.or(Some(rounds));
            // As a new boot would not: it has no mark.
            let _ = signal(view, 12);
            let begun = Instant::now();
            while memory.read_obj::<u64>(at(6)).is_err() && begun.elapsed() < Duration::from_secs(2)
            {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
    assert_eq!(wrong, 0, "of {rounds} rounds, the first in round {first:?}");
}

/// A range of guest-physical addresses that begins before RAM, or goes over the hole.
#[test]
fn a_range_over_a_hole_is_asked_to_its_end() {
    let _alone = alone();
    let region =
        |n: u64| unsafe { RamRegion::new(0x2100_0000_0000 + n * 4 * PAGE, n * 4 * PAGE, PAGE) };
    let relay = Relay::builder(RamMap::new(&[region(1), region(2)]).unwrap()).start().unwrap();
    let handle = relay.handle();
    let bad = 8 * PAGE;
    std::thread::spawn(move || forge_ao(0x2100_0000_0000 + bad)).join().unwrap();
    until("the page is in the ledger", || handle.pages().len() == 1);
    assert!(handle.is_bad(bad..bad + 1));
    assert!(handle.is_bad(4 * PAGE..12 * PAGE), "over the hole");
}

/// Two mappings of /dev/zero are two memories.
#[test]
fn a_view_is_the_guests_memory() {
    let _alone = alone();
    let zero = File::options().read(true).write(true).open("/dev/zero").unwrap();
    let mapping = MmapRegion::<()>::from_file(FileOffset::new(zero, 0), 4096);
    let Ok(mapping) = mapping else { return println!("vm-memory refuses it") };
    let memory = of_mapping(mapping);
    memory.write_obj(7_u64, at(0)).unwrap();
    assert_eq!(guests(&memory, 0), 7);
}

/// One page of a huge page goes bad under a device. The rings of others in that huge page are good, and are not refused: that
/// would end as a reset.
#[test]
fn good_pages_beside_a_bad_one_are_refused_no_moment() {
    let _alone = alone();
    let memory = shared_at(512, 0);
    let _relay = relay(&memory);
    let view = devices(&memory, 9);
    let start = Instant::now();
    assert_eq!(signal(view, 21), Handled::Handled);
    let attempt = Attempt::begin();
    let ring = memory.read_obj::<u64>(at(300));
    println!("clean {}, {ring:?}", attempt.is_clean());
    until("good", || memory.read_obj::<u64>(at(300)).is_ok());
    println!("for {:?}", start.elapsed());
    assert!(ring.is_ok(), "a ring in good memory: the device asks for a reset, for good");
}

/// Another VM's memory lies in the same 2 MiB of addresses.
#[test]
fn a_late_signal_does_not_take_the_marks_of_another_vm() {
    let _alone = alone();
    let marker = marker();
    let memory = shared_at(64, 0);
    // The room of `shared_at` is longer than its memory: more than 4 MiB behind it are free.
    let len = 64 * PAGE;
    let neighbours = numbered(mapped_at(hva(&memory, 0) + len, memfd(len, 0), len), 64);
    let (_relay, theirs) = (relay(&memory), relay(&neighbours));
    let handle = theirs.handle();
    marker.poison(hva(&neighbours, 3), PAGE).unwrap();
    assert!(handle.read(GPA + 3 * PAGE, &mut [0; 8]).is_err());
    until("the page is in the ledger", || handle.pages().len() == 1);
    assert!(handle.is_bad(at(3).0..at(4).0));
    assert_eq!(signal(devices(&memory, 9), 21), Handled::Handled);
    until("the relay has seen it", || memory.read_obj::<u64>(at(9)).is_ok());
    std::thread::sleep(Duration::from_millis(500));
    assert!(handle.is_bad(at(3).0..at(4).0), "the mark of another VM's page is lost");
}

/// Whoever takes the signal first need not be the one whose page it is: it must not take the mark.
#[test]
fn a_relay_that_does_not_have_the_page_lets_its_mark_be() {
    let _alone = alone();
    let memory = shared(64);
    // The page's own relay is not there (it is being built, say); another VM's is.
    let (other, set_up_by) = (shared(16), relay(&shared(16)));
    let _other = relay(&other);
    let marker = marker();
    marker.poison(hva(&memory, 6), PAGE).unwrap();
    marker.poison(devices(&memory, 6), PAGE).unwrap();
    assert!(validated(&memory, 6).is_err());
    assert!(guard::is_bad(hva(&memory, 6), 1));
    std::thread::sleep(Duration::from_millis(1500));
    assert!(guard::is_bad(hva(&memory, 6), 1), "a page that is bad is not marked any more");
    drop(set_up_by);
}
