//! Signals that were forged.

use mce_relay::FoundBy;
use serde_json::json;

use super::*;

#[test]
fn what_is_forged_is_counted_apart_until_it_is_not() {
    let forged = events(&[(1, "seen", seen("0x1000", "0x1000", "AO", "forged"))]);
    let report = report_of(&forged);
    assert_eq!((report.totals.bad, report.totals.forged), (0, 1));
    let again = events(&[(2, "again", json!({"gpa": "0x1000", "kind": "AO", "forged": false}))]);
    let report = report_of(&(forged + &again));
    assert_eq!((report.totals.bad, report.totals.forged, report.pages.len()), (1, 0, 1));
}

/// It is in none of the other figures, and nobody has touched it.
#[test]
fn what_is_forged_is_in_no_other_figure() {
    let mut signal = caught("AR", "0x1000", json!({"vcpu": 0}));
    signal["forged"] = true.into();
    let mut told = injected("0x1000");
    told["forged"] = true.into();
    let mut taken = acknowledged("0x1000");
    taken["forged"] = true.into();
    let course = events(&[
        (1, "caught", signal),
        (2, "seen", seen("0x1000", "0x1000", "AR", "forged")),
        (3, "injected", told),
        (4, "acknowledged", taken),
    ]);
    let report = report_of(&course);
    assert_eq!((report.latencies.injected.count, report.latencies.acknowledged.count), (0, 0));
    assert_eq!((report.pages[0].lost_to, report.totals.lost_to.len()), (LostTo::Nothing, 0));
    let page = super::super::html::page(&report, &super::super::raw::Raw::default());
    assert!(page.contains("nothing: forged") && !page.contains("guest (vCPU 0)"));

    let real = events(&[
        (10, "caught", caught("AR", "0x1000", json!({"vcpu": 2}))),
        (11, "again", json!({"gpa": "0x1000", "kind": "AR", "forged": false})),
        (15, "injected", injected("0x1000")),
    ]);
    let report = report_of(&(course.clone() + &real));
    let page = &report.pages[0];
    assert_eq!(
        (page.found_by, &page.touched_by[..]),
        (Some(FoundBy::Signal), &[Toucher::Vcpu(2)][..])
    );
    assert_eq!((report.latencies.injected.count, page.told[1].after), (1, Some(5)));
    // By a scan, say: no event says by what.
    let found = events(&[(11, "again", json!({"gpa": "0x1000", "kind": "AO", "forged": false}))]);
    assert_eq!(report_of(&(course + &found)).pages[0].found_by, None);
}
