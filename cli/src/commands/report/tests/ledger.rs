//! What the ledger adds to events, which are newer.

use mce_relay::{FoundBy, Place};
use mce_relay_vmm::api::types::vm::Status;

use super::*;
use crate::commands::report::model::{Course, Lacks};
use crate::testing::an_info;

/// The times of a page, of which `at` are seconds after 1e9.
fn times(at: &[(&str, f64)]) -> Value {
    let mut times = json!({"seen": 1e9, "waiting": null, "injected": null, "acknowledged": null,
        "undeliverable": null, "healed": null, "removed": null});
    for (state, at) in at {
        times[state] = (1e9 + at).into();
    }
    times
}

fn ledgered(gpa: &str, kind: &str, state: Value, at: &[(&str, f64)]) -> Value {
    let mut page = json!({"gpa": gpa, "hva": gpa, "lsb": 12, "kind": kind, "found_by": "signal", "signals": 1,
        "times": times(at)});
    for (name, value) in state.as_object().unwrap() {
        page[name] = value.clone();
    }
    page
}

fn taken() -> Value {
    json!({"state": "acknowledged", "channel": "ghes", "record": 1})
}

fn of(pages: Value, past: Value) -> Status {
    Status {
        vm: an_info(),
        pages: serde_json::from_value(pages).unwrap(),
        predicted: Vec::new(),
        past: serde_json::from_value(past).unwrap(),
        rescued: Vec::new(),
    }
}

fn with(text: &str, status: &Status) -> Report {
    let mut builder = Builder::default();
    text.lines().for_each(|line| builder.line(line));
    builder.finish(Origin::default(), Some(status), 1e9)
}

#[test]
fn the_ledger_has_what_events_no_longer_have() {
    let page = |gpa| ledgered(gpa, "AR", taken(), &[("acknowledged", 0.0)]);
    let status = of(json!([page("0x1000"), page("0x2000")]), json!([]));
    let report = with(&events(&[(1, "seen", seen("0x1000", "0x1000", "AO", "scan"))]), &status);
    assert_eq!((report.pages.len(), report.log.by_ledger), (2, 1));
    let added = &report.pages[1];
    assert_eq!((added.gpa, added.steps.len(), added.lost_to), (0x2000, 0, LostTo::Guest));
    assert_eq!((added.boot, added.course), (Some(status.vm.boot), Course::Ledger));
    assert_eq!((report.totals.bad, report.totals.told, report.totals.acknowledged), (2, 2, 2));
    assert!(report.memory.ram.is_some());
}

/// The ledger was written before the guest started over, and the VMM was killed after that.
#[test]
fn a_ledger_that_is_older_than_the_events() {
    const S: u64 = 1_000_000;
    let stale = of(
        json!([ledgered("0x1000", "AO", taken(), &[("seen", 2.0), ("acknowledged", 3.0)])]),
        json!([]),
    );
    let course = [
        (2 * S, "seen", seen("0x1000", "0x1000", "AO", "signal")),
        (3 * S, "injected", injected("0x1000")),
        (3 * S + 1, "acknowledged", acknowledged("0x1000")),
        (9 * S, "reset", json!({"reason": "x", "by_policy": false})),
        (9 * S, "healed", json!({"gpa": "0x1000"})),
    ];
    let begin = events(&[(0, "booting", booting(1))]);
    for begin in [begin.as_str(), ""] {
        let report = with(&(begin.to_owned() + &events(&course)), &stale);
        assert_eq!((report.pages.len(), report.pages[0].state), (1, State::Healed), "{begin}");
        assert_eq!((report.log.by_ledger, report.log.filled, report.totals.bad), (0, 0, 1));
    }
    // It went bad again, after the ledger was written.
    let again = events(&[
        (
            10 * S,
            "booting",
            json!({"boot": 2, "unix_time": 1e9 + 10.0, "mcg_cap": "0x10a", "vendor": "amd"}),
        ),
        (20 * S, "seen", seen("0x1000", "0x1000", "AO", "scan")),
    ]);
    let report = with(&(begin.clone() + &events(&course) + &again), &stale);
    let lives: Vec<_> = report.pages.iter().map(|page| (page.state, page.told_before)).collect();
    assert_eq!(lives, [(State::Healed, false), (State::Seen, false)]);
    // Only the event of its healing is left.
    let report = with(&(begin.clone() + &events(&course[3..])), &stale);
    assert_eq!((report.pages.len(), report.pages[0].state), (1, State::Healed));
    assert_eq!((report.totals.acknowledged, report.pages[0].lost_to), (1, LostTo::Told));
    // The ledger has one that is newer than that healing.
    let newer = of(json!([ledgered("0x1000", "AO", taken(), &[("seen", 30.0)])]), json!([]));
    let report = with(&(begin + &events(&course)), &newer);
    assert_eq!((report.pages.len(), report.log.by_ledger), (2, 1));
}

/// One late event does not hide what the ledger knows.
#[test]
fn the_ledger_fills_what_late_events_lack() {
    let mut page = ledgered("0x1000", "AR", taken(), &[("injected", 1.0), ("acknowledged", 2.0)]);
    page["hva"] = "0x7f0000001000".into();
    let late = events(&[(5, "acknowledged", acknowledged("0x1000"))]);
    let report = with(&late, &of(json!([page.clone()]), json!([])));
    let [filled] = &report.pages[..] else { panic!("{:#?}", report.pages) };
    assert_eq!((filled.kind, filled.hva), (FailureKind::ActionRequired, Some(0x7f00_0000_1000)));
    assert_eq!((filled.found_by, filled.lost_to), (Some(FoundBy::Signal), LostTo::Guest));
    assert_eq!((filled.course, filled.by_ledger, report.log.filled), (Course::Late, true, 1));
    page["kind"] = "AO".into();
    page["found_by"] = "access".into();
    let report = with(&late, &of(json!([page]), json!([])));
    assert_eq!((report.pages[0].lost_to, report.totals.unknown), (LostTo::Vmm, 0));
}

/// The newer state wins, where times tell which one that is, and a removal.
#[test]
fn the_newer_state_wins() {
    let wait = json!({"gpa": "0x1000", "kind": "AO", "wait": {"reason": "pace"}});
    let course = [(100, "seen", seen("0x1000", "0x1000", "AO", "signal")), (200, "waiting", wait)];
    let begin = events(&[(0, "booting", booting(1))]);
    let removed = of(
        json!([ledgered("0x1000", "AO", json!({"state": "removed"}), &[("removed", 9.0)])]),
        json!([]),
    );
    for begin in [begin.as_str(), ""] {
        let report = with(&(begin.to_owned() + &events(&course)), &removed);
        assert_eq!((report.pages.len(), report.pages[0].state), (1, State::Removed));
    }
    for (at, newer) in [(9.0, true), (0.0, false)] {
        let page = ledgered("0x1000", "AO", taken(), &[("acknowledged", at)]);
        let report = with(&(begin.clone() + &events(&course)), &of(json!([page]), json!([])));
        let place = Place::Ghes { record: 1 };
        assert_eq!(report.pages[0].state == State::Acknowledged { place }, newer);
    }
}

/// By its times: it was told before it was removed.
#[test]
fn what_is_only_in_the_ledger_was_told_by_its_times() {
    let at = [("acknowledged", 3.0), ("removed", 9.0)];
    let gone = ledgered("0x1000", "AO", json!({"state": "removed"}), &at);
    let at = [("injected", 3.0), ("undeliverable", 4.0), ("removed", 9.0)];
    let untold = ledgered("0x2000", "AR", json!({"state": "removed"}), &at);
    let report = with("", &of(json!([gone, untold]), json!([])));
    let totals = &report.totals;
    assert_eq!((totals.told, totals.acknowledged, totals.undeliverable), (2, 1, 1));
    let whom: Vec<LostTo> = report.pages.iter().map(|page| page.lost_to).collect();
    assert_eq!(whom, [LostTo::Told, LostTo::GuestUntold]);
    assert_eq!(report.pages[0].boot, None, "removed in which boot is not known");
}

#[test]
fn what_was_bad_once_is_in_the_ledger_too() {
    let healed = |gpa: &str, seen: f64, healed: f64| {
        ledgered(gpa, "AO", json!({"state": "healed"}), &[("seen", seen), ("healed", healed)])
    };
    let past = json!([
        healed("0x1000", 2.0, 5.0),
        healed("0x1000", 60.0, 90.0),
        healed("0x2000", 2.0, 5.0)
    ]);
    let status = of(json!([]), past);
    let text = events(&[
        (0, "booting", booting(1)),
        (60_000_000, "seen", seen("0x1000", "0x1000", "AO", "scan")),
        (90_000_000, "healed", json!({"gpa": "0x1000"})),
        (95_000_000, "seen", seen("0x2000", "0x2000", "AO", "scan")),
    ]);
    let report = with(&text, &status);
    let mut lives: Vec<_> = report.pages.iter().map(|page| (page.gpa, page.state)).collect();
    lives.sort_by_key(|(gpa, state)| (*gpa, state.to_string()));
    let expected = [
        (0x1000, State::Healed),
        (0x1000, State::Healed),
        (0x2000, State::Healed),
        (0x2000, State::Seen),
    ];
    assert_eq!((lives, report.log.by_ledger), (expected.to_vec(), 2));
    // Without a clock the same, as the newest of each are those of the events.
    let text = text.lines().skip(1).map(|line| format!("{line}\n")).collect::<String>();
    let report = with(&text, &status);
    assert_eq!((report.pages.len(), report.log.by_ledger), (4, 2));
}

#[test]
fn predictions_and_rescues_of_the_ledger() {
    let rescued = |gpa: &str| {
        json!({"gpa": gpa, "hva": gpa, "extent": 2 << 20, "kept": 511, "gone": 1,
        "micros": 1834, "held_micros": null})
    };
    let predicted =
        |gpa: &str| json!({"gpa": gpa, "state": "seen", "times": times(&[("seen", 1.0)])});
    let status = Status {
        predicted: serde_json::from_value(json!([predicted("0x1000"), predicted("0x2000")]))
            .unwrap(),
        rescued: serde_json::from_value(json!([rescued("0x200000"), rescued("0x400000")])).unwrap(),
        ..of(json!([]), json!([]))
    };
    let mut done = json!({"gpa": "0x1000"});
    for (name, value) in taken().as_object().unwrap() {
        done[name] = value.clone();
    }
    let text = events(&[
        (0, "booting", booting(1)),
        (1_000_000, "predicted", json!({"gpa": "0x1000", "state": "seen"})),
        (1_000_500, "predicted", done),
        (2_000_000, "rescued", rescued("0x400000")),
    ]);
    let report = with(&text, &status);
    let states: Vec<_> = report.predicted.iter().map(|one| (one.gpa, one.state)).collect();
    let place = Place::Ghes { record: 1 };
    assert_eq!(states, [(0x1000, State::Acknowledged { place }), (0x2000, State::Seen)]);
    let at: Vec<_> = report.rescued.iter().map(|one| (one.what.gpa, one.at)).collect();
    assert_eq!(at, [(0x40_0000, Some(2_000_000)), (0x20_0000, None)]);
    let page = super::super::html::page(&report, &super::super::raw::Raw::default());
    assert!(page.contains("<td>unknown</td></tr>"), "when it was rescued");
}

/// Of 9000 bad pages 1 was kept: the page says it.
#[test]
fn a_record_that_has_left_pages_out() {
    let mut builder = Builder::default();
    builder.lacks(Lacks { pages: 8999, predicted: 0, past: 0 });
    let status = of(json!([ledgered("0x1000", "AO", taken(), &[])]), json!([]));
    let report = builder.finish(Origin::default(), Some(&status), 1e9);
    let page = super::super::html::page(&report, &super::super::raw::Raw::default());
    assert!(page.contains("The record has left out 8999 bad pages of the ledger"), "{page}");
}

/// The ledger has each page of a huge page that was lost, the report has one row of it, whatever became of it since.
#[test]
fn a_huge_page_in_the_ledger() {
    let all = |state: &str, at: &[(&str, f64)]| {
        let page = |page: u64| {
            let gpa = format!("{:#x}", 0x20_0000 + (page << 12));
            ledgered(&gpa, "AO", json!({"state": state}), at)
        };
        Value::from((0..512).map(page).collect::<Vec<_>>())
    };
    let lost = json!({"gpa": "0x200000", "hva": "0x200000", "kind": "AO", "found_by": "signal",
        "extent": 2 << 20, "pages": 512});
    let removed = json!({"gpa": "0x200000", "len": 2 << 20});
    let lost = events(&[(0, "booting", booting(1)), (1_000_000, "seen", lost)]);
    let removed = events(&[(9_000_000, "removed", removed)]);
    let mut healed = Vec::new();
    for page in 0..512 {
        healed.push((
            9_000_000,
            "healed",
            json!({"gpa": format!("{:#x}", 0x20_0000 + (page << 12))}),
        ));
    }
    let healed = events(&healed);
    let seen = [("seen", 1.0)];
    let gone = [("seen", 1.0), ("removed", 9.0)];
    for (text, state, at) in [
        (lost.clone(), "seen", &seen[..]),
        (lost.clone() + &removed, "seen", &seen[..]),
        (lost.clone() + &removed, "removed", &gone[..]),
        (lost + &healed, "seen", &seen[..]),
    ] {
        let report = with(&text, &of(all(state, at), json!([])));
        assert_eq!((report.pages.len(), report.totals.bad), (1, 512), "{state}");
        assert_eq!(report.log.by_ledger, 0);
    }
}
