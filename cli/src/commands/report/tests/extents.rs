//! Huge pages.

use mce_relay::{FailureKind, FoundBy, State};
use serde_json::{Value, json};

use super::*;

const EXTENT: u64 = 2 << 20;

fn lost(gpa: &str, hva: &str, kind: &str) -> Value {
    json!({"gpa": gpa, "hva": hva, "kind": kind, "found_by": "signal", "extent": EXTENT, "pages": 512})
}

fn rescued(gone: u64) -> Value {
    json!({"gpa": "0x200000", "hva": "0x7f0000200000", "extent": EXTENT, "kept": 512 - gone,
        "gone": gone, "micros": 1834, "held_micros": null})
}

#[test]
fn a_rescued_huge_page() {
    let report = report_of(&events(&[
        (100, "caught", caught("AO", "0x7f0000200000", json!("relay"))),
        (
            2000,
            "rescued",
            json!({"gpa": "0x200000", "hva": "0x7f0000200000", "extent": 2_097_152, "kept": 510,
            "gone": 2, "micros": 1834, "held_micros": null}),
        ),
        (2001, "seen", seen("0x291000", "0x7f0000291000", "AO", "signal")),
        (2002, "seen", seen("0x292000", "0x7f0000292000", "AO", "signal")),
        (2100, "injected", injected("0x291000")),
        (3000, "seen", seen("0x400000", "0x7f0000400000", "AO", "signal")),
    ]));
    assert_eq!((report.rescued.len(), report.rescued[0].what.kept), (1, 510));
    let first: Vec<_> = report.pages.iter().map(|page| page.steps[0].at).collect();
    assert_eq!(first, [100, 100, 3000], "the signal named the huge page");
    assert_eq!(report.pages[0].told[0].after, Some(2000));
    assert_eq!((report.totals.bad, report.huge.len()), (3, 0));
}

#[test]
fn a_huge_page_that_was_lost() {
    let text = events(&[
        (100, "caught", caught("AR", "0x7f0000203000", json!({"vcpu": 1}))),
        (
            110,
            "seen",
            json!({"gpa": "0x203000", "hva": "0x7f0000203000", "kind": "AR", "found_by": "signal",
            "extent": 2_097_152, "pages": 512}),
        ),
        (120, "injected", injected("0x203000")),
        (130, "injected", injected("0x204000")),
    ]);
    let report = report_of(&text);
    assert_eq!((report.pages.len(), report.huge[0].rest().waiting), (2, 510));
    let totals = &report.totals;
    assert_eq!((totals.bad, totals.told, totals.waiting), (512, 2, 510));
    let [named, other] = &report.pages[..] else { panic!() };
    assert_eq!((named.lost_to, other.lost_to), (LostTo::Guest, LostTo::Told));
    assert_eq!(
        (named.kind, other.first_kind),
        (FailureKind::ActionRequired, FailureKind::ActionOptional)
    );
    assert_eq!((steps(other), other.told[0].after), (vec!["caught", "seen", "injected"], Some(30)));
    assert_eq!((other.hva, other.found_by), (Some(0x7f00_0020_4000), Some(FoundBy::Signal)));
    let stretches: Vec<u64> = report.memory.stretches.iter().map(|one| one.pages).collect();
    assert_eq!(stretches, [3, 2, 507], "each page once");

    let gone = events(&[(200, "removed", json!({"gpa": "0x200000", "len": 2_097_152}))]);
    let totals = report_of(&(text + &gone)).totals;
    assert_eq!((totals.bad, totals.waiting, totals.removed), (512, 0, 512));
}

/// A page's own signal stays its own, and one that nobody touched is not lost to a vCPU.
#[test]
fn the_signals_of_a_rescued_huge_page() {
    let report = report_of(&events(&[
        (100, "caught", caught("AR", "0x7f0000291040", json!({"vcpu": 1}))),
        (150, "caught", caught("AR", "0x7f0000293000", json!({"vcpu": 2}))),
        (160, "caught", caught("AR", "0x7f00002a0000", json!({"vcpu": 3}))),
        (2000, "rescued", rescued(3)),
        (2001, "seen", seen("0x291000", "0x7f0000291000", "AR", "signal")),
        (2002, "seen", seen("0x292000", "0x7f0000292000", "AO", "signal")),
        (2003, "seen", seen("0x293000", "0x7f0000293000", "AR", "signal")),
        (9000, "seen", seen("0x2a0000", "0x7f00002a0000", "AO", "signal")),
    ]));
    let by: Vec<_> = report.pages.iter().map(|page| page.touched_by.clone()).collect();
    assert_eq!(by, [vec![Toucher::Vcpu(1)], vec![], vec![Toucher::Vcpu(2)], vec![]]);
    let whom: Vec<LostTo> = report.pages.iter().map(|page| page.lost_to).collect();
    assert_eq!(whom, [LostTo::Guest, LostTo::Nobody, LostTo::Guest, LostTo::Nobody]);
    let first: Vec<u64> = report.pages.iter().map(|page| page.steps[0].at).collect();
    assert_eq!(first, [100, 100, 150, 9000], "the last went bad later");
}

/// The touch of one page of a lost huge page is not that of another.
#[test]
fn the_signals_of_a_lost_huge_page() {
    let mut whole = caught("AO", "0x7f0000200000", json!("relay"));
    whole["lsb"] = 21.into();
    let report = report_of(&events(&[
        (100, "caught", whole),
        (110, "caught", caught("AR", "0x7f0000204000", json!({"vcpu": 3}))),
        (120, "seen", lost("0x203000", "0x7f0000203000", "AO")),
        (130, "again", json!({"gpa": "0x204000", "kind": "AR"})),
    ]));
    let [named, touched] = &report.pages[..] else { panic!("{:#?}", report.pages) };
    assert_eq!((named.touched_by.len(), steps(named)), (0, vec!["caught", "seen"]));
    assert_eq!(touched.touched_by, [Toucher::Vcpu(3)]);
}

/// However pages are named, each is in the legend once.
#[test]
fn the_map_of_a_lost_huge_page() {
    let cannot = json!({"gpa": "0x200000", "kind": "AR", "vcpu": 0, "why": {"reason": "no-form"}, "rip": null});
    let report = report_of(&events(&[
        (1, "seen", lost("0x200000", "0x200000", "AR")),
        (2, "undeliverable", cannot),
        (3, "injected", injected("0x205000")),
        (4, "acknowledged", acknowledged("0x205000")),
        (5, "injected", injected("0x2ff000")),
    ]));
    let all: Vec<u64> = report.memory.stretches.iter().map(|one| one.pages).collect();
    assert_eq!((all.len(), all.iter().sum::<u64>()), (6, 512), "{all:?}");
}

/// They are healed page by page, and stay in one row.
#[test]
fn a_lost_huge_page_that_is_healed() {
    let mut all = vec![
        (1, "seen", lost("0x203000", "0x203000", "AO")),
        (2, "injected", injected("0x203000")),
    ];
    for page in 0..512 {
        all.push((9, "healed", json!({"gpa": format!("{:#x}", 0x20_0000 + (page << 12))})));
    }
    all.push((20, "seen", seen("0x204000", "0x204000", "AO", "signal")));
    let report = report_of(&events(&all));
    let lives: Vec<_> = report.pages.iter().map(|page| (page.gpa, page.state)).collect();
    assert_eq!(lives, [(0x20_3000, State::Healed), (0x20_4000, State::Seen)]);
    assert_eq!((report.huge[0].rest().healed, report.huge[0].rest().waiting), (511, 0));
    let totals = &report.totals;
    assert_eq!((totals.bad, totals.healed, totals.waiting), (513, 512, 1));
    let page = super::super::html::page(&report, &super::super::raw::Raw::default());
    assert_eq!(page.matches("<tr data-kinds").count(), 3);
    assert!(page.contains("511 pages: healed"));
}

#[test]
fn a_part_of_a_lost_huge_page_is_removed() {
    let report = report_of(&events(&[
        (1, "seen", lost("0x203000", "0x203000", "AO")),
        (2, "removed", json!({"gpa": "0x202000", "len": 0x4000})),
    ]));
    let rest = report.huge[0].rest();
    assert_eq!((rest.waiting, rest.removed), (508, 3));
    assert_eq!((report.totals.removed, report.totals.bad), (4, 512));
}

/// What is predicted and goes bad is told as a bad page, alone or with its huge page.
#[test]
fn a_prediction_that_comes_true() {
    let predicted = |gpa: &str| json!({"gpa": gpa, "state": "seen"});
    let report = report_of(&events(&[
        (1, "predicted", predicted("0x5000")),
        (2, "predicted", predicted("0x2ff000")),
        (3, "predicted", predicted("0x900000")),
        (4, "seen", seen("0x5000", "0x5000", "AO", "signal")),
        (5, "seen", lost("0x203000", "0x203000", "AO")),
        (6, "booting", booting(2)),
        (7, "predicted", predicted("0x900000")),
    ]));
    let words: Vec<_> =
        report.predicted.iter().map(|one| (one.state.to_string(), one.last, one.dropped)).collect();
    let bad = "undeliverable: the page went bad before the guest was told of it";
    let seen = "seen: not told yet";
    let expected = [(bad, 4, false), (bad, 5, false), (seen, 3, true), (seen, 7, false)];
    let expected = expected.map(|(words, at, dropped)| (words.to_owned(), Some(at), dropped));
    assert_eq!(words, expected);
}
