//! `GET /metrics`: counts and times in Prometheus' text format.
//!
//! Counters and durations are kept as events happen ([`Counts`](crate::events::counts::Counts)), and never fall. The
//! present state is read from the ledger at each request.

use std::time::{Duration, SystemTime};

use mce_relay::{Ledger, State};
use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{Gauge, GaugeVec, Opts, TextEncoder};

use super::current::Running;
use crate::events::hub::Hub;

/// Names of the states, in the order in which a page passes them.
const STATES: [&str; 6] =
    ["seen", "waiting", "injected", "acknowledged", "undeliverable", "removed"];

/// All metrics: the counters, and those of the VM that runs, if one does.
pub(super) fn text(running: Option<&Running>, hub: &Hub) -> String {
    let mut families = hub.counts().families();
    if let Some(running) = running {
        match of(running) {
            Ok(more) => families.extend(more),
            Err(error) => log::warn!("metrics: {error}"),
        }
    }
    TextEncoder::new().encode_to_string(&families).unwrap_or_else(|error| {
        // The encoder fails only for families without lines, of which there are none.
        log::warn!("metrics: {error}");
        String::new()
    })
}

fn of(running: &Running) -> Result<Vec<MetricFamily>, prometheus::Error> {
    let info = running.info();
    let about = GaugeVec::new(
        Opts::new("mce_relay_info", "What runs; always 1."),
        &["version", "vendor", "mcg_cap", "ao_channel"],
    )?;
    let vendor = format!("{:?}", info.vendor).to_lowercase();
    let channel = info.ao_channel.to_string();
    about.with_label_values(&[&*info.version, &vendor, &info.mcg_cap, &channel]).set(1.0);
    let paused = Gauge::new("mce_relay_paused", "1 while the vCPUs are held.")?;
    paused.set(f64::from(u8::from(info.paused)));
    let panicked = Gauge::new(
        "mce_relay_panicked",
        "1 from when the guest says that its kernel has panicked until it starts over.",
    )?;
    panicked.set(f64::from(u8::from(info.panic.is_some())));
    let alive = Gauge::new(
        "mce_relay_alive",
        "1 as long as the relay's thread is there; without it nobody takes AOs.",
    )?;
    alive.set(f64::from(u8::from(info.relay_alive)));
    let scans = Gauge::new(
        "mce_relay_scans",
        "Looks through guest RAM for bad pages that no signal named, in this boot.",
    )?;
    scans.set(number(running.relay.scans()));

    let mut families = of_ledger(|look| running.relay.inspect(|ledger| look(ledger)))?;
    let more =
        [about.collect(), paused.collect(), panicked.collect(), alive.collect(), scans.collect()];
    families.extend(more.concat());
    Ok(families)
}

/// Counts are exact up to 2^53.
#[allow(clippy::cast_precision_loss)]
fn number(count: u64) -> f64 {
    count as f64
}

fn seconds(from: SystemTime, to: SystemTime) -> f64 {
    // The clock may have been set back.
    to.duration_since(from).unwrap_or(Duration::ZERO).as_secs_f64()
}

/// Pages that are counted at once, so that the relay's lock is held for less than a millisecond.
const AT_ONCE: usize = 4096;

/// How many pages are in which state.
#[derive(Default)]
struct Pages {
    /// How many are in each of [`STATES`].
    states: [u64; STATES.len()],
    /// How long the page that has waited longest has waited, in seconds.
    oldest_waiting: f64,
    past: usize,
    predicted: usize,
}

impl Pages {
    /// Counts the pages from `gpa` on, at most [`AT_ONCE`]; returns where the next ones begin.
    fn count(&mut self, ledger: &Ledger, gpa: u64, now: SystemTime) -> Option<u64> {
        (self.past, self.predicted) = (ledger.past().len(), ledger.predicted_len());
        let mut left = AT_ONCE;
        for page in ledger.within(gpa..u64::MAX) {
            if left == 0 {
                return Some(page.gpa);
            }
            left -= 1;
            let state = match page.state {
                State::Seen => 0,
                State::Waiting { .. } => 1,
                State::Injected { .. } => 2,
                State::Acknowledged { .. } => 3,
                State::Undeliverable { .. } => 4,
                State::Removed | State::Healed => 5,
            };
            self.states[state] += 1;
            if state < 2 {
                let waits = seconds(page.times.waiting_since(), now);
                self.oldest_waiting = self.oldest_waiting.max(waits);
            }
        }
        None
    }
}

/// Metrics of the ledger that `inspect` gives access to, a part at a time.
fn of_ledger(
    inspect: impl Fn(&mut dyn FnMut(&Ledger)),
) -> Result<Vec<MetricFamily>, prometheus::Error> {
    let (mut counted, mut next, now) = (Pages::default(), Some(0), SystemTime::now());
    while let Some(gpa) = next {
        inspect(&mut |ledger| next = counted.count(ledger, gpa, now));
    }
    let pages = GaugeVec::new(
        Opts::new("mce_relay_pages", "Bad pages of 4 KiB in this boot, by what became of them."),
        &["state"],
    )?;
    for (state, count) in STATES.iter().zip(counted.states) {
        pages.with_label_values(&[state]).set(number(count));
    }
    let past =
        Gauge::new("mce_relay_past_pages", "Pages that were bad once and are so no longer.")?;
    let predicted =
        Gauge::new("mce_relay_predicted_pages", "Whole pages that are predicted to fail.")?;
    let waiting = Gauge::new(
        "mce_relay_oldest_waiting_seconds",
        "How long the page that has waited longest to be told of has waited; 0 when none waits.",
    )?;
    waiting.set(counted.oldest_waiting);
    past.set(number(counted.past as u64));
    predicted.set(number(counted.predicted as u64));
    let all: [&dyn Collector; 4] = [&pages, &past, &predicted, &waiting];
    Ok(all.into_iter().flat_map(Collector::collect).collect())
}

#[cfg(test)]
mod tests {
    use mce_relay::{FailureKind, FoundBy, Place, WaitReason};

    use super::*;
    use crate::api::types::vm_event::VmEvent;
    use crate::events::entry::What;

    #[test]
    fn a_ledger_in_numbers() {
        let oldest = |ledger: &Ledger| -> f64 {
            let text = TextEncoder::new()
                .encode_to_string(&of_ledger(|look| look(ledger)).unwrap())
                .unwrap();
            let line = text.lines().find(|line| line.starts_with("mce_relay_oldest")).unwrap();
            line.rsplit(' ').next().unwrap().parse().unwrap()
        };
        let mut ledger = Ledger::default();
        let seen = SystemTime::now() - Duration::from_secs(100);
        for page in 0..3 {
            let (gpa, kind) = (page << 12, FailureKind::ActionOptional);
            ledger.enter(gpa, gpa, 12, kind, FoundBy::Signal, seen);
        }
        let place = Place::Ghes { record: 1 };
        ledger.set(0, State::Injected { place }, seen + Duration::from_millis(20));
        ledger.set(0, State::Acknowledged { place }, seen + Duration::from_secs(2));
        let families = of_ledger(|look| look(&ledger)).unwrap();
        let text = TextEncoder::new().encode_to_string(&families).unwrap();
        for line in [
            "mce_relay_pages{state=\"acknowledged\"} 1",
            "mce_relay_pages{state=\"seen\"} 2",
            "mce_relay_pages{state=\"undeliverable\"} 0",
        ] {
            assert!(text.lines().any(|known| known == line), "{line}: {text}");
        }
        // More than are counted in one go.
        for page in 3..2 * AT_ONCE as u64 + 1 {
            ledger.enter(
                page << 12,
                page << 12,
                12,
                FailureKind::ActionOptional,
                FoundBy::Scan,
                seen,
            );
        }
        let families = of_ledger(|look| look(&ledger)).unwrap();
        let text = TextEncoder::new().encode_to_string(&families).unwrap();
        assert!(text.contains("mce_relay_pages{state=\"seen\"} 8192"), "{text}");
        assert!((100.0..200.0).contains(&oldest(&ledger)), "since it became known");

        // One that was told of, and begins to wait again.
        let mut ledger = Ledger::default();
        ledger.enter(0, 0, 12, FailureKind::ActionOptional, FoundBy::Signal, seen);
        ledger.set(0, State::Acknowledged { place }, seen);
        assert_eq!(oldest(&ledger).to_bits(), 0.0_f64.to_bits());
        let wait = WaitReason::Mcip { vcpu: 0 };
        ledger.set(0, State::Waiting { wait }, seen + Duration::from_secs(90));
        assert!((10.0..99.0).contains(&oldest(&ledger)), "since it waits");
    }

    #[test]
    fn events_are_counted() {
        let hub = Hub::default();
        assert_eq!(text(None, &hub).lines().filter(|line| line.contains("boots")).count(), 3);
        let (vendor, mcg_cap) = (mce_relay::mca::Vendor::Amd, String::new());
        hub.emit(What::Vm(VmEvent::Booting { boot: 1, unix_time: 0.0, mcg_cap, vendor }));
        hub.emit(What::Memory(mce_relay::Event::Overrun { signals: 7 }));
        let text = text(None, &hub);
        for line in [
            "mce_relay_boots_total 1",
            "mce_relay_signals_lost_total 7",
            "mce_relay_events_total{source=\"memory\"} 1",
        ] {
            assert!(text.lines().any(|known| known == line), "{line}: {text}");
        }
    }
}
