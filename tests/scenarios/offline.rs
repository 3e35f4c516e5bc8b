//! Processors that the guest takes offline and brings back: none of them holds up the telling, whichever they are, and
//! nothing of what lay in their banks is lost.

use mce_relay_tests::burst::{named_all, same_pages, settled};
use mce_relay_tests::guest::{Guest, Options};

/// Pages that go bad in all.
const PAGES: usize = 40;
/// Of them, those that the guest touches.
const TOUCHED: usize = 10;

/// Four processors, of which those in `off` go offline; the last of them comes back half-way.
fn go(options: Options, off: &[usize]) {
    let mut guest = Guest::boot(&options.quiet());
    if guest.ao_channel() == "mce" {
        // An AMD guest finds deferred errors by polling, every five minutes unless it is told otherwise.
        guest.agent.ask("interval 1");
    }
    guest.agent.ask("sigbus count");
    let all = guest.agent.alloc_many("anon", PAGES);
    for cpu in off {
        guest.agent.ask(&format!("online {cpu} off"));
    }
    let (first, second) = all.split_at(PAGES / 2);
    guest.poison_many(&first.iter().map(|page| page.gpa).collect::<Vec<_>>());
    let (named, _) = named_all(&mut guest, first.len());
    println!("    {} of {} named with processors {off:?} offline", named.len(), first.len());
    assert_eq!(named.len(), first.len(), "an offline processor holds up the telling");

    let back = off.last().unwrap();
    guest.agent.ask(&format!("online {back} on"));
    let (touched, rest) = second.split_at(TOUCHED);
    for page in touched {
        guest.poison(page.gpa, "hwpoison-inject");
        // Told already, or by this touch.
        let touch = guest.agent.touch(*page, "read");
        assert_eq!(touch["result"], "sigbus", "{touch}");
    }
    guest.poison_many(&rest.iter().map(|page| page.gpa).collect::<Vec<_>>());
    let (named, _) = named_all(&mut guest, PAGES);
    let ledger = settled(&guest);
    same_pages(&all, &named, &ledger);
    println!("    {} of {PAGES} named in the end, and the guest lives", named.len());
    guest.agent.ask("ping");
    guest.power_off();
}

pub fn intel_by_rendezvous() {
    go(Options::intel(4, false), &[1, 3]);
}

pub fn amd_by_machine_check() {
    go(Options::amd(4), &[1, 3]);
}

/// Linux 6.1 lets the boot processor go, if it is asked to at its start.
pub fn the_boot_processor_of_an_intel_guest() {
    go(Options { cmdline: "cpu0_hotplug", ..Options::intel(4, false) }, &[2, 0]);
}

pub fn the_boot_processor_of_an_amd_guest() {
    go(Options { cmdline: "cpu0_hotplug", ..Options::amd(4) }, &[2, 0]);
}
