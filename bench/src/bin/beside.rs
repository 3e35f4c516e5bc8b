//! What is measured with whole guests, beside QEMU, in the lab: `beside QEMU [FIGURE…]`. The figures go to
//! $MCE_RELAY_LAB_OUT/beside.json.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "what cannot be set up is not measured"
)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use mce_relay_bench::figure::{Figure, Goal, Series, US};
use mce_relay_bench::progress;
use mce_relay_cli::poison::host::hwpoison_inject;
use mce_relay_tests::agent::Page;
use mce_relay_tests::guest::{Guest, Options};
use mce_relay_tests::lab;
use mce_relay_tests::qemu::{Machine, Qemu, Style};
use mce_relay_vmm::host::{page_frames, pagemap};

const MICROVM: &str = "QEMU microvm";
const PC: &str = "QEMU pc";
const Q35: &str = "QEMU q35";
const RAM: u64 = 256 << 20;

type Measure = fn(&Path) -> Vec<Figure>;

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let Some(qemu) = words.next().map(PathBuf::from) else {
        eprintln!("usage: beside QEMU [boot|touch|burst …]");
        return ExitCode::from(2);
    };
    if let Err(reason) = lab::may_poison() {
        eprintln!("beside: {reason}");
        return ExitCode::FAILURE;
    }
    let wanted: Vec<String> = words.collect();
    let measures: [(&str, Measure); 3] = [("boot", boot), ("touch", touch), ("burst", burst)];
    let mut figures = Vec::new();
    for (name, measure) in measures {
        if wanted.is_empty() || wanted.iter().any(|one| one == name) {
            figures.extend(measure(&qemu));
            // After each: the lab may not live to see the next.
            if let Some(out) = std::env::var_os("MCE_RELAY_LAB_OUT") {
                let path = Path::new(&out).join("beside.json");
                std::fs::write(path, serde_json::to_string_pretty(&figures).unwrap()).unwrap();
            }
        }
    }
    ExitCode::SUCCESS
}

fn ours() -> Options {
    Options { memory: "size=256M,shared=on", ..Options::amd(2).quiet() }
}

/// From the VMM's start to the agent's first word, and the VMM's own memory then.
fn boot(qemu: &Path) -> Vec<Figure> {
    const ROUNDS: usize = 5;
    let mut times = [const { Vec::new() }; 3];
    let mut sizes = [const { Vec::new() }; 3];
    for round in 1..=ROUNDS {
        progress(&format!("boot, round {round} of {ROUNDS}"));
        let begun = Instant::now();
        let guest = Guest::boot(&ours());
        times[0].push(begun.elapsed().as_secs_f64());
        sizes[0].push(outside(guest.pid()));
        drop(guest);
        for (place, machine) in [(1, Machine::Microvm), (2, Machine::Pc)] {
            let begun = Instant::now();
            match Qemu::boot_on(qemu, machine, Style::Amd, 2) {
                Ok(guest) => {
                    times[place].push(begun.elapsed().as_secs_f64());
                    sizes[place].push(outside(guest.pid()));
                }
                Err(error) => progress(&format!("QEMU {machine:?}: {error}")),
            }
        }
    }
    let series = |values: [Vec<f64>; 3]| {
        [US, MICROVM, PC]
            .into_iter()
            .zip(values)
            .map(|(name, values)| Series::new(name, values))
            .collect()
    };
    vec![
        Figure {
            what: "boot to the agent's first word".into(),
            unit: "s".into(),
            series: series(times),
            goal: Goal::AtMostTimes(0.7, MICROVM.into()),
            command: "make bench FIGURES=boot".into(),
            note: "the same kernel and initramfs, 2 vCPUs, quiet console, in turns".into(),
        },
        Figure {
            what: "memory of the VMM outside guest RAM".into(),
            unit: "MiB".into(),
            series: series(sizes),
            goal: Goal::AtMost(2.5),
            command: "make bench FIGURES=boot".into(),
            note: "resident, private and shared, from smaps, with the guest up; mce-relay as `make dist` builds it"
                .into(),
        },
    ]
}

#[allow(clippy::cast_precision_loss, reason = "some MiB")]
fn outside(pid: u32) -> f64 {
    lab::outside(pid, RAM) as f64 / 1024.0
}

/// Poisons the host's page `hva` of process `pid`.
fn poison(pid: u32, hva: u64) {
    let pfn = pagemap::pfn(pid, hva).unwrap();
    hwpoison_inject::Injector::open().unwrap().corrupt(pfn).unwrap();
    assert!(page_frames::is_poisoned(pfn).unwrap());
}

/// Milliseconds from a touch in the guest's program to the end of its SIGBUS handler.
fn touched(reply: &serde_json::Value) -> Result<f64, String> {
    match (reply["result"].as_str(), reply["nanos"].as_f64()) {
        (Some("sigbus"), Some(nanos)) => Ok(nanos / 1e6),
        _ => Err(format!("no SIGBUS: {reply}")),
    }
}

/// A touch of a page that went bad, and the guest's SIGBUS.
fn touch(qemu: &Path) -> Vec<Figure> {
    const PAGES: usize = 12;
    progress("a touch of a bad page under mce-relay");
    let mut guest = Guest::boot(&Options { kill: "late", ..ours() });
    guest.agent.ask("sigbus count");
    let pages: Vec<Page> = guest.agent.alloc("anon", PAGES);
    let own: Vec<f64> = pages
        .iter()
        .map(|page| {
            progress(&format!("GPA {:#x}", page.gpa));
            guest.poison(page.gpa, "hwpoison-inject");
            let reply = guest.agent.touch(*page, "read");
            std::thread::sleep(Duration::from_millis(300));
            touched(&reply).unwrap()
        })
        .collect();
    drop(guest);

    progress("a touch of a bad page under QEMU");
    let mut theirs = Vec::new();
    match Qemu::boot(qemu, Style::Amd, 2) {
        Err(error) => progress(&error),
        Ok(mut guest) => {
            let pages = guest.agent(|agent| {
                agent.ask("sigbus count");
                agent.alloc("anon", PAGES)
            });
            for page in pages.unwrap_or_default() {
                progress(&format!("GPA {:#x}", page.gpa));
                poison(guest.pid(), guest.hva(page.gpa).unwrap());
                // It takes the AO, which its guest hears of at its next poll only.
                std::thread::sleep(Duration::from_millis(300));
                let reply = guest.agent(|agent| agent.touch(page, "read"));
                match reply.and_then(|reply| touched(&reply)) {
                    Ok(time) => theirs.push(time),
                    Err(error) => {
                        progress(&format!("QEMU: {error}; {:?}", guest.end()));
                        break;
                    }
                }
            }
        }
    }
    vec![Figure {
        what: "AR: the guest's touch to its SIGBUS handler".into(),
        unit: "ms".into(),
        series: vec![Series::new(US, own), Series::new(Q35, theirs)],
        goal: Goal::AtMostTimes(0.8, Q35.into()),
        command: "make bench FIGURES=touch".into(),
        note:
            "AMD-style guest, quiet console, on the guest's clock; QEMU has been sent the AO before"
                .into(),
    }]
}

/// 512 pages that go bad as fast as the host's kernel takes them.
fn burst(_: &Path) -> Vec<Figure> {
    const PAGES: usize = 512;
    const PATIENCE: Duration = Duration::from_secs(150);
    progress("a burst of 512 under mce-relay");
    let mut guest = Guest::boot(&ours().ghes());
    guest.agent.ask("sigbus count");
    guest.agent.ask("early off");
    let pages = guest.agent.alloc_many("anon", PAGES);
    let gpas: Vec<u64> = pages.iter().map(|page| page.gpa).collect();
    let begun = Instant::now();
    guest.poison_many(&gpas);
    let (mut learned, mut last) = (0.0, 0.0);
    let mut said = begun;
    while learned < 512.0 && begun.elapsed() < PATIENCE {
        let now = guest.agent.failures_count()["pfns"].as_f64().unwrap_or_default();
        if now > learned {
            (learned, last) = (now, begun.elapsed().as_secs_f64());
        }
        if said.elapsed() > Duration::from_secs(5) {
            progress(&format!("the guest has learned of {learned}"));
            said = Instant::now();
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    vec![
        Figure {
            what: "burst of 512 AOs: pages the guest learned of".into(),
            unit: "pages".into(),
            series: vec![Series::new(US, vec![learned])],
            goal: Goal::Exactly(512.0),
            command: "make bench FIGURES=burst".into(),
            note: "AMD-style guest, firmware-first, default pace".into(),
        },
        Figure {
            what: "burst of 512 AOs: time to the last that the guest learned of".into(),
            unit: "s".into(),
            series: vec![Series::new(US, vec![last])],
            goal: Goal::Shown,
            command: "make bench FIGURES=burst".into(),
            note: "10 a second by the default pace, so that the guest's own queue loses none"
                .into(),
        },
    ]
}
