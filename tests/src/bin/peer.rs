//! `peer QEMU STYLE PAGES...`: the line beside ours; `peer QEMU STYLE hugepages`: one frame of a huge page, and what the
//! guest's program has left of the rest. For each number of PAGES a guest boots under QEMU,
//! and so many of its pages go bad on the host as fast as the host's kernel takes them; the table says
//! what became of them on each level. The same is in $MCE_RELAY_LAB_OUT/peer.json.
//!
//! Nothing here judges: the exit status is that of the measurement.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "without its numbers there is no line")]

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mce_relay_cli::output::table;
use mce_relay_cli::poison::host::hwpoison_inject;
use mce_relay_tests::agent::Agent;
use mce_relay_tests::guest::image;
use mce_relay_tests::lab::may_poison;
use mce_relay_tests::qemu::{Qemu, Style};
use mce_relay_vmm::host::{page_frames, pagemap};
use serde::Serialize;

const VCPUS: usize = 2;
/// Most pages that the agent allocates at once.
const MAX_ALLOC: usize = 4096;
/// A burst is over when nothing new has reached the guest for so long.
const QUIET: Duration = Duration::from_secs(60);
/// The guest looks for deferred errors once a second; to ask it more often only costs it time.
const LOOK: Duration = Duration::from_secs(1);

/// What became of one burst.
#[derive(Debug, Default, Serialize)]
struct Burst {
    /// What the guest is shown.
    style: String,
    /// Pages that were to be poisoned.
    pages: usize,
    /// Page frames that the host's kernel marks as poisoned.
    poisoned: usize,
    /// How long that took, in seconds.
    poisoning_seconds: f64,
    /// "Sending SIGBUS" lines of the host's kernel about QEMU.
    signals_sent: usize,
    /// Lines that the host's log lost before they were counted.
    host_log_lost: usize,
    /// QEMU's log: errors "injected".
    log_injected: usize,
    /// QMP events MEMORY_FAILURE.
    qmp_events: usize,
    /// Pages of the burst that the guest's own kernel names as failed.
    guest_learned: usize,
    /// From the first poisoned page to the last that the guest learned of, in seconds. It is asked once
    /// a second; none if it never was able to say that it had learned of one.
    last_learned_seconds: Option<f64>,
    /// Whether the guest answers after the burst.
    guest_alive: bool,
    /// How it ended.
    end: String,
}

/// All that is written down.
#[derive(Debug, Serialize)]
struct Report {
    vmm: String,
    host_kernel: String,
    guest_kernel: String,
    vcpus: usize,
    bursts: Vec<Burst>,
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let usage = "usage: peer QEMU amd|intel|intel-without-ser-p PAGES...|hugepages";
    let [qemu, style, numbers @ ..] = &words[..] else {
        eprintln!("{usage}");
        return ExitCode::from(2);
    };
    let qemu = PathBuf::from(qemu);
    let Some((_, style)) = Style::NAMES.into_iter().find(|(name, _)| name == style) else {
        eprintln!("peer: {style:?} is not a style of guests; {usage}");
        return ExitCode::from(2);
    };
    if numbers == ["hugepages"] {
        return huge_page(&qemu, style).map_or_else(
            |error| {
                println!("== no result: {error}");
                ExitCode::FAILURE
            },
            |()| ExitCode::SUCCESS,
        );
    }
    let numbers: Result<Vec<usize>, _> = numbers.iter().map(|word| word.parse()).collect();
    let numbers = match numbers {
        Ok(numbers) if !numbers.is_empty() && !numbers.contains(&0) => numbers,
        _ => {
            eprintln!("peer: PAGES are numbers above 0; {usage}");
            return ExitCode::from(2);
        }
    };
    if let Err(reason) = may_poison() {
        eprintln!("peer: {reason}");
        return ExitCode::FAILURE;
    }

    let mut report = Report {
        vmm: version(&qemu),
        host_kernel: read(Path::new("/proc/sys/kernel/osrelease")),
        guest_kernel: read(&image("version")),
        vcpus: VCPUS,
        bursts: Vec::new(),
    };
    println!(
        "== {}; host Linux {}; guest Linux {}, {VCPUS} vCPUs, {}",
        report.vmm,
        report.host_kernel,
        report.guest_kernel,
        style.name()
    );
    let mut complete = true;
    for pages in numbers {
        println!("== {pages} pages: a guest boots");
        match burst(&qemu, style, pages) {
            Ok(burst) => report.bursts.push(burst),
            Err(error) => {
                println!("== {pages} pages: no result: {error}");
                complete = false;
            }
        }
        // After each, as the lab may not live to see the next.
        write(&report);
        table(&report.bursts);
    }
    if complete { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// One frame of a huge page goes bad. Then the guest's program reads all of its pages.
fn huge_page(qemu: &Path, style: Style) -> Result<(), String> {
    const HUGE: u64 = 2 << 20;
    may_poison()?;
    mce_relay_tests::lab::set_pool("2048kB", 132);
    println!("== {}; {} in huge pages of 2 MiB", version(qemu), style.name());
    let mut guest = Qemu::boot_in_huge_pages(qemu, style, VCPUS)?;
    let pages = guest.agent(|agent| {
        agent.ask("sigbus count");
        agent.ask("interval 1");
        agent.alloc_many("anon", MAX_ALLOC)
    })?;
    let bad = pages[MAX_ALLOC / 2];
    let around = pages.iter().filter(|page| page.gpa / HUGE == bad.gpa / HUGE).count();
    let frame = pagemap::pfn(guest.pid(), guest.hva(bad.gpa)?).map_err(|e| e.to_string())?;
    poison(&mut guest, &[frame])?;
    std::thread::sleep(Duration::from_secs(20));
    let named = guest.agent(Agent::failures).map(|(named, _)| named.len());
    println!(
        "== the guest's kernel names {named:?} pages; its program has {around} in that huge page"
    );
    let deadline = Instant::now() + QUIET;
    let read = guest.agent(|agent| agent.reply(&format!("check except {}", bad.number), deadline));
    println!("== its program reads all but that page: {read:?}");
    println!(
        "== gone: {}, MEMORY_FAILURE events: {}",
        guest.is_gone(),
        guest.events("MEMORY_FAILURE")
    );
    guest.log().lines().rev().take(5).for_each(|line| println!("  qemu | {line}"));
    if let Ok((named, account)) = guest.agent(Agent::failures) {
        println!("== after that its kernel names {} pages: {account}", named.len());
    } else {
        println!(
            "== after that the guest does not answer; its kernel named {} pages",
            guest.memory().failed.len()
        );
    }
    Ok(())
}

/// Boots a guest, poisons `pages` pages of it, and watches until nothing more comes.
fn burst(qemu: &Path, style: Style, pages: usize) -> Result<Burst, String> {
    let mut guest = Qemu::boot(qemu, style, VCPUS)?;
    let gpas = guest.agent(|agent| {
        agent.ask("sigbus count");
        agent.ask("interval 1");
        let mut gpas = Vec::new();
        while gpas.len() < pages {
            let made = agent.alloc_many("anon", (pages - gpas.len()).min(MAX_ALLOC));
            gpas.extend(made.iter().map(|page| page.gpa));
        }
        gpas
    })?;
    let frames: Result<Vec<u64>, String> = gpas
        .iter()
        .map(|&gpa| pagemap::pfn(guest.pid(), guest.hva(gpa)?).map_err(|error| error.to_string()))
        .collect();
    let frames = frames?;

    let mut burst = Burst { style: style.name().to_owned(), pages, ..Burst::default() };
    let log = HostLog::follow(guest.pid());
    println!("== {pages} pages: the guest is there, its pages go bad now");
    let start = Instant::now();
    let corrupt = poison(&mut guest, &frames);
    burst.poisoning_seconds = start.elapsed().as_secs_f64();
    burst.poisoned = count_poisoned(&frames)?;
    corrupt?;

    (burst.guest_alive, burst.end) = watch(&mut guest, start, &mut burst);
    // Who can be asked is asked; the memory of others is read.
    let named = match burst.guest_alive {
        true => guest.agent(Agent::failures)?.0,
        false => guest.memory().failed,
    };
    burst.guest_learned = gpas.iter().filter(|&gpa| named.contains(&(gpa >> 12))).count();
    burst.log_injected = guest.claims();
    burst.qmp_events = guest.events("MEMORY_FAILURE");
    (burst.signals_sent, burst.host_log_lost) = log.end();
    let rest: Vec<String> =
        guest.log().lines().filter(|line| !Qemu::is_claim(line)).map(str::to_owned).collect();
    for line in &rest[rest.len().saturating_sub(10)..] {
        println!("  qemu | {line}");
    }
    Ok(burst)
}

/// Hands `frames` to hwpoison-inject, one by one, as it wants them.
fn poison(guest: &mut Qemu, frames: &[u64]) -> Result<(), String> {
    let named = |error| format!("{}: {error}", hwpoison_inject::CORRUPT_PFN);
    let mut corrupt =
        OpenOptions::new().write(true).open(hwpoison_inject::CORRUPT_PFN).map_err(named)?;
    for frame in frames {
        // Once QEMU is gone its page frames are somebody else's.
        if guest.is_gone() {
            break;
        }
        corrupt.write_all(format!("{frame:#x}").as_bytes()).map_err(named)?;
    }
    Ok(())
}

fn count_poisoned(frames: &[u64]) -> Result<usize, String> {
    let mut count = 0;
    for &frame in frames {
        count += usize::from(page_frames::is_poisoned(frame).map_err(|error| error.to_string())?);
    }
    Ok(count)
}

/// Looks what the guest has learned until that is all, or nothing more comes, or it is gone. Whether it
/// is alive, and which of these.
fn watch(guest: &mut Qemu, start: Instant, burst: &mut Burst) -> (bool, String) {
    let mut news = Instant::now();
    let mut learned = 0;
    loop {
        if let Some(end) = guest.end() {
            return (false, end);
        }
        match guest.agent(Agent::failures_count) {
            Ok(account) => {
                let now = account["pfns"].as_u64().unwrap_or_default();
                if now > learned {
                    learned = now;
                    news = Instant::now();
                    burst.last_learned_seconds = Some(start.elapsed().as_secs_f64());
                }
            }
            // It may have gone while it was asked, or be stuck in its panic.
            Err(error) => {
                let end = guest.end().or_else(|| guest.panicked());
                return (false, end.unwrap_or(format!("the guest is silent: {error}")));
            }
        }
        if learned >= burst.poisoned as u64 {
            return (true, "alive, all learned".to_owned());
        }
        if news.elapsed() >= QUIET {
            return (true, format!("alive, nothing new for {} s", QUIET.as_secs()));
        }
        std::thread::sleep(LOOK);
    }
}

/// Counts, as they come, the lines of this host's kernel about signals sent to QEMU.
struct HostLog {
    sent: Arc<AtomicUsize>,
    lost: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    reader: JoinHandle<()>,
}

impl HostLog {
    fn follow(pid: u32) -> Self {
        let (sent, lost) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let stop = Arc::new(AtomicBool::new(false));
        let mut log =
            File::options().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg").unwrap();
        log.seek(SeekFrom::End(0)).unwrap();
        let shared = (Arc::clone(&sent), Arc::clone(&lost), Arc::clone(&stop));
        let reader = std::thread::spawn(move || {
            let (sent, lost, stop) = shared;
            let mut next = None;
            // One read returns one record, of 8 KiB at most.
            let mut buffer = [0; 8192];
            loop {
                match log.read(&mut buffer) {
                    Ok(count) => {
                        let record = String::from_utf8_lossy(&buffer[..count]);
                        let sequence: Option<usize> =
                            record.split(',').nth(1).and_then(|word| word.parse().ok());
                        if let (Some(next), Some(sequence)) = (next, sequence) {
                            lost.fetch_add(sequence - next, Ordering::Relaxed);
                        }
                        next = sequence.map(|sequence| sequence + 1);
                        sent.fetch_add(usize::from(is_signal(&record, pid)), Ordering::Relaxed);
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    // Overwritten before it was read: the next record's number says how many.
                    Err(error)
                        if matches!(
                            error.kind(),
                            ErrorKind::BrokenPipe | ErrorKind::Interrupted
                        ) => {}
                    Err(error) => panic!("/dev/kmsg: {error}"),
                }
            }
        });
        Self { sent, lost, stop, reader }
    }

    /// Lines counted, and lines lost.
    fn end(self) -> (usize, usize) {
        self.stop.store(true, Ordering::Relaxed);
        self.reader.join().unwrap();
        (self.sent.load(Ordering::Relaxed), self.lost.load(Ordering::Relaxed))
    }
}

/// kill_proc in mm/memory-failure.c. A thread of QEMU's that touched the page has another number
/// than its process, so any of them is looked up.
fn is_signal(record: &str, pid: u32) -> bool {
    let Some((_, to)) = record.split_once(": Sending SIGBUS to ") else { return false };
    let thread = to.split(" due to ").next().and_then(|name| name.rsplit_once(':'));
    thread.is_some_and(|(_, thread)| {
        Path::new(&format!("/proc/{pid}/task/{thread}")).exists() || thread == pid.to_string()
    })
}

fn version(qemu: &Path) -> String {
    let out = std::process::Command::new(qemu).arg("--version").output();
    let text = out.map(|out| String::from_utf8_lossy(&out.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or("QEMU of an unknown version").replace(" emulator version", "")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn write(report: &Report) {
    let Some(out) = std::env::var_os("MCE_RELAY_LAB_OUT") else { return };
    let path = Path::new(&out).join("peer.json");
    std::fs::write(&path, serde_json::to_string_pretty(report).unwrap()).unwrap();
}

fn table(bursts: &[Burst]) {
    let mut table = table::sheet(&[
        "pages",
        "poisoned",
        "in s",
        "signals",
        "log: injected",
        "QMP events",
        "guest learned",
        "last after s",
        "end",
    ]);
    for burst in bursts {
        let signals = match burst.host_log_lost {
            0 => burst.signals_sent.to_string(),
            lost => format!("{} (+{lost} lines lost)", burst.signals_sent),
        };
        let last = burst.last_learned_seconds.map_or("-".to_owned(), |last| format!("{last:.1}"));
        table.add_row([
            burst.pages.to_string(),
            burst.poisoned.to_string(),
            format!("{:.2}", burst.poisoning_seconds),
            signals,
            burst.log_injected.to_string(),
            burst.qmp_events.to_string(),
            burst.guest_learned.to_string(),
            last,
            burst.end.clone(),
        ]);
    }
    println!("{table}");
}
