//! A report as a page of HTML that needs nothing beside it.
//!
//! Everything that came with an event goes through `escape`. The page's policy admits the script and the style that are
//! here by their hashes, and nothing else: no other script would run even if one got onto the page, and nothing is fetched.

use std::fmt::{self, Write};

use super::model::Report;
use super::raw::Raw;
use escape::{Json, Text};

mod charts;
mod escape;
mod head;
mod pages;
mod tables;
mod words;

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");
/// The hash of [`STYLE`], as a policy names it.
const STYLE_HASH: &str = "sha256-TEWWHt55nyc7wCMrkARHDRz/LrPPcZrlcpizgO3yAx4=";
/// The hash of [`SCRIPT`].
const SCRIPT_HASH: &str = "sha256-P+QeoMuJi4XP7Lz16OFPp/SHEOnQO6vTQ94+pcesWZE=";

/// The page for `report`, with the events as they were read.
#[must_use]
pub fn page(report: &Report, raw: &Raw) -> String {
    let mut out = String::new();
    // Writing to memory does not fail.
    let _ = write_page(&mut out, report, raw);
    out
}

fn write_page(out: &mut String, report: &Report, raw: &Raw) -> fmt::Result {
    let title = match &report.of.vm {
        Some(name) => format!("Bad memory of {name}"),
        None => "Bad memory of a VM".to_owned(),
    };
    // The policy comes first, so that it holds for all that follows.
    write!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src '{STYLE_HASH}'; \
         script-src '{SCRIPT_HASH}'; base-uri 'none'; form-action 'none'\">\n\
         <meta name=\"referrer\" content=\"no-referrer\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"generator\" content=\"mce-relay {version}\">\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<header>\n<h1>{title}</h1>\n",
        version = report.version,
        title = Text(&title)
    )?;
    head::write(out, report)?;
    out.push_str("</header>\n<main>\n");
    out.push_str("<section aria-labelledby=\"h-map\">\n<h2 id=\"h-map\">Memory</h2>\n");
    if report.memory.rows.is_empty() {
        out.push_str("<p>No bad page is known, and no memory.</p>\n");
    } else {
        charts::memory(out, &report.memory)?;
    }
    out.push_str("</section>\n");
    latencies(out, report)?;
    tables::lost(out, report)?;
    pages::write(out, report)?;
    tables::rescued(out, report)?;
    tables::predicted(out, report)?;
    tables::boots(out, report)?;
    tables::happened(out, report)?;
    write_raw(out, raw)?;
    writeln!(out, "</main>\n<script>{SCRIPT}</script>\n</body>\n</html>")
}

fn latencies(out: &mut String, report: &Report) -> fmt::Result {
    out.push_str(
        "<section aria-labelledby=\"h-times\">\n<h2 id=\"h-times\">How long it took</h2>\n",
    );
    let times = &report.latencies;
    charts::histogram(out, "times-injected", "Caught to injected", &times.injected)?;
    charts::histogram(out, "times-acknowledged", "Injected to acknowledged", &times.acknowledged)?;
    out.push_str(
        "<p>Each time that the guest was told counts. A page that no signal named counts from when it became known.</p>\n\
         </section>\n",
    );
    Ok(())
}

fn write_raw(out: &mut String, raw: &Raw) -> fmt::Result {
    out.push_str(
        "<section class=\"raw\" aria-labelledby=\"h-raw\">\n<h2 id=\"h-raw\">The events as they were read</h2>\n",
    );
    if raw.left_out > 0 {
        writeln!(
            out,
            "<p role=\"note\"><strong>Only the last {} of {} lines are here</strong>, as they are many; the tables above are of all \
             of them.</p>",
            raw.len(),
            raw.len() as u64 + raw.left_out
        )?;
    }
    writeln!(out, "<details>\n<summary>Show {} lines</summary>\n<pre tabindex=\"0\">", raw.len())?;
    for line in raw.lines() {
        writeln!(out, "{}", Text(line))?;
    }
    // For programs: an array, in which a line that is no JSON is a string.
    out.push_str("</pre>\n</details>\n<script type=\"application/json\" id=\"events\">[");
    for (at, line) in raw.lines().enumerate() {
        out.push_str(if at == 0 { "\n" } else { ",\n" });
        match serde_json::from_str::<serde::de::IgnoredAny>(line) {
            Ok(_) => write!(out, "{}", Json(line.trim()))?,
            Err(_) => write!(out, "{}", Json(&serde_json::Value::from(line).to_string()))?,
        }
    }
    out.push_str("\n]</script>\n</section>\n");
    Ok(())
}

#[cfg(test)]
mod tests;
