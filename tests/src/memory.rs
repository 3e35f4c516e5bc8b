//! Guests with RAM of each kind: pages go bad, the guest learns of all that is lost with them, and when it
//! starts over it has good memory there.

use std::collections::BTreeSet;
use std::time::Instant;

use serde_json::Value;

use crate::agent::{Page, hex};
use crate::burst::{named_all, same_frames, settled};
use crate::guest::{Guest, Options, hva};
use crate::lab;

const MIB: u64 = 1 << 20;
/// Bytes of a huge page.
pub const HUGE: u64 = 2 * MIB;
/// Guest RAM of every guest here, in bytes.
pub const RAM: u64 = 256 * MIB;

/// An AMD guest that is told of AOs at once, and starts again when it resets itself. The pace is that of
/// a guest with a quiet console, so that 512 pages do not take a minute; and it leaves most of the 16
/// places of Linux' queue free, as the worker that empties it may be late by a fifth of a second here.
pub fn options(memory: &'static str) -> Options {
    let pace = Some("burst=4,rate=50");
    Options { memory, reboot: true, pace, ..Options::amd(2).ghes().quiet() }
}

/// Pages of the agent that are as large as an extent of the host's, so that nothing of the guest's kernel
/// is lost with them: a guest that loses that is a guest that dies, and rightly so.
pub fn of_the_agent(guest: &mut Guest, extent: u64) -> Vec<Page> {
    // Each SIGBUS costs the emulated guest its time; the account is in its kernel's log.
    guest.agent.ask("sigbus count");
    guest.agent.ask("early off");
    if extent == HUGE {
        return guest.agent.alloc("thp", 8);
    }
    // So many, that the last of them are not the guest's kernel's own in the next boot again.
    guest.agent.alloc_many("anon", 1024)
}

/// Poisons `bad` and has the guest touch it before the relay has heard of it. The relay has to be at rest:
/// its thread is stopped where it is, and that must not be with its lock held.
pub fn touched(guest: &mut Guest, bad: Page) {
    let held = lab::hold_thread(guest.pid(), "mce-relay-ao");
    guest.poison(bad.gpa, "hwpoison-inject");
    let reply = guest.agent.touch(bad, "read");
    assert_eq!(reply["sigbus"]["code"], "AR", "{reply}");
    drop(held);
    assert_eq!(guest.event("seen", bad)["kind"], "AR");
}

/// All pages of 4 KiB that are lost with `bad`.
fn lost_with(bad: Page, extent: u64) -> BTreeSet<u64> {
    let start = bad.gpa / extent * extent;
    (start..start + extent).step_by(4096).collect()
}

/// AO and AR on a guest with such memory, in extents of so many bytes; the guest and the pages it lost.
pub fn poisoned(memory: &'static str, extent: u64) -> (Guest, BTreeSet<u64>) {
    // What becomes of a huge page that is lost as a whole.
    let mut guest = Guest::boot(&Options { rescue: Some("off"), ..options(memory) });
    let pages = of_the_agent(&mut guest, extent);
    // Far from each other, so that they need not meet the same fate in the next boot.
    let (ar, half) = (pages[pages.len() - 2], pages[pages.len() / 2]);
    // Somewhere in the middle of what is lost with it.
    let ao = Page { gpa: half.gpa + extent / 8192 * 4096, ..half };

    let start = Instant::now();
    touched(&mut guest, ar);
    let seen = guest.event("seen", ar);
    assert_eq!(seen["extent"], extent, "KVM_RUN says 4 KiB, the mapping says what it is: {seen}");
    guest.poison(ao.gpa, "hwpoison-inject");
    // Before 6.12 a host's signal names the start of a huge page.
    let seen =
        guest.event_where("seen", "the AO", |seen| hex(&seen["gpa"]) / extent == ao.gpa / extent);
    assert_eq!((&seen["kind"], &seen["extent"]), (&"AO".into(), &extent.into()), "{seen}");

    let lost: BTreeSet<u64> =
        lost_with(ao, extent).union(&lost_with(ar, extent)).copied().collect();
    let ledger = settled(&guest);
    let (named, account) = named_all(&mut guest, lost.len());
    println!("    the guest's account: {account}");
    same_frames(&lost.iter().map(|gpa| gpa >> 12).collect(), &named, &ledger);
    println!(
        "    {} pages in {:.1} s, each named by the guest's kernel; it lives",
        lost.len(),
        start.elapsed().as_secs_f64()
    );
    guest.agent.others_intact(&pages, &[ao, ar]);
    (guest, lost)
}

/// Has the guest reboot, and sees that every page of `lost` is good memory now; how many of them the guest
/// itself has used then. Those that its kernel has taken in that boot it cannot show.
pub fn whole_again(guest: &mut Guest, boot: u64, lost: &BTreeSet<u64>) -> usize {
    guest.agent.tell("reboot");
    guest.event_where("booting", "the next boot", |event| event["boot"] == boot);
    guest.up_again();
    let status = guest.status();
    assert_eq!(status["vm"]["boot"], boot);
    assert_eq!(status["pages"].as_array().map(Vec::len), Some(0), "{status}");
    let past: Vec<&Value> = status["past"].as_array().unwrap().iter().collect();
    let healed: BTreeSet<u64> = past.iter().map(|page| hex(&page["gpa"])).collect();
    assert!(healed.is_superset(lost), "the ledger keeps what was");
    assert!(past.iter().all(|page| page["state"] == "healed" && page["times"]["healed"].is_f64()));
    // The new boot may be using them: it is held meanwhile, and finds what it had.
    guest.put("vm.pause");
    let vm = guest.info();
    for gpa in lost {
        let at = hva(&vm, *gpa) + 7;
        let before = lab::read_memory(vm.pid, at).unwrap();
        lab::write_memory(vm.pid, at, !before);
        assert_eq!(lab::read_memory(vm.pid, at).unwrap(), !before, "{gpa:#x}");
        lab::write_memory(vm.pid, at, before);
    }
    guest.put("vm.resume");
    // And the guest itself may have them, but for those that its kernel has taken this time.
    let used = guest.agent.claim(lost);
    println!(
        "    boot {boot}: the guest has written and read {used} of {} healed pages",
        lost.len()
    );
    let events = guest.events();
    let events = events.iter().filter(|event| event["event"] == "healed");
    let told: BTreeSet<u64> = events.map(|event| hex(&event["properties"]["gpa"])).collect();
    assert!(told.is_superset(lost), "each healing is an event");
    let pages = guest.agent.alloc("anon", 8);
    guest.agent.others_intact(&pages, &[]);
    used
}

/// All of it: AO, AR, reboot.
pub fn heals(memory: &'static str, extent: u64) {
    let (mut guest, lost) = poisoned(memory, extent);
    // In one boot its kernel may have all of them itself, or keep them for the last.
    let used = (2..5).any(|boot| whole_again(&mut guest, boot, &lost) > 0);
    assert!(used, "the guest came by none of them in three boots: {lost:#x?}");
    guest.power_off();
}
