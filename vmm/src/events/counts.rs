//! Counts of past events, for `GET /metrics`.

use std::time::Duration;

use mce_relay::{Event, Injection, Place, SignalledThread};
use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts};

use super::entry::What;
use crate::api::types::vm_event::VmEvent;

/// Counters that start with the VMM and continue when the guest starts over.
#[derive(Debug, Clone)]
pub struct Counts {
    events: IntCounterVec,
    signals: IntCounterVec,
    signals_lost: IntCounter,
    signals_outside: IntCounter,
    seen: IntCounterVec,
    injected: IntCounterVec,
    acknowledged: IntCounterVec,
    undeliverable: IntCounterVec,
    rescues: IntCounterVec,
    kept: IntCounter,
    boots: IntCounter,
    panics: IntCounterVec,
    told: Histogram,
    taken: Histogram,
}

/// Upper bounds of the histograms' buckets, in seconds: from a machine check that is injected at once to an AMD guest's
/// poll five minutes later.
const BUCKETS: [f64; 12] = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0, 600.0];

/// A family of counters. It can only fail for an ill-formed name, and all names are constants.
fn family(name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    #[expect(clippy::expect_used, reason = "it depends on constants alone, and tests make one")]
    IntCounterVec::new(Opts::new(name, help), labels).expect("a well-formed name")
}

fn counter(name: &str, help: &str) -> IntCounter {
    #[expect(clippy::expect_used, reason = "as in `family`")]
    IntCounter::new(name, help).expect("a well-formed name")
}

fn histogram(name: &str, help: &str) -> Histogram {
    let opts = HistogramOpts::new(name, help).buckets(BUCKETS.into());
    #[expect(clippy::expect_used, reason = "as in `family`; the buckets are in order")]
    Histogram::with_opts(opts).expect("a well-formed name")
}

/// Records how long it took until the first time, if this is the first time.
fn note(histogram: &Histogram, after_micros: Option<u64>) {
    if let Some(micros) = after_micros {
        histogram.observe(Duration::from_micros(micros).as_secs_f64());
    }
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            events: family(
                "mce_relay_events_total",
                "Events reported, by their source.",
                &["source"],
            ),
            signals: family(
                "mce_relay_signals_total",
                "Memory failures that were signalled (SIGBUS), by kind, by the thread that took them, and whether they were forged.",
                &["kind", "thread", "forged"],
            ),
            signals_lost: counter(
                "mce_relay_signals_lost_total",
                "Signals whose address was not stored because too many came at once; their pages are found by looking.",
            ),
            signals_outside: counter(
                "mce_relay_signals_outside_total",
                "Memory failures that were not of guest RAM.",
            ),
            seen: family(
                "mce_relay_pages_seen_total",
                "Pages of 4 KiB that became known as bad, by how they did.",
                &["found_by"],
            ),
            injected: family(
                "mce_relay_injections_total",
                "Tellings that lie where the guest finds them, by channel and form.",
                &["channel", "form"],
            ),
            acknowledged: family(
                "mce_relay_acknowledgements_total",
                "Tellings that the guest has taken, by channel.",
                &["channel"],
            ),
            undeliverable: family(
                "mce_relay_undeliverable_total",
                "Errors that the guest could not be told of, by kind.",
                &["kind"],
            ),
            rescues: family(
                "mce_relay_rescues_total",
                "Huge pages of which a part went bad, by whether the good part was kept (rescued) or not (lost).",
                &["outcome"],
            ),
            kept: counter(
                "mce_relay_pages_kept_total",
                "Pages of 4 KiB that the host had lost with a huge page and that the guest has kept.",
            ),
            boots: counter("mce_relay_boots_total", "Boots of the guest."),
            panics: family(
                "mce_relay_guest_panics_total",
                "Panics of the guest's kernel that the guest has told of, by whether its crash kernel takes over.",
                &["kind"],
            ),
            told: histogram(
                "mce_relay_told_seconds",
                "From a page's becoming known to the first time that the guest was told of it.",
            ),
            taken: histogram(
                "mce_relay_acknowledged_seconds",
                "From a page's becoming known to the first time that the guest has taken a record of it.",
            ),
        }
    }
}

impl Counts {
    /// Counts one event.
    pub fn count(&self, what: &What) {
        match what {
            What::Vm(event) => {
                self.events.with_label_values(&["vm"]).inc();
                match event {
                    VmEvent::Booting { .. } => self.boots.inc(),
                    VmEvent::Panicked { .. } => {
                        self.panics.with_label_values(&["panicked"]).inc();
                    }
                    VmEvent::CrashLoaded {} => {
                        self.panics.with_label_values(&["crash-loaded"]).inc();
                    }
                    _ => {}
                }
            }
            What::Memory(event) => {
                self.events.with_label_values(&["memory"]).inc();
                self.count_memory(event);
            }
        }
    }

    fn count_memory(&self, event: &Event) {
        match event {
            Event::Caught { kind, thread, forged, .. } => {
                let thread = match thread {
                    SignalledThread::Relay => "relay",
                    SignalledThread::Vcpu(_) => "vcpu",
                    SignalledThread::Caller => "caller",
                    SignalledThread::Other => "other",
                };
                let forged = if *forged { "true" } else { "false" };
                self.signals.with_label_values(&[&*kind.to_string(), thread, forged]).inc();
            }
            Event::Outside { .. } => self.signals_outside.inc(),
            Event::Overrun { signals } => self.signals_lost.inc_by(u64::from(*signals)),
            Event::Seen { found_by, pages, .. } => {
                let found_by = found_by.to_string();
                self.seen.with_label_values(&[&found_by]).inc_by(*pages as u64);
            }
            Event::Injected { by, after_micros, .. } => {
                match by {
                    Injection::Mce { form, .. } => {
                        self.injected.with_label_values(&["mce", &form.to_string()]).inc();
                    }
                    Injection::Ghes { .. } => {
                        self.injected.with_label_values(&["ghes", "CPER"]).inc();
                    }
                }
                note(&self.told, *after_micros);
            }
            Event::Acknowledged { place, after_micros, .. } => {
                note(&self.taken, *after_micros);
                let channel = match place {
                    Place::Mce { .. } => "mce",
                    Place::Ghes { .. } => "ghes",
                };
                self.acknowledged.with_label_values(&[channel]).inc();
            }
            Event::Undeliverable { kind, .. } => {
                self.undeliverable.with_label_values(&[&kind.to_string()]).inc();
            }
            Event::Rescued(rescued) => {
                self.rescues.with_label_values(&["rescued"]).inc();
                self.kept.inc_by(rescued.kept);
            }
            Event::NotRescued { .. } => self.rescues.with_label_values(&["lost"]).inc(),
            Event::Again { .. }
            | Event::Waiting { .. }
            | Event::Healed { .. }
            | Event::Removed { .. }
            | Event::Predicted { .. }
            | Event::Scanned { .. } => {}
        }
    }

    /// All families, for an encoder.
    #[must_use]
    pub fn families(&self) -> Vec<MetricFamily> {
        let Self { events, signals, signals_lost, signals_outside, seen, .. } = self;
        let Self { injected, acknowledged, undeliverable, boots, panics, told, taken, .. } = self;
        let Self { rescues, kept, .. } = self;
        let all: [&dyn Collector; 14] = [
            events,
            signals,
            signals_lost,
            signals_outside,
            seen,
            injected,
            acknowledged,
            undeliverable,
            rescues,
            kept,
            boots,
            panics,
            told,
            taken,
        ];
        // A family without any count has no lines, which the encoder takes for an error.
        let families = all.into_iter().flat_map(Collector::collect);
        families.filter(|family| !family.get_metric().is_empty()).collect()
    }
}

#[cfg(test)]
mod tests {
    use prometheus::TextEncoder;

    use super::*;

    fn lines(counts: &Counts) -> Vec<(String, f64)> {
        let text = TextEncoder::new().encode_to_string(&counts.families()).unwrap();
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines
            .map(|line| line.rsplit_once(' ').unwrap())
            .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
            .collect()
    }

    #[test]
    fn what_was_counted_once_stays_where_it_is() {
        let counts = Counts::default();
        let place = Place::Ghes { record: 1 };
        let by = Injection::Ghes { record: 1, pages: 1 };
        let (mut before, forged) = (lines(&counts), false);
        // A page that is told of within 20 ms, and again when the guest touches it an hour later.
        for event in [
            Event::Injected { gpa: 0, by, after_micros: Some(20_000), forged },
            Event::Acknowledged { gpa: 0, place, after_micros: Some(40_000), forged },
            Event::Injected { gpa: 0, by, after_micros: None, forged },
            Event::Acknowledged { gpa: 0, place, after_micros: None, forged },
        ] {
            counts.count(&What::Memory(event));
            let now = lines(&counts);
            for (name, value) in &before {
                let (_, later) = now.iter().find(|(known, _)| known == name).unwrap();
                assert!(later >= value, "{name} was {value} and is {later}");
            }
            before = now;
        }
        for (name, value) in [
            ("mce_relay_told_seconds_bucket{le=\"0.01\"}", 0.0),
            ("mce_relay_told_seconds_bucket{le=\"0.05\"}", 1.0),
            ("mce_relay_told_seconds_bucket{le=\"+Inf\"}", 1.0),
            ("mce_relay_told_seconds_sum", 0.02),
            ("mce_relay_acknowledged_seconds_count", 1.0),
            ("mce_relay_injections_total{channel=\"ghes\",form=\"CPER\"}", 2.0),
        ] {
            assert!(before.contains(&(name.to_owned(), value)), "{name} {value}: {before:?}");
        }
    }
}
