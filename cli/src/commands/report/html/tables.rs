//! The smaller tables.

use std::collections::HashMap;
use std::fmt::{self, Write};

use mce_relay::FoundBy;
use mce_relay_vmm::words::counted;

use super::escape::Text;
use super::words::{duration, size, when};
use crate::commands::report::model::{LostTo, Report, Vmm};

/// What no event has said.
const UNKNOWN: &str = "unknown";

fn time(vmm: Option<&Vmm>, at: Option<u64>) -> String {
    at.map_or_else(|| UNKNOWN.to_owned(), |at| when(vmm, at))
}

/// Begins a section with a table in it.
fn begin(out: &mut String, id: &str, title: &str, columns: &[&str]) -> fmt::Result {
    write!(
        out,
        "<section aria-labelledby=\"{id}\">\n<h2 id=\"{id}\">{title}</h2>\n\
         <div class=\"wide\" tabindex=\"0\" role=\"region\" aria-labelledby=\"{id}\"><table>\n<thead><tr>"
    )?;
    for column in columns {
        write!(out, "<th scope=\"col\">{column}</th>")?;
    }
    out.push_str("</tr></thead>\n<tbody>\n");
    Ok(())
}

fn end(out: &mut String) {
    out.push_str("</tbody></table></div>\n</section>\n");
}

/// A row, of which the first is its header.
fn row(out: &mut String, cells: &[&dyn fmt::Display]) -> fmt::Result {
    out.push_str("<tr>");
    for (at, cell) in cells.iter().enumerate() {
        match at {
            0 => write!(out, "<th scope=\"row\">{}</th>", Text(cell))?,
            _ => write!(out, "<td>{}</td>", Text(cell))?,
        }
    }
    out.push_str("</tr>\n");
    Ok(())
}

/// What was lost to whom.
pub(super) fn lost(out: &mut String, report: &Report) -> fmt::Result {
    begin(out, "h-lost", "What was lost to whom", &["lost to", "pages", "that means"])?;
    for whom in LostTo::ALL {
        let pages = report.totals.lost_to.get(&whom).copied().unwrap_or_default();
        let meaning = match whom {
            LostTo::GuestUntold => {
                "a vCPU touched the page (AR), and the guest cannot be told of that"
            }
            LostTo::Guest => {
                "a vCPU touched the page (AR); the guest is told by a machine check which process or part of its kernel that was"
            }
            LostTo::Vmm => {
                "the VMM itself read or wrote the page: a device for the guest, or a dump; the guest's vCPUs are not known to have touched it"
            }
            LostTo::Told => {
                "the guest was told (AO), and no touch is known: it can give the page up before anybody needs it"
            }
            LostTo::Nobody => {
                "no touch is known, and the guest does not know of the page, or was started over before it did"
            }
            LostTo::Unknown | LostTo::Nothing => {
                "the first events of the page are missing, and what is there does not say whether it was touched"
            }
        };
        row(out, &[&whom.words(), &pages, &meaning])?;
    }
    end(out);
    Ok(())
}

/// Huge pages of which the guest keeps a part.
pub(super) fn rescued(out: &mut String, report: &Report) -> fmt::Result {
    if report.rescued.is_empty() {
        return Ok(());
    }
    let columns = ["GPA", "lost by the host", "kept", "gone", "took", "a vCPU stood still", "when"];
    begin(out, "h-rescued", "Huge pages that were rescued", &columns)?;
    for rescue in &report.rescued {
        let what = &rescue.what;
        let gpa = format!("{:#x}", what.gpa);
        let held = what.held_micros.map_or_else(|| "no".to_owned(), duration);
        let pages = |pages| counted(pages, "page");
        let at = time(report.vmms.get(rescue.vmm), rescue.at);
        let (kept, gone) = (pages(what.kept), pages(what.gone));
        row(out, &[&gpa, &size(what.extent), &kept, &gone, &duration(what.micros), &held, &at])?;
    }
    end(out);
    Ok(())
}

/// Whole pages that are predicted to fail.
pub(super) fn predicted(out: &mut String, report: &Report) -> fmt::Result {
    if report.predicted.is_empty() {
        return Ok(());
    }
    begin(out, "h-predicted", "Predicted to fail", &["GPA", "asked for", "outcome", "after that"])?;
    for page in &report.predicted {
        let (gpa, asked) = (format!("{:#x}", page.gpa), time(report.vmms.get(page.vmm), page.at));
        let dropped = if page.dropped {
            " (dropped: the guest started over, or no longer has it)"
        } else {
            ""
        };
        let outcome = format!("{}{dropped}", page.state);
        let after = page.last.zip(page.at).map(|(last, at)| duration(last.saturating_sub(at)));
        row(out, &[&gpa, &asked, &outcome, &after.unwrap_or_else(|| UNKNOWN.to_owned())])?;
    }
    end(out);
    Ok(())
}

/// The boots of the guest.
pub(super) fn boots(out: &mut String, report: &Report) -> fmt::Result {
    if report.vmms.iter().all(|vmm| vmm.boots.is_empty()) {
        return Ok(());
    }
    let mut pages: HashMap<(usize, Option<u32>), u64> = HashMap::new();
    let listed =
        report.pages.iter().filter(|page| !page.forged).map(|page| (page.vmm, page.boot, 1));
    let huge = report.huge.iter().filter(|huge| huge.found_by != FoundBy::Forged);
    let rest = huge.map(|huge| (huge.vmm, huge.boot, huge.rest().pages()));
    for (vmm, boot, count) in listed.chain(rest) {
        *pages.entry((vmm, boot)).or_default() += count;
    }
    begin(out, "h-boots", "Boots", &["boot", "began", "the guest sees", "bad pages", "ended by"])?;
    for (index, vmm) in report.vmms.iter().enumerate() {
        for boot in &vmm.boots {
            let number = match report.vmms.len() {
                1 => boot.boot.to_string(),
                _ => format!("{} of VM {}", boot.boot, index + 1),
            };
            let bad = pages.remove(&(index, Some(boot.boot))).unwrap_or_default();
            let end = boot.end.as_deref().unwrap_or("no end of it is known");
            let vendor = boot.vendor.as_deref().unwrap_or(UNKNOWN);
            row(out, &[&number, &time(Some(vmm), boot.at), &vendor, &bad, &end])?;
        }
    }
    // So that the column is all of them.
    let others: u64 = pages.values().sum();
    if others > 0 {
        row(out, &[&UNKNOWN, &UNKNOWN, &UNKNOWN, &others, &UNKNOWN])?;
    }
    end(out);
    Ok(())
}

/// What else happened.
pub(super) fn happened(out: &mut String, report: &Report) -> fmt::Result {
    if report.happened.is_empty() {
        return Ok(());
    }
    begin(out, "h-happened", "What else happened", &["when", "what"])?;
    for what in &report.happened {
        row(out, &[&when(report.vmms.get(what.vmm), what.at), &what.words])?;
    }
    end(out);
    Ok(())
}
