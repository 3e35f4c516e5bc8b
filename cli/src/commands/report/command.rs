//! The command itself: reads, makes the report, writes it.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::SystemTime;

use mce_relay_vmm::words::counted;

use super::error::ReportError;
use super::html;
use super::model::{Broken, Report};
use super::save::Target;
use super::source::Material;

/// Makes a report of what was read and writes it to `target`: as a page, or as JSON. What could not be read is told on
/// stderr.
///
/// # Errors
/// It cannot be written.
pub fn report(material: Material, target: &Target, json: bool) -> Result<ExitCode, ReportError> {
    let Material { builder, raw, of, status } = material;
    let made = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let report = builder.finish(of, status.as_ref(), made.as_secs_f64());
    tell(&report);
    let text = if json {
        // Plain structs of strings and numbers: their serialisation cannot fail.
        let mut text = serde_json::to_string_pretty(&report).unwrap_or_default();
        text.push('\n');
        text
    } else {
        html::page(&report, &raw)
    };
    target.write(&text)
}

fn tell(report: &Report) {
    let log = &report.log;
    if let Some(Broken { line, why }) = &log.first_broken {
        let lines = counted(log.broken, "line");
        note(&format!(
            "{lines} could not be read as events and were passed over; the first is line {line}: {why}"
        ));
    }
    if log.events == 0 {
        note(&format!("there are no events {}", report.of.events));
    }
}

/// Nobody reads it where stderr cannot be written; the report has it, too.
fn note(words: &str) {
    let _ = writeln!(io::stderr(), "mce-relay: note: {words}");
}
