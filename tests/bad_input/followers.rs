//! A thousand events a second, for those who follow them and for one who does not get on with it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mce_relay_cli::client::requests;
use mce_relay_tests::lab;
use mce_relay_tests::spinning::Spinning;
use serde_json::{Value, json};

/// Events a second that are made at least.
const RATE: u64 = 1000;

/// What a follower has seen.
#[derive(Default)]
struct Seen {
    events: AtomicU64,
    missed: AtomicU64,
    /// Forged signals.
    caught: AtomicU64,
}

/// Reads events until the stream ends.
fn follow(stream: UnixStream, seen: &Seen) {
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        // Between the events are the sizes of chunks.
        let Ok(event) = serde_json::from_str::<Value>(&line) else { continue };
        match event["event"].as_str() {
            Some("missed") => {
                let missed = event["properties"]["events"].as_u64().unwrap();
                seen.missed.fetch_add(missed, Ordering::Relaxed);
            }
            Some(name) => {
                seen.events.fetch_add(1, Ordering::Relaxed);
                seen.caught.fetch_add(u64::from(name == "caught"), Ordering::Relaxed);
            }
            None => {}
        }
    }
}

fn connect(socket: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(b"GET /api/v1/relay.events?follow=true HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    stream
}

/// The events so far, as the VM counts them.
fn events_total(socket: &Path) -> u64 {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let lines = BufReader::new(stream).lines().map_while(Result::ok);
    lines
        .filter(|line| line.starts_with("mce_relay_events_total{"))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
        .sum()
}

/// Two followers get every event, and a third, who does not read until the end, is told how many it has
/// missed; the VMM's memory stays bounded. Five seconds, or with MCE_RELAY_SOAK set (make soak) a minute.
pub fn three_of_them_one_stuck() {
    // In five seconds it takes more events a second to overrun the stuck one. Not as many as the machine gives:
    // beside other work the live ones would be held up for longer than the events that are kept last.
    let (seconds, rate) = match std::env::var_os("MCE_RELAY_SOAK") {
        Some(_) => (60, RATE as f64 * 1.1),
        None => (5, RATE as f64 * 10.0),
    };
    let vm = Spinning::start(&[]);
    let socket = vm.socket();
    let live: Vec<Arc<Seen>> = (0..2).map(|_| Arc::default()).collect();
    let threads: Vec<_> = live
        .iter()
        .map(|seen| {
            let (stream, seen) = (connect(&socket), Arc::clone(seen));
            std::thread::spawn(move || follow(stream, &seen))
        })
        .collect();
    let stuck = connect(&socket);

    // Each forged signal is two events, once its page is known: caught, and again.
    let forge = |count: usize| {
        let gpas = vec!["0x5000"; count];
        let body = json!({ "gpas": gpas, "via": "signal" });
        requests::put_json::<Value>(&socket, "vm.poison", &body).unwrap();
    };
    // As many again as are kept, so that the stuck one has missed some whatever the machine.
    let begin = Instant::now();
    let mut asked = 0_u32;
    let mut peak = 0;
    while begin.elapsed() < Duration::from_secs(seconds) {
        for _ in 0..10 {
            forge(60);
            asked += 60;
        }
        peak = peak.max(lab::outside(vm.pid(), 32 << 20));
        let due = Duration::from_secs_f64(f64::from(asked * 2) / rate);
        std::thread::sleep(due.saturating_sub(begin.elapsed()));
    }
    while events_total(&socket) < 40_000 {
        forge(1000);
        asked += 1000;
    }
    let took = begin.elapsed().as_secs_f64();
    // The relay's thread takes what was queued.
    let mut total = 0;
    while total != events_total(&socket) {
        total = events_total(&socket);
        std::thread::sleep(Duration::from_millis(300));
    }
    peak = peak.max(lab::outside(vm.pid(), 32 << 20));
    let rate = total as f64 / took;
    println!(
        "    {total} events in {took:.1} s ({rate:.0} a second), {asked} of them forged signals"
    );
    assert!(rate >= RATE as f64, "{rate:.0} events a second");

    let late = Arc::new(Seen::default());
    let for_thread = Arc::clone(&late);
    let reader = std::thread::spawn(move || follow(stuck, &for_thread));
    let start = Instant::now();
    let sum =
        |seen: &Seen| seen.events.load(Ordering::Relaxed) + seen.missed.load(Ordering::Relaxed);
    while (sum(&late) < total || live.iter().any(|seen| sum(seen) < total))
        && start.elapsed() < Duration::from_secs(20)
    {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(vm.shut_down().code(), Some(0));
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    reader.join().unwrap();

    // And the end of the VM.
    let total = total + 1;
    for seen in &live {
        let (events, missed) =
            (seen.events.load(Ordering::Relaxed), seen.missed.load(Ordering::Relaxed));
        println!("    a live follower: {events} events, {missed} missed");
        assert_eq!((events, missed), (total, 0));
        assert_eq!(seen.caught.load(Ordering::Relaxed), u64::from(asked));
    }
    let (events, missed) =
        (late.events.load(Ordering::Relaxed), late.missed.load(Ordering::Relaxed));
    println!(
        "    the stuck one: {events} events, told of {missed} that it missed; {peak} kB at most"
    );
    assert_eq!(events + missed, total);
    assert!(missed > 0);
    assert!(peak < 32 * 1024, "{peak} kB outside guest RAM");
}

/// Clients that follow events and go, with nothing happening that could be written to them: there is room for
/// as many again, and the VMM keeps nothing of them.
pub fn places_come_back_with_their_clients_end() {
    let vm = Spinning::start(&[]);
    let socket = vm.socket();
    let follow = || {
        let mut follower = BufReader::new(connect(&socket));
        let mut status = String::new();
        follower.read_line(&mut status).unwrap();
        status.contains(" 200 ").then_some(follower)
    };
    let (files, events) = (lab::open_files(vm.pid()), events_total(&socket));
    for round in 0..10 {
        let start = Instant::now();
        let mut followers = Vec::new();
        while followers.len() < 16 {
            followers.extend(follow());
            let taken = start.elapsed();
            assert!(taken < Duration::from_secs(20), "{round}: room for {} only", followers.len());
        }
        assert!(follow().is_none(), "sixteen are all");
    }
    let start = Instant::now();
    while lab::open_files(vm.pid()) > files {
        assert!(start.elapsed() < Duration::from_secs(20), "{} files", lab::open_files(vm.pid()));
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(events_total(&socket), events, "nothing has happened meanwhile");
    assert_eq!(vm.shut_down().code(), Some(0));
}
