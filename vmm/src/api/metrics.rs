//! `GET /metrics`: counts and times in Prometheus' text format.
//!
//! Counters are kept as events happen ([`Counts`](crate::events::counts::Counts)). What is so now, and how long things took, is made
//! from the ledger when somebody asks.

use std::time::{Duration, SystemTime};

use mce_relay::Ledger;
use mce_relay::ledger::{State, Times};
use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{Gauge, GaugeVec, Histogram, HistogramOpts, Opts, TextEncoder};

use super::types::Running;
use crate::events::Hub;

/// Upper ends of the histograms' buckets, in seconds: from a machine check that goes at once to an
/// AMD guest's poll, five minutes later.
const BUCKETS: [f64; 12] = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0, 600.0];

/// Names of the states, in the order of a page's way.
const STATES: [&str; 6] =
    ["seen", "waiting", "injected", "acknowledged", "undeliverable", "removed"];

/// Everything there is to say of the VM that runs, if one does.
pub(super) fn text(running: Option<&Running>, hub: &Hub) -> String {
    let mut families = hub.counts().families();
    if let Some(running) = running {
        match of(running) {
            Ok(more) => families.extend(more),
            Err(error) => log::warn!("metrics: {error}"),
        }
    }
    TextEncoder::new().encode_to_string(&families).unwrap_or_else(|error| {
        // Its only faults are families without lines, of which there are none.
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
    let scans = Gauge::new(
        "mce_relay_scans",
        "Looks through guest RAM for bad pages that no signal named, in this boot.",
    )?;
    scans.set(number(running.relay.scans()));

    let mut families = running.relay.inspect(of_ledger)?;
    families.extend([about.collect(), paused.collect(), scans.collect()].concat());
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

fn of_ledger(ledger: &Ledger) -> Result<Vec<MetricFamily>, prometheus::Error> {
    let pages = GaugeVec::new(
        Opts::new("mce_relay_pages", "Bad pages of 4 KiB in this boot, by what became of them."),
        &["state"],
    )?;
    STATES.iter().for_each(|state| pages.with_label_values(&[state]).set(0.0));
    let past =
        Gauge::new("mce_relay_past_pages", "Pages that were bad once and are so no longer.")?;
    let predicted =
        Gauge::new("mce_relay_predicted_pages", "Whole pages that are predicted to fail.")?;
    let waiting = Gauge::new(
        "mce_relay_oldest_waiting_seconds",
        "How long the page that has waited longest to be told of has been known; 0 when none waits.",
    )?;
    let histogram = |name: &str, help: &str| {
        Histogram::with_opts(HistogramOpts::new(name, help).buckets(BUCKETS.into()))
    };
    let told = histogram(
        "mce_relay_told_seconds",
        "From a page's becoming known to its being told, for every page told so far.",
    )?;
    let taken = histogram(
        "mce_relay_acknowledged_seconds",
        "From a page's becoming known to the guest's having taken it.",
    )?;

    let now = SystemTime::now();
    let mut oldest = 0.0_f64;
    let note = |times: &Times| {
        let Times { seen, injected, acknowledged, .. } = *times;
        injected.into_iter().for_each(|at| told.observe(seconds(seen, at)));
        acknowledged.into_iter().for_each(|at| taken.observe(seconds(seen, at)));
    };
    for page in ledger.pages() {
        let state = match page.state {
            State::Seen => 0,
            State::Waiting { .. } => 1,
            State::Injected { .. } => 2,
            State::Acknowledged { .. } => 3,
            State::Undeliverable { .. } => 4,
            State::Removed | State::Healed => 5,
        };
        pages.with_label_values(&[STATES[state]]).inc();
        if state < 2 {
            oldest = oldest.max(seconds(page.times.seen, now));
        }
        note(&page.times);
    }
    ledger.past().for_each(|page| note(&page.times));
    waiting.set(oldest);
    past.set(number(ledger.past().count() as u64));
    predicted.set(number(ledger.predicted().count() as u64));
    let all: [&dyn Collector; 6] = [&pages, &past, &predicted, &waiting, &told, &taken];
    Ok(all.into_iter().flat_map(Collector::collect).collect())
}

#[cfg(test)]
mod tests {
    use mce_relay::FoundBy;
    use mce_relay::ledger::Place;
    use mce_relay::mca::Kind;

    use super::*;
    use crate::events::{VmEvent, What};

    #[test]
    fn a_ledger_in_numbers() {
        let mut ledger = Ledger::default();
        let seen = SystemTime::now() - Duration::from_secs(100);
        for page in 0..3 {
            let (gpa, kind) = (page << 12, Kind::ActionOptional);
            ledger.enter(gpa, gpa, 12, kind, FoundBy::Signal, seen);
        }
        let place = Place::Ghes { record: 1 };
        ledger.set(0, State::Injected { place }, seen + Duration::from_millis(20));
        ledger.set(0, State::Acknowledged { place }, seen + Duration::from_secs(2));
        let families = of_ledger(&ledger).unwrap();
        let text = TextEncoder::new().encode_to_string(&families).unwrap();
        for line in [
            "mce_relay_pages{state=\"acknowledged\"} 1",
            "mce_relay_pages{state=\"seen\"} 2",
            "mce_relay_pages{state=\"undeliverable\"} 0",
            "mce_relay_told_seconds_bucket{le=\"0.01\"} 0",
            "mce_relay_told_seconds_bucket{le=\"0.05\"} 1",
            "mce_relay_acknowledged_seconds_bucket{le=\"5\"} 1",
            "# TYPE mce_relay_told_seconds histogram",
        ] {
            assert!(text.lines().any(|known| known == line), "{line}: {text}");
        }
        let oldest = text.lines().find(|line| line.starts_with("mce_relay_oldest")).unwrap();
        let oldest: f64 = oldest.rsplit(' ').next().unwrap().parse().unwrap();
        assert!((100.0..200.0).contains(&oldest), "{oldest}");
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
