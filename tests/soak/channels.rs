//! The two channels side by side: from a page's end on the host to the line of the guest's kernel, for
//! one page and for bursts, at the guest's own pace of looking (check_interval is left as it is).

use std::time::Instant;

use mce_relay_tests::agent::Page;
use mce_relay_tests::burst::{named_all, nothing_lost, same_pages, settled};
use mce_relay_tests::guest::{Guest, NEWEST, Options};

/// Beyond this a program would not ask for a signal for each page, and the signals would be what
/// takes the time.
const TOLD_AT_ONCE: usize = 64;

fn measure(options: Options, bursts: &[usize]) {
    let what = format!(
        "{}-style, {} vCPUs, Linux {}, by {}",
        options.vendor,
        options.cpus,
        if options.image == NEWEST { "newest" } else { "6.1" },
        match (options.ao_channel, options.vendor, options.lmce) {
            ("mce", "intel", "on") => "machine check (LMCE)",
            ("mce", "intel", _) => "machine check (rendezvous)",
            ("mce", ..) => "machine check (deferred record, polled)",
            _ => "firmware-first record",
        }
    );
    let mut guest = Guest::boot(&options.quiet());
    guest.agent.ask("sigbus count");
    let mut bad: Vec<Page> = Vec::new();
    for count in bursts {
        if *count > TOLD_AT_ONCE {
            guest.agent.ask("early off");
        }
        let pages = guest.agent.alloc_many("anon", *count);
        let gpas: Vec<u64> = pages.iter().map(|page| page.gpa).collect();
        bad.extend(pages);
        let clock = guest.agent.clock();
        let start = Instant::now();
        guest.poison_many(&gpas);
        let named = wait(&mut guest, bad.len());
        let ledger = settled(&guest);
        let last = guest.agent.failures_count()["last"].as_f64().unwrap();
        println!(
            "    {what}: {count} poisoned, {named} of {} told since the boot, the last {:.3} s after the first \
             was poisoned (give or take {:.3} s)",
            bad.len(),
            clock.seconds(start, last),
            clock.error.as_secs_f64()
        );
        let (named, account) = guest.agent.failures();
        same_pages(&bad, &named, &ledger);
        nothing_lost(&account);
    }
    guest.agent.ask("ping");
    guest.power_off();
}

/// An AMD guest looks into its banks every five minutes, and more often once it has found something.
/// Each time is a minute and more.
const POLLS: u32 = 12;

fn wait(guest: &mut Guest, count: usize) -> usize {
    let mut named = 0;
    for _ in 0..POLLS {
        named = named_all(guest, count).0.len();
        if named >= count {
            break;
        }
    }
    named
}

const ALL: &[usize] = &[1, 64, 512];
const SMALL: &[usize] = &[1, 64];

fn newest(options: Options) -> Options {
    Options { image: NEWEST, ..options }
}

pub fn records_amd() {
    measure(Options::amd(1).ghes(), SMALL);
    measure(Options::amd(2).ghes(), ALL);
}

pub fn records_intel() {
    measure(Options::intel(1, false).ghes(), SMALL);
    measure(Options::intel(2, false).ghes(), ALL);
}

pub fn records_newest_kernel() {
    measure(newest(Options::amd(1).ghes()), SMALL);
    measure(newest(Options::amd(2).ghes()), ALL);
    measure(newest(Options::intel(1, false).ghes()), SMALL);
    measure(newest(Options::intel(2, false).ghes()), ALL);
}

pub fn machine_checks_amd() {
    measure(Options::amd(2), ALL);
}

pub fn machine_checks_intel() {
    measure(Options::intel(1, false), SMALL);
    measure(Options::intel(2, false), ALL);
    measure(Options::intel(2, true), SMALL);
}

pub fn machine_checks_newest_kernel() {
    measure(newest(Options::amd(1)), SMALL);
    measure(newest(Options::intel(2, false)), ALL);
}
