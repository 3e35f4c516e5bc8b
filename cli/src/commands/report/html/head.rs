//! What the report is about, how many pages there are, and what the reader has to know about the figures.

use std::fmt::{self, Write};

use mce_relay_vmm::words::counted;

use super::escape::Text;
use super::words::{size, time_of_day, when};
use crate::commands::report::model::{Broken, Course, Lacks, Report, Totals, Vmm};

/// More types of events that are not known are not named.
const TYPES: usize = 20;

pub(super) fn write(out: &mut String, report: &Report) -> fmt::Result {
    let Report { of, vmms, log, .. } = report;
    out.push_str("<dl class=\"facts\">\n");
    let mut fact =
        |what: &str, words: &str| writeln!(out, "<dt>{what}</dt><dd>{}</dd>", Text(words));
    fact("VM", of.vm.as_deref().unwrap_or("not named"))?;
    if let Some(stands) = &of.stands {
        fact("State", stands)?;
    }
    fact("Boots", &boots(vmms))?;
    if let (Some(first), Some(last)) = (vmms.first(), vmms.last()) {
        let words = format!("{} to {}", when(Some(first), 0), when(Some(last), last.last));
        fact("Time", &words)?;
    }
    fact("Events", &format!("{}, {}", log.events, of.events))?;
    fact("Made", &format!("{} by mce-relay {}", time_of_day(report.made), report.version))?;
    out.push_str("</dl>\n");
    notes(out, report)?;
    totals(out, &report.totals)
}

fn boots(vmms: &[Vmm]) -> String {
    let known: u64 = vmms.iter().map(|vmm| vmm.boots.len() as u64).sum();
    match vmms {
        [] => "none is known".to_owned(),
        [vmm] => match vmm.boots.last().map(|last| u64::from(last.boot)) {
            None => "unknown: no event says it".to_owned(),
            // They are numbered from 1.
            Some(all) if all > known => {
                format!("{}; something is known of {known}", counted(all, "boot"))
            }
            Some(_) => counted(known, "boot"),
        },
        vmms => {
            let unknown = vmms.iter().any(|vmm| vmm.boots.is_empty());
            let more = if unknown { ", and others that no event names" } else { "" };
            format!("{}{more}, of {} VMs, one after another", counted(known, "boot"), vmms.len())
        }
    }
}

fn notes(out: &mut String, report: &Report) -> fmt::Result {
    let log = &report.log;
    let mut notes = Vec::new();
    if log.events == 0 {
        notes.push("There are no events: nothing has been read that could be reported.".to_owned());
    }
    if let Some(Broken { line, why }) = &log.first_broken {
        let lines = counted(log.broken, "line");
        notes.push(format!("{lines} could not be read as events and were passed over. The first is line {line}: {why}"));
    }
    if log.missed > 0 {
        notes.push(format!(
            "Missing, as they were no longer kept when this was read: {}",
            counted(log.missed, "event")
        ));
    }
    if log.by_ledger > 0 {
        let pages = counted(log.by_ledger, "page");
        notes.push(format!("The events of {pages} are no longer kept; what is shown of them is what the ledger has."));
    }
    if log.filled > 0 {
        let pages = counted(log.filled, "page");
        notes.push(format!(
            "The events of {pages} are not all there; what they lack is what the ledger has."
        ));
    }
    let Lacks { pages, predicted, past } = log.ledger_lacks;
    for (lacks, what) in
        [(pages, "bad pages"), (predicted, "predicted pages"), (past, "past pages")]
    {
        if lacks > 0 {
            notes.push(format!("The record has left out {lacks} {what} of the ledger: those that no event names are not here, and in none of the figures."));
        }
    }
    let late = report.pages.iter().filter(|page| page.course == Course::Late && !page.by_ledger);
    match late.count() as u64 {
        0 => {}
        late => notes.push(format!("The first events of {} are missing: what happened before, and whether the guest was told then, is unknown.", counted(late, "page"))),
    }
    for (name, count) in log.unknown.iter().take(TYPES) {
        let events = counted(*count, "event");
        notes.push(format!("{events} of a type that this version does not know: {name}"));
    }
    if log.unknown.len() > TYPES {
        notes.push(format!("{} more types that it does not know.", log.unknown.len() - TYPES));
    }
    if notes.is_empty() {
        return Ok(());
    }
    out.push_str("<div class=\"notes\" role=\"note\">\n<ul>\n");
    for note in notes {
        writeln!(out, "<li>{}</li>", Text(note))?;
    }
    out.push_str("</ul>\n</div>\n");
    Ok(())
}

fn totals(out: &mut String, totals: &Totals) -> fmt::Result {
    let Totals {
        bad,
        bytes,
        told,
        acknowledged,
        waiting,
        undeliverable,
        healed,
        removed,
        forged,
        unknown,
        ..
    } = totals;
    out.push_str("<h2>Totals, in pages of 4 KiB</h2>\n<dl class=\"totals\">\n");
    let mut tile = |count: &dyn fmt::Display, words: &str| {
        writeln!(out, "<div><dt>{words}</dt><dd>{count}</dd></div>")
    };
    tile(bad, "pages went bad")?;
    tile(&size(*bytes), "of contents lost")?;
    tile(told, "told to the guest")?;
    tile(acknowledged, "acknowledged by it")?;
    tile(waiting, "seen or waiting: not told yet")?;
    tile(undeliverable, "undeliverable: could not be told")?;
    tile(healed, "healed by a start over")?;
    tile(removed, "removed from its memory")?;
    if *unknown > 0 {
        tile(unknown, "unknown whether told: their first events are missing")?;
    }
    if *forged > 0 {
        tile(forged, "forged: whole, and in none of the other figures")?;
    }
    out.push_str("</dl>\n");
    Ok(())
}
