//! Results for people: tables and colour on a terminal, plain text in a pipe, JSON on request.

use std::fmt::Display;
use std::io::{self, BufWriter, Write};
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use jiff::Timestamp;
use mce_relay::delivery::Wait;
use mce_relay::ledger::{State, Times};
use mce_relay::{FoundBy, Pace, Page, Predicted};
use mce_relay_vmm::api::types::manual_mce::{ByHand, OnVcpu, Outcome, Outlook};
use mce_relay_vmm::api::types::means::Means;
use mce_relay_vmm::api::types::policy::Notify;
use mce_relay_vmm::api::types::vm::{Status, VmInfo};
use mce_relay_vmm::words::{counted, with_causes};
use serde::Serialize;

use crate::client::record::Record;
use crate::commands::map::Map;
use crate::commands::retire::Retired;
use crate::output::screen;
use crate::output::table::{Cell, Color, Sheet};
use crate::poison::burst::{Burst, NotPoisoned, Poisoned};
use crate::poison::error::PoisonError;
use crate::poison::host::unpoison::UnpoisonError;

/// Of more pages than this, a burst is summed up instead of shown one by one.
const MANY_PAGES: usize = 32;
/// Of more pages than this, a terminal shows the end of the table: the summary goes there.
const MANY_ROWS: usize = 100;

/// Has `write` write to stdout. A reader that goes away is no error.
fn output(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> ExitCode {
    let mut out = BufWriter::new(io::stdout().lock());
    match write(&mut out).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mce-relay: cannot write the result: {error}");
            ExitCode::FAILURE
        }
    }
}

fn write_json(out: &mut dyn Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    writeln!(out)
}

/// Prints `value` on stdout, as JSON or as its text. A reader that goes away is no error.
pub fn print(value: &(impl Serialize + Display), json: bool) -> ExitCode {
    output(|out| if json { write_json(out, value) } else { writeln!(out, "{value}") })
}

/// The same on stderr, where stdout has something else.
pub fn print_beside(value: &(impl Serialize + Display), json: bool) -> ExitCode {
    let mut out = io::stderr().lock();
    let written = if json { write_json(&mut out, value) } else { writeln!(out, "{value}") };
    if written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Writes `bytes` to stdout as they are. A reader that goes away is no error.
pub fn raw(bytes: &[u8]) -> ExitCode {
    output(|out| out.write_all(bytes))
}

/// An empty table for standard output.
pub fn table(header: &[&str]) -> Sheet {
    Sheet::new(header, screen::stdout(), screen::columns())
}

/// Of more bytes than this, it is shown at once how many have been worked on; so it is of [`MANY_PAGES`].
const MANY_BYTES: u64 = 64 << 20;
/// Any work that takes longer than this shows how far it is.
const LONG: Duration = Duration::from_secs(1);

/// Shows how far a long work is, where stderr is a terminal. Goes away when dropped.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    /// Of more than so many it is drawn at once.
    many: u64,
    /// Draws once a second, also while nothing gets done; ends when its sender is dropped.
    clock: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    /// Of a work on pages that is called so, as in "poisoning", and begins now.
    #[must_use]
    pub fn new(what: &'static str) -> Self {
        let template = "{prefix} [{wide_bar}] {pos} of {len} pages, {per_sec:0}, {eta} left";
        Self::begin(what, template, MANY_PAGES as u64)
    }

    /// Of a work on bytes that is called so, as in "dumping", and begins now.
    #[must_use]
    pub fn bytes(what: &'static str) -> Self {
        let template =
            "{prefix} [{wide_bar}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
        Self::begin(what, template, MANY_BYTES)
    }

    fn begin(what: &'static str, template: &str, many: u64) -> Self {
        let bar = ProgressBar::hidden().with_prefix(what);
        let bar = match ProgressStyle::with_template(template) {
            // In characters that every terminal has.
            Ok(style) => bar.with_style(style.progress_chars("=> ")),
            Err(_) => bar,
        };
        let clock = screen::stderr().moves.then(|| clock(bar.clone())).and_then(Result::ok);
        Self { bar, many, clock }
    }

    /// `done` of `total` pages are done.
    pub fn step(&mut self, done: usize, total: usize) {
        self.advance(done as u64, total as u64);
    }

    /// `done` of `total` pages or bytes are done.
    pub fn advance(&mut self, done: u64, total: u64) {
        if self.bar.length() != Some(total) {
            self.bar.set_length(total);
        }
        if total > self.many && done != 0 && self.clock.is_some() && self.bar.is_hidden() {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        self.bar.set_position(done);
    }
}

fn clock(bar: ProgressBar) -> io::Result<(Sender<()>, JoinHandle<()>)> {
    let (sender, receiver) = mpsc::channel();
    let draw = move || {
        while receiver.recv_timeout(LONG) == Err(RecvTimeoutError::Timeout) {
            // How much there is to do may not be known yet.
            if bar.length().is_some_and(|length| length != 0) {
                if bar.is_hidden() {
                    bar.set_draw_target(ProgressDrawTarget::stderr());
                }
                bar.tick();
            }
        }
    };
    Ok((sender, thread::Builder::new().name("progress".to_owned()).spawn(draw)?))
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((sender, clock)) = self.clock.take() {
            drop(sender);
            // It cannot have panicked with words that were not printed.
            let _ = clock.join();
        }
        self.bar.finish_and_clear();
    }
}

/// One page of a burst in JSON.
#[derive(Serialize)]
#[serde(untagged)]
enum Entry<'a> {
    Poisoned(&'a Poisoned),
    Failed {
        #[serde(with = "mce_relay::event::hex")]
        gpa: u64,
        error: String,
    },
}

/// Prints on stderr what is to be known of something.
pub fn notes(notes: &[String]) {
    notes.iter().for_each(|note| eprintln!("mce-relay: note: {note}"));
}

/// Prints what became of a burst: what was poisoned on stdout, what was not on stderr. Exit status 1
/// when anything was not; 128 and the signal's number when a signal ended it.
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

/// What was not poisoned, a line for each stretch, as far as somebody will read it; and what was not even tried
/// in one.
fn failures_of(burst: &Burst) -> Vec<String> {
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

/// The first of many lines, and how many more there are.
fn first_of(mut lines: Vec<String>) -> Vec<String> {
    if lines.len() > MANY_PAGES {
        let more = lines.len() - MANY_PAGES;
        lines.truncate(MANY_PAGES);
        lines.push(format!("and so on, {more} more lines; --json has every page"));
    }
    lines
}

fn write_burst(out: &mut dyn Write, burst: &Burst, via: Means, json: bool) -> io::Result<()> {
    if !json {
        return lines_of(burst, &burst.poisoned, via).try_for_each(|line| writeln!(out, "{line}"));
    }
    let failed = burst
        .failed
        .iter()
        .map(|NotPoisoned { gpa, error }| Entry::Failed { gpa: *gpa, error: with_causes(error) });
    let entries: Vec<_> = burst.poisoned.iter().map(Entry::Poisoned).chain(failed).collect();
    // One page is shown as what it is.
    match &*entries {
        [page] => write_json(out, page),
        pages => write_json(out, &pages),
    }
}

/// Prints what became of page frames that were to be given back to the host. Exit status 1 when any
/// was not.
pub fn unpoisoned(pages: &[(u64, Result<(), UnpoisonError>)], json: bool) -> ExitCode {
    #[derive(Serialize)]
    struct Entry {
        #[serde(with = "mce_relay::event::hex")]
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

/// Prints a map of guest RAM.
pub fn map(map: &Map, json: bool) -> ExitCode {
    let colour = screen::stdout().colour;
    output(|out| if json { write_json(out, map) } else { map.write(out, colour) })
}

/// Prints what would come of a machine check by hand.
pub fn outlook(planned: &ByHand, json: bool) -> ExitCode {
    output(|out| match json {
        true => write_json(out, planned),
        false => writeln!(out, "{}", planned.outlook),
    })
}

/// Prints what came of a machine check by hand, of which `shown` has been said before. Exit status 1 when
/// it was to be injected and is not there.
pub fn by_hand(shown: Option<&Outlook>, done: &ByHand, json: bool) -> ExitCode {
    let printed = output(|out| {
        if json {
            return write_json(out, done);
        }
        if shown != Some(&done.outlook) {
            writeln!(out, "by then the guest stood otherwise:\n{}", done.outlook)?;
        }
        done.done.iter().try_for_each(|done| writeln!(out, "{done}"))
    });
    let missing = |done: &OnVcpu| matches!(done.outcome, Outcome::NotThere { .. });
    if done.done.iter().any(missing) { ExitCode::FAILURE } else { printed }
}

/// Prints what became of pages that the guest was to stop using: those it was told of on stdout, the
/// others on stderr. Exit status 1 when there are any.
pub fn retired(pages: &[Retired], json: bool) -> ExitCode {
    let (told, not_told): (Vec<&Retired>, Vec<&Retired>) = pages.iter().partition(|page| page.told);
    let printed = output(|out| {
        if json {
            write_json(out, &pages)
        } else {
            told.iter().try_for_each(|page| writeln!(out, "{page}"))
        }
    });
    for (pages, outcome) in runs(not_told.iter().map(|page| (page.gpa, &page.outcome))) {
        eprintln!("mce-relay: not told: {pages}: {outcome}");
    }
    if not_told.is_empty() { printed } else { ExitCode::FAILURE }
}

/// A line for each page, or for each stretch where some failed, or one for all.
fn lines_of<'a>(
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
        // Some are bad and some are not; the notes say which.
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

/// Pages in a row of which the same is to be said, as words: `GPA 0x1000` or `GPA 0x1000..0x3000`.
fn runs<T: PartialEq>(pages: impl Iterator<Item = (u64, T)>) -> Vec<(String, T)> {
    let mut runs: Vec<(u64, u64, T)> = Vec::new();
    for (gpa, what) in pages {
        match runs.last_mut() {
            Some((_, end, same)) if *end == gpa && *same == what => *end += 4096,
            _ => runs.push((gpa, gpa + 4096, what)),
        }
    }
    let words = |(start, end, what)| match (end - start) / 4096 {
        1 => (format!("GPA {start:#x}"), what),
        count => (format!("GPA {start:#x}..{end:#x} ({count} pages)"), what),
    };
    runs.into_iter().map(words).collect()
}

/// Prints a VM's status.
pub fn status(status: &Status, json: bool) -> ExitCode {
    output(|out| {
        if json {
            write_json(out, status)
        } else {
            write_status(out, status, screen::stdout().terminal)
        }
    })
}

/// Prints how a VM ended that is gone, and its last ledger.
pub fn record(record: &Record, json: bool) -> ExitCode {
    output(|out| {
        if json {
            return write_json(out, &record.left());
        }
        writeln!(out, "{}", record.headline())?;
        match (record.about_the_ledger(), record.status()) {
            (Some(words), Some(status)) => {
                writeln!(out, "{words}")?;
                write_status(out, status, screen::stdout().terminal)
            }
            _ => writeln!(out, "it has left no ledger; `mce-relay events` has its events"),
        }
    })
}

/// A VM's status as [`status`] prints it, but JSON on one line.
#[must_use]
pub fn status_text(status: &Status, json: bool) -> String {
    let mut text = Vec::new();
    // Nothing can go wrong where there is memory.
    let _ = if json {
        serde_json::to_writer(&mut text, status).map_err(Into::into).and_then(|()| writeln!(text))
    } else {
        write_status(&mut text, status, screen::stdout().terminal)
    };
    String::from_utf8_lossy(&text).into_owned()
}

fn write_status(out: &mut dyn Write, status: &Status, terminal: bool) -> io::Result<()> {
    let Status { vm, pages, predicted, past } = status;
    writeln!(out, "{}", headline(vm))?;
    if let Some(panic) = vm.panic {
        writeln!(out, "PANICKED: {panic}; `mce-relay reset` starts the guest over")?;
    }
    if let Some(reason) = &vm.pause_reason {
        writeln!(out, "PAUSED: {reason}; `mce-relay resume` lets it go on")?;
    }
    if !predicted.is_empty() {
        write_predicted(out, predicted)?;
    }
    if !past.is_empty() {
        writeln!(out, "bad once, and no longer: {}", past.len())?;
        write_pages(out, past)?;
    }
    if pages.is_empty() {
        return writeln!(out, "no bad pages");
    }
    let summary = |pages: &[Page]| match paced(pages, vm.ao_pace) {
        Some(words) => format!("{}\n{words}", summary(pages)),
        None => summary(pages),
    };
    let sum_last = terminal && pages.len() > MANY_ROWS;
    if !sum_last {
        writeln!(out, "{}", summary(pages))?;
    }
    write_pages(out, pages)?;
    if sum_last {
        writeln!(out, "{}", summary(pages))?;
    }
    Ok(())
}

fn write_pages(out: &mut dyn Write, pages: &[Page]) -> io::Result<()> {
    let mut table =
        table(&["GPA", "HVA", "kind", "found by", "signals", "seen", "outcome", "after seen"]);
    for page in pages {
        table.add_row([
            Cell::new(format!("{:#x}", page.gpa)),
            Cell::new(format!("{:#x}", page.hva)),
            Cell::new(page.kind),
            Cell::new(page.found_by),
            Cell::new(page.signals),
            Cell::new(time(page.times.seen)),
            Cell::new(page.state).fg(colour(&page.state)),
            Cell::new(course(&page.times)),
        ]);
    }
    table.into_lines().iter().try_for_each(|line| writeln!(out, "{line}"))
}

fn colour(state: &State) -> Color {
    match state {
        State::Acknowledged { .. } | State::Healed => Color::Green,
        State::Undeliverable { .. } | State::Removed => Color::Red,
        _ => Color::Yellow,
    }
}

/// Pages that are whole and that the guest was to stop using.
fn write_predicted(out: &mut dyn Write, pages: &[Predicted]) -> io::Result<()> {
    writeln!(out, "predicted to fail: {}", pages.len())?;
    let mut table = table(&["GPA", "asked for", "outcome", "after that"]);
    for page in pages {
        table.add_row([
            Cell::new(format!("{:#x}", page.gpa)),
            Cell::new(time(page.times.seen)),
            Cell::new(page.state).fg(colour(&page.state)),
            Cell::new(course(&page.times)),
        ]);
    }
    table.into_lines().iter().try_for_each(|line| writeln!(out, "{line}"))
}

fn headline(vm: &VmInfo) -> String {
    let channel = match (vm.ao_channel, vm.ghes) {
        (channel, None) => channel.to_string(),
        (channel, Some(Notify::Interrupt)) => format!("{channel} (source interrupts)"),
        (channel, Some(Notify::Poll { millis })) => {
            format!("{channel} (source polled every {millis} ms)")
        }
    };
    format!(
        "pid {}, boot {}, {}, {}-style guest, MCG_CAP {}, {} kill, AO channel {channel}, \
         AO pace {} at once and {} a second, on undeliverable: {}",
        vm.pid,
        vm.boot,
        counted(vm.vcpus as u64, "vCPU"),
        vm.vendor,
        vm.mcg_cap,
        format!("{:?}", vm.mce_kill).to_lowercase(),
        vm.ao_pace.burst,
        vm.ao_pace.rate,
        vm.on_undeliverable
    )
}

/// How many pages wait for the pace, and about how long they will.
fn paced(pages: &[Page], pace: Pace) -> Option<String> {
    let waits = |page: &&Page| matches!(page.state, State::Waiting { wait: Wait::Pace });
    // Those behind the first that wait are not looked at yet.
    pages.iter().find(waits)?;
    let untold = |page: &&Page| waits(page) || matches!(page.state, State::Seen);
    let count = pages.iter().filter(untold).count() as u64;
    let left = HumanDuration(Duration::from_secs(count / u64::from(pace.rate.max(1))));
    let pages = counted(count, "page");
    Some(format!("{pages} still to be told at {} a second (--ao-pace): about {left}", pace.rate))
}

/// How many pages are in each state, and how they were found.
fn summary(pages: &[Page]) -> String {
    type Is = fn(&State) -> bool;
    let states: [(&str, Is); 6] = [
        ("seen", |state| matches!(state, State::Seen)),
        ("waiting", |state| matches!(state, State::Waiting { .. })),
        ("injected", |state| matches!(state, State::Injected { .. })),
        ("acknowledged", |state| matches!(state, State::Acknowledged { .. })),
        ("undeliverable", |state| matches!(state, State::Undeliverable { .. })),
        ("removed", |state| matches!(state, State::Removed)),
    ];
    let counts: Vec<String> = states
        .iter()
        .map(|(name, is)| (name, pages.iter().filter(|page| is(&page.state)).count()))
        .filter(|(_, count)| *count > 0)
        .map(|(name, count)| format!("{count} {name}"))
        .collect();
    let found = |by| pages.iter().filter(|page| page.found_by == by).count();
    let more = |words: &str, by| match found(by) {
        0 => String::new(),
        count => format!(", {words} {count}"),
    };
    format!(
        "bad pages: {}: {} (found by signal {}, by scan {}{}{})",
        pages.len(),
        counts.join(", "),
        found(FoundBy::Signal),
        found(FoundBy::Scan),
        more("by the VMM's own access", FoundBy::Access),
        more("FORGED and whole", FoundBy::Forged)
    )
}

/// UTC, to the millisecond.
fn time(time: SystemTime) -> String {
    match Timestamp::try_from(time) {
        Ok(time) => format!("{time:.3}"),
        Err(_) => format!("{time:?}"),
    }
}

/// The states that a page came to after it was seen, in order, each with the seconds since then.
fn course(times: &Times) -> String {
    let Times { seen, waiting, injected, acknowledged, undeliverable, healed, removed } = *times;
    let mut steps: Vec<(SystemTime, &str)> = [
        (waiting, "waiting"),
        (injected, "injected"),
        (acknowledged, "acknowledged"),
        (undeliverable, "undeliverable"),
        (healed, "healed"),
        (removed, "removed"),
    ]
    .into_iter()
    .filter_map(|(time, name)| Some((time?, name)))
    .collect();
    steps.sort_by_key(|(time, _)| *time);
    let words: Vec<String> = steps
        .into_iter()
        .map(|(time, name)| {
            // The clock may have been set back in between.
            let after = match time.duration_since(seen) {
                Ok(after) => after.as_secs_f64(),
                Err(before) => -before.duration().as_secs_f64(),
            };
            format!("{name} {after:+.3} s")
        })
        .collect();
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use mce_relay::mca::Kind;
    use serde_json::Value;

    use super::*;
    use mce_relay_vmm::api::types::pause::{PauseReason, Undeliverable};

    fn at(millis: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(1_000_000_000_000 + millis)
    }

    fn page(number: u64, state: State) -> Page {
        let (waiting, injected) = (Some(at(250)), Some(at(100)));
        Page {
            gpa: number << 12,
            hva: 0x7000_0000 + (number << 12),
            lsb: 12,
            kind: Kind::ActionOptional,
            found_by: if number == 0 { FoundBy::Scan } else { FoundBy::Signal },
            signals: 1,
            state,
            times: Times { waiting, injected, ..Times::new(at(0)) },
        }
    }

    fn shown(pages: Vec<Page>, pause_reason: Option<PauseReason>, terminal: bool) -> Vec<String> {
        let vm =
            VmInfo { paused: pause_reason.is_some(), pause_reason, ..crate::testing::an_info() };
        let mut out = Vec::new();
        let status = Status { vm, pages, predicted: Vec::new(), past: Vec::new() };
        write_status(&mut out, &status, terminal).unwrap();
        String::from_utf8(out).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn the_course_of_a_page_is_in_the_order_of_time() {
        let times = page(0, State::Seen).times;
        assert_eq!(course(&times), "injected +0.100 s, waiting +0.250 s");
        assert_eq!(time(times.seen), "2001-09-09T01:46:40.000Z");
        let back = Times { seen: at(150), waiting: None, ..times };
        assert_eq!(course(&back), "injected -0.050 s", "the clock was set back");
    }

    #[test]
    fn a_status_counts_states_and_says_why_it_is_paused() {
        assert_eq!(shown(Vec::new(), None, false)[1..], ["no bad pages"]);
        let waits = State::Waiting { wait: Wait::Mcip { vcpu: 0 } };
        let pages = vec![page(0, waits), page(1, State::Seen), page(2, waits)];
        let what = Undeliverable { vcpu: 1, gpa: 0x5000, why: "test".into(), rip: Some(0) };
        let lines = shown(pages, Some(PauseReason::Undeliverable(what)), true);
        assert!(lines[0].contains("AO pace 16 at once and 10 a second"), "{}", lines[0]);
        assert!(lines[1].starts_with("PAUSED: vCPU 1 touched the bad page at 0x5000"));
        let sum = "bad pages: 3: 1 seen, 2 waiting (found by signal 2, by scan 1)";
        assert_eq!(lines[2], sum);
        assert!(lines[4].contains("0x7000"), "{}", lines[4]);
    }

    #[test]
    fn a_terminal_ends_with_the_summary_of_a_long_table() {
        let pages = |count| (0..count).map(|number| page(number, State::Seen)).collect();
        let sum = |lines: &[String]| lines.iter().position(|line| line.starts_with("bad pages:"));
        for (count, terminal, last) in
            [(100, true, false), (101, true, true), (101, false, false), (4096, true, true)]
        {
            let lines = shown(pages(count), None, terminal);
            let expected = if last { lines.len() - 1 } else { 1 };
            assert_eq!(sum(&lines), Some(expected), "{count} rows, terminal {terminal}");
            let rows = lines.iter().filter(|line| line.contains("2001-")).count();
            assert_eq!(rows as u64, count, "every row is there");
        }
    }

    #[test]
    fn a_status_estimates_how_long_the_pace_takes() {
        let waits = State::Waiting { wait: Wait::Pace };
        let mut pages: Vec<Page> = (0..1200).map(|number| page(number, State::Seen)).collect();
        assert!(!shown(pages.clone(), None, false)[2].contains("pace"), "told at once");
        pages[0].state = waits;
        pages[1].state = State::Acknowledged { place: mce_relay::Place::Ghes { record: 1 } };
        let words = "1199 pages still to be told at 10 a second (--ao-pace): about 2 minutes";
        assert_eq!(shown(pages, None, false)[2], words);
    }

    #[test]
    fn an_interrupted_burst_is_summed_up() {
        let not = |gpa, error| NotPoisoned { gpa, error };
        let failed = (0..40).map(|n| not(n << 13, PoisonError::NotMoved { pfn: n }));
        let untried = (0..2000).map(|n| not((1000 + 2 * n) << 12, PoisonError::Interrupted));
        let burst = Burst {
            poisoned: Vec::new(),
            failed: failed.chain(untried).collect(),
            took: Duration::from_secs(1),
            notes: Vec::new(),
            interrupted: None,
            ended: None,
        };
        let lines = failures_of(&burst);
        assert_eq!(lines.len(), MANY_PAGES + 2, "{lines:#?}");
        assert!(lines[MANY_PAGES].contains("8 more lines"), "{lines:#?}");
        let words = "interrupted: of 2040 pages 0 done, 40 failed, and 2000 not tried";
        assert!(lines[MANY_PAGES + 1].starts_with(words), "{lines:#?}");
    }

    #[test]
    fn runs_of_pages_with_the_same_to_be_said() {
        let pages = [(0x1000, 'a'), (0x2000, 'a'), (0x3000, 'b'), (0x5000, 'b'), (0x4000, 'b')];
        let words: Vec<String> = runs(pages.into_iter()).into_iter().map(|(run, _)| run).collect();
        let expected = ["GPA 0x1000..0x3000 (2 pages)", "GPA 0x3000", "GPA 0x5000", "GPA 0x4000"];
        assert_eq!(words, expected);
    }

    #[test]
    fn a_burst_is_shown_page_by_page_or_summed_up() {
        let via = Means::Madvise;
        let burst = |good: u64, bad: u64| Burst {
            poisoned: (0..good)
                .map(|n| Poisoned { pfn: Some(0x42), ..Poisoned::new(n << 12, 0x7000_0000, via) })
                .collect(),
            failed: (0..bad)
                .map(|n| NotPoisoned { gpa: (good + n) << 12, error: PoisonError::NoMemoryFailure })
                .collect(),
            took: Duration::from_millis(1500),
            notes: Vec::new(),
            interrupted: None,
            ended: None,
        };
        let lines = |good, bad| {
            let burst = burst(good, bad);
            lines_of(&burst, &burst.poisoned, via).collect::<Vec<_>>()
        };
        let line = "poisoned: GPA 0x0 = HVA 0x70000000 of the VMM = host pfn 0x42, via madvise";
        assert_eq!(lines(1, 0), [line]);
        assert_eq!(lines(30, 2).len(), 30);
        let sum = "poisoned: 33 of 33 pages in 1.500 s, via madvise";
        assert_eq!(lines(33, 0), [sum]);
        let sum = "poisoned: 30 of 33 pages in 1.500 s, via madvise";
        assert_eq!(lines(30, 3), ["poisoned: GPA 0x0..0x1e000 (30 pages)", sum]);

        let json = |good, bad| -> Value {
            let mut out = Vec::new();
            write_burst(&mut out, &burst(good, bad), via, true).unwrap();
            serde_json::from_slice(&out).unwrap()
        };
        assert_eq!(json(1, 0)["pfn"], "0x42");
        let failed = json(0, 1);
        assert_eq!(failed["gpa"], "0x0", "{failed}");
        assert!(failed["error"].as_str().unwrap().contains("CONFIG_MEMORY_FAILURE"), "{failed}");
        assert_eq!(json(1, 1)[1]["gpa"], "0x1000");
        assert_eq!(json(0, 2).as_array().unwrap().len(), 2);
    }
}
