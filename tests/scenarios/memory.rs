//! Each kind of guest RAM: a page goes bad that nobody touches (AO), one that the guest touches (AR), and
//! when the guest starts over both are good memory again. tests/soak has more kinds.

use std::collections::BTreeSet;
use std::path::PathBuf;

use mce_relay_tests::agent::{Page, hex};
use mce_relay_tests::burst::{named_all, settled};
use mce_relay_tests::guest::{Guest, Options, hva};
use mce_relay_tests::memory::{HUGE, RAM, heals, of_the_agent, options, touched, whole_again};
use mce_relay_tests::{judges, lab};
use object::LittleEndian as LE;
use object::elf::{FileHeader64, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use serde_json::Value;

/// Sees to `free` free pages of 2 MiB in the host's pool.
fn pool(free: u64) {
    lab::set_pool("2048kB", free);
}

pub fn anonymous() {
    heals("size=256M,thp=off", 4096);
}

/// The host joins pages to huge ones; when one goes bad it splits them, and 4 KiB are lost.
pub fn thp() {
    let before = lab::meminfo("HardwareCorrupted");
    let mut guest = Guest::boot(&options("size=256M,thp=on"));
    let pages = guest.agent.alloc_many("anon", 64);
    let huge = lab::smaps(guest.pid(), "AnonHugePages");
    assert!(huge > RAM / 8 / 1024, "only {huge} kB of guest RAM are in transparent huge pages");
    let bad = pages[10];
    guest.poison(bad.gpa, "hwpoison-inject");
    assert_eq!(guest.event("seen", bad)["extent"], 4096);
    guest.agent.sigbus_ao(bad);
    settled(&guest);
    touched(&mut guest, pages[20]);
    settled(&guest);
    assert_eq!(guest.pages().len(), 2, "two pages of 4 KiB");
    assert_eq!(lab::meminfo("HardwareCorrupted") - before, 8, "kB, on the host as well");
    guest.agent.others_intact(&pages, &[bad, pages[20]]);
    whole_again(&mut guest, 2, &BTreeSet::from([bad.gpa, pages[20].gpa]));
    guest.power_off();
}

pub fn hugetlb() {
    pool(RAM / HUGE + 4);
    heals("size=256M,hugepages=on", HUGE);
    pool(0);
}

/// KVM's own file: the guest's touch of a bad page is no signal but the end of KVM_RUN. The page of the AO is signalled, as
/// the VMM has all of it mapped.
pub fn guest_memfd() {
    heals("size=256M,guest_memfd=on", 4096);
}

pub fn file() {
    let path = "/tmp/mce-relay-ram";
    std::fs::File::create(path).unwrap().set_len(RAM).unwrap();
    heals("size=256M,file=/tmp/mce-relay-ram,shared=on", 4096);
    std::fs::remove_file(path).unwrap();
}

/// The host's pool has no other huge page: the guest comes up without the stretch that went bad, and is
/// told so by its memory map.
pub fn a_huge_page_that_cannot_be_replaced() {
    pool(RAM / HUGE);
    let mut guest =
        Guest::boot(&Options { rescue: Some("off"), ..options("size=256M,hugepages=on") });
    let bad = of_the_agent(&mut guest, HUGE)[3];
    guest.poison(bad.gpa, "hwpoison-inject");
    settled(&guest);
    guest.agent.tell("reboot");
    guest.event_where("booting", "the second boot", |boot| boot["boot"] == 2);
    guest.up_again();
    let start = bad.gpa / HUGE * HUGE;
    let removed = guest.event_where("removed", "the huge page", |_| true);
    assert_eq!((hex(&removed["gpa"]), &removed["len"]), (start, &HUGE.into()));
    let pages = guest.pages();
    assert_eq!(pages.len(), 512);
    assert!(pages.iter().all(|page| page["state"] == "removed"), "{}", pages[0]);
    let map = guest.agent.ask("dmesg BIOS-e820");
    let line = format!("[mem {start:#018x}-{:#018x}] reserved", start + HUGE - 1);
    let lines = map["lines"].as_array().unwrap();
    assert!(lines.iter().any(|l| l.as_str().unwrap().contains(&line)), "{line}: {map}");
    let pages = guest.agent.alloc("anon", 64);
    guest.agent.others_intact(&pages, &[]);
    guest.power_off();
    pool(0);
}

/// A guest of two zones with 100 bad pages, paused; its good pages, and the bad ones.
fn with_bad_pages() -> (Guest, Vec<Page>, Vec<Page>) {
    // At a pace that it keeps up with beside other work of this machine: its kernel has to have named each.
    let zones = &["size=128M", "size=128M,shared=on"];
    let mut guest = Guest::boot(&Options { zones, pace: None, ..options("") });
    let pages = guest.agent.alloc_many("anon", 4000);
    let bad: Vec<Page> = pages.iter().step_by(40).copied().collect();
    assert_eq!(bad.len(), 100);
    guest.poison_many(&bad.iter().map(|page| page.gpa).collect::<Vec<_>>());
    settled(&guest);
    named_all(&mut guest, bad.len());
    guest.put("vm.pause");
    (guest, pages, bad)
}

/// Dumps its memory to a file; the file, and what the command printed.
fn dumped(guest: &Guest, args: &[&str]) -> (PathBuf, String) {
    let file = guest.path("dump");
    let out = guest.command("memory dump", &[args, &[file.to_str().unwrap()]].concat());
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let words = String::from_utf8_lossy(&out.stdout).trim().to_owned();
    println!("    {words}");
    assert!(out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
    (file, words)
}

/// Bad pages are absent from a core, exactly; all others are as they are in the guest; and crash, drgn and
/// makedumpfile read it.
pub fn core() {
    let (mut guest, pages, bad) = with_bad_pages();
    let (file, said) = dumped(&guest, &[]);
    assert!(said.contains("100 poisoned pages are absent"), "{said}");

    let bytes = std::fs::read(&file).unwrap();
    let header = FileHeader64::<LE>::parse(&*bytes).unwrap();
    let (vm, mut absent) = (guest.info(), (0..RAM).step_by(4096).collect::<BTreeSet<u64>>());
    let memory = lab::Memory::of(vm.pid);
    for load in header.program_headers(LE, &*bytes).unwrap() {
        if load.p_type(LE) != PT_LOAD {
            continue;
        }
        let data = load.data(LE, &*bytes).unwrap().chunks_exact(4096);
        for (gpa, page) in (load.p_paddr(LE)..).step_by(4096).zip(data) {
            assert!(absent.remove(&gpa), "{gpa:#x} is there twice, or is no RAM");
            assert!(memory.page(hva(&vm, gpa)) == page, "{gpa:#x} differs");
        }
    }
    assert_eq!(absent, bad.iter().map(|page| page.gpa).collect(), "what is bad is absent");

    // What the guest's kernel said last, and of the last of them.
    let last = format!("Memory failure: {:#x}: ", bad[99].gpa >> 12);
    let release = said.split_once("its kernel: Linux ").unwrap().1.split(',').next().unwrap();
    let version = format!("Linux version {release} ");
    let mut logs = Vec::new();
    for (judge, log) in [
        ("drgn", judges::drgn(&file)),
        ("makedumpfile", judges::makedumpfile(&file, &guest.path("dmesg"))),
    ] {
        let Some(log) = log else { continue };
        let first = log.lines().next().unwrap_or_default();
        assert!(first.contains(&version), "{judge}: {log}");
        assert!(log.contains(&last), "{judge}: {last:?} is not in it: {log}");
        println!("    {judge} reads {} lines of the guest's log: {first}", log.lines().count());
        logs.push(log);
    }
    assert!(logs.windows(2).all(|two| two[0].trim_end() == two[1].trim_end()), "they agree");
    if let Some(found) = judges::crash(&file) {
        assert_eq!(found, release);
        println!("    crash takes it for a kernel's: {found}");
    }
    guest.put("vm.resume");
    guest.agent.others_intact(&pages, &bad);
    guest.power_off();
}

/// The VMM reads around each of 100 bad pages, and a raw image has holes there, exactly.
pub fn dump() {
    let (mut guest, pages, bad) = with_bad_pages();
    let (file, _) = dumped(&guest, &["--raw"]);
    let list: Value =
        serde_json::from_slice(&std::fs::read(guest.path("dump.json")).unwrap()).unwrap();
    let holes: BTreeSet<u64> = list["poisoned"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|run| {
            let (start, len) = (hex(&run["gpa"]), run["len"].as_u64().unwrap());
            (start..start + len).step_by(4096)
        })
        .collect();
    assert_eq!(holes, bad.iter().map(|page| page.gpa).collect(), "the holes are the bad pages");
    assert_eq!(list["paused"], true);

    let dumped = std::fs::read(&file).unwrap();
    assert_eq!(dumped.len() as u64, RAM);
    let (vm, mut compared) = (guest.info(), 0);
    let memory = lab::Memory::of(vm.pid);
    for (gpa, page) in (0..RAM).step_by(4096).zip(dumped.chunks_exact(4096)) {
        match holes.contains(&gpa) {
            true => assert_eq!(page, [0; 4096], "{gpa:#x}"),
            false => {
                assert!(memory.page(hva(&vm, gpa)) == page, "{gpa:#x} differs");
                compared += 1;
            }
        }
    }
    println!("    {compared} pages are as they are in the guest, {} are holes", holes.len());
    // What is bad, or zeros, takes no room; the lab's file systems keep holes page by page.
    let image = std::fs::File::open(&file).unwrap();
    for (gpa, page) in (0..RAM).step_by(4096).zip(dumped.chunks_exact(4096)) {
        assert_eq!(lab::is_hole(&image, gpa), page == [0; 4096], "whether {gpa:#x} is a hole");
    }

    // One of them by hand.
    let gpa = format!("{:#x}", bad[0].gpa);
    let out = guest.command("memory read", &["--gpa", &gpa, "--len", "16"]);
    assert_eq!(out.status.code(), Some(1));
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(error.contains(&format!("poisoned at GPA {gpa}")), "{error}");
    guest.put("vm.resume");
    guest.agent.others_intact(&pages, &bad);
    guest.power_off();
}

/// The VMM meets a bad page that nobody has told it of: an error, an entry in the ledger, and the guest
/// learns of it.
pub fn the_vmms_own_touch() {
    let mut guest = Guest::boot(&Options { kill: "late", ..options("size=256M,shared=on") });
    let pages = guest.agent.alloc("anon", 8);
    let bad = pages[3];
    guest.poison(bad.gpa, "hwpoison-inject");
    let gpa = format!("{:#x}", bad.gpa - 4096 + 4000);
    let out = guest.command("memory read", &["--gpa", &gpa, "--len", "200"]);
    assert_eq!(out.status.code(), Some(1));
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(error.contains(&format!("poisoned at GPA {:#x}", bad.gpa)), "{error}");
    let seen = guest.event("seen", bad);
    assert_eq!((&seen["found_by"], &seen["kind"]), (&"access".into(), &"AO".into()));
    guest.event("acknowledged", bad);
    guest.agent.sigbus_ao(bad);
    guest.agent.others_intact(&pages, &[bad]);
    guest.power_off();
}

/// Errors that come while the VM is paused wait, and are told when it goes on.
pub fn while_paused() {
    let mut guest = Guest::boot(&Options::intel(2, false).quiet());
    let pages = guest.agent.alloc_many("anon", 8);
    guest.put("vm.pause");
    let bad = [pages[1], pages[4], pages[6]];
    guest.poison_many(&bad.map(|page| page.gpa));
    assert_eq!(guest.known(3).len(), 3, "taken while it is paused");
    std::thread::sleep(std::time::Duration::from_secs(2));
    let told = |event: &Value| event["event"] == "injected" || event["event"] == "acknowledged";
    let early: Vec<Value> = guest.events().into_iter().filter(told).collect();
    assert!(early.is_empty(), "told while it is paused: {early:#?}");
    guest.put("vm.resume");
    settled(&guest);
    let (named, _) = named_all(&mut guest, 3);
    assert_eq!(named, bad.iter().map(|page| page.gpa >> 12).collect());
    guest.agent.others_intact(&pages, &bad);
    guest.power_off();
}
