//! What the kernel's log says of failed memory, counted line by line.
//!
//! A burst makes thousands of lines; a test wants to know which page frames were named, and whether
//! a line says that something was lost on the way.

use std::collections::BTreeMap;

use crate::proto::{Body, Losses, Outcomes};
use crate::words::Hex;

/// How `action_result` in Linux' mm/memory-failure.c says a page ended (`action_name`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Recovered,
    Ignored,
    Delayed,
    Failed,
}

impl Outcome {
    fn from_word(word: &str) -> Option<Self> {
        match word {
            "Recovered" => Some(Self::Recovered),
            "Ignored" => Some(Self::Ignored),
            "Delayed" => Some(Self::Delayed),
            "Failed" => Some(Self::Failed),
            _ => None,
        }
    }
}

/// The account of all lines so far.
#[derive(Debug, Default)]
pub struct Failures {
    /// Page frames that any line of mm/memory-failure.c named, and the first outcome of each: later
    /// lines about the same frame only say that it is known.
    pfns: BTreeMap<u64, Option<Outcome>>,
    losses: Losses,
    logged: u64,
    /// When the last frame was named or its outcome said, in microseconds on the log's clock.
    last: Option<u64>,
}

impl Failures {
    /// Takes one line into account, of `micros` on the log's clock.
    pub fn line(&mut self, line: &str, micros: u64) {
        if let Some((pfn, outcome)) = named(line) {
            let new = !self.pfns.contains_key(&pfn);
            let entry = self.pfns.entry(pfn).or_default();
            if new || (entry.is_none() && outcome.is_some()) {
                self.last = Some(micros);
            }
            *entry = entry.or(outcome);
        } else if line.contains("Machine check events logged") {
            self.logged += 1;
        } else if line.contains("MCE records pool full") {
            // mce_gen_pool_add: the machine-check log has no room, the record is gone.
            self.losses.pool_full += 1;
        } else if line.contains("buffer overflow when queuing memory failure") {
            // memory_failure_queue: the queue of a CPU has no room, the page is not isolated.
            self.losses.overflow += 1;
        }
    }

    /// Takes into account that so many lines of the log were overwritten before they were read.
    pub fn missed(&mut self, records: u64) {
        self.losses.kmsg_lost += records;
    }

    /// Whether a line named one of the `count` page frames from `first` on.
    pub fn holds(&self, first: u64, count: u64) -> bool {
        self.pfns.range(first..first.saturating_add(count)).next().is_some()
    }

    /// The account, with or without the page frames themselves.
    pub fn account(&self, with_runs: bool) -> Body {
        let count = |outcome| self.pfns.values().filter(|o| **o == Some(outcome)).count();
        Body::Failures {
            pfns: self.pfns.len(),
            outcomes: Outcomes {
                recovered: count(Outcome::Recovered),
                ignored: count(Outcome::Ignored),
                delayed: count(Outcome::Delayed),
                failed: count(Outcome::Failed),
            },
            losses: self.losses,
            mce_logged: self.logged,
            last: self.last.map(|micros| micros as f64 / 1e6),
            runs: with_runs.then(|| runs(self.pfns.keys().copied(), 1)),
        }
    }
}

/// The page frame that a line of mm/memory-failure.c is about, and how it ended if it says so:
/// `Memory failure: 0x1e03: recovery action for dirty LRU page: Recovered`.
fn named(line: &str) -> Option<(u64, Option<Outcome>)> {
    let (pfn, text) = line.strip_prefix("Memory failure: 0x")?.split_once(": ")?;
    let pfn = u64::from_str_radix(pfn, 16).ok()?;
    let outcome = text
        .strip_prefix("recovery action for ")
        .and_then(|text| Outcome::from_word(text.rsplit_once(": ")?.1));
    Some((pfn, outcome))
}

/// Numbers in the order they come, as runs: the first one and how many follow each other, each
/// `step` above the last.
pub fn runs(numbers: impl IntoIterator<Item = u64>, step: u64) -> Vec<(Hex, u32)> {
    let mut runs: Vec<(Hex, u32)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((first, count)) if first.0 + u64::from(*count) * step == number => *count += 1,
            _ => runs.push((Hex(number), 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(failures: &Failures, with_runs: bool) -> String {
        serde_json::to_string(&failures.account(with_runs)).unwrap()
    }

    #[test]
    fn lines_of_the_kernel_are_understood() {
        let table = [
            (
                "Memory failure: 0x1e03: recovery action for dirty LRU page: Recovered",
                Some((0x1e03, Some(Outcome::Recovered))),
            ),
            (
                "Memory failure: 0xa: recovery action for reserved kernel page: Ignored",
                Some((0xa, Some(Outcome::Ignored))),
            ),
            (
                "Memory failure: 0xb: recovery action for free buddy page: Delayed",
                Some((0xb, Some(Outcome::Delayed))),
            ),
            (
                "Memory failure: 0xc: recovery action for unsplit thp: Failed",
                Some((0xc, Some(Outcome::Failed))),
            ),
            (
                "Memory failure: 0x1e03: Sending SIGBUS to agent:90 due to hardware memory corruption",
                Some((0x1e03, None)),
            ),
            ("Memory failure: 0x1e03: already hardware poisoned", Some((0x1e03, None))),
            ("Memory failure: 0xxyz: what", None),
            ("NET: Memory failure: 0x1e03: no", None),
        ];
        for (line, expected) in table {
            assert_eq!(named(line), expected, "{line}");
        }
    }

    #[test]
    fn a_frame_counts_once_by_its_first_outcome_and_losses_are_counted() {
        let mut failures = Failures::default();
        for (line, micros) in [
            "mce: [Hardware Error]: Machine check events logged",
            "Memory failure: 0x1e04: recovery action for dirty LRU page: Recovered",
            "Memory failure: 0x1e03: Sending SIGBUS to agent:90 due to hardware memory corruption",
            "Memory failure: 0x1e03: recovery action for dirty LRU page: Recovered",
            "Memory failure: 0x1e03: recovery action for already poisoned: Failed",
            "Memory failure: 0x2000: already hardware poisoned",
            "mce: [Hardware Error]: MCE records pool full!",
            "Memory failure: buffer overflow when queuing memory failure at 0x77",
            "random: crng init done",
        ]
        .into_iter()
        .zip(1_000_000..)
        {
            failures.line(line, micros);
        }
        failures.missed(3);
        let numbers = r#""pfns":3,"recovered":2,"ignored":0,"delayed":0,"failed":0,"pool_full":1,"overflow":1,"kmsg_lost":3,"mce_logged":1,"last":1.000005"#;
        assert_eq!(json(&failures, false), format!("{{{numbers}}}"));
        let runs = r#""runs":[["0x1e03",2],["0x2000",1]]"#;
        assert_eq!(json(&failures, true), format!("{{{numbers},{runs}}}"));
        assert!(failures.holds(0x1e04, 1) && failures.holds(0x1e00, 512));
        assert!(!failures.holds(0x1e05, 0x1fb) && !failures.holds(0, 1));
    }

    #[test]
    fn runs_keep_the_order() {
        let page = 4096;
        let numbers = [5 * page, 6 * page, page, 2 * page, 3 * page, 9 * page];
        let expected = [(Hex(5 * page), 2), (Hex(page), 3), (Hex(9 * page), 1)];
        assert_eq!(runs(numbers, page), expected);
        assert_eq!(runs([], page), []);
    }
}
