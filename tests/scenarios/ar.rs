//! The guest touches a page that went bad unannounced: the vCPU that touched it is told at once, the
//! process that did gets SIGBUS, and everything else goes on.

use mce_relay_tests::agent::Page;
use mce_relay_tests::guest::{Guest, Options};
use serde_json::Value;

/// Poisons two of eight pages and has them touched, one read and one written, on the last vCPU.
fn touched(options: Options, form: &str, reach: &str) {
    // Late kill, or the guest would know before the touch.
    let options = options.late();
    let mut guest = Guest::boot(&options);
    let pages = guest.agent.alloc("anon", 8);
    let last_vcpu = options.cpus - 1;
    guest.agent.ask(&format!("cpu {last_vcpu}"));

    for (bad, how) in [(pages[2], "read"), (pages[5], "write")] {
        guest.poison(bad.gpa, "hwpoison-inject");
        let reply = guest.agent.touch(bad, how);
        sigbus_ar(&reply);
        println!("    guest: {}", guest.agent.memory_failure(bad));
        let injected = guest.event("injected", bad);
        assert_eq!(injected["vcpu"], last_vcpu, "on the vCPU that touched it: {injected}");
        assert_eq!((&injected["form"], &injected["reach"]), (&form.into(), &reach.into()));
        acknowledged(&guest, bad);
    }
    guest.agent.others_intact(&pages, &[pages[2], pages[5]]);
    guest.power_off();
}

fn sigbus_ar(reply: &Value) {
    assert_eq!(reply["result"], "sigbus", "{reply}");
    assert_eq!(reply["sigbus"]["code"], "AR", "{reply}");
}

fn acknowledged(guest: &Guest, page: Page) {
    guest.event("acknowledged", page);
    assert_eq!(guest.ledger(page).unwrap()["state"], "acknowledged");
}

pub fn amd_one_vcpu() {
    touched(Options::amd(1), "AMD-AR", "local");
}

pub fn amd_two_vcpus() {
    touched(Options::amd(2), "AMD-AR", "local");
}

pub fn intel_one_vcpu() {
    touched(Options::intel(1, false), "SRAR", "rendezvous");
}

pub fn intel_two_vcpus_by_rendezvous() {
    touched(Options::intel(2, false), "SRAR", "rendezvous");
}

pub fn intel_one_vcpu_by_lmce() {
    touched(Options::intel(1, true), "SRAR", "lmce");
}

pub fn intel_two_vcpus_by_lmce() {
    touched(Options::intel(2, true), "SRAR", "lmce");
}

/// The guest's kernel meets the page itself, while it copies from user memory for a write(2): the
/// call fails, and the guest lives.
fn kernel_copy(options: Options) {
    let mut guest = Guest::boot(&options.late());
    let pages = guest.agent.alloc("anon", 8);
    let bad = pages[0];

    guest.poison(bad.gpa, "hwpoison-inject");
    let reply = guest.agent.touch(bad, "kernel-copy");
    assert_eq!((&reply["result"], &reply["errno"]), (&"errno".into(), &"EFAULT".into()), "{reply}");
    println!("    guest: {}", guest.agent.memory_failure(bad));
    acknowledged(&guest, bad);
    guest.agent.others_intact(&pages, &[bad]);
    guest.power_off();
}

pub fn amd_kernel_copy() {
    kernel_copy(Options::amd(2));
}

pub fn intel_kernel_copy() {
    kernel_copy(Options::intel(2, true));
}

/// An AMD guest polls every five minutes. One that touches the page before it has looked is told
/// by an AR at once; the deferred record in its bank neither holds that up nor is overwritten.
pub fn while_the_ao_waits_to_be_polled() {
    let mut guest = Guest::boot(&Options::amd(2));
    let pages = guest.agent.alloc("anon", 8);
    let bad = pages[1];

    guest.poison(bad.gpa, "hwpoison-inject");
    let deferred = guest.event("injected", bad);
    assert_eq!(deferred["form"], "deferred");
    sigbus_ar(&guest.agent.touch(bad, "read"));
    println!("    guest: {}", guest.agent.memory_failure(bad));
    let told: Vec<Value> =
        guest.events().into_iter().filter(|event| event["event"] == "injected").collect();
    assert_eq!(told.len(), 2, "{told:?}");
    let ar = &told[1]["properties"];
    assert_eq!(ar["form"], "AMD-AR");
    assert_ne!(ar["bank"], deferred["bank"], "the deferred record is left alone");
    guest.agent.others_intact(&pages, &[bad]);
    guest.power_off();
}
