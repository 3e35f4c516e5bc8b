//! The VMM as a user who may use /dev/kvm and nothing else. Memory goes bad under it by root's doing, as it
//! would by the hardware's.

use mce_relay_tests::guest::{Guest, Options};
use mce_relay_tests::memory::touched;
use mce_relay_tests::spinning::Nobody;

/// What the guest touches first, what is signalled, and what is not: all of it reaches the guest.
pub fn real_failures_under_nobodys_vmm() {
    let mut guest = Guest::boot(&Options { user: Some(Nobody), ..Options::amd(2).ghes() });
    let status = std::fs::read_to_string(format!("/proc/{}/status", guest.pid())).unwrap();
    let line = |name: &str| {
        let found = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        found.unwrap_or_default().split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(line("Uid"), ["65534"; 4], "{status}");
    let capabilities = line("CapEff");
    assert!(capabilities[0].bytes().all(|digit| digit == b'0'), "{capabilities:?}");
    let pages = guest.agent.alloc("anon", 8);
    let (ar, ao) = (pages[2], pages[5]);

    touched(&mut guest, ar);
    println!("    guest: {}", guest.agent.memory_failure(ar));
    guest.event("acknowledged", ar);

    guest.poison(ao.gpa, "hwpoison-inject");
    let seen = guest.event("seen", ao);
    assert_eq!((&seen["kind"], &seen["found_by"]), (&"AO".into(), &"signal".into()), "{seen}");
    println!("    guest: {}", guest.agent.memory_failure(ao));
    guest.agent.sigbus_ao(ao);
    guest.event("acknowledged", ao);

    let unsignalled = guest.clean_page();
    guest.poison_many(&[unsignalled.gpa]);
    let seen = guest.event("seen", unsignalled);
    assert_eq!((&seen["kind"], &seen["found_by"]), (&"AO".into(), &"scan".into()), "{seen}");
    println!("    guest: {}", guest.agent.memory_failure(unsignalled));
    guest.event("acknowledged", unsignalled);
    assert_eq!(guest.ledger(unsignalled).unwrap()["signals"], 0);

    assert_eq!(guest.pages().len(), 3, "{}", guest.status());
    guest.agent.others_intact(&pages, &[ao, ar]);
    guest.power_off();
}
