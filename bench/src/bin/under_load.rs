//! How long a guest waits for what it is to be told while others ask the VMM's API: `under_load FILE`. On
//! this machine's KVM, with a guest that takes machine checks and does nothing else.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "what cannot be set up is not measured"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mce_relay_bench::figure::{Figure, Goal, Series, US};
use mce_relay_bench::progress;
use mce_relay_cli::client::requests;
use mce_relay_tests::spinning::Spinning;
use mce_relay_tests::tiny::takes_machine_checks;
use serde_json::{Value, json};

/// Pages that go bad at once.
const BURST: u64 = 64;
/// Pages that go bad one by one after that.
const SINGLE: u64 = 32;
const ROUNDS: usize = 10;
const QUIET: &str = "no requests";
/// Requests a second, of all clients together.
const RATE: u32 = 1000;
const CLIENTS: u32 = 4;
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    let Some(out) = std::env::args().nth(1) else {
        eprintln!("usage: under_load FILE");
        return ExitCode::from(2);
    };
    let (mut quiet, mut loaded) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        progress(&format!("deliveries while clients ask, round {round} of {ROUNDS}"));
        quiet.push(deliver(false));
        loaded.push(deliver(true));
    }
    let of = |rounds: &[Round], what: fn(&Round) -> f64| rounds.iter().map(what).collect();
    let rate = Series::new(US, of(&loaded, |round| round.rate)).median().unwrap();
    let figure = |what: String, value: fn(&Round) -> f64| Figure {
        what,
        unit: "ms".into(),
        series: vec![Series::new(US, of(&loaded, value)), Series::new(QUIET, of(&quiet, value))],
        goal: Goal::AtMostTimes(2.0, QUIET.into()),
        command: "make bench FIGURES=api".into(),
        note: format!(
            "the latest of each round, from the page's becoming known to its injection; status asked for {rate:.0} \
             times a second by {CLIENTS} clients; a guest of a few instructions that takes each at once; in turns"
        ),
    };
    let figures = [
        figure(format!("under requests: {BURST} AOs at once"), |round| round.at_once),
        figure(format!("under requests: {SINGLE} AOs, one by one"), |round| round.single),
    ];
    std::fs::write(out, serde_json::to_string_pretty(&figures).unwrap()).unwrap();
    ExitCode::SUCCESS
}

/// The latest deliveries, in milliseconds, and how many requests a second there were.
struct Round {
    at_once: f64,
    single: f64,
    rate: f64,
}

fn deliver(requests: bool) -> Round {
    let pace = ["--cpu-vendor", "intel", "--ao-pace", "burst=1000000,rate=1000000"];
    let vmm = Spinning::start_with(takes_machine_checks(), &pace);
    let stop = Arc::new(AtomicBool::new(false));
    let begun = Instant::now();
    let clients: Vec<_> = (0..if requests { CLIENTS } else { 0 })
        .map(|_| {
            let (socket, stop) = (vmm.socket(), Arc::clone(&stop));
            std::thread::spawn(move || ask(&socket, &stop))
        })
        .collect();
    // The clients are under way, and the guest is up.
    std::thread::sleep(Duration::from_millis(300));
    poison(&vmm, 0..BURST);
    delivered(&vmm, BURST);
    for page in BURST..BURST + SINGLE {
        poison(&vmm, page..page + 1);
        std::thread::sleep(Duration::from_millis(15));
    }
    let pages = delivered(&vmm, BURST + SINGLE);
    stop.store(true, Ordering::Relaxed);
    let took = begun.elapsed().as_secs_f64();
    let answers: f64 = clients.into_iter().map(|client| client.join().unwrap()).sum();
    let at = |page: &Value, what: &str| page["times"][what].as_f64().unwrap();
    let late = |page: &Value| (at(page, "injected") - at(page, "seen")) * 1e3;
    let (at_once, single) = pages.split_at(usize::try_from(BURST).unwrap());
    let latest = |pages: &[Value]| pages.iter().map(late).fold(0.0, f64::max);
    Round { at_once: latest(at_once), single: latest(single), rate: answers / took }
}

/// Forges an AO for each of `pages`.
fn poison(vmm: &Spinning, pages: std::ops::Range<u64>) {
    let gpas: Vec<String> = pages.map(|page| format!("{:#x}", 0x100_0000 + page * 4096)).collect();
    let body = json!({ "gpas": gpas, "via": "signal" });
    let _: Value = requests::put_json(&vmm.socket(), "vm.poison", &body).unwrap();
}

/// The pages, by address, once there are `count` and the guest has taken them all.
fn delivered(vmm: &Spinning, count: u64) -> Vec<Value> {
    let begun = Instant::now();
    loop {
        let status: Value = requests::get(&vmm.socket(), "relay.status").unwrap();
        let pages = status["pages"].as_array().unwrap();
        let done = |page: &&Value| page["state"] == "acknowledged";
        if pages.iter().filter(done).count() as u64 == count {
            return pages.clone();
        }
        assert!(begun.elapsed() < PATIENCE, "not all are delivered: {status:#}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Asks for the status on one connection, a share of [`RATE`] a second; how many answers came.
fn ask(socket: &Path, stop: &AtomicBool) -> f64 {
    let mut stream = BufReader::new(UnixStream::connect(socket).unwrap());
    let each = Duration::from_secs(1) * CLIENTS / RATE;
    let begun = Instant::now();
    let mut answers = 0;
    while !stop.load(Ordering::Relaxed) {
        stream
            .get_mut()
            .write_all(b"GET /api/v1/relay.status HTTP/1.1\r\nHost: x\r\n\r\n")
            .unwrap();
        let (mut line, mut len) = (String::new(), 0);
        while line != "\r\n" {
            line.clear();
            assert_ne!(stream.read_line(&mut line).unwrap(), 0, "the VMM hangs up");
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                len = value.trim().parse().unwrap();
            }
        }
        assert_ne!(len, 0, "a short status is sent whole");
        stream.read_exact(&mut vec![0; len]).unwrap();
        answers += 1;
        std::thread::sleep((each * answers).saturating_sub(begun.elapsed()));
    }
    f64::from(answers)
}
