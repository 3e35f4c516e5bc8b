//! More attempts on marks, waits and views: waits that add up, marks that nobody takes back, zeros that get out.
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

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use guarded::{
    GPA, HUGE, Memory, PAGE, alone, at, devices, go_on, guests, held_rescuer, hold_of_this_thread,
    hold_scratch_of_this_thread, huge, hva, marker, memfd, next, of_file, relay, rescuer,
    shared_at, signal, until, validated,
};
use mce_relay::guard::{self, Attempt};
use mce_relay::signal::Handled;
use mce_relay::{RamMap, RamRegion, Relay};
use vm_memory::Bytes;

/// One wait for a relay.
const PATIENCE: Duration = Duration::from_millis(500);

/// Guest memory at a multiple of 2 MiB, each page of which begins with its number and 100.
fn shared(pages: u64) -> Memory {
    shared_at(pages, 0)
}

/// How long a request takes whose buffers are in these pages, each in another one.
fn request(memory: &Memory, pages: std::ops::Range<u64>) -> (Duration, Vec<bool>) {
    let since = Instant::now();
    let read = pages.map(|page| memory.read_obj::<u64>(at(page)).is_ok()).collect();
    (since.elapsed(), read)
}

/// A device's thread has a request with many buffers in a huge page that is being rescued for seconds, as one of 1 GiB is.
/// Each buffer waits for half a second of its own, and meanwhile the thread takes no order to stop or to pause.
#[test]
fn the_waits_of_one_request_do_not_add_up() {
    let _alone = alone();
    let (memory, other) = huge();
    let view = devices(&memory, 5);
    let (relay, begun, go) = held_rescuer(&memory, other);
    assert_eq!(signal(view, 21), Handled::Handled);
    assert!(!Attempt::begin().is_clean() || memory.read_obj::<u64>(at(5)).is_err());
    begun.recv_timeout(Duration::from_secs(10)).unwrap();
    let (took, _) = request(&memory, 20..28);
    go.send(()).unwrap();
    until("the rescue", || !relay.pages().is_empty());
    assert!(took < 3 * PATIENCE, "one request of 8 buffers kept its thread for {took:?}");
}

/// The relay has gone, as between two boots or at the VM's end: nobody will ever say which pages are good. What waits,
/// waits for nobody.
#[test]
fn nobody_waits_for_a_relay_that_has_gone() {
    let _alone = alone();
    let memory = shared(512);
    drop(relay(&memory));
    assert_eq!(signal(devices(&memory, 5), 21), Handled::Handled);
    let (took, _) = request(&memory, 20..24);
    let since = Instant::now();
    for _ in 0..4 {
        let read = unsafe { guard::read(hva(&memory, 30) as *const u8, &mut [0; 8]) };
        read.unwrap_err();
    }
    let again = since.elapsed();
    println!("four pages: {took:?}, one page four times: {again:?}");
    assert!(took + again < PATIENCE, "{:?} were waited for nobody", took + again);
}

/// A copy of ours, over and over at a page of which nothing comes to be known: each waits again.
#[test]
fn a_copy_does_not_wait_again_for_what_was_waited_for_in_vain() {
    let _alone = alone();
    let (memory, other) = huge();
    let view = devices(&memory, 5);
    let (relay, begun, go) = held_rescuer(&memory, other);
    assert_eq!(signal(view, 21), Handled::Handled);
    assert!(memory.read_obj::<u64>(at(5)).is_err());
    begun.recv_timeout(Duration::from_secs(10)).unwrap();
    let since = Instant::now();
    for _ in 0..6 {
        let read = unsafe { guard::read(hva(&memory, 9) as *const u8, &mut [0; 8]) };
        assert!(read.is_err());
    }
    let took = since.elapsed();
    go.send(()).unwrap();
    until("the rescue", || !relay.pages().is_empty());
    assert!(took < 3 * PATIENCE, "six reads of one page took {took:?}");
}

/// The owner of memory looks at guest memory (a vhost-user ring's index, say) on the relay's own thread, which is the one that
/// would have to find out: it waits for itself, and vCPUs are stopped meanwhile.
#[test]
fn the_relays_own_thread_does_not_wait_for_itself() {
    let _alone = alone();
    let (memory, other) = huge();
    let took = Arc::new(Mutex::new(None));
    let (of, guests) = (Arc::clone(&took), memory.clone());
    let view = devices(&memory, 5);
    let release = Box::new(move || {
        // A device's thread meets it, too, at the latest now.
        let _ = std::thread::spawn(move || signal(view, 21)).join().unwrap();
        *of.lock().unwrap() = Some(request(&guests, 20..24).0);
    });
    let relay = rescuer(&memory, other, release, || Ok(()));
    assert_eq!(signal(view, 21), Handled::Handled);
    let _ = memory.read_obj::<u64>(at(5));
    until("the rescue", || !relay.pages().is_empty());
    let took = took.lock().unwrap().unwrap();
    assert!(took < PATIENCE, "it waited for itself for {took:?}");
}

/// A host without a thread for the relay: the thread of its event loop does the relay's work, and that of devices.
#[test]
fn an_event_loop_does_not_wait_for_itself() {
    let _alone = alone();
    let memory = shared(512);
    let regions = unsafe { RamRegion::all_of(&memory) }.unwrap();
    let builder = Relay::builder(RamMap::new(&regions).unwrap());
    let loops = std::thread::spawn({
        let memory = memory.clone();
        move || {
            let (_relay, mut polled) = builder.start_polled().unwrap();
            // Another device's thread has met a huge page that was said to be bad; it is good.
            let view = devices(&memory, 5);
            let other = std::thread::spawn(move || assert_eq!(signal(view, 21), Handled::Handled));
            other.join().unwrap();
            let (took, read) = request(&memory, 20..24);
            polled.process();
            let then = request(&memory, 20..24).1;
            (took, read, then)
        }
    });
    let (took, read, then) = loops.join().unwrap();
    println!("{took:?}: {read:?}, and once it has looked: {then:?}");
    assert!(then.iter().all(|is_good| *is_good));
    assert!(
        took < PATIENCE,
        "it waited for itself for {took:?}, and was refused good pages: {read:?}"
    );
}

/// A copy is of an address of the devices' view: where the page is known to be bad and a scratch page is there, that is no
/// guest memory. The copy says it is, and an attempt that was begun before it is clean.
#[test]
fn a_copy_from_the_view_gives_no_scratch_page_out() {
    let _alone = alone();
    let marker = marker();
    let memory = shared(16);
    let relay = relay(&memory);
    let view = devices(&memory, 6);
    marker.poison(view, PAGE).unwrap();
    marker.poison(hva(&memory, 6), PAGE).unwrap();
    assert_eq!(validated(&memory, 6).map_err(|_| ()), Err(()), "by unmodified code");
    until("the page is in the ledger", || !relay.pages().is_empty());
    assert!(guard::is_bad(hva(&memory, 6), 8));
    // Code that copies by `guard::read`, at an address it has got by `get_slice` before: a ring's index.
    let attempt = Attempt::begin();
    let mut bytes = [0xff; 8];
    let read = unsafe { guard::read(view as *const u8, &mut bytes) };
    let loaded = unsafe { guard::load(view as *const u64) };
    let is_clean = attempt.is_clean();
    println!("is_bad {}, {read:?} {bytes:?} {loaded:?} clean {is_clean}", guard::is_bad(view, 8));
    assert!(
        !is_clean || (read.is_err() && loaded.is_err()),
        "zeros of a scratch page, with Ok and a clean attempt"
    );
}

/// The file of a region is hugetlb's, and a huge page of it has been rescued: small pages lie in its place, and a relay of
/// the next boot is told so. One of them goes bad under a device. The handler marks 2 MiB, and the relay takes 4 KiB back.
#[test]
fn pages_beside_a_bad_one_in_a_stand_in_come_back() {
    let _alone = alone();
    let marker = marker();
    let memory = of_file(memfd(HUGE, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB), HUGE, 0);
    let (start, view) = (hva(&memory, 0), devices(&memory, 0));
    unsafe {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let flags = flags | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let got = libc::mmap(start as *mut _, HUGE as usize, prot, flags, -1, 0);
        assert_ne!(got, libc::MAP_FAILED);
        for page in 0..512 {
            ((start + page * PAGE) as *mut u64).write_volatile(page + 100);
        }
    }
    let region = unsafe { RamRegion::new(start, GPA, HUGE) }.in_pages_of(12);
    let relay = Relay::builder(RamMap::new(&[region]).unwrap()).start().unwrap();
    // Devices get the stand-in: their view is marked as lost, and the relay finds that it is good.
    assert_eq!(signal(view, 21), Handled::Handled);
    let _ = Attempt::begin();
    until("devices have the stand-in", || {
        (0..512).all(|page| validated(&memory, page).is_ok_and(|read| read == page + 100))
    });
    marker.poison(devices(&memory, 7), PAGE).unwrap();
    marker.poison(hva(&memory, 7), PAGE).unwrap();
    let _ = validated(&memory, 7);
    until("the page is in the ledger", || !relay.pages().is_empty());
    let since = Instant::now();
    let mut refused = usize::MAX;
    while refused > 1 && since.elapsed() < Duration::from_secs(5) {
        // What has been waited for in vain is not waited for again: the first look is the slow one.
        refused =
            [5, 6, 7, 8, 9, 300].iter().filter(|at| validated(&memory, **at).is_err()).count();
    }
    let marked = (0..512).filter(|page| guard::is_bad(start + page * PAGE, 1)).count();
    println!("the ledger has {:?}; {marked} pages are marked", relay.pages().len());
    assert_eq!((refused, marked), (1, 1), "good pages stay refused for good");
}

/// Memory that devices have and the relays do not: a page of it that is good is marked for good.
#[test]
fn a_good_page_that_is_no_relays_comes_back() {
    let _alone = alone();
    let marker = marker();
    let (memory, others) = (shared(16), shared(16));
    let _relay = relay(&memory);
    marker.poison(devices(&others, 6), PAGE).unwrap();
    let _ = validated(&others, 6);
    let since = Instant::now();
    while validated(&others, 6).is_err() && since.elapsed() < Duration::from_secs(4) {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(validated(&others, 6).ok(), Some(guests(&others, 6)));
}

/// More signals than there are places for, of a page of 1 GiB that is good. Each of its pages is looked at, and for each one
/// all of them: a quarter of a million times a quarter of a million, under the relay's lock. Here it is 128 MiB.
#[test]
fn what_an_overrun_costs_grows_with_the_pages_and_not_with_their_square() {
    const PAGES: u64 = 32768;
    let _alone = alone();
    let memory = shared(PAGES);
    let region = unsafe { RamRegion::new(hva(&memory, 0), GPA, PAGES * PAGE) }.in_pages_of(30);
    let relay = Relay::builder(RamMap::new(&[region]).unwrap()).start().unwrap();
    let others = shared(1);
    let (few, many) = (devices(&others, 0), devices(&memory, 1));
    // The relay's thread looks once a second, or when it is called.
    for _ in 0..40 {
        assert_eq!(signal(few, 12), Handled::Handled);
    }
    assert_eq!(signal(many, 30), Handled::Handled);
    let since = Instant::now();
    assert!(guard::is_bad(hva(&memory, 99), 1));
    let attempt = Attempt::begin();
    until("the relay looks", || {
        let _ = attempt.is_clean();
        let _ = relay.handle();
        !guard::is_bad(hva(&memory, 99), 1)
    });
    let marked = since.elapsed();
    // A vCPU that would be told, or a management program that asks.
    let pages = relay.pages().len();
    let locked = since.elapsed();
    println!("good again after {marked:?}; the ledger ({pages}) could be read after {locked:?}");
    // Some milliseconds on a real machine, and a thousand times that on an emulated one that shares its processors.
    let limit =
        Duration::from_secs(if std::env::var_os("MCE_RELAY_LAB").is_some() { 20 } else { 2 });
    assert!(locked < limit, "the relay's lock was held for {locked:?}");
}

/// The calling thread's calls of mremap(2) with an old size of 0, by which the view has memory again, wait for whoever has
/// what is returned.
fn hold_restores_of_this_thread() -> OwnedFd {
    hold_of_this_thread(libc::SYS_mremap, 1, 0)
}

/// A huge page is being rescued, and devices get their view of it back. A device that reads a good page of it in that moment
/// is refused at once, where before and after it would have waited or read: a ring that lies there ends as a reset.
#[test]
fn a_rescue_refuses_good_pages_no_moment() {
    let _alone = alone();
    let (memory, other) = huge();
    let (tx, rx) = channel();
    let view = devices(&memory, 5);
    let relay = rescuer(&memory, other, Box::new(|| {}), move || {
        tx.send(hold_restores_of_this_thread()).unwrap();
        Ok(())
    });
    let held = rx.recv().unwrap();
    // The relay may have found the page before, by its first look: then the handler waits for what is held here.
    let signalled = std::thread::spawn(move || signal(view, 21));
    // Whoever reads has the relay called, and waits.
    let caller = std::thread::spawn({
        let memory = memory.clone();
        move || memory.read_obj::<u64>(at(5)).map_err(|_| ())
    });
    let id = next(&held).unwrap();
    let ring = std::thread::spawn({
        let memory = memory.clone();
        move || memory.read_obj::<u64>(at(9)).map_err(|error| error.to_string())
    });
    // Of half a second.
    std::thread::sleep(Duration::from_millis(60));
    let _ = go_on(&held, id);
    std::thread::spawn(move || {
        while let Ok(id) = next(&held) {
            let _ = go_on(&held, id);
        }
    });
    let (caller, ring) = (caller.join().unwrap(), ring.join().unwrap());
    assert_eq!(signalled.join().unwrap(), Handled::Handled);
    until("the rescue", || !relay.pages().is_empty());
    println!("the one before: {caller:?}");
    assert_eq!(ring, Ok(109), "a good page was refused at once");
}

/// A handler has marked a huge page, and is held up for 50 ms before it says so to the relay (mmap(2) waits for a lock that a
/// rescue has, say). Whoever waits has called the relay by then, which found nothing; nobody calls it again within the half
/// second, and a good page is refused, though all is known after 50 ms.
#[test]
fn what_a_slow_handler_says_late_is_looked_at_while_somebody_waits() {
    let _alone = alone();
    let memory = shared(512);
    let _relay = relay(&memory);
    let view = devices(&memory, 5);
    let (tx, rx) = channel();
    let (done, end): (Sender<()>, Receiver<()>) = channel();
    let slow = std::thread::spawn(move || {
        tx.send(hold_scratch_of_this_thread()).unwrap();
        assert_eq!(signal(view, 21), Handled::Handled);
        // Its own work goes on for a while before it asks whether its attempt was clean.
        let _ = end.recv();
    });
    let held = rx.recv().unwrap();
    let id = next(&held).unwrap();
    let ring = std::thread::spawn({
        let memory = memory.clone();
        move || {
            let since = Instant::now();
            (memory.read_obj::<u64>(at(9)).map_err(|error| error.to_string()), since.elapsed())
        }
    });
    std::thread::sleep(Duration::from_millis(50));
    let _ = go_on(&held, id);
    let (ring, took) = ring.join().unwrap();
    drop(done);
    slow.join().unwrap();
    assert_eq!(ring, Ok(109), "a good page was refused after {took:?}");
}
