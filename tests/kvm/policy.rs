//! `--on-undeliverable`: a guest with its machine-check handler closed touches a page that is really
//! bad for this process (see `uffd`), so it cannot be told.

use std::time::Duration;

use mce_relay::State;
use mce_relay_tests::hooked::SPIN;
use mce_relay_vmm::api::types::pause::{PauseReason, Undeliverable};
use serde_json::Value;

use crate::uffd::Uffd;
use crate::whole::Vmm;

/// The page that the guest touches.
const GPA: u64 = 0x100_0000;
/// 1: mov al, [GPA]; pause; jmp 1b.
const TOUCH: [u8; 9] = [0xa0, 0, 0, 0, 0x01, 0xf3, 0x90, 0xeb, 0xf7];

/// A guest that touches its page again and again, with that page gone bad. The second vCPU waits for
/// its start-up IPI. The bad page is bad as long as the second value lives.
fn start(policy: &str, options: &[&str]) -> (Vmm, Uffd) {
    let common = ["--cpus", "2", "--cpu-vendor", "amd", "--on-undeliverable", policy];
    let vmm = Vmm::start(&TOUCH, &[&common, options].concat());
    let info = vmm.info(|_| true);
    assert!(!info.paused && info.pause_reason.is_none(), "{info:?}");
    let uffd = Uffd::open().unwrap();
    uffd.poison(info.block(GPA).unwrap().hva + GPA, 4096).unwrap();
    (vmm, uffd)
}

/// The names of the VM's own events, and the properties of the last of them.
fn course(vmm: &Vmm) -> (Vec<String>, Value) {
    let events: Vec<Value> = vmm.events().into_iter().filter(|e| e["source"] == "vm").collect();
    let names = events.iter().map(|e| e["event"].as_str().unwrap().to_owned()).collect();
    (names, events.last().unwrap()["properties"].clone())
}

fn is_undeliverable(reason: &str) -> bool {
    reason.contains("vCPU 0") && reason.contains("0x1000000") && reason.contains("CR4.MCE")
}

pub fn stop_ends_the_vm_with_the_reason() {
    let (mut vmm, _uffd) = start("stop", &[]);
    vmm.ends_with(6);
    let (names, ended) = course(&vmm);
    assert_eq!(names, ["booting", "ended"]);
    assert!(is_undeliverable(ended["how"].as_str().unwrap()), "{ended}");
}

pub fn reset_starts_the_guest_again_with_whole_memory() {
    let (mut vmm, _uffd) = start("reset", &[]);
    let info = vmm.info(|info| info.boot == 2);
    assert!(!info.paused);
    // It touches the page all the time, and nothing is wrong with it.
    std::thread::sleep(Duration::from_millis(200));
    assert!(vmm.status().pages.is_empty(), "{:?}", vmm.status().pages);
    vmm.put("vm.shutdown");
    vmm.ends_with(0);
    let (names, _) = course(&vmm);
    assert_eq!(names, ["booting", "reset", "booting", "ended"]);
    let reset = vmm.events().into_iter().find(|e| e["event"] == "reset").unwrap();
    assert!(is_undeliverable(reset["properties"]["reason"].as_str().unwrap()), "{reset}");
}

pub fn reset_without_reboot_ends_the_vm() {
    let (mut vmm, _uffd) = start("reset", &["--no-reboot"]);
    vmm.ends_with(6);
    assert_eq!(course(&vmm).0, ["booting", "ended"]);
}

pub fn pause_holds_the_vm_and_resume_tries_again() {
    let (mut vmm, _uffd) = start("pause", &[]);
    for _ in 0..3 {
        let info = vmm.info(|info| info.paused);
        let Some(PauseReason::Undeliverable(what)) = info.pause_reason else {
            panic!("{info:?}");
        };
        let Undeliverable { vcpu, gpa, why, .. } = &what;
        assert_eq!((*vcpu, *gpa), (0, GPA));
        assert!(why.contains("CR4.MCE"), "{why}");
        vmm.put("vm.pause");
        let again = vmm.info(|_| true);
        assert_eq!(
            again.pause_reason,
            Some(PauseReason::Undeliverable(what)),
            "a request does not hide why"
        );
        let pages = vmm.status().pages;
        assert!(matches!(pages[0].state, State::Undeliverable { .. }), "{pages:?}");
        vmm.put("vm.resume");
    }
    vmm.info(|info| info.paused);
    vmm.put("vm.shutdown");
    vmm.ends_with(0);
    let (names, _) = course(&vmm);
    let tries = ["paused", "resumed"].repeat(3);
    assert_eq!(names, [&["booting"], tries.as_slice(), &["paused", "ended"]].concat());
}

pub fn pause_and_resume_as_often_as_one_likes() {
    // Nothing is bad here: the guest only spins.
    let mut vmm = Vmm::start(&SPIN, &["--cpus", "2"]);
    vmm.info(|_| true);
    for _ in 0..10 {
        vmm.put("vm.pause");
        vmm.put("vm.pause");
        assert_eq!(vmm.info(|_| true).pause_reason, Some(PauseReason::Request));
        vmm.put("vm.resume");
        vmm.put("vm.resume");
        assert!(!vmm.info(|_| true).paused);
    }
    vmm.put("vm.pause");
    vmm.put("vm.shutdown");
    vmm.ends_with(0);
    assert_eq!(course(&vmm).0.iter().filter(|name| *name == "paused").count(), 11);
}
