//! The firmware-first channel: AOs told at once, to any guest, without a machine check; what happens
//! with guests that do not take part; and pages that are taken out of use before they fail.

use std::time::{Duration, Instant};

use mce_relay_tests::agent::{PATIENCE, Page, hex};
use mce_relay_tests::burst::bursts;
use mce_relay_tests::guest::{Guest, Options};
use mce_relay_vmm::machine::boot::layout::FIRMWARE_START;
use serde_json::Value;

/// Where the status block begins (`BLOCK_OFFSET` in `relay/src/relay/error_source.rs`).
const BLOCK: u64 = FIRMWARE_START + 64;
/// How long a guest may take to take a record or, once it is up, the source (`PATIENCE` there).
const TEN_SECONDS: Duration = Duration::from_secs(10);

/// Poisons a page that nobody touches, and sees the guest's kernel name it and tell its owner; how
/// long that took, and what the relay says it injected.
fn one_ao(guest: &mut Guest, page: Page) -> (f64, Value) {
    let clock = guest.agent.clock();
    let start = Instant::now();
    guest.poison_many(&[page.gpa]);
    let line = guest.agent.memory_failure(page);
    println!("    guest: {line}");
    guest.agent.sigbus_ao(page);
    let last = guest.agent.failures_count()["last"].as_f64().unwrap();
    let took = clock.seconds(start, last);
    println!("    {took:.3} s after the host poisoned the page, give or take {:?}", clock.error);
    let injected = guest.event("injected", page);
    assert_eq!(acknowledged(guest, page)["gpa"], format!("{:#x}", page.gpa));
    (took, injected)
}

/// Waits until `page` is acknowledged; its entry in the ledger.
fn acknowledged(guest: &Guest, page: Page) -> Value {
    let start = Instant::now();
    loop {
        let entry = guest.ledger(page);
        match entry {
            Some(entry) if entry["state"] == "acknowledged" => return entry,
            entry if start.elapsed() > PATIENCE => panic!("not acknowledged: {entry:?}"),
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// A page goes bad: the guest's own decoder prints the record, its kernel isolates the page and tells
/// the owner, and everything else goes on.
fn told(options: &Options) {
    let mut guest = Guest::boot(options);
    let pages = guest.agent.alloc("anon", 8);
    for (record, bad) in [pages[3], pages[5]].into_iter().enumerate() {
        let (_, injected) = one_ao(&mut guest, bad);
        assert_eq!((&injected["channel"], &injected["pages"]), (&"ghes".into(), &1.into()));
        assert_eq!(injected["record"], record + 1);
        let decoded = format!("physical_address: {:#018x}", bad.gpa);
        let found = guest.agent.ask(&format!("dmesg {decoded}"));
        assert_eq!(found["count"], 1, "{found}");
        println!("    guest: {}", found["lines"][0]);
    }
    // A severity that Linux would not act on, or more than one, would have shown here.
    assert_eq!(guest.agent.ask("dmesg event severity: recoverable")["count"], 2);
    assert_eq!(guest.pages().len(), 2, "two bad pages, no more");
    guest.agent.others_intact(&pages, &[pages[3], pages[5]]);
    guest.power_off();
}

pub fn amd_one_vcpu() {
    // As by default.
    told(&Options { ao_channel: "auto", ..Options::amd(1) });
}

pub fn amd_two_vcpus() {
    told(&Options { ao_channel: "auto", ..Options::amd(2) });
}

pub fn intel_one_vcpu() {
    told(&Options::intel(1, true).ghes());
}

pub fn intel_two_vcpus() {
    told(&Options::intel(2, false).ghes());
}

pub fn a_guest_that_polls() {
    told(&Options { ghes_poll: Some("100"), ..Options::intel(2, false).ghes() });
}

/// Intel-style guests are told at once by machine check, too, and so they are by default.
pub fn auto_is_the_machine_check_for_intel() {
    let mut guest = Guest::boot(&Options { ao_channel: "auto", ..Options::intel(1, true) });
    let page = guest.agent.alloc("anon", 1)[0];
    let (_, injected) = one_ao(&mut guest, page);
    assert_eq!((&injected["channel"], &injected["form"]), (&"mce".into(), &"SRAO".into()));
    guest.power_off();
}

pub fn burst_amd() {
    bursts(Options::amd(2).ghes(), &[8, 64]);
}

pub fn burst_intel() {
    bursts(Options::intel(2, true).ghes(), &[8, 64]);
}

/// An AO and, before the guest is told of it, the touch of the same page and an AO elsewhere: the
/// machine check for the touch and the record for the other go their own ways.
pub fn a_touch_is_a_machine_check() {
    let mut guest = Guest::boot(&Options::amd(2).ghes());
    let pages = guest.agent.alloc("anon", 3);
    one_ao(&mut guest, pages[0]);
    guest.agent.ask("early off");
    // Nobody has been told of it when it is touched: late kill within the guest, and the same moment.
    guest.poison(pages[1].gpa, "hwpoison-inject");
    let reply = guest.agent.touch(pages[1], "read");
    assert_eq!(reply["sigbus"]["code"], "AR", "{reply}");
    guest.poison(pages[2].gpa, "hwpoison-inject");
    guest.agent.memory_failure(pages[2]);
    for page in pages {
        acknowledged(&guest, page);
    }
    guest.power_off();
}

/// A guest that does not take the source into use: told by machine check, after it has had its time.
fn not_taken(options: &Options) {
    let mut guest = Guest::boot(options);
    guest.agent.ask("interval 1");
    let pages = guest.agent.alloc("anon", 4);
    for bad in [pages[0], pages[2]] {
        let (took, injected) = one_ao(&mut guest, bad);
        assert_eq!(injected["channel"], "mce", "{injected}");
        let told: Vec<Value> = guest.events();
        let why = told.iter().find(|event| {
            event["event"] == "waiting" && event["properties"]["wait"]["why"] == "no-source"
        });
        assert!(why.is_some(), "it says why: {told:#?}");
        // It was up when the first page went bad, as far as could be seen, and is so since.
        let limit = if bad == pages[0] { 3 * TEN_SECONDS } else { TEN_SECONDS };
        assert!(took < limit.as_secs_f64(), "{took} s");
    }
    assert_eq!(guest.pages().len(), 2);
    guest.agent.others_intact(&pages, &[pages[0], pages[2]]);
    assert_eq!(guest.memory(BLOCK).read(4), [0; 4], "nothing was put where nobody looks");
    // Not by the guest: without ACPI it cannot.
    guest.put("vm.shutdown");
    assert_eq!(guest.ended().code(), Some(0));
}

pub fn a_guest_without_the_driver_amd() {
    not_taken(&Options { cmdline: "ghes.disable=1", ..Options::amd(2).ghes() });
}

pub fn a_guest_without_the_driver_intel() {
    not_taken(&Options { cmdline: "ghes.disable=1", ..Options::intel(2, true).ghes() });
}

/// Without ACPI the guest finds one processor.
pub fn a_guest_without_acpi() {
    not_taken(&Options { cmdline: "acpi=off", ..Options::amd(1).ghes() });
}

/// A guest whose memory map does not have the page: it is told by record or by machine check, once.
pub fn a_guest_without_the_reserved_page() {
    let cmdline = "memmap=exactmap memmap=640K@0 memmap=255M@1M";
    let mut guest = Guest::boot(&Options { cmdline, ..Options::amd(2).ghes() });
    guest.agent.ask("interval 1");
    let pages = guest.agent.alloc("anon", 4);
    let (_, injected) = one_ao(&mut guest, pages[1]);
    println!("    by {}", injected["channel"]);
    assert_eq!(guest.agent.failures_count()["pfns"], 1);
    guest.agent.others_intact(&pages, &[pages[1]]);
    guest.power_off();
}

/// The block is written to by somebody who is not the driver, here from outside. The source is polled,
/// so that nobody can see that the guest does not use it, and records are put there.
fn unattended() -> Guest {
    let options = Options {
        cmdline: "ghes.disable=1",
        ghes_poll: Some("1000"),
        ..Options::intel(2, false).ghes()
    };
    Guest::boot(&options)
}

/// A guest that never takes a record is told by machine check, and not tried again for a while.
pub fn a_record_that_is_never_taken() {
    let mut guest = unattended();
    let pages = guest.agent.alloc("anon", 4);
    let (took, injected) = one_ao(&mut guest, pages[0]);
    // The first to say so was the record; the machine check came after.
    assert_eq!(injected["channel"], "ghes");
    assert!(took > TEN_SECONDS.as_secs_f64(), "{took} s");
    assert_eq!(acknowledged(&guest, pages[0])["channel"], "mce");
    assert_eq!(guest.memory(BLOCK).read(4), [0; 4], "it was withdrawn");
    let (took, injected) = one_ao(&mut guest, pages[1]);
    assert_eq!(injected["channel"], "mce");
    assert!(took < TEN_SECONDS.as_secs_f64(), "{took} s");
    let failures = guest.agent.failures_count();
    assert_eq!(failures["pfns"], 2, "{failures}");
    guest.agent.others_intact(&pages, &pages[..2]);
    guest.power_off();
}

/// Zeroed early is all that can be known of being taken; scribbled over is not.
pub fn a_block_that_is_scribbled_over() {
    let mut guest = unattended();
    let pages = guest.agent.alloc("anon", 4);
    guest.poison(pages[0].gpa, "hwpoison-inject");
    assert_eq!(guest.event("injected", pages[0])["channel"], "ghes");
    guest.memory(BLOCK).write(&[0; 4]);
    let entry = acknowledged(&guest, pages[0]);
    assert_eq!((&entry["channel"], &entry["record"]), (&"ghes".into(), &1.into()));

    guest.poison(pages[1].gpa, "hwpoison-inject");
    guest.event("injected", pages[1]);
    guest.memory(BLOCK).write(&[0xa5; 64]);
    guest.agent.memory_failure(pages[1]);
    assert_eq!(acknowledged(&guest, pages[1])["channel"], "mce");
    guest.event_where("waiting", "the scribbling", |p| p["wait"]["why"] == "overwritten");
    assert_eq!(guest.memory(BLOCK).read(4), [0; 4], "emptied for the next record");

    guest.agent.ask("ping");
    guest.agent.others_intact(&pages, &pages[..2]);
    guest.power_off();
}

/// The page that the block lies in goes bad itself: nothing is lost, and nobody dies of it.
pub fn the_blocks_own_page_goes_bad() {
    let mut guest = Guest::boot(&Options::amd(2).ghes());
    guest.agent.ask("interval 1");
    let pages = guest.agent.alloc("anon", 4);
    one_ao(&mut guest, pages[0]);
    let block = Page { number: u64::MAX, gpa: FIRMWARE_START };
    guest.poison(block.gpa, "hwpoison-inject");
    println!("    guest: {}", guest.agent.memory_failure(block));
    let (_, injected) = one_ao(&mut guest, pages[1]);
    assert_eq!(injected["channel"], "mce");
    let entry = acknowledged(&guest, block);
    assert_eq!(entry["channel"], "mce", "{entry}");
    guest.agent.others_intact(&pages, &pages[..2]);
    guest.power_off();
}

/// The guest starts over: the new boot finds an empty block, and is told of what goes bad then.
pub fn reboot() {
    let mut guest = Guest::boot(&Options { reboot: true, ..Options::amd(2).ghes() });
    let page = guest.agent.alloc("anon", 1)[0];
    one_ao(&mut guest, page);
    // Guests leave what they were told behind the status word.
    assert!(guest.memory(BLOCK + 4).read(64).iter().any(|byte| *byte != 0));
    guest.agent.ask("reboot");
    guest.event_where("booting", "the second boot", |boot| boot["boot"] == 2);
    guest.up_again();
    assert_eq!(guest.memory(BLOCK).read(256), [0; 256]);
    assert!(guest.pages().is_empty(), "with other memory");
    let page = guest.agent.alloc("anon", 1)[0];
    let (_, injected) = one_ao(&mut guest, page);
    assert_eq!((&injected["channel"], &injected["record"]), (&"ghes".into(), &1.into()));
    guest.power_off();
}

/// A page that is predicted to fail: the guest's program goes on with the same contents in another
/// place, and is not signalled.
fn retire(options: &Options) {
    let mut guest = Guest::boot(options);
    let pages = guest.agent.alloc("anon", 24);
    let old: Vec<u64> = pages[2..20].iter().map(|page| page.gpa).collect();
    let list: Vec<String> = old.iter().map(|gpa| format!("{gpa:#x}")).collect();
    let before = guest.agent.ask("meminfo")["hardware_corrupted_kb"].as_u64().unwrap();
    let out = guest.command("retire", &["--gpa", &list.join(","), "--json"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let told: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(told.as_array().unwrap().iter().all(|page| page["told"] == true), "{told}");

    let moved = |guest: &mut Guest| {
        let gpa = |page: &Page| hex(&guest.agent.ask(&format!("gpa {}", page.number))["gpa"]);
        pages[2..20].iter().map(gpa).zip(&old).filter(|(now, old)| now != *old).count()
    };
    let start = Instant::now();
    while moved(&mut guest) < old.len() {
        assert!(start.elapsed() < PATIENCE, "{} of {} have moved", moved(&mut guest), old.len());
        std::thread::sleep(Duration::from_millis(200));
    }
    let after = guest.agent.ask("meminfo")["hardware_corrupted_kb"].as_u64().unwrap();
    assert_eq!(after - before, 4 * old.len() as u64, "KiB out of use in the guest");
    // All of them, with what was in them.
    guest.agent.others_intact(&pages, &[]);
    assert_eq!(guest.agent.ask("sigbus")["ao"], 0, "nobody was signalled");
    assert!(guest.pages().is_empty(), "no page is bad");
    let status = guest.status();
    let predicted = status["predicted"].as_array().unwrap();
    assert_eq!(predicted.len(), old.len());
    assert!(predicted.iter().all(|page| page["state"] == "acknowledged"), "{predicted:?}");

    // What is whole can be retired, and nothing else.
    guest.agent.ask("interval 1");
    guest.poison(pages[0].gpa, "hwpoison-inject");
    guest.agent.memory_failure(pages[0]);
    for (gpa, words) in [(pages[0].gpa, "in the ledger already"), (0xc000_0000, "not guest RAM")] {
        let out = guest.command("retire", &["--gpa", &format!("{gpa:#x}")]);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && said.contains(words), "{said}");
    }
    guest.power_off();
}

pub fn retire_amd() {
    retire(&Options::amd(2).ghes());
}

/// By default Intel-style guests have their AOs by machine check; the source is there all the same.
pub fn retire_intel() {
    retire(&Options { ao_channel: "auto", ..Options::intel(1, true) });
}

/// A guest that cannot be told says so, and keeps its page.
pub fn retire_without_the_driver() {
    for (options, words) in [
        (Options { cmdline: "ghes.disable=1", ..Options::amd(1).ghes() }, "not taken the ACPI"),
        (Options::amd(1), "no ACPI error source"),
    ] {
        let mut guest = Guest::boot(&options);
        let pages = guest.agent.alloc("anon", 2);
        let out = guest.command("retire", &["--gpa", &format!("{:#x}", pages[0].gpa)]);
        let said = String::from_utf8_lossy(&out.stderr);
        println!("    {}", said.trim_end());
        assert_eq!(out.status.code(), Some(1));
        assert!(said.contains(words), "{said}");
        guest.agent.others_intact(&pages, &[]);
        guest.power_off();
    }
}
