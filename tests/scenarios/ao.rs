//! A page goes bad that nobody is touching: the guest is told, by the form its vendor has, its own
//! kernel names the page and tells the owner, and everything else goes on.

use mce_relay_tests::guest::{Guest, Options};
use serde_json::Value;

/// Poisons one of eight pages and follows the error to the end; what the relay says it injected.
fn one_ao(options: &Options) -> Value {
    let mut guest = Guest::boot(options);
    // An AMD guest finds deferred errors by polling; five minutes is too long for a test.
    guest.agent.ask("interval 1");
    let pages = guest.agent.alloc("anon", 8);
    let bad = pages[3];

    guest.poison(bad.gpa, "hwpoison-inject");

    let injected = guest.event("injected", bad);
    let line = guest.agent.memory_failure(bad);
    println!("    guest: {line}");
    let sigbus = guest.agent.sigbus_ao(bad);
    assert_eq!(sigbus["lsb"], 12);
    guest.event("acknowledged", bad);
    assert_eq!(guest.ledger(bad).unwrap()["state"], "acknowledged");
    assert_eq!(guest.status()["pages"].as_array().unwrap().len(), 1, "one bad page, no more");
    guest.agent.others_intact(&pages, &[bad]);
    guest.power_off();
    injected
}

fn told_as(injected: &Value, form: &str, reach: &str) {
    assert_eq!((injected["form"].as_str(), injected["reach"].as_str()), (Some(form), Some(reach)));
}

pub fn amd_one_vcpu() {
    told_as(&one_ao(&Options::amd(1)), "deferred", "logged");
}

pub fn amd_two_vcpus() {
    told_as(&one_ao(&Options::amd(2)), "deferred", "logged");
}

pub fn intel_one_vcpu() {
    told_as(&one_ao(&Options::intel(1, false)), "SRAO", "rendezvous");
}

pub fn intel_two_vcpus_by_rendezvous() {
    told_as(&one_ao(&Options::intel(2, false)), "SRAO", "rendezvous");
}

pub fn intel_one_vcpu_by_lmce() {
    told_as(&one_ao(&Options::intel(1, true)), "SRAO", "lmce");
}

pub fn intel_two_vcpus_by_lmce() {
    told_as(&one_ao(&Options::intel(2, true)), "SRAO", "lmce");
}
