//! Puts what was measured into a report that a person can read: `report DIR`. DIR/raw has the figures, as
//! `make bench` leaves them; the report, its plots and all figures in one file go to DIR.

use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use mce_relay_bench::figure::{Figure, Goal, Judgement, Series, US};
use plotters::prelude::*;
use serde_json::Value;

/// Why goals are missed, as far as profiling has shown it: the beginning of the figure's name, and the reason.
const REASONS: [(&str, &str); 3] = [
    (
        "forged AO, from the kick",
        "Before it injects, the relay reads the vCPU's MSRs, which is one system call more than the bare use makes (\"never injected \
         of what was not\"); its registers come with the exit of the kick. Each system call on a vCPU loads and puts it, which on a \
         nested host takes some 5 µs. The rest is the ledger and the events.",
    ),
    (
        "forged AR, from its signal",
        "Nobody has kicked the vCPU, so its registers come with a KVM_RUN more, which does not run the guest; then its MSRs are read. \
         On a nested host these two take some 15 µs, and waking the relay's thread, which looks for the acknowledgement, some 8.",
    ),
    (
        "boot to the agent",
        "The guest waits for no device any more: of some 5 s in the lab 0.5 to 1 go by before it runs (66 MB of vmlinux are read), \
         and the rest is Linux' own work on an emulated processor, spread over its log: unpacking the initramfs 0.3 s, its two \
         looks through page tables and clocks 0.5 s. QEMU's microvm is run without ACPI, whose set-up it saves.",
    ),
];

fn main() -> ExitCode {
    let Some(dir) = std::env::args().nth(1).map(PathBuf::from) else {
        eprintln!("usage: report DIR");
        return ExitCode::from(2);
    };
    match report(&dir) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("report: {error}");
            ExitCode::FAILURE
        }
    }
}

fn report(dir: &Path) -> Result<(), Box<dyn Error>> {
    let raw = dir.join("raw");
    let mut figures = counted(&raw);
    figures.extend(criterion(&raw));
    figures.extend(slowed(&raw));
    for file in ["here.json", "under_load.json", "beside.json", "disks.json"] {
        if let Ok(text) = fs::read_to_string(raw.join(file)) {
            figures.extend(serde_json::from_str::<Vec<Figure>>(&text)?);
        }
    }
    if let Ok(text) = fs::read_to_string(raw.join("peer.json")) {
        peer(&mut figures, &serde_json::from_str(&text)?);
    }
    if figures.is_empty() {
        return Err(format!("there are no figures in {}; run make bench", raw.display()).into());
    }
    fs::write(dir.join("figures.json"), serde_json::to_string_pretty(&figures)?)?;
    plot(&dir.join("figures.svg"), &figures)?;
    fs::write(dir.join("report.md"), words(&figures, &raw)?)?;
    println!("{}", short(&figures));
    println!("all of it: {}", dir.join("report.md").display());
    Ok(())
}

/// callgrind's total of a run of `counted`, and how often it went round.
fn total(raw: &Path, what: &str) -> Option<f64> {
    let text = fs::read_to_string(raw.join(format!("{what}.callgrind"))).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("totals: "))?;
    line.trim().parse().ok()
}

/// Rounds of `counted`; bench/run.sh has the same.
const ROUNDS: f64 = 100_000.0;

fn counted(raw: &Path) -> Vec<Figure> {
    let mut figures = Vec::new();
    if let (Some(deliver), Some(empty)) = (total(raw, "deliver"), total(raw, "empty")) {
        figures.push(Figure {
            what: "before_run with nothing pending".into(),
            unit: "instructions".into(),
            // What is around the two loops differs by some instructions in all.
            series: vec![Series::new(
                US,
                vec![((deliver - empty) / ROUNDS * 100.0).round() / 100.0],
            )],
            goal: Goal::AtMost(5.0),
            command: "make bench FIGURES=counted".into(),
            note: "by callgrind, less an empty loop".into(),
        });
    }
    if let Some(handler) = total(raw, "handler") {
        figures.push(Figure {
            what: "signal handler's body on a vCPU's thread".into(),
            unit: "instructions".into(),
            series: vec![Series::new(US, vec![handler / ROUNDS])],
            goal: Goal::AtMost(100.0),
            command: "make bench FIGURES=counted".into(),
            note: "by callgrind; that it makes no system call is shown by `quiet`".into(),
        });
    }
    figures
}

/// What a build that is slow on purpose shows: the component without optimisation. If it did not show as
/// slower, nothing else here would mean anything.
fn slowed(raw: &Path) -> Vec<Figure> {
    const BUILD: &str = "the build that is measured";
    let handler = |raw: &Path| total(raw, "handler").map(|total| total / ROUNDS);
    let deciding = |raw: &Path| samples(raw, "decisions", "AR by LMCE", "1");
    let slow = raw.join("slowed");
    let counted = |raw: &Path| handler(raw).into_iter().collect();
    [
        ("instructions", "signal handler's body", counted(&slow), counted(raw)),
        ("ns", "deciding on an AR", deciding(&slow), deciding(raw)),
    ]
    .into_iter()
    .filter(|(_, _, slow, _)| !slow.is_empty())
    .map(|(unit, what, slow, own)| Figure {
        what: format!("slowed on purpose: {what}"),
        unit: unit.into(),
        series: vec![Series::new(US, slow), Series::new(BUILD, own)],
        goal: Goal::AtLeastTimes(1.5, BUILD.into()),
        command: "make bench FIGURES=slowed".into(),
        note: "the component built without optimisation, to see that the harness shows it".into(),
    })
    .collect()
}

/// The values that criterion has measured of one benchmark, in its own unit of nanoseconds.
fn samples(raw: &Path, group: &str, name: &str, of: &str) -> Vec<f64> {
    let path = raw.join("criterion").join(group).join(name).join(of).join("new/sample.json");
    let Ok(text) = fs::read_to_string(path) else { return Vec::new() };
    let Ok(sample) = serde_json::from_str::<Value>(&text) else { return Vec::new() };
    let list = |key: &str| -> Vec<f64> {
        sample[key].as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
    };
    list("times").iter().zip(list("iters")).map(|(time, times)| time / times).collect()
}

fn criterion(raw: &Path) -> Vec<Figure> {
    let mut figures = Vec::new();
    let command = "make bench FIGURES=criterion";
    for (n, goal) in [("4", 15.0), ("100", 30.0), ("10000", 60.0)] {
        let series = [(US, "RamMap"), ("sorted array", "sorted array"), ("linear", "linear")];
        figures.push(Figure {
            what: format!("HVA to GPA among {n} intervals"),
            unit: "ns".into(),
            series: series
                .map(|(who, name)| Series::new(who, samples(raw, "translation", name, n)))
                .into(),
            goal: Goal::Both(goal, 1.2, "sorted array".into()),
            command: command.into(),
            note: "linear: as vm-memory's regions are gone through".into(),
        });
    }
    for vcpus in ["1", "2", "4", "8", "16", "512"] {
        let group = "AO, from the signal to the bank";
        let values = samples(raw, group, "rendezvous", vcpus);
        figures.push(Figure {
            what: format!("AO to all of {vcpus} vCPUs by rendezvous, from the signal to the bank"),
            unit: "µs".into(),
            series: vec![Series::new(US, values.iter().map(|nanos| nanos / 1000.0).collect())],
            goal: Goal::Shown,
            command: command.into(),
            note: "a sleeping thread for each vCPU, 10,000 intervals".into(),
        });
    }
    figures.retain(|figure| !figure.series[0].values.is_empty());
    figures
}

/// Adds what QEMU made of the same burst.
fn peer(figures: &mut [Figure], peer: &Value) {
    let bursts = peer["bursts"].as_array().into_iter().flatten();
    let Some(burst) = bursts.into_iter().find(|burst| burst["pages"] == 512) else { return };
    let name = peer["vmm"].as_str().unwrap_or("QEMU");
    for figure in figures {
        let value = if figure.what.starts_with("burst of 512 AOs: pages") {
            burst["guest_learned"].as_f64()
        } else if figure.what.starts_with("burst of 512 AOs: time") {
            burst["last_learned_seconds"].as_f64()
        } else {
            continue;
        };
        let end = burst["end"].as_str().unwrap_or_default();
        let _ = write!(figure.note, "; QEMU's guest in the end: {end}");
        figure.series.push(Series::new(name, value.into_iter().collect()));
    }
}

/// A number with three digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        x if x >= 1000.0 => format!("{value:.0}"),
        x if x >= 100.0 => format!("{value:.1}"),
        x if x >= 1.0 || x == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

/// Median and quarters.
fn value(series: &Series) -> String {
    match (series.median(), series.quarters()) {
        (Some(median), Some((low, high))) if series.values.len() > 1 => {
            format!("{} ({} to {})", number(median), number(low), number(high))
        }
        (Some(median), _) => number(median),
        _ => "not measured".to_owned(),
    }
}

fn goal(figure: &Figure) -> String {
    match &figure.goal {
        Goal::AtMost(most) => format!("at most {}", number(*most)),
        Goal::AtMostTimes(factor, name) => format!("at most {factor} × {name}"),
        Goal::AtLeastTimes(factor, name) => format!("at least {factor} × {name}"),
        Goal::Both(most, factor, name) => {
            format!("at most {} and {factor} × {name}", number(*most))
        }
        Goal::Exactly(value) => number(*value),
        Goal::NoDifference(name) => format!("no difference to {name}"),
        Goal::Shown => String::new(),
    }
}

fn result(figure: &Figure) -> String {
    match figure.judge() {
        Judgement::Met => "met".to_owned(),
        Judgement::Missed(how) => format!("**missed**: {how}"),
        Judgement::Shown => String::new(),
        Judgement::NotMeasured(who) => format!("**not measured**: {who}"),
    }
}

/// The table, one line for each figure.
fn short(figures: &[Figure]) -> String {
    let mut out = String::from("| figure | mce-relay | beside | goal | |\n|---|---|---|---|---|\n");
    for figure in figures {
        let beside = figure.series[1..]
            .iter()
            .map(|series| {
                let ratio = figure.ours().zip(series.median()).map(|(a, b)| a / b);
                let ratio = ratio.map_or(String::new(), |ratio| format!(", ratio {ratio:.2}"));
                format!("{}: {}{ratio}", series.name, value(series))
            })
            .collect::<Vec<_>>();
        // Writing to a string does not fail.
        let _ = writeln!(
            out,
            "| {} | {} {} | {} | {} | {} |",
            figure.what,
            value(&figure.series[0]),
            figure.unit,
            beside.join("; "),
            goal(figure),
            result(figure)
        );
    }
    out
}

fn words(figures: &[Figure], raw: &Path) -> Result<String, Box<dyn Error>> {
    let machine = fs::read_to_string(raw.join("machine")).unwrap_or_default();
    let mut out = format!(
        "# mce-relay beside others\n\nValues are medians, in parentheses the first and the third quarter; what is side by side was measured \
         in one run. Ratios are to be compared across machines, values are not.\n\n{}\n\n{}\n![All figures, each in \
         shares of the largest of its series](figures.svg)\n",
        machine.trim(),
        short(figures)
    );
    let missed: Vec<&Figure> = figures
        .iter()
        .filter(|figure| !matches!(figure.judge(), Judgement::Met | Judgement::Shown))
        .collect();
    writeln!(out, "\n## Goals that are not met\n")?;
    if missed.is_empty() {
        writeln!(out, "None.")?;
    }
    for figure in missed {
        let reason = REASONS.iter().find(|(what, _)| figure.what.starts_with(what));
        let reason = reason.map_or("Its reason is not known yet.", |(_, reason)| reason);
        writeln!(out, "- {}: {}. {reason}", figure.what, result(figure))?;
    }
    writeln!(out, "\n## How each was measured\n")?;
    for figure in figures {
        let counts: Vec<String> = figure
            .series
            .iter()
            .map(|series| format!("{} × {}", series.values.len(), series.name))
            .collect();
        let note =
            if figure.note.is_empty() { String::new() } else { format!("; {}", figure.note) };
        writeln!(out, "- {}: `{}`; {}{note}", figure.what, figure.command, counts.join(", "))?;
    }
    Ok(out)
}

/// Each figure as bars, in shares of its largest.
fn plot(path: &Path, figures: &[Figure]) -> Result<(), Box<dyn Error>> {
    const BAR: i32 = 14;
    const LEFT: i32 = 470;
    const WIDTH: i32 = 1100;
    let rows: usize = figures.iter().map(|figure| figure.series.len() + 1).sum();
    let height = u32::try_from(rows)? * BAR.unsigned_abs() + 20;
    let root = SVGBackend::new(path, (WIDTH.unsigned_abs(), height)).into_drawing_area();
    root.fill(&WHITE)?;
    let text = |size: i32| ("sans-serif", size).into_font();
    let mut y = 6;
    for figure in figures {
        let medians = || figure.series.iter().filter_map(Series::median);
        let largest = medians().fold(f64::MIN_POSITIVE, f64::max);
        root.draw(&Text::new(figure.what.clone(), (6, y), text(11)))?;
        for series in &figure.series {
            y += BAR;
            root.draw(&Text::new(series.name.clone(), (LEFT - 130, y), text(10)))?;
            let Some(median) = series.median() else { continue };
            #[allow(clippy::cast_possible_truncation, reason = "some hundred pixels")]
            let right = |value: f64| LEFT + (value / largest * 420.0) as i32;
            let colour =
                if series.name == US { RGBColor(30, 90, 160) } else { RGBColor(170, 170, 170) };
            let bar = [(LEFT, y), (right(median).max(LEFT + 1), y + BAR - 4)];
            root.draw(&Rectangle::new(bar, colour.filled()))?;
            if let Some((low, high)) = series.quarters() {
                let middle = y + BAR / 2 - 2;
                let line = [(right(low), middle), (right(high.min(largest)), middle)];
                root.draw(&PathElement::new(line, BLACK.stroke_width(1)))?;
            }
            let words = format!("{} {}", value(series), figure.unit);
            root.draw(&Text::new(words, (right(median) + 6, y), text(10)))?;
        }
        y += BAR;
    }
    root.present()?;
    Ok(())
}
