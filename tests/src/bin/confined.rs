//! A relay whose threads may make no system calls but those of `mce_relay::syscalls`:
//! `confined relay|handed-on|vcpu|start|polled [LEFT-OUT]`. With `start` the thread that starts it is under a filter, too,
//! and with `polled` it does the relay's work.
//!
//! Everything that the thread does in its life happens once. LEFT-OUT is the number of a call in its list
//! that it may not make either; then it is killed (SIGSYS) if it makes it. `relay` ends with status 0, `start` and `polled`, too, the
//! others by a SIGBUS that is not the relay's.
#![allow(clippy::unwrap_used, reason = "it says what it saw by panicking")]

use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;
use std::{io, ptr};

use mce_relay::syscalls::{Call, HANDLE, KICK, POLLED, RELAY, START, THREAD, VCPU};
use mce_relay::{
    AoChannel, Bell, ErrorSource, Event, ExitByte, FoundBy, Page, RamMap, RamRegion, Relay, State,
    Verdict, syscalls,
};
use mce_relay_tests::ready::{Ready, forge_ar};
use mce_relay_vmm::relaying::uffd::Uffd;
use seccompiler::{BpfProgram, SeccompAction, apply_filter};
use vmm_sys_util::signal::SIGRTMIN;

const LEN: usize = 1 << 20;
/// A huge page of which nothing is mapped, by its host and its guest-physical address.
const HUGE_HVA: usize = 0x4000_0000;
const HUGE: u64 = 1 << 30;
/// The error source's page, one that is marked as bad, and one that is only said to be.
const SOURCE: u64 = 0;
const MARKED: u64 = 0x5000;
const FORGED: u64 = 0x9000;
/// A host address that is not guest RAM.
const OUTSIDE: usize = 0x1234_5000;

/// The relay's thread.
static RELAYS: AtomicI32 = AtomicI32::new(0);

/// A stretch of addresses where nothing is mapped, or where there is memory that is this program's for this alone.
fn region(hva: u64, gpa: u64, len: u64) -> RamRegion {
    // SAFETY: no reference of Rust's leads there.
    unsafe { RamRegion::new(hva, gpa, len) }
}

/// A guest that listens, and never takes a record.
struct Silent;

impl Bell for Silent {
    fn ring(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn is_heard(&mut self) -> Option<bool> {
        Some(true)
    }
}

fn memory() -> u64 {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address of the kernel's choice, which stays.
    let at = unsafe { libc::mmap(ptr::null_mut(), LEN, prot, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at.expose_provenance() as u64
}

/// `own` and what every thread may call, without the one that is left out.
fn filter(own: &[Call], left_out: Option<usize>) -> BpfProgram {
    let out = left_out.map(|index| own[index]);
    let same = |call: &Call, out: &Call| call.number == out.number && call.args == out.args;
    let all = THREAD.iter().chain(own).filter(|call| !out.is_some_and(|out| same(call, &out)));
    syscalls::filter(all, SeccompAction::KillProcess).unwrap()
}

fn confine(program: &BpfProgram) -> io::Result<()> {
    apply_filter(program).map_err(io::Error::other)
}

/// Waits for the event that `wanted` is about.
fn wait(events: &Receiver<Event>, what: &str, wanted: impl Fn(&Event) -> bool) {
    loop {
        match events.recv_timeout(Duration::from_secs(10)) {
            Ok(event) if wanted(&event) => return,
            Ok(event) => println!("{event}"),
            Err(error) => panic!("no {what}: {error}"),
        }
    }
}

/// A thread under a filter starts a relay and a vCPU's thread, which inherit it and are kicked, and ends them.
fn start() -> ExitCode {
    extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        mce_relay::signal::request_exit();
    }
    vmm_sys_util::signal::register_signal_handler(SIGRTMIN(), on_kick).unwrap();
    let hva = memory();
    let calls = [START, RELAY, VCPU, HANDLE, KICK].concat();
    let program = filter(&calls, None);
    let (told, events) = channel();
    let confined = std::thread::spawn(move || {
        confine(&program).unwrap();
        let ram = RamMap::new(&[region(hva, 0, LEN as u64)]).unwrap();
        let observer = move |event: &Event| drop(told.send(event.clone()));
        let relay = Relay::builder(ram).vcpus(1).machine_checks(Ready::CAPS).observer(observer);
        let relay = relay.start().unwrap();
        let handle = relay.handle();
        let vcpu = std::thread::spawn(move || {
            let mut exit = 0_u8;
            // SAFETY: the byte outlives the port.
            let byte = unsafe { ExitByte::new(&raw mut exit) };
            // SAFETY: has no preconditions.
            let this = unsafe { libc::pthread_self() };
            let kick = move || {
                // SAFETY: the thread is there as long as the port.
                unsafe { libc::pthread_kill(this, SIGRTMIN()) };
            };
            let mut port = handle.attach(0, byte, kick).unwrap();
            let mut vcpu = Ready::default();
            let is_told = |page: &Page| matches!(page.state, State::Injected { .. });
            while !handle.pages().iter().any(is_told) {
                port.clear_exit();
                assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
                std::thread::park_timeout(Duration::from_millis(1));
            }
        });
        relay.handle().forge(FORGED, None).unwrap();
        vcpu.join().unwrap();
        drop(relay);
    });
    wait(&events, "forged page", |event| matches!(event, Event::Injected { .. }));
    confined.join().unwrap();
    ExitCode::SUCCESS
}

/// A thread under a filter starts a relay, does its work and ends it.
fn polled(left_out: Option<usize>) -> ExitCode {
    let hva = memory();
    let own: Vec<Call> = POLLED
        .iter()
        .enumerate()
        .filter(|(index, _)| Some(*index) != left_out)
        .map(|(_, call)| *call)
        .chain([START, RELAY, HANDLE].concat())
        .collect();
    let program = filter(&own, None);
    let (told, events) = channel();
    let confined = std::thread::spawn(move || {
        confine(&program).unwrap();
        let ram = RamMap::new(&[region(hva, 0, LEN as u64)]).unwrap();
        let observer = move |event: &Event| drop(told.send(event.clone()));
        let (relay, mut polled) = Relay::builder(ram).observer(observer).start_polled().unwrap();
        relay.handle().forge(FORGED, None).unwrap();
        while relay.pages().is_empty() {
            let mut fd = libc::pollfd { fd: polled.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one live pollfd; neither a time nor a mask.
            unsafe { libc::ppoll(&raw mut fd, 1, ptr::null(), ptr::null()) };
            polled.process();
        }
    });
    wait(&events, "forged page", |event| matches!(event, Event::Seen { .. }));
    confined.join().unwrap();
    ExitCode::SUCCESS
}

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let how = args.next().unwrap_or_default();
    let left_out: Option<usize> = args.next().map(|index| index.parse().unwrap());
    if how == "start" {
        return start();
    }
    if how == "polled" {
        return polled(left_out);
    }
    if !["relay", "handed-on", "vcpu"].contains(&how.as_str()) {
        eprintln!("confined: got {how:?}, expected relay, handed-on, vcpu, start or polled");
        return ExitCode::from(2);
    }
    let of = |one: bool| left_out.filter(|_| one);
    let (relays, vcpus) = (filter(RELAY, of(how != "vcpu")), filter(VCPU, of(how == "vcpu")));
    let hva = memory();
    let uffd = Uffd::open().unwrap();
    uffd.poison(hva + MARKED, 4096).unwrap();
    let (send, events) = channel();
    let observer = move |event: &Event| drop(send.send(event.clone()));
    let huge = region(HUGE_HVA as u64, HUGE, 2 << 20).in_pages_of(21);
    let ram = RamMap::new(&[region(hva, 0, LEN as u64), huge]).unwrap();
    let relay = Relay::builder(ram).vcpus(1).machine_checks(Ready::CAPS).observer(observer);
    let relay = relay.error_source(ErrorSource::new(SOURCE, Silent)).ao_channel(AoChannel::Ghes);
    let relay = relay.on_thread(move || {
        // SAFETY: has no preconditions.
        RELAYS.store(unsafe { libc::gettid() }, Ordering::Relaxed);
        confine(&relays)
    });
    let relay = relay.start().unwrap();
    let handle = relay.handle();
    // What its first look finds.
    wait(&events, "page by a scan", |event| {
        matches!(event, Event::Seen { found_by: FoundBy::Scan, .. })
    });
    wait(&events, "record", |event| matches!(event, Event::Injected { .. }));
    handle.forge(FORGED, None).unwrap();
    wait(&events, "forged page", |event| {
        matches!(event, Event::Seen { found_by: FoundBy::Forged, .. })
    });
    match how.as_str() {
        // Its look at the kernel's count, once a second.
        "relay" => std::thread::sleep(Duration::from_millis(1100)),
        "handed-on" => {
            let to = RELAYS.load(Ordering::Relaxed);
            // SAFETY: a signal to a thread of this process.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), to, libc::SIGBUS) };
            std::thread::sleep(Duration::from_secs(10));
        }
        _ => {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    confine(&vcpus).unwrap();
                    let mut port = relay.attach(0, ExitByte::NONE, || {}).unwrap();
                    let mut vcpu = Ready::default();
                    handle.forge(FORGED + 0x1000, Some(0)).unwrap();
                    assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
                    assert!(port.probe(MARKED).is_err());
                    // The guest has not left its handler, so it cannot be told of this one.
                    forge_ar(HUGE_HVA);
                    let _ = port.before_run(&mut vcpu);
                    // Not of guest RAM, which is found out here.
                    forge_ar(OUTSIDE);
                    let _ = port.before_run(&mut vcpu);
                });
            });
        }
    }
    drop(relay);
    ExitCode::SUCCESS
}
