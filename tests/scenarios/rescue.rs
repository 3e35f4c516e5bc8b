//! A huge page of which a frame goes bad: the host loses all of it, and the guest keeps all but 4 KiB.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use mce_relay_cli::poison::host::hwpoison_inject;
use mce_relay_tests::agent::{Page, hex};
use mce_relay_tests::burst::{named_all, same_pages, settled};
use mce_relay_tests::guest::{Guest, Options, hva};
use mce_relay_tests::lab::{self, Cgroup};
use mce_relay_tests::memory::{HUGE, RAM, options};
use serde_json::Value;

const GIB: u64 = 1 << 30;

/// A guest in pages of 2 MiB, of which the pool has as many as it needs and `spare` more; and pages of its agent's.
fn guest(options: Options, spare: u64) -> (Guest, Vec<Page>) {
    lab::set_pool("2048kB", RAM / HUGE + spare);
    let mut guest = Guest::boot(&options);
    guest.agent.ask("sigbus count");
    let pages = allocated(&mut guest, 2);
    (guest, pages)
}

/// So many times 16 MiB of the agent's, in pages of 4 KiB.
fn allocated(guest: &mut Guest, times: usize) -> Vec<Page> {
    (0..times).flat_map(|_| guest.agent.alloc_many("anon", 4096)).collect()
}

fn in_huge_pages() -> Options {
    options("size=256M,hugepages=on")
}

/// The huge page that is full of the agent's pages, from its first one on, and these.
fn full(pages: &[Page], huge: u64) -> Vec<Page> {
    let starts: BTreeSet<u64> = pages.iter().map(|page| page.gpa / huge * huge).collect();
    let within = |start: u64| -> Vec<Page> {
        let mut all: Vec<Page> =
            pages.iter().filter(|page| page.gpa / huge * huge == start).copied().collect();
        all.sort_by_key(|page| page.gpa);
        all
    };
    let most = starts.into_iter().map(within).max_by_key(Vec::len);
    most.expect("the agent has pages")
}

/// What the pages of 4 KiB of the extent at `start` hold; the guest stands still meanwhile.
fn contents(guest: &Guest, start: u64, len: u64, except: &BTreeSet<u64>) -> Vec<[u8; 4096]> {
    let vm = guest.info();
    let memory = lab::Memory::of(vm.pid);
    let pages = (start..start + len).step_by(4096).filter(|gpa| !except.contains(gpa));
    pages.map(|gpa| memory.page(hva(&vm, gpa))).collect()
}

fn rescued(guest: &Guest, start: u64) -> Value {
    guest.event_where("rescued", &format!("{start:#x}"), |of| hex(&of["gpa"]) == start)
}

/// Poisons the frame of `bad` while the guest stands still: all other pages of the huge page hold what they held. Then the
/// guest goes on, names that page and no other, and its program has all other pages.
fn loses_4_kib(guest: &mut Guest, pages: &[Page], bad: Page, huge: u64) -> Value {
    loses_4_kib_by(guest, pages, bad, huge, "hwpoison-inject")
}

/// The same by other means.
fn loses_4_kib_by(guest: &mut Guest, pages: &[Page], bad: Page, huge: u64, via: &str) -> Value {
    // Where the huge page begins in the guest: a block need not begin at a multiple of its pages there.
    let block = guest.info().block(bad.gpa).expect("guest RAM").gpa;
    let start = block + (bad.gpa - block) / huge * huge;
    let gone = BTreeSet::from([bad.gpa]);
    guest.put("vm.pause");
    let before = contents(guest, start, huge, &gone);
    guest.poison(bad.gpa, via);
    let event = rescued(guest, start);
    let all = huge / 4096;
    assert_eq!(
        (&event["extent"], &event["kept"], &event["gone"]),
        (&huge.into(), &(all - 1).into(), &1.into())
    );
    assert!(contents(guest, start, huge, &gone) == before, "the other {} pages", all - 1);
    let vm = guest.info();
    let read = lab::read_memory(vm.pid, hva(&vm, bad.gpa));
    assert!(read.is_err(), "the bad page is no memory: {read:?}");
    guest.put("vm.resume");
    let ledger = settled(guest);
    let (named, account) = named_all(guest, 1);
    println!("    the guest's account: {account}");
    same_pages(&[bad], &named, &ledger);
    guest.agent.others_intact(pages, &[bad]);
    println!("    of {} KiB {} pages are as they were; {event}", huge >> 10, all - 1);
    event
}

/// How long this host takes for a plain copy of a huge page, the best of three each.
#[derive(Clone, Copy)]
struct PlainCopy {
    /// By another process's loads, into memory of its own.
    by_loads: Duration,
    /// By read(2) of the file, into memory of its own: by the kernel's copy, as a rescue is. In the lab that is much
    /// slower than loads, since the emulator takes its string instruction byte by byte.
    by_read: Duration,
}

fn plain_copy(guest: &Guest, gpa: u64, huge: u64) -> PlainCopy {
    let vm = guest.info();
    let block = vm.block(gpa).expect("guest RAM");
    let fd = block.fd.expect("a memfd");
    let path = format!("/proc/{}/fd/{fd}", vm.pid);
    let file = std::fs::File::options().read(true).open(path).unwrap();
    let offset = block.fd_offset + (gpa - block.gpa) / huge * huge;
    let len = usize::try_from(huge).unwrap();
    // SAFETY: a new mapping of a file that stays as long as the guest, which only reads.
    let from = unsafe {
        let (prot, flags) = (libc::PROT_READ, libc::MAP_SHARED | libc::MAP_POPULATE);
        let offset = libc::off_t::try_from(offset).unwrap();
        libc::mmap(std::ptr::null_mut(), len, prot, flags, file.as_raw_fd(), offset)
    };
    assert_ne!(from, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    let best = |copy: &dyn Fn(*mut u8)| {
        let once = |_| {
            let start = Instant::now();
            let mut to = Vec::<u8>::with_capacity(len);
            copy(to.as_mut_ptr());
            std::hint::black_box(to.as_ptr());
            start.elapsed()
        };
        (0..3).map(once).min().unwrap()
    };
    let by_loads = best(&|to| {
        // SAFETY: both have `len` bytes; the guest may write meanwhile, and nobody looks at the copy.
        unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), to, len) }
    });
    let by_read = best(&|to| {
        let at = libc::off_t::try_from(offset).unwrap();
        // SAFETY: `to` has room for `len` bytes.
        let read = unsafe { libc::pread(file.as_raw_fd(), to.cast(), len, at) };
        assert_eq!(usize::try_from(read).ok(), Some(len));
    });
    // SAFETY: mapped above, and used by nobody any more.
    unsafe { libc::munmap(from, len) };
    PlainCopy { by_loads, by_read }
}

/// Says how long a rescue took beside a plain copy.
fn beside(plain: PlainCopy, event: &Value, what: &str) {
    let micros = event[what].as_u64().expect("a time");
    let times = |plain: Duration| micros as f64 / plain.as_secs_f64() / 1e6;
    let PlainCopy { by_loads, by_read } = plain;
    println!(
        "    {what} {micros}: {:.2} times the {} us of a plain copy by read(2), {:.2} times the {} us of one by loads",
        times(by_read),
        by_read.as_micros(),
        times(by_loads),
        by_loads.as_micros()
    );
}

/// `KernelPageSize` of the mapping of `gpa` in the VMM, in kB.
fn page_size(guest: &Guest, gpa: u64) -> u64 {
    let vm = guest.info();
    let at = hva(&vm, gpa);
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", vm.pid)).unwrap();
    let mut within = false;
    for line in smaps.lines() {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let hex = |text| u64::from_str_radix(text, 16);
        if let Some((Ok(from), Ok(to))) = range.map(|(from, to)| (hex(from), hex(to))) {
            within = (from..to).contains(&at);
        }
        if let (true, Some(size)) = (within, line.strip_prefix("KernelPageSize:")) {
            return size.trim().trim_end_matches(" kB").parse().unwrap();
        }
    }
    panic!("{at:#x} is not mapped");
}

/// Has the guest reboot; pages of its agent's in the new boot.
fn reboot(guest: &mut Guest, boot: u64) -> Vec<Page> {
    guest.agent.tell("reboot");
    guest.event_where("booting", "the next boot", |event| event["boot"] == boot);
    guest.up_again();
    assert_eq!(guest.pages().len(), 0, "all of it is good");
    let pages = allocated(guest, 2);
    guest.agent.others_intact(&pages, &[]);
    pages
}

/// One frame; its memory, and a reboot with a huge page to spare in the pool.
pub fn of_2_mib() {
    let (mut guest, pages) = guest(in_huge_pages(), 4);
    let full = full(&pages, HUGE);
    let bad = full[full.len() / 2];
    let before = lab::smaps(guest.pid(), "Anonymous");
    loses_4_kib(&mut guest, &pages, bad, HUGE);
    assert_eq!(page_size(&guest, bad.gpa), 4);
    let took = lab::smaps(guest.pid(), "Anonymous") - before;
    println!("    it took {took} kB of ordinary memory");
    assert!((2044..4096).contains(&took), "{took} kB");
    let status = guest.status();
    assert_eq!(status["rescued"].as_array().map(Vec::len), Some(1), "{status}");
    // A page of what is there instead is one page.
    let second = full[full.len() / 2 + 3];
    guest.poison(second.gpa, "hwpoison-inject");
    assert_eq!(guest.event("seen", second)["extent"], 4096);
    settled(&guest);
    named_all(&mut guest, 2);
    guest.agent.others_intact(&pages, &[bad, second]);
    reboot(&mut guest, 2);
    assert_eq!(page_size(&guest, bad.gpa), 2048, "a huge page again");
    guest.power_off();
    lab::set_pool("2048kB", 0);
}

/// The host's own machine-check code is made to believe in the error.
pub fn from_the_hardware_down() {
    let (mut guest, pages) = guest(in_huge_pages(), 4);
    let bad = full(&pages, HUGE)[33];
    loses_4_kib_by(&mut guest, &pages, bad, HUGE, "mce-inject");
    guest.power_off();
    lab::set_pool("2048kB", 0);
}

/// The pool has no other: the next boot is in ordinary memory there, and that is rescued as well.
pub fn and_no_huge_page_to_spare() {
    let (mut guest, pages) = guest(in_huge_pages(), 0);
    let full = full(&pages, HUGE);
    let bad = full[7];
    loses_4_kib(&mut guest, &pages, bad, HUGE);
    let pages = reboot(&mut guest, 2);
    assert_eq!(page_size(&guest, bad.gpa), 4, "there is no other huge page");
    // A page there is one page, as the guest that has started over may find out.
    let there = |page: &&Page| page.gpa / HUGE == bad.gpa / HUGE;
    let again = pages.iter().find(there).expect("Linux hands out the same memory first");
    guest.poison(again.gpa, "hwpoison-inject");
    assert_eq!(
        guest.event_where("seen", "4 KiB", |of| hex(&of["gpa"]) == again.gpa
            && of["extent"] == 4096)["pages"],
        1
    );
    settled(&guest);
    guest.agent.others_intact(&pages, &[*again]);
    guest.power_off();
    lab::set_pool("2048kB", 0);
}

pub fn of_1_gib() {
    lab::set_pool("1048576kB", 1);
    let zones = &["size=128M", "size=1G,hugepages=on,hugepage_size=1G"];
    let mut guest = Guest::boot(&Options { zones, ..options("") });
    guest.agent.ask("sigbus count");
    let pages = allocated(&mut guest, 6);
    let large = guest.info().memory.iter().find(|block| block.page_size == GIB).cloned();
    let large = large.expect("a zone of 1 GiB");
    let inside =
        pages.iter().filter(|page| page.gpa >= large.gpa && page.gpa - large.gpa < large.len);
    let bad = inside.copied().nth(100).expect("the agent has pages there");
    let plain = plain_copy(&guest, bad.gpa, GIB);
    let event = loses_4_kib(&mut guest, &pages, bad, GIB);
    beside(plain, &event, "micros");
    guest.power_off();
    lab::set_pool("1048576kB", 0);
}

/// Nobody is told before the guest touches it. A touch of a good part holds its vCPU for as long as the rescue takes, and is no
/// error; a touch of the bad part is told.
pub fn by_a_touch() {
    let (mut guest, pages) = guest(in_huge_pages().late(), 4);
    let full = full(&pages, HUGE);
    let (bad, good) = (full[9], full[200]);
    let plain = plain_copy(&guest, bad.gpa, HUGE);
    guest.poison(bad.gpa, "hwpoison-inject");
    let reply = guest.agent.touch(good, "read");
    assert!(reply["sigbus"].is_null(), "{reply}");
    let event = rescued(&guest, bad.gpa / HUGE * HUGE);
    beside(plain, &event, "held_micros");
    assert_eq!(guest.pages().len(), 1);
    let reply = guest.agent.touch(bad, "read");
    assert_eq!(reply["sigbus"]["code"], "AR", "{reply}");
    guest.agent.others_intact(&pages, &[bad]);
    let (named, _) = named_all(&mut guest, 1);
    assert_eq!(named, BTreeSet::from([bad.gpa >> 12]));
    guest.power_off();
    lab::set_pool("2048kB", 0);
}

/// Has a frame of the host's go bad. Of a huge page that is bad already the kernel notes the frame and says EHWPOISON. Where
/// somebody has the page at that moment, as the rescue of another frame of it does, the kernel says EBUSY, and may or may not
/// have taken note: it is asked again.
fn corrupt(frame: u64) {
    let begun = Instant::now();
    while let Err(error) = std::fs::write(hwpoison_inject::CORRUPT_PFN, format!("{frame:#x}")) {
        match error.raw_os_error() {
            Some(libc::EHWPOISON) => return,
            Some(libc::EBUSY) if begun.elapsed() < Duration::from_secs(5) => {
                std::thread::sleep(Duration::from_millis(10));
            }
            _ => panic!("{frame:#x}: {error}"),
        }
    }
}

/// Several frames of one huge page, before anybody has looked; and after that.
pub fn several_frames() {
    let (mut guest, pages) = guest(in_huge_pages(), 4);
    let full = full(&pages, HUGE);
    let bad = [full[0], full[5], full[6], full[full.len() - 1]];
    let vm = guest.info();
    let frames = bad.map(|page| lab::host_physical(vm.pid, hva(&vm, page.gpa)) >> 12);
    let held = lab::hold_thread(guest.pid(), "mce-relay-ao");
    for frame in frames {
        corrupt(frame);
    }
    drop(held);
    let event = rescued(&guest, bad[0].gpa / HUGE * HUGE);
    assert_eq!((&event["kept"], &event["gone"]), (&508.into(), &4.into()), "{event}");
    let ledger = settled(&guest);
    let (named, _) = named_all(&mut guest, 4);
    same_pages(&bad, &named, &ledger);
    guest.agent.others_intact(&pages, &bad);
    guest.power_off();
    lab::set_pool("2048kB", 0);
}

/// Where it cannot be: all of it is gone, and why is said.
pub fn not_where_it_cannot_be() {
    for (memory, rescue, reason) in [
        ("size=256M,hugepages=on,shared=on", None, Some("shared")),
        ("size=256M,hugepages=on", Some("off"), None),
    ] {
        let (mut guest, pages) = guest(Options { rescue, ..options(memory) }, 4);
        let bad = guest.agent.alloc("thp", 1)[0];
        guest.poison(bad.gpa, "hwpoison-inject");
        assert_eq!(guest.event("seen", bad)["pages"], 512, "{memory}");
        let said = guest.events().into_iter().find(|event| event["event"] == "not-rescued");
        let said = said.map(|event| event["properties"]["reason"].clone());
        assert_eq!(said, reason.map(Value::from), "{memory}");
        settled(&guest);
        guest.agent.others_intact(&[&pages[..], &[bad]].concat(), &[bad]);
        guest.power_off();
    }
    lab::set_pool("2048kB", 0);
}

/// A memory cgroup that has no room for it is an outcome, and memory that was set aside is there. For one huge page there
/// always is some.
pub fn within_a_memory_cgroup() {
    let cgroup = Cgroup::new("narrow");
    let limit = cgroup.path().join("memory.max");
    for (rescue, second_is_rescued) in [(None, false), (Some("reserve=2M"), true)] {
        let within = Options { cgroup: Some(cgroup.path().to_owned()), rescue, ..in_huge_pages() };
        let (mut guest, _) = guest(within, 4);
        let bad = guest.agent.alloc("thp", 2);
        // What is cached of files would make room.
        let _ = std::fs::write(cgroup.path().join("memory.reclaim"), "256M");
        let current = std::fs::read_to_string(cgroup.path().join("memory.current")).unwrap();
        let current: u64 = current.trim().parse().unwrap();
        std::fs::write(&limit, (current + (1 << 20)).to_string()).unwrap();
        for (page, is_rescued) in bad.iter().zip([true, second_is_rescued]) {
            guest.poison(page.gpa, "hwpoison-inject");
            let seen = guest.event("seen", *page);
            assert_eq!(seen["pages"], if is_rescued { 1 } else { 512 }, "{rescue:?}");
        }
        if !second_is_rescued {
            let why = guest.event_where("not-rescued", "no memory", |_| true);
            assert_eq!(why["reason"], "no-memory", "{why}");
            println!("    {why}");
        }
        // What is told now, 512 pages of it, takes memory of its own.
        std::fs::write(&limit, "max").unwrap();
        settled(&guest);
        guest.power_off();
    }
    lab::set_pool("2048kB", 0);
}

/// How many frames go bad in [`many`].
const MANY: usize = 100;

/// Random frames of a guest that works and touches them: what its kernel names is what the ledger has, and no page is lost
/// that the host could still read.
pub fn many() {
    let seed = 0x5eed_2bad;
    let (mut guest, pages) = guest(in_huge_pages(), 4);
    let mut order: Vec<Page> = pages.clone();
    let mut state: u64 = seed;
    for at in (1..order.len()).rev() {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        order.swap(at, usize::try_from(state >> 33).unwrap() % (at + 1));
    }
    let bad = &order[..MANY];
    let start = Instant::now();
    let vm = guest.info();
    for (page, around) in bad.iter().zip(&order[MANY..]) {
        // While its huge page is being rescued it has no frame.
        while !lab::is_resident(vm.pid, hva(&vm, page.gpa)) {
            assert!(start.elapsed() < Duration::from_secs(120), "{}", guest.status());
            std::thread::sleep(Duration::from_millis(1));
        }
        corrupt(lab::host_physical(vm.pid, hva(&vm, page.gpa)) >> 12);
        // The guest's program reads what is good of it, and all else.
        let reply = guest.agent.touch(*around, "read");
        assert!(reply["sigbus"].is_null(), "{reply}");
    }
    let ledger = settled(&guest);
    let (named, account) = named_all(&mut guest, MANY);
    println!(
        "    {MANY} frames, seed {seed:#x}, in {:.1} s: {account}",
        start.elapsed().as_secs_f64()
    );
    same_pages(bad, &named, &ledger);
    guest.agent.others_intact(&pages, bad);
    let all = guest.status()["rescued"].as_array().map_or(0, Vec::len);
    let huge: BTreeSet<u64> = bad.iter().map(|page| page.gpa / HUGE).collect();
    assert_eq!(all, huge.len(), "each huge page once");
    guest.power_off();
    lab::set_pool("2048kB", 0);
}
