//! What a report says of a course of events.

use std::fmt::Write;

use mce_relay::{FailureKind, State};
use serde_json::{Value, json};

use super::builder::Builder;
use super::model::{LostTo, Origin, Page, Report, Toucher};

mod extents;
mod forged;
mod ledger;
mod midway;

const FIXTURE: &str = include_str!("../../../../tests/report/events.jsonl");

pub(super) fn report_of(text: &str) -> Report {
    let mut builder = Builder::default();
    text.lines().for_each(|line| builder.line(line));
    builder.finish(Origin::default(), None, 1e9)
}

/// Events of memory, each with its time in microseconds.
fn events(events: &[(u64, &str, Value)]) -> String {
    let mut text = String::new();
    for (micros, event, properties) in events {
        let source = if ["booting", "reset", "ended"].contains(event) { "vm" } else { "memory" };
        let timestamp = json!({"secs": micros / 1_000_000, "nanos": micros % 1_000_000 * 1000});
        let line = json!({"timestamp": timestamp, "source": source, "event": event, "properties": properties});
        writeln!(text, "{line}").unwrap();
    }
    text
}

fn caught(kind: &str, hva: &str, thread: Value) -> Value {
    json!({"kind": kind, "hva": hva, "lsb": 12, "thread": thread})
}

fn seen(gpa: &str, hva: &str, kind: &str, found_by: &str) -> Value {
    json!({"gpa": gpa, "hva": hva, "kind": kind, "found_by": found_by, "extent": 4096, "pages": 1})
}

fn injected(gpa: &str) -> Value {
    json!({"gpa": gpa, "channel": "ghes", "record": 1, "pages": 1, "after_micros": 900})
}

fn acknowledged(gpa: &str) -> Value {
    json!({"gpa": gpa, "channel": "ghes", "record": 1})
}

fn booting(boot: u32) -> Value {
    json!({"boot": boot, "unix_time": 1e9, "mcg_cap": "0x10a", "vendor": "amd"})
}

fn steps(page: &Page) -> Vec<&str> {
    page.steps.iter().map(|step| step.what).collect()
}

#[test]
fn one_page_from_caught_to_acknowledged() {
    let report = report_of(&events(&[
        (10, "booting", booting(1)),
        (100, "caught", caught("AO", "0x7f0000005123", json!("relay"))),
        (150, "seen", seen("0x5000", "0x7f0000005000", "AO", "signal")),
        (160, "waiting", json!({"gpa": "0x5000", "kind": "AO", "wait": {"reason": "pace"}})),
        (1100, "injected", injected("0x5000")),
        (4100, "acknowledged", acknowledged("0x5000")),
    ]));
    let [page] = &report.pages[..] else { panic!("{:#?}", report.pages) };
    assert_eq!(steps(page), ["caught", "seen", "waiting", "injected", "acknowledged"]);
    assert_eq!((page.gpa, page.hva, page.boot), (0x5000, Some(0x7f00_0000_5000), Some(1)));
    let told = &page.told[0];
    assert_eq!((told.after, told.taken_after), (Some(1000), Some(3000)));
    assert_eq!((page.lost_to, page.forged), (LostTo::Told, false));
    let totals = &report.totals;
    assert_eq!((totals.bad, totals.bytes, totals.told, totals.acknowledged), (1, 4096, 1, 1));
    assert_eq!((totals.waiting, totals.undeliverable, totals.healed, totals.removed), (0, 0, 0, 0));
    assert_eq!(report.vmms[0].began, Some(1e9 - 1e-5));
}

#[test]
fn an_ao_and_then_an_ar_of_the_same_page() {
    let report = report_of(&events(&[
        (100, "caught", caught("AO", "0x5000", json!("relay"))),
        (150, "seen", seen("0x5000", "0x5000", "AO", "signal")),
        (300, "injected", injected("0x5000")),
        (500, "acknowledged", acknowledged("0x5000")),
        (1000, "caught", caught("AR", "0x5040", json!({"vcpu": 3}))),
        (1010, "again", json!({"gpa": "0x5000", "kind": "AR"})),
        (
            1020,
            "injected",
            json!({"gpa": "0x5000", "channel": "mce", "vcpu": 3, "bank": 9, "form": "SRAR",
            "reach": "lmce", "status": "0x1", "mcg_status": "0x7", "after_micros": null}),
        ),
        (
            1050,
            "acknowledged",
            json!({"gpa": "0x5000", "channel": "mce", "vcpu": 3, "bank": 9, "form": "SRAR"}),
        ),
    ]));
    let [page] = &report.pages[..] else { panic!("{:#?}", report.pages) };
    assert_eq!(
        (page.first_kind, page.kind),
        (FailureKind::ActionOptional, FailureKind::ActionRequired)
    );
    assert_eq!((&page.touched_by[..], page.lost_to), (&[Toucher::Vcpu(3)][..], LostTo::Guest));
    let times: Vec<_> = page.told.iter().map(|told| (told.after, told.taken_after)).collect();
    assert_eq!(times, [(Some(200), Some(200)), (Some(20), Some(30))]);
    assert_eq!(report.latencies.injected.count, 2);
    assert_eq!(steps(page)[4..6], ["caught", "again"]);
}

/// An AO of what waits does not begin the wait anew; the touch of it does.
#[test]
fn what_waits_has_waited_since_its_first_signal() {
    for (kind, after) in [("AO", 1000), ("AR", 200)] {
        let report = report_of(&events(&[
            (100, "seen", seen("0x5000", "0x5000", "AO", "scan")),
            (900, "caught", caught(kind, "0x5000", json!({"vcpu": 0}))),
            (910, "again", json!({"gpa": "0x5000", "kind": kind})),
            (1100, "injected", injected("0x5000")),
            (1200, "injected", injected("0x5000")),
        ]));
        let told: Vec<_> = report.pages[0].told.iter().map(|told| told.after).collect();
        // The second time is without a signal, and the event's own figure is not of the first.
        assert_eq!(told, [Some(after), Some(900)], "{kind}");
    }
}

#[test]
fn several_boots() {
    let report = report_of(&events(&[
        (5, "seen", seen("0x5000", "0x5000", "AO", "signal")),
        (10, "booting", booting(1)),
        (100, "injected", injected("0x5000")),
        (200, "reset", json!({"reason": "the guest reset itself", "by_policy": false})),
        (210, "healed", json!({"gpa": "0x5000"})),
        (220, "booting", booting(2)),
        (300, "seen", seen("0x5000", "0x5000", "AR", "signal")),
    ]));
    let lives: Vec<_> = report.pages.iter().map(|page| (page.boot, page.state)).collect();
    assert_eq!(lives, [(Some(1), State::Healed), (Some(2), State::Seen)]);
    let boots = &report.vmms[0].boots;
    assert_eq!((boots.len(), boots[0].end.as_deref()), (2, Some("the guest reset itself")));
    assert_eq!((report.totals.healed, report.totals.waiting, report.vmms.len()), (1, 1, 1));
    assert_eq!(report.pages[1].touched_by, [Toucher::Guest]);
}

/// A file that several VMMs have written to.
#[test]
fn several_vmms() {
    let one = events(&[
        (10, "booting", booting(1)),
        (500, "seen", seen("0x5000", "0x5000", "AO", "signal")),
    ]);
    let ended = events(&[(600, "ended", json!({"how": "x", "status": 0}))]);
    // Time that goes back, an end, and a first boot once more each begin another.
    let late = events(&[(9000, "seen", seen("0x5000", "0x5000", "AO", "signal"))]);
    let report = report_of(
        &[one.clone(), one, ended, late, events(&[(9001, "booting", booting(1))])].concat(),
    );
    let vmms: Vec<usize> = report.pages.iter().map(|page| page.vmm).collect();
    assert_eq!((vmms, report.vmms.len()), (vec![0, 1, 2], 3));
    let again = events(&[(1, "booting", booting(1)), (2, "booting", booting(1))]);
    assert_eq!(report_of(&again).vmms.len(), 2);
}

#[test]
fn to_whom_it_was_lost() {
    let cannot = json!({"gpa": "0x3000", "kind": "AR", "vcpu": 0, "why": {"reason": "no-form"}, "rip": null});
    let report = report_of(&events(&[
        (1, "caught", caught("AR", "0x1000", json!("other"))),
        (2, "seen", seen("0x1000", "0x1000", "AO", "access")),
        (3, "seen", seen("0x2000", "0x2000", "AO", "scan")),
        (4, "seen", seen("0x3000", "0x3000", "AR", "signal")),
        (5, "undeliverable", cannot),
        (6, "caught", caught("AO", "0x9000", json!("relay"))),
        (7, "outside", json!({"kind": "AO", "hva": "0x9000", "lsb": 12})),
    ]));
    let whom: Vec<LostTo> = report.pages.iter().map(|page| page.lost_to).collect();
    assert_eq!(whom, [LostTo::Vmm, LostTo::Nobody, LostTo::GuestUntold]);
    assert_eq!((report.totals.undeliverable, report.happened.len()), (1, 1));
    assert_eq!(report.totals.lost_to[&LostTo::GuestUntold], 1);
}

#[test]
fn what_cannot_be_read_is_counted() {
    let report = report_of("\n{\n\"x\"\n");
    assert_eq!((report.log.events, report.log.broken), (0, 2));
    assert_eq!(report.log.first_broken.as_ref().map(|first| first.line), Some(2));
    let missed = r#"{"timestamp":{"secs":9,"nanos":0},"source":"monitor","event":"missed","properties":{"events":7}}"#;
    let report =
        report_of(&format!("{missed}\n{}", events(&[(1, "healed", json!({"gpa": "0x1000"}))])));
    assert_eq!(
        (report.log.missed, report.vmms.len()),
        (7, 1),
        "its time is later than what follows"
    );
}

#[test]
fn the_file_of_the_tests() {
    let report = report_of(FIXTURE);
    let log = &report.log;
    assert_eq!((log.broken, log.unknown.get("memory: cooled")), (1, Some(&1)));
    let totals = &report.totals;
    assert_eq!((totals.bad, totals.forged, totals.undeliverable), (521, 1, 1));
    assert_eq!(totals.lost_to[&LostTo::GuestUntold], 1, "healed since");
    assert_eq!((totals.healed, totals.removed, totals.waiting), (8, 512, 0));
    assert_eq!((report.vmms.len(), report.vmms[0].boots.len(), report.rescued.len()), (1, 2, 1));
    let twice = report.pages.iter().filter(|page| page.gpa == 0x28f_9000).count();
    assert_eq!(twice, 2, "bad in both boots");
    let by_json = serde_json::to_value(&report).unwrap();
    assert_eq!(by_json["pages"][0]["gpa"], "0x5000");
    assert_eq!(by_json["totals"]["bad"], 521);
}

/// Addresses and numbers that no VMM writes.
#[test]
fn numbers_that_cannot_be_are_no_panic() {
    for text in ["0xffffffffffffffff", "0x0"] {
        let huge = json!({"gpa": text, "hva": text, "kind": "AO", "found_by": "signal", "extent": u64::MAX, "pages": u64::MAX});
        let whole = json!({"gpa": text, "hva": text, "kind": "AO", "found_by": "signal", "extent": 1 << 30, "pages": u64::MAX});
        let report = report_of(&events(&[
            (
                1,
                "caught",
                json!({"kind": "AR", "hva": text, "lsb": 255, "thread": {"vcpu": u64::MAX}}),
            ),
            (2, "seen", huge),
            (3, "seen", whole),
            (
                4,
                "rescued",
                json!({"gpa": text, "hva": text, "extent": u64::MAX, "kept": u64::MAX, "gone": u64::MAX,
                "micros": u64::MAX, "held_micros": u64::MAX}),
            ),
            (5, "removed", json!({"gpa": text, "len": u64::MAX})),
            (6, "again", json!({"gpa": text, "kind": "AR"})),
        ]));
        assert!(!report.pages.is_empty());
        let _ = super::html::page(&report, &super::raw::Raw::default());
    }
}
