//! A guest that has switched machine checks off (`mce=off`). An AO waits and does no harm, with the
//! reason in the ledger. A touch cannot wait and cannot be told: the user's policy is followed, and
//! never a triple fault.

use mce_relay_tests::agent::Page;
use mce_relay_tests::guest::{Guest, Options, hva};
use mce_relay_tests::lab;

/// Boots it, poisons a page, sees that the AO waits, and touches the page.
fn touched(options: Options, policy: &'static str) -> (Guest, Page) {
    let options = Options { cmdline: "mce=off", on_undeliverable: Some(policy), ..options };
    let mut guest = Guest::boot(&options);
    let pages = guest.agent.alloc("anon", 8);
    let bad = pages[2];
    guest.poison(bad.gpa, "hwpoison-inject");
    let waits = guest.event("waiting", bad);
    assert_eq!((&waits["kind"], &waits["wait"]["reason"]), (&"AO".into(), &"cr4-mce-clear".into()));
    guest.agent.others_intact(&pages, &[bad]);
    let ledger = guest.ledger(bad).unwrap();
    assert_eq!(
        (&ledger["state"], &ledger["wait"]["reason"]),
        (&"waiting".into(), &"cr4-mce-clear".into())
    );

    guest.agent.tell(&format!("touch {} read", bad.number));
    let event = guest.event("undeliverable", bad);
    assert_eq!(event["kind"], "AR", "{event}");
    assert_eq!(event["why"]["by"]["reason"], "cr4-mce-clear", "{event}");
    (guest, bad)
}

/// `stop`: the VMM ends, with a status of its own.
pub fn stop() {
    let (mut guest, _) = touched(Options::amd(2), "stop");
    assert_eq!(guest.ended().code(), Some(6));
}

/// `pause`: the VM stays as it is, for somebody to look at, and can be ended.
pub fn pause() {
    let (mut guest, bad) = touched(Options::intel(2, true), "pause");
    guest.event_where("paused", "the page", |_| true);
    let vm = guest.status()["vm"].clone();
    assert_eq!(vm["paused"], true, "{vm}");
    assert_eq!(vm["pause_reason"]["reason"], "undeliverable", "{vm}");
    assert_eq!(vm["pause_reason"]["gpa"], format!("{:#x}", bad.gpa), "{vm}");
    assert_eq!(guest.ledger(bad).unwrap()["state"], "undeliverable");
    guest.put("vm.shutdown");
    assert_eq!(guest.ended().code(), Some(0));
}

/// `reset`: the guest is started again, and its RAM is whole.
pub fn reset() {
    let (mut guest, bad) = touched(Options { reboot: true, ..Options::amd(1) }, "reset");
    guest.event_where("booting", "the second boot", |boot| boot["boot"] == 2);
    guest.up_again();
    let status = guest.status();
    assert_eq!(status["vm"]["boot"], 2);
    assert_eq!(status["pages"].as_array().map(Vec::len), Some(0), "{status}");
    let vm = guest.info();
    lab::read_memory(vm.pid, hva(&vm, bad.gpa)).expect("good memory where the bad page was");
    let pages = guest.agent.alloc("anon", 8);
    guest.agent.others_intact(&pages, &[]);
    guest.power_off();
}
