//! Other ways for a page to go bad than the injector's AO.

use std::time::Duration;

use mce_relay_tests::guest::{Guest, Options};

/// madvise(MADV_HWPOISON) by another process that shares the page. The kernel takes that process
/// for one that touched it (AR); the VMM is one of those who have it mapped (AO).
pub fn madvise() {
    let mut guest = Guest::boot(&Options::intel(1, true));
    let pages = guest.agent.alloc("anon", 8);
    let bad = pages[4];

    guest.poison(bad.gpa, "madvise");
    assert_eq!(guest.event("seen", bad)["kind"], "AO");
    println!("    guest: {}", guest.agent.memory_failure(bad));
    guest.agent.sigbus_ao(bad);
    guest.event("acknowledged", bad);
    guest.agent.others_intact(&pages, &[bad]);
    guest.power_off();
}

/// With late kill nobody is told of a page that nobody touches; the touch is an AR.
pub fn late_kill_says_nothing_until_a_touch() {
    let mut guest = Guest::boot(&Options::amd(2).late());
    let pages = guest.agent.alloc("anon", 8);
    let bad = pages[6];

    guest.poison(bad.gpa, "hwpoison-inject");
    // An AO is there within milliseconds of the injector's return, where one is sent.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(guest.status()["vm"]["mce_kill"], "late");
    assert!(guest.ledger(bad).is_none(), "{}", guest.status());

    let reply = guest.agent.touch(bad, "read");
    assert_eq!(reply["sigbus"]["code"], "AR", "{reply}");
    assert_eq!(guest.event("seen", bad)["kind"], "AR");
    guest.event("acknowledged", bad);
    guest.agent.others_intact(&pages, &[bad]);
    guest.power_off();
}
