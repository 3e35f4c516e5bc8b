//! What `mce-relay poison` does not hit: pages of this host that are not the VM's own memory, by any means that
//! poisons page frames; and what it says will go, before it goes.

use std::process::Output;
use std::time::{Duration, Instant};

use mce_relay_tests::agent::{PATIENCE, hex};
use mce_relay_tests::guest::{Guest, MIDDLE, Options, Vmm, hva};
use mce_relay_tests::lab;
use mce_relay_tests::memory::{HUGE, RAM, of_the_agent, options};
use mce_relay_vmm::host::flags::{HWPOISON, THP, ZERO_PAGE};
use mce_relay_vmm::host::page_frames::{PageCounts, PageFlags};
use serde_json::Value;

/// Those that poison the host's page frames.
const OF_FRAMES: [&str; 4] = ["hwpoison-inject", "madvise", "soft-offline", "mce-inject"];

fn words(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn json(out: &Output) -> Value {
    assert!(out.status.success(), "{}", words(out));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// Runs `mce-relay poison --gpa …` with `more`.
fn poison(guest: &Vmm, gpa: u64, more: &[&str]) -> Output {
    guest.command("poison", &[&["--gpa", &format!("{gpa:#x}")], more].concat())
}

/// The page frame behind `gpa` and its flags.
fn frame(guest: &Vmm, gpa: u64) -> (u64, u64) {
    let pfn = lab::host_physical(guest.pid(), hva(&guest.info(), gpa)) >> 12;
    (pfn, PageFlags::open().unwrap().get(pfn).unwrap())
}

/// Sees that the page at `gpa`, which is not the VM's own, is hit by no means that poisons page frames, and that
/// `named` is said to be why.
fn is_refused(guest: &Vmm, gpa: u64, named: &str) {
    let (pfn, flags) = frame(guest, gpa);
    let before = lab::meminfo("HardwareCorrupted");
    for via in OF_FRAMES {
        for more in [&["--via", via, "--dry-run"][..], &["--via", via]] {
            let out = poison(guest, gpa, more);
            let said = words(&out);
            assert_eq!(out.status.code(), Some(1), "{more:?}: {said}");
            assert!(
                said.contains(named) && said.contains(&format!("{pfn:#x}")),
                "{more:?}: {said}"
            );
            assert!(out.stdout.is_empty(), "{more:?}: {}", String::from_utf8_lossy(&out.stdout));
        }
    }
    println!("    {}", words(&poison(guest, gpa, &["--via", OF_FRAMES[0]])).trim_end());
    // It is what it was, and no page of this host has gone bad.
    let now = PageFlags::open().unwrap().get(pfn).unwrap();
    assert_eq!((now & HWPOISON, now & ZERO_PAGE), (0, flags & ZERO_PAGE), "{pfn:#x}");
    assert_eq!(lab::meminfo("HardwareCorrupted"), before, "kB");
}

/// Sees that of pages at random there is none whose frame is `wrong`: of neither those of the means that poison page
/// frames nor the others.
fn is_not_drawn(guest: &Vmm, wrong: impl Fn(u64) -> bool) {
    for (seed, via) in [("1", "hwpoison-inject"), ("2", "madvise"), ("3", "uffd")] {
        let random = ["--random", "50", "--seed", seed, "--via", via, "--dry-run", "--json"];
        let drawn = json(&guest.command("poison", &random));
        let frames: Vec<u64> =
            drawn.as_array().unwrap().iter().map(|page| hex(&page["pfn"])).collect();
        assert_eq!(frames.len(), 50);
        let wrong: Vec<&u64> = frames.iter().filter(|pfn| wrong(**pfn)).collect();
        assert!(wrong.is_empty(), "{via}: {} of 50: {wrong:#x?}", wrong.len());
    }
}

/// Whether a frame is a zero page.
fn is_zero_page(pfn: u64) -> bool {
    PageFlags::open().unwrap().get(pfn).unwrap() & ZERO_PAGE != 0
}

/// Whether a frame is mapped more than once. The flag of KSM's pages is true of all anonymous memory with some
/// kernels, the lab's among them.
fn is_shared(pfn: u64) -> bool {
    PageCounts::open().unwrap().get(pfn).unwrap() > 1
}

/// Has the VMM read `len` bytes from `gpa` on.
fn read(guest: &Vmm, gpa: u64, len: u64) {
    let (gpa, len) = (format!("{gpa:#x}"), len.to_string());
    let out = guest.command("memory read", &["--gpa", &gpa, "--len", &len, "--raw"]);
    assert!(out.status.success() && out.stdout.iter().all(|byte| *byte == 0), "{}", words(&out));
}

/// What was only read from is the zero page of the whole host, by 4 KiB.
pub fn the_zero_page() {
    let mut guest = Guest::boot(&Options { memory: "size=256M,thp=off", ..Options::amd(2).ghes() });
    read(&guest, MIDDLE, 4 << 20);
    let (pfn, flags) = frame(&guest, MIDDLE + 0x5000);
    assert_eq!((flags & ZERO_PAGE, flags & THP), (ZERO_PAGE, 0), "{pfn:#x}");
    is_refused(&guest, MIDDLE + 0x5000, "is the zero page");
    is_not_drawn(&guest, is_zero_page);

    // The others that were asked for with it are left alone, too.
    let pages = guest.agent.alloc("anon", 8);
    let both = format!("{:#x},{:#x}", pages[1].gpa, MIDDLE);
    let out = guest.command("poison", &["--gpa", &both, "--via", "hwpoison-inject"]);
    assert!(!out.status.success() && words(&out).contains("zero page"), "{}", words(&out));
    guest.agent.others_intact(&pages, &[]);

    // The pages that go from here on are anybody's in the guest, which may need them at any moment, in its kernel too:
    // it is held, and what it would do about them is not asked.
    assert!(guest.command("pause", &[]).status.success());

    // Whoever asks the VMM itself has it poison a page of its own, in the place of that one.
    let body = format!(r#"{{"gpas":["{:#x}"],"via":"madvise"}}"#, MIDDLE + 0x6000);
    let asked: Value = serde_json::from_str(&body).unwrap();
    let done: Value =
        mce_relay_cli::client::requests::put_json(&guest.path("api"), "vm.poison", &asked).unwrap();
    assert!(done[0]["error"].is_null(), "{done}");
    assert_eq!(PageFlags::open().unwrap().get(pfn).unwrap() & HWPOISON, 0, "{pfn:#x}");

    // What does nothing to page frames may have it.
    for via in ["uffd", "signal"] {
        let out = poison(&guest, MIDDLE + 0x7000, &["--via", via]);
        assert!(out.status.success(), "{}", words(&out));
    }
    assert_eq!(PageFlags::open().unwrap().get(pfn).unwrap() & HWPOISON, 0, "{pfn:#x}");
}

/// The same by 2 MiB, where the host joins pages.
pub fn the_huge_zero_page() {
    let guest = Guest::boot(&Options { memory: "size=256M,thp=on", ..Options::amd(2).ghes() });
    for number in 0..16 {
        read(&guest, MIDDLE + number * HUGE, 16);
    }
    let (pfn, flags) = frame(&guest, MIDDLE + 0x5000);
    assert_eq!(flags & (ZERO_PAGE | THP), ZERO_PAGE | THP, "{pfn:#x}: {flags:#x}");
    is_refused(&guest, MIDDLE + 0x5000, "is of the huge zero page");
    is_not_drawn(&guest, is_zero_page);
    guest.power_off();
}

/// KSM while this lives.
struct Merging;

impl Merging {
    fn new() -> Self {
        for (file, value) in [("pages_to_scan", "20000"), ("sleep_millisecs", "10"), ("run", "1")] {
            std::fs::write(format!("/sys/kernel/mm/ksm/{file}"), value).unwrap();
        }
        Self
    }
}

impl Drop for Merging {
    fn drop(&mut self) {
        let _ = std::fs::write("/sys/kernel/mm/ksm/run", "0");
    }
}

/// Pages that have the same in them, which the host has joined.
pub fn a_page_of_ksm() {
    let memory = "size=256M,thp=off";
    let guest = Guest::boot(&Options { memory, merge: true, ..Options::amd(1).ghes() });
    let pages: Vec<u64> = (0..64).map(|number| MIDDLE + number * 4096).collect();
    for gpa in &pages {
        guest.memory(*gpa).write(&[0x5a; 4096]);
    }
    let merging = Merging::new();
    let start = Instant::now();
    while !is_shared(frame(&guest, pages[7]).0) {
        assert!(start.elapsed() < PATIENCE, "the host's KSM joins no pages of the VM's");
        std::thread::sleep(Duration::from_millis(200));
    }
    // So that none is split or joined while it is looked at.
    drop(merging);
    is_refused(&guest, pages[7], "KSM has joined them");
    is_not_drawn(&guest, is_shared);
    guest.power_off();
}

/// A page that is not there any more when its turn comes is looked at once more right before: the command stands
/// still in the middle of its work, and meanwhile the page of its list that comes last is marked by other means.
pub fn it_is_looked_at_right_before() {
    let mut guest = Guest::boot(&Options::amd(1).ghes());
    let pages = guest.agent.alloc_many("anon", 2048);
    let last = pages.last().unwrap().gpa;
    let list: Vec<String> = pages.iter().map(|page| format!("{:#x}", page.gpa)).collect();
    let via = ["--via", "hwpoison-inject"];
    let child = guest.spawn("poison", &[&via[..], &["--gpa", &list.join(",")]].concat());
    let (enable, start) = ("/sys/kernel/debug/hwpoison/corrupt-filter-enable", Instant::now());
    while std::fs::read_to_string(enable).unwrap().trim() != "1" {
        assert!(start.elapsed() < Duration::from_secs(20), "no filter comes into force");
        std::thread::sleep(Duration::from_millis(1));
    }
    lab::stop(child.id());
    let (pfn, _) = frame(&guest, last);
    let out = poison(&guest, last, &["--via", "uffd"]);
    assert!(out.status.success(), "{}", words(&out));
    // SAFETY: sends a signal to a child that has not been waited for.
    unsafe { libc::kill(child.id().cast_signed(), libc::SIGCONT) };
    let out = child.wait_with_output().unwrap();
    let said = words(&out);
    assert_eq!(out.status.code(), Some(1), "{said}");
    let line = said.lines().find(|line| line.contains(&format!("{last:#x}"))).unwrap_or_default();
    assert!(line.contains("it is bad already, or swapped out"), "{said}");
    assert_eq!(PageFlags::open().unwrap().get(pfn).unwrap() & HWPOISON, 0, "{pfn:#x}: {said}");
    guest.put("vm.shutdown");
    assert_eq!(guest.ended().code(), Some(0));
}

/// Zones of huge pages that were not touched have no memory; and a huge page that goes is said to, with whatever
/// else is in it.
pub fn huge_pages() {
    lab::set_pool("2048kB", RAM / HUGE + 4);
    for shared in ["", ",shared=on"] {
        let memory = format!("size=256M,hugepages=on{shared}");
        one_of_huge_pages(memory.leak());
    }
    lab::set_pool("2048kB", 0);
}

fn one_of_huge_pages(memory: &'static str) {
    // All of it is to be lost.
    let mut guest = Guest::boot(&Options { rescue: Some("off"), ..options(memory) });
    let map = json(&guest.command("pages", &["--map", "--json"]));
    let marks =
        map["blocks"].as_array().unwrap().iter().flat_map(|cells| cells.as_array().unwrap());
    let (empty, used): (Vec<&Value>, Vec<&Value>) = marks.partition(|cell| cell["mark"] == "empty");
    println!("    {memory}: {} cells are in use, {} have no memory", used.len(), empty.len());
    assert!(!empty.is_empty() && !used.is_empty(), "{memory}: {map}");
    for seed in ["1", "2", "3"] {
        let random =
            ["--random", "3", "--seed", seed, "--via", "hwpoison-inject", "--dry-run", "--json"];
        let out = guest.command("poison", &random);
        let drawn = json(&out);
        let huge = |page: &Value| hex(&page["gpa"]) / HUGE;
        let mut numbers: Vec<u64> = drawn.as_array().unwrap().iter().map(huge).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), 3, "each in a huge page of its own: {drawn}");
        assert_eq!(drawn[0]["extent"], HUGE, "{drawn}");
        assert!(
            words(&out).contains("in 3 huge pages, and each goes as a whole: 6 MiB"),
            "{}",
            words(&out)
        );
    }
    // Several pages of one huge page.
    let bad = of_the_agent(&mut guest, HUGE)[3];
    let (first, second) = (bad.gpa / HUGE * HUGE + 0x3000, bad.gpa / HUGE * HUGE + 0x7000);
    let both = format!("{first:#x},{second:#x}");
    let via = ["--via", "hwpoison-inject", "--json", "--gpa", &both];
    for more in [&["--dry-run"][..], &[]] {
        let out = guest.command("poison", &[&via[..], more].concat());
        let (done, said) = (json(&out), words(&out));
        assert!(said.contains("2 MiB") && said.contains("(512 pages of 4 KiB)"), "{said}");
        assert!(said.contains("only huge pages of hugetlb can be hit"), "{said}");
        assert_eq!(
            (&done[0]["extent"], &done[0]["goes_with"]),
            (&HUGE.into(), &Value::Null),
            "{done}"
        );
        assert_eq!(hex(&done[1]["goes_with"]), first, "{done}");
    }
    let start = Instant::now();
    while guest.known(512).len() < 512 {
        assert!(start.elapsed() < PATIENCE, "{}", guest.status());
    }
    guest.put("vm.shutdown");
    assert_eq!(guest.ended().code(), Some(0));
}

/// What is said before a page goes, and with --dry-run instead: that nothing keeps others' pages from it, that it
/// is of the guest's kernel, that it is bad already.
pub fn what_is_said_before() {
    // Where every process is that nobody puts elsewhere.
    let root = Some("/sys/fs/cgroup".into());
    let mut guest = Guest::boot(&Options { cgroup: root, ..Options::amd(2).ghes() });
    let pages = guest.agent.alloc("anon", 8);
    let (bad, marked) = (pages[2], pages[5]);
    let inject = ["--via", "hwpoison-inject"];
    let (out, planned) = (
        poison(&guest, bad.gpa, &inject),
        poison(&guest, bad.gpa, &[&inject[..], &["--dry-run"]].concat()),
    );
    assert_eq!((out.status.code(), planned.status.code()), (Some(1), Some(0)), "{}", words(&out));
    for out in [&out, &planned] {
        let said = words(out);
        assert!(said.contains("in the root cgroup") && said.contains("--force"), "{said}");
    }
    assert!(guest.ledger(bad).is_none(), "{}", guest.status());
    let forced = poison(&guest, bad.gpa, &[&inject[..], &["--force", "--json"]].concat());
    assert_eq!(json(&forced)["was_bad"], false);
    assert!(words(&forced).contains("in the root cgroup"), "{}", words(&forced));
    guest.event("acknowledged", bad);

    // A signal about a page that is bad, and a mark on one.
    let out = poison(&guest, bad.gpa, &["--via", "signal"]);
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success() && !said.contains("whole"), "{said}");
    assert!(
        said.contains("really bad already") && words(&out).contains("really bad already"),
        "{said}"
    );
    let out = poison(&guest, bad.gpa, &["--via", "signal", "--json", "--dry-run"]);
    assert_eq!((&json(&out)["forged"], &json(&out)["was_bad"]), (&true.into(), &true.into()));
    let out = poison(&guest, bad.gpa, &["--via", "uffd"]);
    assert!(!out.status.success() && words(&out).contains("is bad already"), "{}", words(&out));
    // One of which nobody has heard yet.
    let once = poison(&guest, marked.gpa, &["--via", "uffd"]);
    let twice = poison(&guest, marked.gpa, &["--via", "uffd"]);
    assert_eq!((once.status.code(), twice.status.code()), (Some(0), Some(1)), "{}", words(&twice));
    assert!(words(&twice).contains("is bad already"), "{}", words(&twice));
    let out = poison(&guest, marked.gpa, &["--via", "signal", "--json"]);
    assert_eq!(json(&out)["was_bad"], true);
    let whole = poison(&guest, pages[7].gpa, &["--via", "signal"]);
    let said = String::from_utf8_lossy(&whole.stdout).into_owned();
    assert!(said.starts_with("FORGED (the page is whole)"), "{said}");

    // The guest's kernel.
    let kernel = guest.info().kernel;
    let at = format!("{:#x}", kernel.gpa);
    let plan = ["--via", "uffd", "--dry-run", "--json", "--gpa"];
    let end = format!("{:#x}", kernel.gpa + kernel.len);
    let out = guest.command("poison", &[&plan[..], &[&end]].concat());
    assert_eq!(json(&out)["guest_kernel"], false, "{}", words(&out));
    assert!(!words(&out).contains("kernel was loaded"), "{}", words(&out));
    let out = guest.command("poison", &[&plan[..], &[&at]].concat());
    assert_eq!(json(&out)["guest_kernel"], true);
    assert!(
        words(&out).contains("in the range where the guest's kernel was loaded"),
        "{}",
        words(&out)
    );
    println!("    {}", words(&out).trim_end());
    guest.put("vm.shutdown");
    assert_eq!(guest.ended().code(), Some(0));
}
