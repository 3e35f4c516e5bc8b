//! Drawings: the memory map and the histograms. What they show is on the page as text, too.

use std::fmt::{self, Write};

use mce_relay_vmm::words::counted;

use super::escape::Text;
use super::words::{duration, size};
use crate::commands::mark::Mark;
use crate::commands::report::latency::Spread;
use crate::commands::report::memory_map::{BINS, MemoryMap, Row};

/// Width of an address at the left.
const LEFT: u64 = 150;
/// Units of a part of a row.
const PART: u64 = 3;
const ROW: u64 = 22;
const GAP: u64 = 4;
/// More stretches than this are not listed beside the map.
const LISTED: usize = 200;

/// The memory map.
pub(super) fn memory(out: &mut String, map: &MemoryMap) -> fmt::Result {
    let (width, height) = (LEFT + BINS * PART + 10, map.rows.len() as u64 * (ROW + GAP) + GAP);
    let row = size(map.row_bytes);
    writeln!(
        out,
        "<figure>\n<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-labelledby=\"map-title\">\
         <title id=\"map-title\">Guest memory, {} a row; {}</title>",
        Text(&row),
        counted(map.stretches.len() as u64, "bad place")
    )?;
    for (at, row) in map.rows.iter().enumerate() {
        one_row(out, row, GAP + at as u64 * (ROW + GAP), map.row_bytes)?;
    }
    let ends = match map.ram {
        Some(_) => String::new(),
        None => " The events do not say how much memory the guest has: it is drawn up to the \
                  highest page that they name."
            .to_owned(),
    };
    writeln!(
        out,
        "</svg>\n<figcaption>Guest-physical memory. A row is {row}, and a mark at least {}; the taller, the worse. \
         Grey is RAM.{ends}</figcaption>\n</figure>\n<ul class=\"legend\">",
        size(map.row_bytes / BINS)
    )?;
    for mark in Mark::ALL {
        let pages: u64 =
            map.stretches.iter().filter(|one| one.worst == mark).map(|one| one.pages).sum();
        if pages > 0 {
            let name = mark.name();
            let pages = counted(pages, "page");
            writeln!(out, "<li class=\"mark {name}\">{name}: {pages}</li>")?;
        }
    }
    out.push_str("</ul>\n");
    stretches(out, map)
}

fn one_row(out: &mut String, row: &Row, y: u64, row_bytes: u64) -> fmt::Result {
    writeln!(out, "<text x=\"0\" y=\"{}\">{:#x}</text>", y + 15, row.gpa)?;
    for (from, to) in &row.ram {
        let whole = precise(BINS * PART);
        let (x, width) = (precise(LEFT) + from * whole, (to - from) * whole);
        writeln!(
            out,
            "<rect class=\"ram\" x=\"{x:.2}\" y=\"{y}\" width=\"{width:.2}\" height=\"{ROW}\"/>"
        )?;
    }
    for bin in &row.bad {
        let (name, x) = (bin.worst.name(), LEFT + bin.at * PART);
        // The taller, the worse: for those who do not see the colours.
        let rank = Mark::ALL.iter().position(|mark| *mark == bin.worst).unwrap_or_default() as u64;
        let height = ROW - 2 * (Mark::ALL.len() as u64 - 1 - rank);
        let from = row.gpa.saturating_add(bin.at.saturating_mul(row_bytes / BINS));
        writeln!(
            out,
            "<rect class=\"{name}\" x=\"{x}\" y=\"{}\" width=\"{PART}\" height=\"{height}\">\
             <title>from {from:#x}: {name}, {} in {}</title></rect>",
            y + ROW - height,
            bin.stretches,
            size(row_bytes / BINS)
        )?;
    }
    Ok(())
}

/// The same as a table.
fn stretches(out: &mut String, map: &MemoryMap) -> fmt::Result {
    let all = map.stretches.len();
    writeln!(
        out,
        "<details>\n<summary>The stretches as a table ({all})</summary>\n<div class=\"wide\" tabindex=\"0\" role=\"region\" \
         aria-label=\"Stretches of bad pages\"><table>\n<thead><tr><th scope=\"col\">GPA</th>\
         <th scope=\"col\" class=\"n\">pages</th><th scope=\"col\">worst</th></tr></thead>\n<tbody>"
    )?;
    for one in map.stretches.iter().take(LISTED) {
        let (name, pages) = (one.worst.name(), one.pages);
        writeln!(
            out,
            "<tr><th scope=\"row\"><code>{:#x}</code></th><td class=\"n\">{pages}</td><td><span class=\"mark {name}\">{name}</span></td></tr>",
            one.gpa
        )?;
    }
    out.push_str("</tbody></table></div>\n");
    if all > LISTED {
        writeln!(out, "<p>{} more are in the table of pages.</p>", all - LISTED)?;
    }
    out.push_str("</details>\n");
    Ok(())
}

/// A histogram and its figures.
pub(super) fn histogram(out: &mut String, id: &str, what: &str, spread: &Spread) -> fmt::Result {
    writeln!(out, "<h3>{what}</h3>")?;
    if spread.count == 0 {
        return writeln!(out, "<p>None.</p>");
    }
    const TALL: u64 = 120;
    const TOP: u64 = 18;
    let bars = spread.bars.len() as u64;
    // Some bars stay narrow.
    let step = (740 / bars.max(1)).min(90);
    let most = spread.bars.iter().map(|bar| bar.count).max().unwrap_or(1).max(1);
    let (width, height) = (800, TOP + TALL + 24);
    writeln!(
        out,
        "<figure>\n<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-labelledby=\"{id}\">\
         <title id=\"{id}\">{what}: {}, from {} to {}, half of them within {}</title>",
        counted(spread.count, "time"),
        duration(spread.least),
        duration(spread.most),
        duration(spread.median)
    )?;
    let base = TOP + TALL;
    writeln!(out, "<line class=\"axis\" x1=\"0\" y1=\"{base}\" x2=\"{width}\" y2=\"{base}\"/>")?;
    for (at, bar) in spread.bars.iter().enumerate() {
        let x = 40 + at as u64 * step;
        // What there is can be seen.
        let tall = bar.count.saturating_mul(TALL) / most;
        let tall = if bar.count > 0 { tall.max(2) } else { 0 };
        let to = bar.to.map_or_else(|| "more".to_owned(), |to| format!("to {}", duration(to)));
        if bar.count > 0 {
            writeln!(
                out,
                "<rect class=\"bar\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{tall}\"><title>over {} {to}: {}</title></rect>\
                 <text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                x + 1,
                base - tall,
                step.saturating_sub(2).max(1),
                duration(bar.from),
                bar.count,
                x + step / 2,
                base - tall - 4,
                bar.count
            )?;
        }
        // Each bar's lower end, or each third where they are many: a power of ten.
        if bars <= 9 || at % 3 == 0 {
            let end = duration(bar.from);
            writeln!(
                out,
                "<text x=\"{x}\" y=\"{}\" text-anchor=\"middle\">{end}</text>",
                base + 16
            )?;
        }
    }
    writeln!(
        out,
        "</svg>\n<figcaption>Logarithmic: each bar ends at 1, 2 or 5 times a power of ten. {}: shortest {}, half within {}, \
         95 of 100 within {}, longest {}.</figcaption>\n</figure>",
        counted(spread.count, "time"),
        duration(spread.least),
        duration(spread.median),
        duration(spread.most_of),
        duration(spread.most)
    )
}

#[allow(clippy::cast_precision_loss, reason = "a small number of units")]
fn precise(units: u64) -> f64 {
    units as f64
}
