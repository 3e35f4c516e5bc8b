//! Pages that the kernel really takes for bad: the component without KVM and without a guest, on any architecture. Each test
//! costs the machine a page or a few until it boots again, so that they run where it is meant for that (`make arm`).
#![cfg(all(feature = "internals", feature = "vm-memory"))]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    reason = "a test; and it does not use all of `guarded`"
)]
#![allow(clippy::cast_possible_truncation, reason = "a test")]

mod guarded;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

use guarded::{
    GPA, Memory, PAGE, alone, at, devices, guests, hva, relay, shared_at, until, validated,
};
use mce_relay::guard;
use mce_relay::signal::{Signals, set_up};
use mce_relay::watch::Watch;
use mce_relay::{AccessError, FailureKind, FoundBy, PAGE_SHIFT};
use vm_memory::Bytes;

/// Has the kernel find that the frame behind `address` of the process `pid` is bad, as its handler of hardware errors does.
fn poison_of(pid: u32, address: u64) {
    let map = File::open(format!("/proc/{pid}/pagemap")).unwrap();
    let mut entry = [0; 8];
    map.read_exact_at(&mut entry, address / PAGE * 8).unwrap();
    let entry = u64::from_le_bytes(entry);
    assert!(entry >> 63 == 1, "there is no memory at {address:#x}: {entry:#x}");
    let pfn = entry & ((1 << 55) - 1);
    fs::write("/sys/kernel/debug/hwpoison/corrupt-pfn", format!("{pfn:#x}")).unwrap();
}

fn poison(address: u64) {
    poison_of(std::process::id(), address);
}

/// Guest memory that devices have mapped, too. The guest has touched all of it: the frame is looked up there.
fn memory() -> Memory {
    let memory = shared_at(16, 0);
    for page in 0..16 {
        assert_eq!(guests(&memory, page), page + 100);
    }
    memory
}

#[test]
#[ignore = "takes a page from this machine: make arm"]
fn a_page_that_nobody_touches_is_signalled_and_in_the_ledger() {
    let _alone = alone();
    let memory = memory();
    let relay = relay(&memory);
    // Else it may find the page before the signal is taken.
    until("the first look at the page tables", || relay.handle().scans() > 0);
    poison(hva(&memory, 3));
    until("the page is in the ledger", || !relay.pages().is_empty());
    let [page] = &relay.pages()[..] else { panic!("{:?}", relay.pages()) };
    assert_eq!((page.gpa, page.hva, page.lsb), (GPA + 3 * PAGE, hva(&memory, 3), PAGE_SHIFT));
    assert_eq!((page.kind, page.found_by), (FailureKind::ActionOptional, FoundBy::Signal));
    let handle = relay.handle();
    assert!(handle.is_bad(page.gpa..page.gpa + 1) && !handle.is_bad(GPA..page.gpa));
    assert!(memory.read_obj::<u64>(at(3)).is_err());
    assert_eq!(validated(&memory, 2).unwrap(), 102);
    let mut bytes = [0; 8];
    assert!(matches!(handle.read(page.gpa, &mut bytes), Err(AccessError::Poisoned { .. })));
    assert_eq!(handle.read(page.gpa + PAGE, &mut bytes).unwrap(), 8);
    assert_eq!(u64::from_le_bytes(bytes), 104);
}

/// There is no relay here whose marks would be in the way of the access.
#[test]
#[ignore = "takes a page from this machine: make arm"]
fn guarded_accesses_of_a_bad_page_end_as_errors() {
    let _alone = alone();
    set_up(Signals::Install).unwrap();
    let memory = memory();
    let base = hva(&memory, 0);
    poison(base + 3 * PAGE);
    let page = (base + 3 * PAGE) as *mut u64;
    for len in [1, 7, 8, 15, 16, 31, 32, 33, 64, 65, 128, 1000, 3000] {
        let mut to = vec![0xaa; len];
        unsafe {
            assert_eq!(guard::read(page.cast(), &mut to).unwrap_err().done, 0, "{len}");
            assert_eq!(guard::write(page.cast(), &to).unwrap_err().done, 0, "{len}");
            // It begins in the page before.
            let before = page.cast::<u8>().sub(len);
            guard::write(before, &vec![0x5a; len]).unwrap();
            let mut long = vec![0; 2 * len];
            let done = guard::read(before, &mut long).unwrap_err().done;
            assert!(done <= len && long[..done].iter().all(|&byte| byte == 0x5a), "{len}: {done}");
        }
    }
    unsafe {
        guard::load(page).unwrap_err();
        guard::load(page.cast::<u8>()).unwrap_err();
        guard::store(page, 7).unwrap_err();
        guard::store(page.cast::<u16>(), 7).unwrap_err();
        guard::compare_exchange(page, 103, 7).unwrap_err();
        guard::compare_exchange(page.cast::<u32>(), 103, 7).unwrap_err();
        let good = (base + 4 * PAGE) as *mut u64;
        assert_eq!(guard::load(good).unwrap(), 104);
        guard::store(good, 7).unwrap();
        assert_eq!(guard::compare_exchange(good, 8, 9).unwrap(), 7);
        assert_eq!(guard::compare_exchange(good, 7, 9).unwrap(), 7);
        assert_eq!(guard::load(good).unwrap(), 9);
    }
}

#[test]
#[ignore = "takes a page from this machine: make arm"]
fn a_device_that_meets_a_bad_page_lets_nothing_out() {
    let _alone = alone();
    set_up(Signals::Install).unwrap();
    let memory = memory();
    let view = devices(&memory, 5);
    poison(hva(&memory, 5));
    // It has its slice already, and no relay has said a word yet.
    let attempt = guard::Attempt::begin();
    let seen = unsafe { (view as *const u64).read_volatile() };
    assert_eq!(seen, 0, "a scratch page");
    assert!(!attempt.is_clean());
    assert!(guard::is_bad(hva(&memory, 5), 8) && memory.read_obj::<u64>(at(5)).is_err());
    assert_eq!(validated(&memory, 6).unwrap(), 106);
}

#[test]
#[ignore = "takes a page from this machine: make arm"]
fn a_watch_says_what_is_lost_and_a_guarded_read_is_an_error() {
    let _alone = alone();
    let memory = memory();
    let (tx, rx) = channel();
    let watch = Watch::start(Signals::Install, move |lost| tx.send(lost).unwrap_or(())).unwrap();
    watch.add(hva(&memory, 0), 16 * PAGE, PAGE_SHIFT).unwrap();
    poison(hva(&memory, 9));
    let lost = rx.recv_timeout(Duration::from_secs(20)).unwrap();
    assert_eq!((lost.address, lost.extent, lost.range), (hva(&memory, 9), PAGE, hva(&memory, 0)));
    let mut bytes = [0; 8];
    assert!(watch.read(hva(&memory, 9), &mut bytes).is_err());
    assert_eq!(watch.read(hva(&memory, 8), &mut bytes).unwrap(), 8);
}

struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "takes a page from this machine: make arm"]
fn the_cache_of_the_examples_loses_one_entry() {
    let mut program = std::env::current_exe().unwrap();
    program.pop();
    program.pop();
    program.push("examples/cache");
    let run = Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut cache = Program(run.unwrap());
    let mut ask = cache.0.stdin.take().unwrap();
    let out = BufReader::new(cache.0.stdout.take().unwrap());
    let (tx, lines) = channel();
    std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|l| tx.send(l)));
    let wait_for = |start: &str| loop {
        let line = lines.recv_timeout(Duration::from_secs(20)).expect(start);
        if line.starts_with(start) {
            return line;
        }
    };
    wait_for("ready");
    writeln!(ask, "put a first\nput b second\nwhere a").unwrap();
    let line = wait_for("a at 0x");
    poison_of(cache.0.id(), u64::from_str_radix(&line["a at 0x".len()..], 16).unwrap());
    wait_for("lost a: 4096 bytes");
    writeln!(ask, "get a\nget b\nquit").unwrap();
    wait_for("a is not there");
    wait_for("b = second");
    assert_eq!(cache.0.wait().unwrap().code(), Some(0));
}
