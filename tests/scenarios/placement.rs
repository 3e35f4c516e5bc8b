//! Where a page lies in the guest.

use mce_relay_tests::guest::{Guest, Options};

/// Guest RAM has a hole below 4 GiB; a page beyond it has another offset between host and guest
/// address than one below.
pub fn a_page_above_4_gib() {
    let mut guest = Guest::boot(&Options { memory: "size=3328M", ..Options::intel(2, true) });
    let pages = guest.agent.alloc("anon", 8);
    let bad = pages[0];
    assert!(bad.gpa >= 4 << 30, "Linux gives out the highest memory first: {:#x}", bad.gpa);

    guest.poison(bad.gpa, "hwpoison-inject");
    guest.event("acknowledged", bad);
    println!("    guest: {}", guest.agent.memory_failure(bad));
    guest.agent.sigbus_ao(bad);
    guest.agent.others_intact(&pages, &[bad]);
    guest.power_off();
}
