//! The table of bad pages, and the fields by which it is filtered.

use std::collections::BTreeSet;
use std::fmt::{self, Write};

use mce_relay::{FoundBy, State};
use mce_relay_vmm::words::counted;

use super::escape::Text;
use super::words::{duration, size, when};
use crate::commands::report::huge::Huge;
use crate::commands::report::model::{Course, LostTo, Page, Report, Step, Toucher};

/// With more rows than this the timelines are folded.
const MANY: usize = 100;

pub(super) fn write(out: &mut String, report: &Report) -> fmt::Result {
    out.push_str("<section aria-labelledby=\"h-pages\">\n<h2 id=\"h-pages\">Bad pages</h2>\n");
    let rest = || report.huge.iter().filter(|huge| huge.rest().pages() > 0);
    let rows = report.pages.len() + rest().count();
    if rows == 0 {
        out.push_str("<p>None.</p>\n</section>\n");
        return Ok(());
    }
    filter(out, report, rows)?;
    out.push_str(
        "<div class=\"wide\" tabindex=\"0\" role=\"region\" aria-labelledby=\"h-pages\"><table id=\"pages\">\n\
         <caption>In the order in which they became known. The first time is from caught to injected, the second from injected \
         to acknowledged, each of the first time that the guest was told.</caption>\n<thead><tr>",
    );
    for column in ["GPA", "boot", "kind", "found by", "told by", "lost to", "outcome"] {
        write!(out, "<th scope=\"col\">{column}</th>")?;
    }
    out.push_str(
        "<th scope=\"col\" class=\"n\">told after</th><th scope=\"col\" class=\"n\">taken after</th>\
         <th scope=\"col\">timeline</th></tr></thead>\n<tbody>\n",
    );
    for page in &report.pages {
        one(out, report, page, rows <= MANY)?;
    }
    for huge in rest() {
        of_huge(out, report, huge)?;
    }
    out.push_str("</tbody></table></div>\n</section>\n");
    Ok(())
}

/// Shown by the script, as nothing comes of them without it.
fn filter(out: &mut String, report: &Report, rows: usize) -> fmt::Result {
    let mut outcomes: BTreeSet<&str> = report.pages.iter().map(Page::state_name).collect();
    outcomes.extend(report.huge.iter().filter(|huge| huge.rest().pages() > 0).map(outcome_of_huge));
    out.push_str(
        "<div class=\"filter\" id=\"filter\" role=\"search\" aria-label=\"Rows of the table\" hidden>\n\
         <label for=\"filter-text\">Words in a row<input id=\"filter-text\" type=\"search\" autocomplete=\"off\" spellcheck=\"false\"></label>\n\
         <label for=\"filter-kind\">Kind<select id=\"filter-kind\"><option value=\"\">all</option><option>AO</option><option>AR</option></select></label>\n\
         <label for=\"filter-outcome\">Outcome<select id=\"filter-outcome\"><option value=\"\">all</option>",
    );
    for outcome in outcomes {
        write!(out, "<option>{outcome}</option>")?;
    }
    writeln!(
        out,
        "</select></label>\n<button type=\"button\" id=\"filter-all\">Show all</button>\n\
         <p id=\"filter-told\" role=\"status\">All {rows} rows are shown.</p>\n</div>"
    )
}

fn outcome_of_huge(huge: &Huge) -> &'static str {
    let rest = huge.rest();
    match (rest.waiting, rest.removed) {
        (1.., _) => "seen",
        (0, 1..) => "removed",
        (0, 0) => "healed",
    }
}

fn one(out: &mut String, report: &Report, page: &Page, open: bool) -> fmt::Result {
    let (first, last) = (page.first_kind.to_string(), page.kind.to_string());
    let kinds = if first == last { first.clone() } else { format!("{first} {last}") };
    let outcome = page.state_name();
    let gpa = page.gpa;
    write!(
        out,
        "<tr data-kinds=\"{kinds}\" data-outcome=\"{outcome}\"><th scope=\"row\"><code>{gpa:#x}</code></th><td>{}</td><td>{}</td><td>{}</td><td>",
        boot(report, page.vmm, page.boot),
        kinds.replace(' ', ", then "),
        page.found_by.map_or_else(|| "?".to_owned(), |by| by.to_string()),
    )?;
    match page.told.last() {
        Some(told) => {
            let again = match page.told.len() {
                1 => String::new(),
                times => format!(", {times} times in all"),
            };
            write!(out, "{}{again}", Text(told.place))?;
        }
        None if page.told_before => out.push_str("told, no event says by what"),
        None if page.course == Course::Late && !page.by_ledger => out.push_str("unknown"),
        None => {}
    }
    write!(out, "</td><td>{}{}</td>", page.lost_to.words(), Text(touchers(page)))?;
    let forged = if page.forged { "FORGED, the page is whole; " } else { "" };
    write!(out, "<td><span class=\"mark {outcome}\">{forged}{}</span></td>", Text(page.state))?;
    let time = |time: Option<u64>| time.map(duration).unwrap_or_default();
    let first = page.told.first();
    write!(
        out,
        "<td class=\"n\">{}</td><td class=\"n\">{}</td><td>",
        time(first.and_then(|told| told.after)),
        time(first.and_then(|told| told.taken_after))
    )?;
    timeline(out, report, page, open)?;
    out.push_str("</td></tr>\n");
    Ok(())
}

fn touchers(page: &Page) -> String {
    let vcpus = page.touched_by.iter().filter_map(|by| match by {
        Toucher::Vcpu(vcpu) => Some(format!("vCPU {vcpu}")),
        Toucher::Guest | Toucher::Vmm => None,
    });
    let mut all: Vec<String> = vcpus.collect();
    let by_guest = page.touched_by.iter().any(|by| *by != Toucher::Vmm);
    if by_guest && page.touched_by.contains(&Toucher::Vmm) {
        all.push("and the VMM".to_owned());
    }
    if all.is_empty() { String::new() } else { format!(" ({})", all.join(", ")) }
}

/// The boot, with the VMM where there are several.
fn boot(report: &Report, vmm: usize, boot: Option<u32>) -> String {
    let boot = boot.map_or_else(|| "unknown".to_owned(), |boot| boot.to_string());
    match report.vmms.len() {
        0 | 1 => boot,
        _ => format!("{boot} of VM {}", vmm + 1),
    }
}

fn timeline(out: &mut String, report: &Report, page: &Page, open: bool) -> fmt::Result {
    let Some(first) = page.steps.first() else {
        out.push_str("its events are no longer kept: this is what the ledger has");
        return Ok(());
    };
    match (page.course, page.by_ledger) {
        (Course::Late, true) => {
            out.push_str("<p>its first events are missing; the ledger has filled this in</p>")
        }
        (Course::Late, false) => {
            out.push_str("<p>unknown before: its first events are missing</p>")
        }
        (Course::Whole | Course::Ledger, _) => {}
    }
    let open = if open { " open" } else { "" };
    let start = when(report.vmms.get(page.vmm), first.at);
    write!(out, "<details{open}><summary>{start}</summary><ol class=\"steps\">")?;
    for Step { at, what, words } in &page.steps {
        let after = duration(at.saturating_sub(first.at));
        write!(out, "<li>+{after} {what}: {}</li>", Text(words))?;
    }
    out.push_str("</ol></details>");
    Ok(())
}

/// Those pages of a huge page of which nothing more is known.
fn of_huge(out: &mut String, report: &Report, huge: &Huge) -> fmt::Result {
    let (outcome, rest) = (outcome_of_huge(huge), huge.rest());
    let states =
        [(rest.waiting, State::Seen), (rest.healed, State::Healed), (rest.removed, State::Removed)];
    let states = states.iter().filter(|(pages, _)| *pages > 0);
    let words: Vec<String> =
        states.map(|(pages, state)| format!("{}: {state}", counted(*pages, "page"))).collect();
    let (forged, lost_to) = match huge.found_by == FoundBy::Forged {
        true => ("FORGED, the pages are whole; ", LostTo::Nothing),
        false => ("", LostTo::Nobody),
    };
    let start = when(report.vmms.get(huge.vmm), huge.caught.unwrap_or(huge.seen));
    writeln!(
        out,
        "<tr data-kinds=\"AO\" data-outcome=\"{outcome}\"><th scope=\"row\"><code>{:#x}</code></th><td>{}</td>\
         <td>AO</td><td>{}</td><td></td><td>{}</td><td><span class=\"mark {outcome}\">{forged}of a huge page of {}, {}</span></td>\
         <td class=\"n\"></td><td class=\"n\"></td><td>{start}: lost with the page that the host named</td></tr>",
        huge.gpa,
        boot(report, huge.vmm, huge.boot),
        huge.found_by,
        lost_to.words(),
        size(huge.len),
        Text(words.join("; "))
    )
}
