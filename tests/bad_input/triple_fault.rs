//! A guest that dies of a triple fault is started again with whole memory; one that dies at once, again and
//! again, is not.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use mce_relay_tests::guest::binary;
use mce_relay_tests::lab;
use mce_relay_tests::spinning::Spinning;
use mce_relay_tests::tiny::elf;
use serde_json::Value;

/// The guest dies when there is a byte here.
const GO: u64 = 0x100_0000;
/// 1: cmp byte [GO], 0; je 1b; ud2. There is nothing to handle an exception, so it is a triple fault.
const WAIT_AND_DIE: [u8; 11] = [0x80, 0x3d, 0, 0, 0, 0x01, 0, 0x74, 0xf7, 0x0f, 0x0b];
/// ud2, at once.
const DIE: [u8; 2] = [0x0f, 0x0b];

/// A page that is said to be bad, and one that is so for the VMM.
const FORGED: u64 = 0x9000;
const BAD: u64 = 0x100_5000;
/// As many times as would end a guest that dies right after its start (HOPELESS in vmm/src/session/boots.rs), and
/// once more.
const TIMES: u32 = 4;
/// Longer than a boot that counts as one that did not come up (QUICK there).
const LONG: Duration = Duration::from_millis(1200);

/// The events in `path`.
fn events(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// How the boots began and ended.
fn course(events: &[Value]) -> Vec<&str> {
    let own = events.iter().filter(|event| event["source"] == "vm");
    let names = own.map(|event| event["event"].as_str().unwrap());
    // A page is marked while the vCPUs are held.
    names.filter(|name| !["paused", "resumed"].contains(name)).collect()
}

fn wait_until(what: &str, vm: &Spinning, done: impl Fn(&Spinning) -> bool) {
    let start = Instant::now();
    while !done(vm) {
        let late = start.elapsed() > Duration::from_secs(10);
        assert!(!late, "{what} does not come: {:?}, {:?}", vm.info(), vm.status());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Pages go bad, one forged and one that really is so for the VMM; the guest, which nobody told, dies, and
/// the next boot has good memory in their places. So it is however often that happens, if only each boot
/// gets somewhere.
pub fn it_starts_again_with_whole_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("events");
    let monitor = format!("path={}", path.display());
    let more = ["--cpu-vendor", "amd", "--event-monitor", &monitor];
    let vm = Spinning::start_with(&WAIT_AND_DIE, &more);
    let reads =
        |gpa: u64| vm.command("memory read", &["--gpa", &format!("{gpa:#x}"), "--len", "16"]);
    let poison = |via: &str, gpa: u64| {
        let out = vm.command("poison", &["--via", via, "--gpa", &format!("{gpa:#x}")]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    };
    for boot in 1..=TIMES {
        let begun = Instant::now();
        assert!(reads(BAD).status.success() && reads(FORGED).status.success(), "boot {boot}");
        poison("uffd", BAD);
        poison("signal", FORGED);
        wait_until("the forged page", &vm, |vm| {
            vm.status().pages.iter().any(|page| page.gpa == FORGED)
        });
        let out = reads(BAD);
        let error = String::from_utf8_lossy(&out.stderr);
        assert!(error.contains(&format!("poisoned at GPA {BAD:#x}")), "boot {boot}: {error}");
        std::thread::sleep(LONG.saturating_sub(begun.elapsed()));
        let info = vm.info();
        let block = info.block(GO).unwrap();
        lab::write_memory(vm.pid(), block.hva + (GO - block.gpa), 1);
        wait_until("the next boot", &vm, |vm| {
            vm.running().is_some_and(|info| info.boot == boot + 1)
        });
        assert!(vm.status().pages.is_empty(), "boot {}: {:?}", boot + 1, vm.status().pages);
    }
    assert!(reads(BAD).status.success() && reads(FORGED).status.success());
    let past = vm.status().past.len();
    assert_eq!(past, 2 * TIMES as usize, "the ledger's history is whole");
    assert_eq!(vm.shut_down().code(), Some(0));

    let events = events(&path);
    let times = TIMES as usize;
    assert_eq!(
        course(&events),
        [["booting", "reset"].repeat(times), vec!["booting", "ended"]].concat()
    );
    let mut resets = events.iter().filter(|event| event["event"] == "reset");
    assert!(resets.all(|reset| reset["properties"]["reason"] == "triple fault on vCPU 0"));
    for gpa in [FORGED, BAD] {
        let gpa = format!("{gpa:#x}");
        for name in ["seen", "healed"] {
            let of_it =
                |event: &&Value| event["event"] == name && event["properties"]["gpa"] == gpa;
            assert_eq!(events.iter().filter(of_it).count(), times, "{name} {gpa}: {events:#?}");
        }
    }
}

/// Three of them, each right after the start: it will not come up.
pub fn three_at_once_end_it() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("kernel"), elf(&DIE)).unwrap();
    let mut command = Command::new(binary());
    command.args(["run", "--serial", "off", "--memory", "32M", "--kernel"]).arg(at("kernel"));
    command.args(["--event-monitor", &format!("path={}", at("events").display())]);
    let out = command.stdin(Stdio::null()).output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    println!("    {}", stderr.trim_end().replace('\n', "\n    "));
    assert_eq!(out.status.code(), Some(4), "{stderr}");
    assert!(stderr.contains("triple fault on vCPU 0"), "{stderr}");
    let events = events(&at("events"));
    let three = ["booting", "reset", "booting", "reset", "booting", "ended"];
    assert_eq!(course(&events), three, "{events:#?}");
    assert_eq!(events.last().unwrap()["properties"]["status"], 4);
}
