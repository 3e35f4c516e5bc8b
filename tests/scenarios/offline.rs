//! Processors that the guest takes offline and brings back, or leaves behind when it goes over to its crash kernel: none
//! of them holds up the telling, whichever they are, and nothing of what lay in their banks is lost.

use std::time::Instant;

use mce_relay_tests::burst::{named_all, nothing_lost, same_pages, settled};
use mce_relay_tests::guest::{Guest, Options, WITH_CRASH_KERNEL};

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

/// Linux 6.1 lets the boot processor go, if it is asked to at its start and is Intel's (`arch_register_cpu`,
/// arch/x86/kernel/topology.c).
pub fn the_boot_processor_of_an_intel_guest() {
    go(Options { cmdline: "cpu0_hotplug", ..Options::intel(4, false) }, &[2, 0]);
}

/// Pages of the crash kernel that go bad: fewer, as each is a machine check for the processors left behind, too, which then
/// spin, and are given a second to leave their handlers.
const CRASHED: usize = 12;
/// Of them, those that it touches.
const CRASHED_TOUCHED: usize = 4;
/// And pages that stay good.
const GOOD: usize = 16;

/// A guest whose kernel panics on `processor` goes on in its crash kernel, on that processor alone; its pages go bad
/// there, some under its hands. The others stand where the panic has stopped them, with CR4.MCE set.
fn crash(options: Options, processor: usize) {
    let polls = options.vendor == "amd";
    let mut guest = Guest::boot(&Options {
        memory: "size=512M,shared=on",
        initramfs: WITH_CRASH_KERNEL,
        // The second word: the guest says first that its crash kernel takes over.
        cmdline: "crashkernel=192M crash_kexec_post_notifiers",
        ..options.quiet()
    });
    guest.agent.ask("kexec");
    guest.agent.ask(&format!("cpu {processor}"));
    guest.agent.ask("panic");
    guest.event_where("crash-loaded", "the panic", |_| true);
    let panicked = Instant::now();
    guest.up_again();
    println!(
        "    the crash kernel's agent answers {:.1} s after the panic",
        panicked.elapsed().as_secs_f64()
    );
    assert_ne!(guest.agent.ask("dmesg elfcorehdr=")["count"], 0, "it is a crash kernel");
    assert_eq!(guest.status()["vm"]["panic"], "crash-loaded");

    if polls {
        guest.agent.ask("interval 1");
    }
    guest.agent.ask("sigbus count");
    let all = guest.agent.alloc_many("anon", CRASHED + GOOD);
    let (bad, _) = all.split_at(CRASHED);
    let (touched, rest) = bad.split_at(CRASHED_TOUCHED);
    for page in touched {
        guest.poison(page.gpa, "hwpoison-inject");
        // Told already, or by this touch.
        let touch = guest.agent.touch(*page, "read");
        assert_eq!(touch["result"], "sigbus", "{touch}");
    }
    guest.poison_many(&rest.iter().map(|page| page.gpa).collect::<Vec<_>>());
    let (named, account) = named_all(&mut guest, CRASHED);
    let ledger = settled(&guest);
    same_pages(bad, &named, &ledger);
    nothing_lost(&account);
    println!("    {} of {CRASHED} named by the crash kernel", named.len());
    guest.agent.others_intact(&all, bad);
    guest.power_off();
}

/// On another processor than the one that booted, which is left behind.
pub fn left_behind_by_an_intel_guests_crash() {
    crash(Options::intel(4, false), 2);
}

pub fn left_behind_by_an_amd_guests_crash() {
    crash(Options::amd(4), 2);
}
