//! The smaller tables.

use std::collections::HashMap;
use std::fmt::{self, Write};

use mce_relay_vmm::words::counted;

use super::escape::Text;
use super::words::{duration, size, when};
use crate::commands::report::model::{LostTo, Report};

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
        let at = when(report.vmms.get(rescue.vmm), rescue.at);
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
        let (gpa, asked) = (format!("{:#x}", page.gpa), when(report.vmms.get(page.vmm), page.at));
        row(out, &[&gpa, &asked, &page.state, &duration(page.last.saturating_sub(page.at))])?;
    }
    end(out);
    Ok(())
}

/// The boots of the guest.
pub(super) fn boots(out: &mut String, report: &Report) -> fmt::Result {
    if report.vmms.iter().all(|vmm| vmm.boots.is_empty()) {
        return Ok(());
    }
    let mut pages: HashMap<(usize, u32), u64> = HashMap::new();
    let listed =
        report.pages.iter().filter(|page| !page.forged).map(|page| (page.vmm, page.boot, 1));
    let rest = report.huge.iter().map(|huge| (huge.vmm, huge.boot, huge.rest().0));
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
            let bad = pages.get(&(index, boot.boot)).copied().unwrap_or_default();
            let end = boot.end.as_deref().unwrap_or("has not ended, as far as is known");
            row(out, &[&number, &when(Some(vmm), boot.at), &boot.vendor, &bad, &end])?;
        }
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
