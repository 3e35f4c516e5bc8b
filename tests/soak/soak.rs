//! Random poison and random touches, for MCE_RELAY_SOAK_MINUTES: at the end the pages that were
//! poisoned, those the guest's kernel names and those of the ledger are the same, and on the way no
//! touch of a bad page gives data and every touch of a good one gives its own.

use std::time::{Duration, Instant};

use fastrand::Rng;
use mce_relay_tests::agent::Page;
use mce_relay_tests::burst::{named_all, nothing_lost, same_pages, settled};
use mce_relay_tests::guest::{Guest, Options};

const VCPUS: usize = 4;
/// Pages of each kind to begin with, and added each time when few good ones are left.
const POOL: usize = 512;
/// Kinds whose loss the guest's kernel never covers up with a fresh page, as it does for a file's.
const KINDS: [&str; 3] = ["anon", "shared", "mlocked"];
const BURST: usize = 16;
const PAUSE_MS: u64 = 300;

/// A number from the environment.
pub(crate) fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

struct Soak {
    rng: Rng,
    guest: Guest,
    good: Vec<Page>,
    bad: Vec<Page>,
    touches: [u64; 2],
    checks: u64,
    bursts: u64,
}

fn soak(options: Options) {
    let minutes = number("MCE_RELAY_SOAK_MINUTES").unwrap_or(10);
    let seed = number("MCE_RELAY_SOAK_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("    {minutes} minutes; the same again: MCE_RELAY_SOAK_SEED={seed}");
    let mut guest = Guest::boot(&Options { memory: "size=512M", ..options.quiet() });
    guest.agent.ask("interval 1");
    guest.agent.ask("sigbus count");
    let mut rng = Rng::with_seed(seed);
    guest.agent.ask(if rng.bool() { "early on" } else { "early off" });
    let (good, bad) = (Vec::new(), Vec::new());
    let mut soak = Soak { rng, guest, good, bad, touches: [0; 2], checks: 0, bursts: 0 };

    let end = Instant::now() + Duration::from_secs(60 * minutes);
    while Instant::now() < end {
        if soak.good.len() < POOL {
            for kind in KINDS {
                soak.good.extend(soak.guest.agent.alloc_many(kind, POOL));
            }
        }
        // In thousands. So many pages as a guest is told of in time, some twelve a second; a check
        // meets all it was not told of yet, which should be few.
        match soak.rng.u32(..1000) {
            0..60 => soak.poison(),
            60..850 => soak.touch(),
            850..855 => soak.check(),
            855..885 => {
                let cpu = soak.rng.usize(..VCPUS);
                soak.guest.agent.ask(&format!("cpu {cpu}"));
            }
            _ => std::thread::sleep(Duration::from_millis(soak.rng.u64(..PAUSE_MS))),
        }
    }
    soak.finish();
}

impl Soak {
    fn poison(&mut self) {
        let count = self.rng.usize(1..=BURST);
        let mut pages = Vec::new();
        for _ in 0..count {
            pages.push(self.good.swap_remove(self.rng.usize(..self.good.len())));
        }
        self.guest.poison_many(&pages.iter().map(|page| page.gpa).collect::<Vec<_>>());
        self.bad.extend(pages);
        self.bursts += 1;
    }

    fn touch(&mut self) {
        let how = *self.rng.choice(["read", "write", "kernel-copy"].iter()).unwrap();
        // Bad ones are touched more often than their share, and those that went bad last more often
        // still: the guest may not have been told of them yet.
        let is_bad = !self.bad.is_empty() && self.rng.bool();
        let pages = if is_bad { &self.bad } else { &self.good };
        let recent = if is_bad && self.rng.bool() { pages.len().min(BURST) } else { pages.len() };
        let page = pages[pages.len() - 1 - self.rng.usize(..recent)];
        let reply = self.guest.agent.touch(page, how);
        self.touches[usize::from(is_bad)] += 1;
        let right = match (is_bad, how) {
            (false, "write") => reply["result"] == "ok",
            (false, _) => reply["result"] == "ok" && reply["intact"] == true,
            // The kernel fails the call; some kernels signal as well.
            (true, "kernel-copy") => reply["errno"] == "EFAULT" || reply["result"] == "sigbus",
            (true, _) => reply["sigbus"]["code"] == "AR",
        };
        assert!(
            right,
            "{how} of a {} page: {page:x?}: {reply}",
            ["good", "bad"][usize::from(is_bad)]
        );
    }

    /// All pages at once: those that are good hold what they should, and no bad one can be read.
    fn check(&mut self) {
        let reply = self.guest.agent.ask("check");
        assert_eq!(reply["intact"], self.good.len(), "{reply}");
        assert!(reply.get("changed").is_none(), "{reply}");
        self.checks += 1;
    }

    fn finish(mut self) {
        let (named, account) = named_all(&mut self.guest, self.bad.len());
        let ledger = settled(&self.guest);
        let scanned = ledger.iter().filter(|page| page["found_by"] == "scan").count();
        let by_ar = ledger.iter().filter(|page| page["kind"] == "AR").count();
        println!(
            "    {} pages poisoned in {} bursts, {scanned} of them found by scan, {by_ar} last signalled by a \
             touch; {} touches of good pages, {} of bad ones, {} checks of all",
            self.bad.len(),
            self.bursts,
            self.touches[0],
            self.touches[1],
            self.checks,
        );
        same_pages(&self.bad, &named, &ledger);
        nothing_lost(&account);
        self.check();
        self.guest.agent.ask("ping");
        self.guest.power_off();
    }
}

pub fn amd() {
    soak(Options::amd(VCPUS));
}

pub fn intel_by_rendezvous() {
    soak(Options::intel(VCPUS, false));
}

pub fn intel_by_lmce() {
    soak(Options::intel(VCPUS, true));
}
