//! Many pages at once: bursts as fast as the host's kernel can poison, and the account of each by
//! the guest's kernel and by the ledger.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::agent::{Page, hex};
use crate::guest::{Guest, Options};

/// Up to here the owner is told of each page at once (early kill), as most programs would ask for;
/// beyond, its signals would be what takes the time.
const TOLD_AT_ONCE: usize = 64;
/// Pages that stay good, beside those of each burst.
const BYSTANDERS: usize = 64;
/// Between two looks at the guest's account: each costs the emulated guest's port some hundred exits.
const LOOK: Duration = Duration::from_secs(1);
/// No news for so long means that there will be none.
const STALLED: Duration = Duration::from_secs(90);

/// How long a guest may take to learn of `pages`; ten minutes for 4,096.
fn limit(pages: usize) -> Duration {
    Duration::from_secs(60) + Duration::from_millis(130) * u32::try_from(pages).unwrap()
}

/// Boots a guest and poisons a burst of each size of `bursts`, one after the other.
///
/// # Panics
/// A page was lost, invented, not acknowledged, or another was harmed.
pub fn bursts(options: Options, bursts: &[usize]) {
    let mut guest = Guest::boot(&options.clone().quiet());
    // An AMD guest finds deferred errors by polling, every five minutes unless it is told otherwise.
    if options.ao_channel == "mce" {
        guest.agent.ask("interval 1");
    }
    guest.agent.ask("sigbus count");
    let good = guest.agent.alloc_many("anon", BYSTANDERS);
    let (mut all, mut last) = (Vec::new(), Duration::ZERO);
    for count in bursts {
        if *count > TOLD_AT_ONCE {
            guest.agent.ask("early off");
        }
        last = burst(&mut guest, *count, &mut all);
    }
    guest.agent.ask("ping");
    if options.says_when_done {
        says_when_done(&mut guest, bursts.last().copied().unwrap_or(1), last);
    }
    let pages: Vec<Page> = good.iter().chain(&all).copied().collect();
    guest.agent.others_intact(&pages, &all);
    guest.power_off();
}

/// How long the burst of `count` pages took, beside what the guest's kernel needs for so many alone.
fn says_when_done(guest: &mut Guest, count: usize, last: Duration) {
    let alone = guest.agent.ask(&format!("failing {count}"))["seconds"].as_f64().unwrap();
    let last = last.as_secs_f64();
    println!(
        "    the guest's kernel alone takes {alone:.2} s for {count} pages: {:.2} x",
        last / alone
    );
    // As fast as the pace alone would have it: nobody has heard the guest.
    assert!(last < count as f64 / 15.0, "{last} s for {count} pages");
}

/// Poisons `count` new pages and adds them to `all`, the pages that are bad; how long it took until the guest's kernel had
/// named the last.
fn burst(guest: &mut Guest, count: usize, all: &mut Vec<Page>) -> Duration {
    let pages = guest.agent.alloc_many("anon", count);
    let gpas: Vec<u64> = pages.iter().map(|page| page.gpa).collect();
    all.extend(pages);

    let start = Instant::now();
    let poisoned = guest.poison_many(&gpas);
    let (named, account) = named_all(guest, all.len());
    let last = start.elapsed();
    let ledger = settled(guest);
    let acknowledged = start.elapsed();
    let caught = guest.events().iter().filter(|event| event["event"] == "caught").count();
    let scanned = ledger.iter().filter(|page| page["found_by"] == "scan").count();
    println!(
        "    {count} pages, poisoned in {:.2} s: the guest's kernel has named all it will after {:.1} s \
         ({:.1} a second), acknowledged after {:.1} s",
        poisoned.as_secs_f64(),
        last.as_secs_f64(),
        count as f64 / last.as_secs_f64(),
        acknowledged.as_secs_f64(),
    );
    println!(
        "    since the boot: {} poisoned, {} named by the guest's kernel, {caught} signals caught, {scanned} found \
         by scan, {} SIGBUS for their owner",
        all.len(),
        named.len(),
        guest.agent.ask("sigbus")["ao"],
    );
    println!("    {account}");
    same_pages(all, &named, &ledger);
    nothing_lost(&account);
    if guest.ao_channel() != "mce" {
        let by = |page: &&Value| page["channel"] == "ghes";
        assert_eq!(ledger.iter().filter(by).count(), all.len(), "told by firmware-first records");
    }
    last
}

/// Waits until the guest's kernel has named `count` page frames as failed since its boot; those it
/// has, and its account.
pub fn named_all(guest: &mut Guest, count: usize) -> (BTreeSet<u64>, Value) {
    let start = Instant::now();
    let (mut named, mut news) = (0, start);
    while named < count as u64 && start.elapsed() < limit(count) && news.elapsed() < STALLED {
        std::thread::sleep(LOOK);
        let now = guest.agent.failures_count()["pfns"].as_u64().unwrap();
        if now != named {
            (named, news) = (now, Instant::now());
        }
    }
    guest.agent.failures()
}

/// Waits until every page of the ledger is acknowledged, or for longer than a guest needs; the ledger.
pub fn settled(guest: &Guest) -> Vec<Value> {
    let start = Instant::now();
    loop {
        let pages = guest.pages();
        let open = pages.iter().filter(|page| page["state"] != "acknowledged").count();
        if open == 0 || start.elapsed() > STALLED {
            return pages;
        }
        std::thread::sleep(LOOK);
    }
}

/// Sees that the guest's kernel has named (by page frame number) and the ledger has as acknowledged
/// exactly the pages of `bad`.
///
/// # Panics
/// They differ; says how.
pub fn same_pages(bad: &[Page], named: &BTreeSet<u64>, ledger: &[Value]) {
    same_frames(&bad.iter().map(|page| page.gpa >> 12).collect(), named, ledger);
}

/// As [`same_pages`], with page frame numbers.
pub fn same_frames(bad: &BTreeSet<u64>, named: &BTreeSet<u64>, ledger: &[Value]) {
    let done = |page: &&Value| page["state"] == "acknowledged";
    let seen: BTreeSet<u64> = ledger.iter().map(|page| hex(&page["gpa"]) >> 12).collect();
    let told: BTreeSet<u64> =
        ledger.iter().filter(done).map(|page| hex(&page["gpa"]) >> 12).collect();
    let mut wrong = String::new();
    for (what, left, right) in [
        ("poisoned, not in the ledger", bad, &seen),
        ("in the ledger, not poisoned", &seen, bad),
        ("in the ledger, not acknowledged", &seen, &told),
        ("poisoned, not named by the guest's kernel", bad, named),
        ("named by the guest's kernel, not poisoned", named, bad),
    ] {
        let some: Vec<String> = left.difference(right).map(|pfn| format!("{pfn:#x}")).collect();
        if !some.is_empty() {
            let shown = &some[..some.len().min(8)];
            wrong += &format!("\n    {} {what}: {} …", some.len(), shown.join(" "));
        }
    }
    for page in ledger.iter().filter(|page| !done(page)).take(8) {
        wrong += &format!("\n    {page}");
    }
    assert!(
        wrong.is_empty(),
        "of {} bad pages, by page frame number of the guest:{wrong}",
        bad.len()
    );
}

/// Sees that no line of the guest's log says that something was lost.
///
/// # Panics
/// One does.
pub fn nothing_lost(account: &Value) {
    for loss in ["pool_full", "overflow", "kmsg_lost", "ignored", "failed"] {
        assert_eq!(account[loss], 0, "{loss}: {account}");
    }
}
