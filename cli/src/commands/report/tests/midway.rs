//! Files of events that begin midway: after `tail`, or with a max-size.

use serde_json::json;

use super::*;

/// The first events are gone, as they are in a ring or after `tail`.
#[test]
fn a_file_that_begins_in_the_middle() {
    let report = report_of(&events(&[
        (100, "acknowledged", acknowledged("0x1000")),
        (200, "injected", injected("0x2000")),
        (300, "healed", json!({"gpa": "0x3000"})),
    ]));
    assert_eq!((report.pages.len(), report.totals.told, report.totals.acknowledged), (3, 2, 1));
    assert_eq!(report.pages[1].told[0].after, Some(900), "as the event has it");
    assert_eq!(report.vmms[0].began, None);
}

fn page_of(report: &Report) -> String {
    super::super::html::page(report, &super::super::raw::Raw::default())
}

/// What happened before is unknown, and is said to be.
#[test]
fn what_happened_before_is_unknown() {
    let report = report_of(&events(&[
        (100, "healed", json!({"gpa": "0x1000"})),
        (200, "acknowledged", acknowledged("0x2000")),
        (300, "healed", json!({"gpa": "0x2000"})),
    ]));
    let whom: Vec<LostTo> = report.pages.iter().map(|page| page.lost_to).collect();
    assert_eq!(whom, [LostTo::Unknown, LostTo::Unknown]);
    let totals = &report.totals;
    assert_eq!((totals.told, totals.acknowledged, totals.unknown), (1, 1, 1));
    assert_eq!(report.pages.iter().map(|page| page.boot).collect::<Vec<_>>(), [None, None]);
    let page = page_of(&report);
    for words in [
        "unknown: the events begin later",
        "unknown whether told",
        "The first events of 2 pages are missing",
        "<dt>Boots</dt><dd>unknown: no event says it</dd>",
    ] {
        assert!(page.contains(words), "{words}");
    }
    assert!(!page.contains("0 boots"));
}

/// The form of a record, and what an event says of the kind, tell that a page was touched.
#[test]
fn a_touch_is_known_by_what_came_of_it() {
    let srar = json!({"gpa": "0x1000", "channel": "mce", "vcpu": 3, "bank": 9, "form": "SRAR",
        "reach": "lmce", "status": "0x1", "mcg_status": "0x7", "after_micros": null});
    let taken = json!({"gpa": "0x2000", "channel": "mce", "vcpu": 2, "bank": 9, "form": "AMD-AR"});
    let cannot = json!({"gpa": "0x3000", "kind": "AR", "vcpu": 1, "why": {"reason": "no-form"}, "rip": null});
    let waits = json!({"gpa": "0x4000", "kind": "AR", "wait": {"reason": "in-handler", "vcpu": 0}});
    let report = report_of(&events(&[
        (1, "injected", srar),
        (2, "acknowledged", taken),
        (3, "undeliverable", cannot),
        (4, "waiting", waits),
    ]));
    let by: Vec<_> = report.pages.iter().map(|page| page.touched_by[0]).collect();
    assert_eq!(by, [Toucher::Vcpu(3), Toucher::Vcpu(2), Toucher::Vcpu(1), Toucher::Guest]);
    assert!(report.pages.iter().all(|page| page.kind == FailureKind::ActionRequired));
    let whom: Vec<LostTo> = report.pages.iter().map(|page| page.lost_to).collect();
    let expected = [LostTo::Guest, LostTo::Guest, LostTo::GuestUntold, LostTo::Guest];
    assert_eq!(whom, expected);
}

/// Boots are numbered one after another, so the first that is known says which one was before it.
#[test]
fn pages_before_the_first_boot_that_is_known() {
    let course = |boot: u32| {
        report_of(&events(&[
            (5, "seen", seen("0x5000", "0x5000", "AO", "scan")),
            (10, "booting", booting(boot)),
            (20, "seen", seen("0x6000", "0x6000", "AO", "scan")),
        ]))
    };
    let of = |report: &Report| report.pages.iter().map(|page| page.boot).collect::<Vec<_>>();
    assert_eq!(of(&course(1)), [Some(1), Some(1)]);
    assert_eq!(course(1).vmms[0].boots.len(), 1);
    let report = course(7);
    assert_eq!(of(&report), [Some(6), Some(7)]);
    let boots: Vec<_> = report.vmms[0].boots.iter().map(|boot| (boot.boot, boot.at)).collect();
    assert_eq!(boots, [(6, None), (7, Some(10))]);
    assert!(page_of(&report).contains("7 boots; something is known of 2"));
}

#[test]
fn a_boot_whose_end_no_event_says() {
    let report = report_of(&events(&[(1, "booting", booting(1)), (9, "booting", booting(2))]));
    let ends: Vec<_> = report.vmms[0].boots.iter().map(|boot| boot.end.as_deref()).collect();
    assert!(ends[0].is_some_and(|end| end.starts_with("unknown: another one followed")));
    assert_eq!(ends[1], None);
    let another = events(&[(1, "booting", booting(1)), (2, "booting", booting(1))]);
    assert!(report_of(&another).vmms[0].boots[0].end.is_some());
    let before = [
        (5, "seen", seen("0x5000", "0x5000", "AO", "scan")),
        (6, "reset", json!({"reason": "by hand", "by_policy": false})),
        (10, "booting", booting(3)),
    ];
    let boots = &report_of(&events(&before)).vmms[0].boots;
    assert_eq!((boots[0].boot, boots[0].end.as_deref()), (2, Some("by hand")));
}
