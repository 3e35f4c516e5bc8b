//! Results for people: tables and colour on a terminal, plain text in a pipe, JSON on request.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use indicatif::HumanDuration;
use jiff::Timestamp;
use mce_relay::{FoundBy, Pace, Page, Predicted, Rescued, State, Times, WaitReason};
use mce_relay_vmm::api::types::policy::Notify;
use mce_relay_vmm::api::types::vm::{Status, VmInfo};
use mce_relay_vmm::words::counted;

use crate::client::record::Record;
use crate::output::print::{output, write_json};
use crate::output::screen;
use crate::output::table::sheet;
use crate::output::table::{Cell, Color};

/// With more pages than this a terminal shows the end of the table, so the summary is put there.
const MANY_ROWS: usize = 100;

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

/// Prints how a VM ended, and its last ledger.
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

/// A VM's status as [`status`] prints it, but with JSON on one line.
#[must_use]
pub fn status_text(status: &Status, json: bool) -> String {
    let mut text = Vec::new();
    // Writing to memory does not fail.
    let _ = if json {
        serde_json::to_writer(&mut text, status).map_err(Into::into).and_then(|()| writeln!(text))
    } else {
        write_status(&mut text, status, screen::stdout().terminal)
    };
    String::from_utf8_lossy(&text).into_owned()
}

fn write_status(out: &mut dyn Write, status: &Status, terminal: bool) -> io::Result<()> {
    let Status { vm, pages, predicted, past, rescued } = status;
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
    if !rescued.is_empty() {
        write_rescued(out, rescued)?;
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
        sheet(&["GPA", "HVA", "kind", "found by", "signals", "seen", "outcome", "after seen"]);
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

pub(crate) fn colour(state: &State) -> Color {
    match state {
        State::Acknowledged { .. } | State::Healed => Color::Green,
        State::Undeliverable { .. } | State::Removed => Color::Red,
        _ => Color::Yellow,
    }
}

/// Huge pages that the host has lost, and what the guest keeps of each.
fn write_rescued(out: &mut dyn Write, rescued: &[Rescued]) -> io::Result<()> {
    writeln!(out, "huge pages rescued: {}", rescued.len())?;
    let mut table =
        sheet(&["GPA", "lost by the host", "pages kept", "pages gone", "took", "a vCPU held"]);
    for one in rescued {
        let held = one.held_micros.map_or_else(|| "-".to_owned(), |held| format!("{held} us"));
        table.add_row([
            Cell::new(format!("{:#x}", one.gpa)),
            Cell::new(format!("{} KiB", one.extent >> 10)),
            Cell::new(one.kept),
            Cell::new(one.gone),
            Cell::new(format!("{} us", one.micros)),
            Cell::new(held),
        ]);
    }
    table.into_lines().iter().try_for_each(|line| writeln!(out, "{line}"))
}

/// Pages that are whole and that the guest was to stop using.
fn write_predicted(out: &mut dyn Write, pages: &[Predicted]) -> io::Result<()> {
    writeln!(out, "predicted to fail: {}", pages.len())?;
    let mut table = sheet(&["GPA", "asked for", "outcome", "after that"]);
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

/// How many pages wait for the pace, and an estimate of how long.
fn paced(pages: &[Page], pace: Pace) -> Option<String> {
    let waits = |page: &&Page| matches!(page.state, State::Waiting { wait: WaitReason::Pace });
    // Pages behind the first that waits have not been looked at yet.
    pages.iter().find(waits)?;
    let untold = |page: &&Page| waits(page) || matches!(page.state, State::Seen);
    let count = pages.iter().filter(untold).count() as u64;
    let left = HumanDuration(Duration::from_secs(count / u64::from(pace.rate.max(1))));
    let pages = counted(count, "page");
    Some(format!(
        "{pages} still to be told at {} a second (--ao-pace) or faster: at most about {left}",
        pace.rate
    ))
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

/// The states that a page passed after it was seen, in order, with the seconds after that.
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
    use mce_relay::FailureKind;
    use serde_json::Value;

    use super::*;
    use crate::output::stretches::{MANY_PAGES, runs};
    use crate::poison::burst::{Burst, NotPoisoned, Poisoned};
    use crate::poison::error::PoisonError;
    use crate::poison::shown::{failures_of, lines_of, write_burst};
    use mce_relay_vmm::api::types::means::Means;
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
            kind: FailureKind::ActionOptional,
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
        let (predicted, past, rescued) = (Vec::new(), Vec::new(), Vec::new());
        let status = Status { vm, pages, predicted, past, rescued };
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
        let waits = State::Waiting { wait: WaitReason::Mcip { vcpu: 0 } };
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
        let waits = State::Waiting { wait: WaitReason::Pace };
        let mut pages: Vec<Page> = (0..1200).map(|number| page(number, State::Seen)).collect();
        assert!(!shown(pages.clone(), None, false)[2].contains("pace"), "told at once");
        pages[0].state = waits;
        pages[1].state = State::Acknowledged { place: mce_relay::Place::Ghes { record: 1 } };
        let words = "1199 pages still to be told at 10 a second (--ao-pace) or faster: at most about 2 minutes";
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
