//! The steps of mce-test's KVM suite, which RAS people run against real machines: a victim in the
//! guest, its address followed down to the host's page frame, an SRAO there, and the guest's own
//! kernel log.

use mce_relay_tests::agent::hex;
use mce_relay_tests::guest::{Guest, Options};
use mce_relay_tests::lab;

pub fn kvm_suite() {
    println!("    1. boot a guest and start a victim in it");
    let mut guest = Guest::boot(&Options::intel(2, false));
    let pages = guest.agent.alloc("anon", 8);
    let victim = pages[7];

    println!("    2. the victim's guest-physical address: {:#x}", victim.gpa);
    let vm = guest.status()["vm"].clone();
    let block = vm["memory"]
        .as_array()
        .unwrap()
        .iter()
        .find(|b| {
            let (start, len) = (hex(&b["gpa"]), b["len"].as_u64().unwrap());
            (start..start + len).contains(&victim.gpa)
        })
        .expect("a block of RAM that holds it");
    let hva = hex(&block["hva"]) + victim.gpa - hex(&block["gpa"]);
    println!("    3. its host virtual address: {hva:#x}");
    let physical = lab::host_physical(guest.pid(), hva);
    println!("    4. its host page frame: {:#x}", physical >> 12);

    println!("    5. an error there");
    let poisoned = guest.poison(victim.gpa, "hwpoison-inject");
    assert_eq!(hex(&poisoned["pfn"]) << 12, physical, "the frame this test found, too");
    assert_eq!(hex(&poisoned["hva"]), hva);
    assert_eq!(guest.event("injected", victim)["form"], "SRAO");

    let line = guest.agent.memory_failure(victim);
    println!("    6. the guest's kernel names it: {line}");
    guest.agent.sigbus_ao(victim);
    guest.agent.others_intact(&pages, &[victim]);
    println!("    7. the guest is alive");
    guest.power_off();
}
