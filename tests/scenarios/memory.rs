//! Each kind of guest RAM: a page goes bad that nobody touches (AO), one that the guest touches (AR), and
//! when the guest starts over both are good memory again.

use std::collections::BTreeSet;
use std::time::Instant;

use mce_relay_tests::agent::{Page, hex};
use mce_relay_tests::burst::{named_all, settled};
use mce_relay_tests::guest::{Guest, Options, hva};
use mce_relay_tests::lab;
use serde_json::Value;

const MIB: u64 = 1 << 20;
const HUGE: u64 = 2 * MIB;
/// Guest RAM of every guest here.
const RAM: u64 = 256 * MIB;

/// An AMD guest that is told of AOs at once, and starts again when it resets itself. The pace is that of
/// a guest with a quiet console, so that 512 pages do not take a minute.
fn options(memory: &'static str) -> Options {
    let pace = Some("burst=16,rate=40");
    Options { memory, reboot: true, pace, ..Options::amd(2).ghes().quiet() }
}

/// Pages of the agent that are as large as an extent of the host's, so that nothing of the guest's kernel
/// is lost with them: a guest that loses that is a guest that dies, and rightly so.
fn of_the_agent(guest: &mut Guest, extent: u64) -> Vec<Page> {
    // Each SIGBUS costs the emulated guest its time; the account is in its kernel's log.
    guest.agent.ask("sigbus count");
    guest.agent.ask("early off");
    guest.agent.alloc(if extent == HUGE { "thp" } else { "anon" }, 8)
}

/// Poisons `bad` and has the guest touch it before the relay has heard of it.
fn touched(guest: &mut Guest, bad: Page) {
    let held = lab::hold_thread(guest.pid(), "mce-relay-ao");
    guest.poison(bad.gpa, "hwpoison-inject");
    let reply = guest.agent.touch(bad, "read");
    assert_eq!(reply["sigbus"]["code"], "AR", "{reply}");
    drop(held);
    assert_eq!(guest.event("seen", bad)["kind"], "AR");
}

/// All pages of 4 KiB that are lost with `bad`.
fn lost_with(bad: Page, extent: u64) -> BTreeSet<u64> {
    let start = bad.gpa / extent * extent;
    (start..start + extent).step_by(4096).collect()
}

/// AO and AR on a guest with such memory, in extents of so many bytes; the guest and the pages it lost.
fn poisoned(memory: &'static str, extent: u64) -> (Guest, BTreeSet<u64>) {
    let mut guest = Guest::boot(&options(memory));
    let pages = of_the_agent(&mut guest, extent);
    let ar = pages[6];
    // Somewhere in the middle of what is lost with it.
    let ao = Page { gpa: pages[2].gpa + extent / 8192 * 4096, ..pages[2] };

    let start = Instant::now();
    guest.poison(ao.gpa, "hwpoison-inject");
    let seen = guest.event("seen", ao);
    assert_eq!((&seen["kind"], &seen["extent"]), (&"AO".into(), &extent.into()), "{seen}");
    touched(&mut guest, ar);
    let seen = guest.event("seen", ar);
    assert_eq!(seen["extent"], extent, "KVM_RUN says 4 KiB, the mapping says what it is: {seen}");

    let lost: BTreeSet<u64> =
        lost_with(ao, extent).union(&lost_with(ar, extent)).copied().collect();
    let ledger = settled(&guest);
    let (named, _) = named_all(&mut guest, lost.len());
    let known: BTreeSet<u64> = ledger.iter().map(|page| hex(&page["gpa"])).collect();
    assert_eq!(known, lost, "the ledger has what is gone, and nothing else");
    let named: BTreeSet<u64> = named.into_iter().map(|pfn| pfn << 12).collect();
    assert_eq!(named, lost, "and the guest's own kernel knows of every page");
    println!(
        "    {} pages in {:.1} s, each named by the guest's kernel; it lives",
        lost.len(),
        start.elapsed().as_secs_f64()
    );
    guest.agent.others_intact(&pages, &[ao, ar]);
    (guest, lost)
}

/// Has the guest reboot, and sees that every page of `lost` is good memory now.
fn whole_again(guest: &mut Guest, boot: u64, lost: &BTreeSet<u64>) {
    guest.agent.tell("reboot");
    guest.event_where("booting", "the next boot", |event| event["boot"] == boot);
    guest.up_again();
    let status = guest.status();
    assert_eq!(status["vm"]["boot"], boot);
    assert_eq!(status["pages"].as_array().map(Vec::len), Some(0), "{status}");
    let past: Vec<&Value> = status["past"].as_array().unwrap().iter().collect();
    let healed: BTreeSet<u64> = past.iter().map(|page| hex(&page["gpa"])).collect();
    assert!(healed.is_superset(lost), "the ledger keeps what was");
    assert!(past.iter().all(|page| page["state"] == "healed" && page["times"]["healed"].is_f64()));
    let vm = guest.info();
    for gpa in lost {
        let at = hva(&vm, *gpa);
        lab::write_memory(vm.pid, at + 7, 0xa5);
        assert_eq!(lab::read_memory(vm.pid, at + 7).unwrap(), 0xa5, "{gpa:#x}");
    }
    let events = guest.events();
    let events = events.iter().filter(|event| event["event"] == "healed");
    let told: BTreeSet<u64> = events.map(|event| hex(&event["properties"]["gpa"])).collect();
    assert!(told.is_superset(lost), "each healing is an event");
    let pages = guest.agent.alloc("anon", 8);
    guest.agent.others_intact(&pages, &[]);
}

fn heals(memory: &'static str, extent: u64) {
    let (mut guest, lost) = poisoned(memory, extent);
    whole_again(&mut guest, 2, &lost);
    guest.power_off();
}

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
    touched(&mut guest, pages[20]);
    settled(&guest);
    assert_eq!(guest.pages().len(), 2, "two pages of 4 KiB");
    assert_eq!(lab::meminfo("HardwareCorrupted") - before, 8, "kB, on the host as well");
    guest.agent.others_intact(&pages, &[bad, pages[20]]);
    whole_again(&mut guest, 2, &BTreeSet::from([bad.gpa, pages[20].gpa]));
    guest.power_off();
}

pub fn shared() {
    heals("size=256M,shared=on", 4096);
}

pub fn hugetlb() {
    pool(RAM / HUGE + 4);
    heals("size=256M,hugepages=on", HUGE);
    pool(0);
}

pub fn hugetlb_shared() {
    pool(RAM / HUGE + 4);
    heals("size=256M,hugepages=on,hugepage_size=2M,shared=on", HUGE);
    pool(0);
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
    let mut guest = Guest::boot(&options("size=256M,hugepages=on"));
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

/// 100 bad pages in guest RAM of two zones: the VMM reads around each of them, and the dump has holes there,
/// exactly.
pub fn dump() {
    let mut guest =
        Guest::boot(&Options { zones: &["size=128M", "size=128M,shared=on"], ..options("") });
    let pages = guest.agent.alloc_many("anon", 4000);
    let bad: Vec<Page> = pages.iter().step_by(40).copied().collect();
    assert_eq!(bad.len(), 100);
    guest.poison_many(&bad.iter().map(|page| page.gpa).collect::<Vec<_>>());
    settled(&guest);
    guest.put("vm.pause");
    let file = guest.path("dump");
    let out = guest.command("memory dump", &[file.to_str().unwrap()]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    println!("    {}", String::from_utf8_lossy(&out.stdout).trim());
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

    let dumped = std::fs::File::open(&file).unwrap();
    assert_eq!(dumped.metadata().unwrap().len(), RAM);
    let (mut compared, mut page) = (0, [0; 4096]);
    for gpa in (0..RAM).step_by(4096) {
        std::os::unix::fs::FileExt::read_exact_at(&dumped, &mut page, gpa).unwrap();
        match holes.contains(&gpa) {
            true => assert_eq!(page, [0; 4096], "{gpa:#x}"),
            false => {
                assert!(guest.memory(gpa).read(4096) == page, "{gpa:#x} differs");
                compared += 1;
            }
        }
    }
    println!("    {compared} pages are as they are in the guest, {} are holes", holes.len());

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
    for options in [Options::intel(2, false).quiet(), options("size=256M,shared=on")] {
        let mut guest = Guest::boot(&options);
        let pages = guest.agent.alloc_many("anon", 8);
        guest.put("vm.pause");
        let bad = [pages[1], pages[4], pages[6]];
        guest.poison_many(&bad.map(|page| page.gpa));
        assert_eq!(guest.known(3).len(), 3, "taken while it is paused");
        std::thread::sleep(std::time::Duration::from_secs(2));
        assert!(guest.events().iter().all(|event| event["event"] != "acknowledged"));
        guest.put("vm.resume");
        settled(&guest);
        let (named, _) = named_all(&mut guest, 3);
        assert_eq!(named, bad.iter().map(|page| page.gpa >> 12).collect());
        guest.agent.others_intact(&pages, &bad);
        guest.power_off();
    }
}
