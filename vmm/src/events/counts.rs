//! What happened so far, counted, for `GET /metrics`.

use mce_relay::event::{Injection, Thread};
use mce_relay::{Event, Place};
use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{IntCounter, IntCounterVec, Opts};

use super::{VmEvent, What};

/// Counters that begin with the VMM and go on when the guest starts over.
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
    boots: IntCounter,
}

/// A family of counters. The names are ours and well-formed, and nothing else can be wrong with them.
fn family(name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    #[expect(clippy::expect_used, reason = "it depends on constants alone, and tests make one")]
    IntCounterVec::new(Opts::new(name, help), labels).expect("a well-formed name")
}

fn counter(name: &str, help: &str) -> IntCounter {
    #[expect(clippy::expect_used, reason = "as in `family`")]
    IntCounter::new(name, help).expect("a well-formed name")
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
                "Tellings that were read back from where the guest finds them, by channel and form.",
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
            boots: counter("mce_relay_boots_total", "Boots of the guest."),
        }
    }
}

impl Counts {
    /// Counts one event.
    pub fn count(&self, what: &What) {
        match what {
            What::Vm(event) => {
                self.events.with_label_values(&["vm"]).inc();
                if matches!(event, VmEvent::Booting { .. }) {
                    self.boots.inc();
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
                    Thread::Relay => "relay",
                    Thread::Vcpu(_) => "vcpu",
                    Thread::Caller => "caller",
                    Thread::Other => "other",
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
            Event::Injected { by: Injection::Mce { form, .. }, .. } => {
                self.injected.with_label_values(&["mce", &form.to_string()]).inc();
            }
            Event::Injected { by: Injection::Ghes { .. }, .. } => {
                self.injected.with_label_values(&["ghes", "CPER"]).inc();
            }
            Event::Acknowledged { place, .. } => {
                let channel = match place {
                    Place::Mce { .. } => "mce",
                    Place::Ghes { .. } => "ghes",
                };
                self.acknowledged.with_label_values(&[channel]).inc();
            }
            Event::Undeliverable { kind, .. } => {
                self.undeliverable.with_label_values(&[&kind.to_string()]).inc();
            }
            Event::Again { .. }
            | Event::Waiting { .. }
            | Event::Healed { .. }
            | Event::Removed { .. }
            | Event::Predicted { .. }
            | Event::Scanned { .. } => {}
        }
    }

    /// All of them, for an encoder.
    #[must_use]
    pub fn families(&self) -> Vec<MetricFamily> {
        let Self { events, signals, signals_lost, signals_outside, seen, .. } = self;
        let Self { injected, acknowledged, undeliverable, boots, .. } = self;
        let all: [&dyn Collector; 9] = [
            events,
            signals,
            signals_lost,
            signals_outside,
            seen,
            injected,
            acknowledged,
            undeliverable,
            boots,
        ];
        // A family that nothing was counted in has no lines, which the encoder takes for a fault.
        let families = all.into_iter().flat_map(Collector::collect);
        families.filter(|family| !family.get_metric().is_empty()).collect()
    }
}
