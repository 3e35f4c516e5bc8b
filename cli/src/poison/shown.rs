//! Prints the outcome of poisoning.

use std::io::{self, Write};
use std::process::ExitCode;

use mce_relay_vmm::api::types::means::Means;
use mce_relay_vmm::words::{counted, with_causes};
use serde::Serialize;

use crate::output::print::{notes, output, write_json};
use crate::output::stretches::{MANY_PAGES, first_of, runs};
use crate::poison::burst::{Burst, NotPoisoned, Poisoned};
use crate::poison::error::PoisonError;
use crate::poison::host::unpoison::UnpoisonError;

/// One page of a burst in JSON.
#[derive(Serialize)]
#[serde(untagged)]
enum Entry<'a> {
    Poisoned(&'a Poisoned),
    Failed {
        #[serde(with = "mce_relay::hex")]
        gpa: u64,
        error: String,
    },
}

/// Prints the outcome of a burst: poisoned pages on stdout, the others on stderr. Exit status 1 when there are others;
/// 128 and the signal's number when a signal ended it.
pub fn burst(burst: &Burst, via: Means, json: bool) -> ExitCode {
    let printed = output(|out| write_burst(out, burst, via, json));
    notes(&burst.notes);
    for line in failures_of(burst) {
        eprintln!("mce-relay: {line}");
    }
    match burst.interrupted {
        Some(signal) => ExitCode::from(128 + signal),
        None if burst.failed.is_empty() => printed,
        None => ExitCode::FAILURE,
    }
}

/// The pages that were not poisoned, a line for each stretch, up to a limit; and one line for those that were not
/// tried.
pub(crate) fn failures_of(burst: &Burst) -> Vec<String> {
    let is_untried =
        |page: &&NotPoisoned| matches!(page.error, PoisonError::Interrupted | PoisonError::Ended);
    let (untried, failed): (Vec<&NotPoisoned>, Vec<&NotPoisoned>) =
        burst.failed.iter().partition(is_untried);
    let stretches = runs(failed.iter().map(|page| (page.gpa, with_causes(&page.error))));
    let words = |(pages, error): (String, String)| format!("failed: {pages}: {error}");
    let mut lines = first_of(stretches.into_iter().map(words).collect());
    if !untried.is_empty() {
        let (why, rest) = match &burst.ended {
            Some(ended) => (ended.to_string(), ""),
            None => ("interrupted".to_owned(), ": what was not tried is as it was"),
        };
        lines.push(format!(
            "{why}: of {} {} done, {} failed, and {} not tried{rest}",
            counted((burst.poisoned.len() + burst.failed.len()) as u64, "page"),
            burst.poisoned.len(),
            failed.len(),
            untried.len(),
        ));
    }
    lines
}

pub(crate) fn write_burst(
    out: &mut dyn Write,
    burst: &Burst,
    via: Means,
    json: bool,
) -> io::Result<()> {
    if !json {
        return lines_of(burst, &burst.poisoned, via).try_for_each(|line| writeln!(out, "{line}"));
    }
    let failed = burst
        .failed
        .iter()
        .map(|NotPoisoned { gpa, error }| Entry::Failed { gpa: *gpa, error: with_causes(error) });
    let entries: Vec<_> = burst.poisoned.iter().map(Entry::Poisoned).chain(failed).collect();
    // A single page is shown as itself.
    match &*entries {
        [page] => write_json(out, page),
        pages => write_json(out, &pages),
    }
}

/// Prints the outcome of unpoisoning page frames. Exit status 1 when any was not taken back.
pub fn unpoisoned(pages: &[(u64, Result<(), UnpoisonError>)], json: bool) -> ExitCode {
    #[derive(Serialize)]
    struct Entry {
        #[serde(with = "mce_relay::hex")]
        pfn: u64,
        error: Option<String>,
    }
    let entries: Vec<Entry> = pages
        .iter()
        .map(|(pfn, result)| Entry {
            pfn: *pfn,
            error: result.as_ref().err().map(|error| with_causes(error)),
        })
        .collect();
    let printed = output(|out| {
        if json {
            return write_json(out, &entries);
        }
        let good = entries.iter().filter(|entry| entry.error.is_none());
        good.map(|entry| entry.pfn)
            .try_for_each(|pfn| writeln!(out, "back in use: host pfn {pfn:#x}"))
    });
    let failed: Vec<&String> = entries.iter().filter_map(|entry| entry.error.as_ref()).collect();
    failed.iter().for_each(|error| eprintln!("mce-relay: {error}"));
    if failed.is_empty() { printed } else { ExitCode::FAILURE }
}

/// A line for each page; a line for each stretch if some failed; or one line for all.
pub(crate) fn lines_of<'a>(
    burst: &Burst,
    pages: &'a [Poisoned],
    via: Means,
) -> Box<dyn Iterator<Item = String> + 'a> {
    let all = pages.len() + burst.failed.len();
    if all <= MANY_PAGES {
        return Box::new(pages.iter().map(ToString::to_string));
    }
    let took = burst.took.as_secs_f64();
    let done = match pages.first() {
        Some(first) if pages.iter().all(|page| page.done() == first.done()) => first.done(),
        // Some pages are really bad and some are not; the notes say which.
        Some(_) => "FORGED signal",
        None => via.done(),
    };
    let done = match pages.first() {
        Some(page) if page.dry_run => format!("would be {done}"),
        _ => done.to_owned(),
    };
    let sum = format!(
        "{done}: {} of {} in {took:.3} s, via {via}",
        pages.len(),
        counted(all as u64, "page")
    );
    let stretches = if burst.failed.is_empty() {
        Vec::new()
    } else {
        runs(pages.iter().map(|page| (page.gpa, ())))
    };
    let stretches: Vec<String> =
        stretches.into_iter().map(|(pages, ())| format!("{done}: {pages}")).collect();
    Box::new(first_of(stretches).into_iter().chain([sum]))
}
