//! What the relay costs while nothing is wrong, counted and not timed: the instructions of
//! `before_run` one by one, and the system calls of a vCPU's loop, by tracing a process that does it.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests say what they saw by panicking")]

#[path = "../kvm/payload.rs"]
#[allow(dead_code, reason = "this needs a guest that leaves KVM_RUN, and nothing else of it")]
mod payload;

use std::hint::black_box;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use libc::{c_int, pid_t};
use mce_relay::mca::{BANKS, Caps, McaState, Record, Vendor};
use mce_relay::{ExitByte, Mca, RamMap, RamRegion, Relay, VcpuPort, Verdict};
use mce_relay_tests::lab::has_kvm;
use mce_relay_tests::suite;

use payload::{Did, Payload, Start};

/// Set for the traced process; says what it is to do.
const ROLE: &str = "MCE_RELAY_QUIET_ROLE";
/// Times the traced process does it.
const ROUNDS: u32 = 1000;
/// A call, the load, the comparison, the jump and the return; the verdict is a constant.
const INSTRUCTIONS: u32 = 5;

/// A stretch of addresses where nothing is mapped, or where there is memory that is this program's for this alone.
fn region(hva: u64, gpa: u64, len: u64) -> RamRegion {
    // SAFETY: no reference of Rust's leads there.
    unsafe { RamRegion::new(hva, gpa, len) }
}

/// A vCPU that must not be looked at.
struct Untouched;

impl Mca for Untouched {
    fn state(&mut self) -> io::Result<McaState> {
        panic!("there was nothing to look for");
    }

    fn inject(&mut self, _: &Record) -> io::Result<()> {
        panic!("there was nothing to tell");
    }
}

fn attach() -> (Relay, VcpuPort) {
    let caps = Caps { vendor: Vendor::Amd, mcg_cap: u64::from(BANKS), succor: true };
    let ram = RamMap::new(&[region(0x7f00_0000_0000, 0, 4096)]).unwrap();
    let relay = Relay::builder(ram).vcpus(1).machine_checks(caps).start().unwrap();
    let port = relay.attach(0, ExitByte::NONE, || {}).unwrap();
    (relay, port)
}

/// Lets the tracer know where what it counts begins and ends.
fn mark() {
    // SAFETY: raise has no preconditions.
    unsafe { libc::raise(libc::SIGSTOP) };
}

/// The traced process.
fn play(role: &str) {
    match role {
        "calls" | "empty" => {
            let (relay, mut port) = attach();
            // The first visit is due to every vCPU: errors may have come before its thread did.
            assert!(port.wants_attention());
            let mut mca = Quiet;
            assert_eq!(port.before_run(&mut mca), Verdict::Run);
            mark();
            if role == "calls" {
                for _ in 0..ROUNDS {
                    // As a VMM's loop asks.
                    if black_box(&mut port).before_run(&mut Untouched) != Verdict::Run {
                        return;
                    }
                }
            } else {
                for _ in 0..ROUNDS {
                    black_box(black_box(&mut port));
                }
            }
            mark();
            drop((port, relay));
        }
        "relay" | "bare" => {
            let mut payload = Payload::new(Start::Beat, true);
            let (relay, mut port) = attach();
            assert_eq!(port.before_run(&mut Quiet), Verdict::Run);
            mark();
            for _ in 0..ROUNDS {
                if role == "relay" {
                    assert_eq!(port.before_run(&mut Untouched), Verdict::Run);
                }
                assert_eq!(payload.run(), Did::Beat);
            }
            mark();
            drop((port, relay));
        }
        other => panic!("no such role: {other}"),
    }
}

/// A vCPU with nothing in its banks.
struct Quiet;

impl Mca for Quiet {
    fn state(&mut self) -> io::Result<McaState> {
        Ok(McaState { waits_for_sipi: true, cr4_mce: false, ..McaState::up() })
    }

    fn inject(&mut self, _: &Record) -> io::Result<()> {
        Err(io::Error::other("nothing is pending"))
    }
}

fn ptrace(request: libc::c_uint, pid: pid_t) {
    // SAFETY: the requests used here take no pointers.
    let result = unsafe { libc::ptrace(request, pid, 0, 0) };
    assert!(result >= 0, "ptrace: {}", io::Error::last_os_error());
}

/// Waits for the next stop of `pid`; the signal it stopped with, or `None` when it has ended.
fn stop(pid: pid_t) -> Option<c_int> {
    let mut status = 0;
    // SAFETY: writes one int to a live local.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(waited, pid, "{}", io::Error::last_os_error());
    libc::WIFSTOPPED(status).then(|| libc::WSTOPSIG(status))
}

/// Runs this program in `role` and counts its stops between the two marks when it is let go on by
/// `request` each time.
fn count(role: &str, request: libc::c_uint) -> Result<u32, String> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(ROLE, role);
    // SAFETY: ptrace(PTRACE_TRACEME) is all that is done between fork and exec.
    unsafe {
        command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        })
    };
    let child = command.spawn().map_err(|error| format!("cannot trace a process: {error}"))?;
    let pid = pid_t::try_from(child.id()).unwrap();
    let ended = || format!("{role}: it ended before its marks");
    loop {
        // The exec, and whatever else there is before the first mark.
        match stop(pid).ok_or_else(ended)? {
            libc::SIGSTOP => break,
            _ => ptrace(libc::PTRACE_CONT, pid),
        }
    }
    let mut stops = 0;
    loop {
        ptrace(request, pid);
        match stop(pid).ok_or_else(ended)? {
            libc::SIGTRAP => stops += 1,
            libc::SIGSTOP => break,
            signal => return Err(format!("{role}: signal {signal}")),
        }
    }
    ptrace(libc::PTRACE_CONT, pid);
    match stop(pid) {
        None => Ok(stops),
        Some(signal) => Err(format!("{role}: signal {signal} after the marks")),
    }
}

mod cost {
    use super::*;

    /// With nothing pending, per KVM_RUN.
    pub fn a_load_and_a_jump_per_run() {
        let calls = count("calls", libc::PTRACE_SINGLESTEP).unwrap();
        let empty = count("empty", libc::PTRACE_SINGLESTEP).unwrap();
        let each = f64::from(calls - empty) / f64::from(ROUNDS);
        println!("    before_run with nothing pending: {each:.2} instructions a call");
        // What surrounds the loops differs by a few.
        assert!(each > 0.9, "it was not called: {calls} and {empty} instructions");
        assert!(each < f64::from(INSTRUCTIONS) + 0.1, "{calls} and {empty} instructions");
    }

    /// The loop of a vCPU makes one system call a round: KVM_RUN.
    pub fn no_system_call_beside_kvm_run() {
        // Each system call stops at its beginning and at its end; so does the one of each mark,
        // once.
        let relay = count("relay", libc::PTRACE_SYSCALL).unwrap() / 2;
        let bare = count("bare", libc::PTRACE_SYSCALL).unwrap() / 2;
        println!("    {ROUNDS} exits: {bare} system calls without the relay, {relay} with it");
        assert_eq!(relay, bare);
        // The marks' own are among them.
        assert!((ROUNDS..ROUNDS + 10).contains(&bare), "{bare}");
    }
}

/// Whether this process may trace another.
fn may_trace() -> Result<(), String> {
    count("empty", libc::PTRACE_CONT).map(drop)
}

fn may_trace_with_kvm() -> Result<(), String> {
    may_trace().and_then(|()| has_kvm())
}

fn main() -> ExitCode {
    if let Ok(role) = std::env::var(ROLE) {
        play(&role);
        return ExitCode::SUCCESS;
    }
    suite::run(mce_relay_tests::tests![
        cost::a_load_and_a_jump_per_run needs may_trace,
        cost::no_system_call_beside_kvm_run needs may_trace_with_kvm,
    ])
}
