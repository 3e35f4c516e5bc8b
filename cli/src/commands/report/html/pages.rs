//! The table of bad pages, and the fields by which it is filtered.

use std::collections::BTreeSet;
use std::fmt::{self, Write};

use mce_relay::State;

use super::escape::Text;
use super::words::{duration, when};
use crate::commands::report::model::{Huge, Page, Report, Step, Toucher};

/// With more rows than this the timelines are folded.
const MANY: usize = 100;

pub(super) fn write(out: &mut String, report: &Report) -> fmt::Result {
    out.push_str("<section aria-labelledby=\"h-pages\">\n<h2 id=\"h-pages\">Bad pages</h2>\n");
    let rest = || report.huge.iter().filter(|huge| huge.rest().0 > 0);
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
    let mut outcomes: BTreeSet<&str> = report.pages.iter().map(outcome).collect();
    outcomes.extend(report.huge.iter().filter(|huge| huge.rest().0 > 0).map(outcome_of_huge));
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

/// The name of a page's state, as JSON has it.
fn outcome(page: &Page) -> &'static str {
    match page.state {
        State::Seen => "seen",
        State::Waiting { .. } => "waiting",
        State::Injected { .. } => "injected",
        State::Acknowledged { .. } => "acknowledged",
        State::Undeliverable { .. } => "undeliverable",
        State::Healed => "healed",
        State::Removed => "removed",
    }
}

fn outcome_of_huge(huge: &Huge) -> &'static str {
    if huge.rest().1 { "seen" } else { "removed" }
}

fn one(out: &mut String, report: &Report, page: &Page, open: bool) -> fmt::Result {
    let (first, last) = (page.first_kind.to_string(), page.kind.to_string());
    let kinds = if first == last { first.clone() } else { format!("{first} {last}") };
    let outcome = outcome(page);
    let gpa = page.gpa;
    write!(
        out,
        "<tr data-kinds=\"{kinds}\" data-outcome=\"{outcome}\"><th scope=\"row\"><code>{gpa:#x}</code></th><td>{}</td><td>{}</td><td>{}</td><td>",
        boot(report, page.vmm, page.boot),
        kinds.replace(' ', ", then "),
        page.found_by.map_or_else(|| "?".to_owned(), |by| by.to_string()),
    )?;
    if let Some(told) = page.told.last() {
        let again = match page.told.len() {
            1 => String::new(),
            times => format!(", {times} times in all"),
        };
        write!(out, "{}{again}", Text(told.place))?;
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
fn boot(report: &Report, vmm: usize, boot: u32) -> String {
    match report.vmms.len() {
        0 | 1 => boot.to_string(),
        _ => format!("{boot} of VM {}", vmm + 1),
    }
}

fn timeline(out: &mut String, report: &Report, page: &Page, open: bool) -> fmt::Result {
    let Some(first) = page.steps.first() else {
        out.push_str("its events are no longer kept");
        return Ok(());
    };
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
    let (outcome, (pages, there)) = (outcome_of_huge(huge), huge.rest());
    let words = if there { State::Seen } else { State::Removed };
    let start = when(report.vmms.get(huge.vmm), huge.caught.unwrap_or(huge.seen));
    writeln!(
        out,
        "<tr data-kinds=\"AO\" data-outcome=\"{outcome}\"><th scope=\"row\"><code>{:#x}</code></th><td>{}</td>\
         <td>AO</td><td>{}</td><td></td><td>nobody yet</td><td><span class=\"mark {outcome}\">{pages} pages of a huge page of {}: {}</span></td>\
         <td class=\"n\"></td><td class=\"n\"></td><td>{start}: lost with the page that the host named</td></tr>",
        huge.gpa,
        boot(report, huge.vmm, huge.boot),
        huge.found_by,
        super::words::size(huge.len),
        Text(words)
    )
}
