//! A guest's end: it says that its kernel has panicked, it is reset, and it is asked to power off.

use mce_relay_tests::guest::{Guest, Options, hva};
use mce_relay_tests::lab;

/// The guest's kernel panics and stands still: an event and a state. A reset starts it over, with good memory in
/// place of a page that was bad.
pub fn a_panic_and_a_reset() {
    let options = Options { reboot: true, cmdline: "panic=0", ..Options::amd(2).ghes() };
    let mut guest = Guest::boot(&options);
    let bad = guest.agent.alloc("anon", 8)[2];
    guest.poison(bad.gpa, "hwpoison-inject");
    guest.event("acknowledged", bad);
    assert!(guest.info().panic.is_none());

    guest.agent.tell("panic");
    guest.event_where("panicked", "the panic", |_| true);
    assert_eq!(guest.status()["vm"]["panic"], "panicked");
    let refused = guest.command("shutdown", &[]);
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && stderr.contains("panicked"), "{stderr}");

    let out = guest.command("reset", &[]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    println!("    {}", String::from_utf8_lossy(&out.stdout).trim_end());
    guest.event_where("booting", "the second boot", |boot| boot["boot"] == 2);
    guest.event("healed", bad);
    guest.up_again();
    let vm = guest.info();
    assert!(vm.panic.is_none(), "{vm:?}");
    lab::read_memory(vm.pid, hva(&vm, bad.gpa)).expect("good memory where the bad page was");
    guest.power_off();
}

/// The guest powers itself off when its power button is pressed, and the VM ends well.
pub fn the_button() {
    let mut guest = Guest::boot(&Options::intel(2, true));
    let out = guest.command("shutdown", &["--json"]);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{stderr}");
    println!("    {} {}", stderr.trim_end(), String::from_utf8_lossy(&out.stdout).trim_end());
    assert_eq!(guest.ended().code(), Some(0));
    let console = std::fs::read_to_string(guest.path("console")).unwrap();
    assert!(console.contains("the power button was pressed"), "{console}");
}
