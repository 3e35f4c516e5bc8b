//! What a user gets when a call to the kernel fails that hardly ever does: each call that a whole
//! run makes of KVM, for memory, for an eventfd and for the memory-failure policy fails in turn
//! (tests/faults/fail.rs, preloaded). The VMM says so and ends, or does without; it neither hangs
//! nor panics, leaves no socket behind, and the terminal is as it was.

use std::fs::File;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use mce_relay_tests::hooked::library;
use mce_relay_tests::tiny::{POWER_OFF, elf};

use crate::terminal::Terminal;

/// tests/faults/fail.rs.
const LIBRARY: &str = "libfail.so";
/// How long a run may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// mov ecx, 1 << 18; 1: loop 1b. It keeps the guest busy long enough to look at the terminal.
const DAWDLE: [u8; 7] = [0xb9, 0x00, 0x00, 0x04, 0x00, 0xe2, 0xfe];

/// With this fail.rs marks the call that fails.
const FAILS: &str = " fails";
/// Calls that the threads of two vCPUs make (reading the machine-check state of each, and the KVM_RUNs that
/// fail.rs counts): how many of them a run comes to before its guest is off is a matter of chance.
const OF_THREADS: usize = 13;

/// In the lab, where a run takes its time: the first call that is made to fail, and the distance to
/// the next.
const SAMPLE: (usize, usize) = (5, 9);

/// An errno and its name. Never EINTR, after which a call may be made again without end.
type Errno = (libc::c_int, &'static str);
const NO_MEMORY: Errno = (libc::ENOMEM, "ENOMEM");
/// What a seccomp filter answers.
const FORBIDDEN: Errno = (libc::EPERM, "EPERM");

/// Whether the library to preload is there.
pub fn preload_available() -> Result<(), String> {
    library(LIBRARY).map(drop)
}

/// What was seen of a run.
#[derive(Debug)]
struct Seen {
    /// `None` if it had to be killed.
    status: Option<ExitStatus>,
    stderr: String,
    /// A line for each call that counts, in the order of their numbers.
    calls: Vec<String>,
    was_raw: bool,
    is_restored: bool,
    left_socket: bool,
}

/// Runs a VM whose guest is `code`, and has the call of this number fail.
fn run(code: &[u8], fail: Option<(usize, Errno)>) -> Seen {
    // The library writes a file on every thread.
    run_under("false", code, fail)
}

/// The same with this `--seccomp`.
fn run_under(seccomp: &str, code: &[u8], fail: Option<(usize, Errno)>) -> Seen {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("kernel"), elf(code)).unwrap();
    let stderr = File::create(at("stderr")).unwrap();
    let terminal = Terminal::new();
    let before = terminal.modes();
    let mut child = terminal.start_with(|command| {
        command
            .args(["--memory-zone", "size=16M,shared=on", "--memory-zone", "size=16M,prefault=on"])
            .args(["--cpus", "2", "--seccomp", seccomp, "--kernel"])
            .arg(at("kernel"))
            .args(["--api-socket", &format!("path={}", at("api").display())])
            .args(["--event-monitor", &format!("path={}", at("events").display())])
            .stderr(stderr)
            // It could silence the errors that are looked for.
            .env_remove("RUST_LOG")
            .env("LD_PRELOAD", library(LIBRARY).unwrap())
            .env("MCE_RELAY_FAIL_LOG", at("calls"));
        if let Some((number, (errno, _))) = fail {
            command
                .env("MCE_RELAY_FAIL_AT", number.to_string())
                .env("MCE_RELAY_FAIL_ERRNO", errno.to_string());
        }
    });
    terminal.drain();
    let start = Instant::now();
    let mut was_raw = false;
    let status = loop {
        was_raw |= terminal.modes() != before;
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if start.elapsed() > PATIENCE {
            child.kill().unwrap();
            child.wait().unwrap();
            break None;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let text = |name: &str| {
        String::from_utf8_lossy(&std::fs::read(at(name)).unwrap_or_default()).into_owned()
    };
    // Threads write their lines as they come to it.
    let mut calls: Vec<String> = text("calls").lines().map(str::to_owned).collect();
    calls.sort_by_key(|call| number(call));
    Seen {
        status,
        stderr: text("stderr"),
        calls,
        was_raw,
        is_restored: terminal.modes() == before,
        // Not `exists`, which takes what it cannot look at for absent.
        left_socket: at("api").try_exists().unwrap(),
    }
}

/// The number of a call, from its line.
fn number(call: &str) -> usize {
    call.split(' ').next().unwrap().parse().unwrap_or_else(|_| panic!("{call:?} has no number"))
}

impl Seen {
    fn code(&self) -> Option<i32> {
        self.status.and_then(|status| status.code())
    }

    /// The line of the call that failed; `None` if the run never came to it.
    fn failed(&self) -> Option<&str> {
        self.calls.iter().find_map(|call| call.strip_suffix(FAILS))
    }

    /// The words on stderr that say what went wrong.
    fn words(&self) -> Option<&str> {
        self.stderr.lines().find(|line| {
            line.starts_with("mce-relay: ") || line.contains("ERROR") || line.contains("error")
        })
    }

    /// What is wrong with it, whichever call failed.
    fn complaints(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut complain = |what: String| wrong.push(what);
        match (self.status, self.code()) {
            (None, _) => complain(format!("hangs: killed after {} s", PATIENCE.as_secs())),
            (Some(status), None) => complain(format!("does not end by itself: {status}")),
            (_, Some(0)) => {}
            (_, Some(code)) => {
                if self.failed().is_none() {
                    complain(format!("ends with {code}, though no call has failed"));
                }
                if self.words().is_none() {
                    complain(format!("ends with {code} and does not say why"));
                }
            }
        }
        if self.stderr.contains("panicked") {
            complain("panics".to_owned());
        }
        // A process that is killed can neither put anything back nor take anything away.
        if self.status.is_some() {
            if !self.is_restored {
                complain("leaves the terminal in another mode".to_owned());
            }
            if self.left_socket {
                complain("leaves its API socket behind".to_owned());
            }
        }
        wrong
    }
}

/// The calls that are made to fail, with what, when a run makes `calls`.
fn failures(calls: &[String]) -> Vec<(usize, Errno)> {
    let in_lab = std::env::var("MCE_RELAY_LAB").is_ok_and(|value| value == "1");
    let (first, step) = if in_lab { SAMPLE } else { (1, 1) };
    if in_lab {
        println!("    in the lab this is a sample: every {step}th call from number {first} on");
    }
    let numbers = (first..=calls.len()).step_by(step);
    let policies = calls.iter().filter(|call| call.contains(" prctl "));
    numbers
        .map(|number| (number, NO_MEMORY))
        .chain(policies.map(|call| (number(call), FORBIDDEN)))
        .collect()
}

/// A kernel that takes no filter of system calls is said to be one, with what to do; nothing is left behind.
pub fn no_filters_in_this_kernel() {
    // The first is PR_MCE_KILL, the second PR_SET_NO_NEW_PRIVS, which comes before every filter.
    let seen = run_under("true", &POWER_OFF, Some((2, FORBIDDEN)));
    println!("    {}", seen.stderr.trim_end());
    assert_eq!(seen.failed(), Some(format!("2 prctl {:#x}", libc::PR_SET_NO_NEW_PRIVS).as_str()));
    assert!(seen.complaints().is_empty(), "{seen:#?}");
    assert!(seen.code() == Some(1) && seen.stderr.contains("--seccomp false"), "{seen:#?}");
}

pub fn every_call_that_can_fail() {
    let sound = run(&[DAWDLE.as_slice(), &POWER_OFF].concat(), None);
    assert!(sound.code() == Some(0) && sound.complaints().is_empty(), "{sound:#?}");
    assert!(sound.was_raw, "the terminal was not raw meanwhile: {sound:#?}");
    // The library is in the program, and in the way of all that it should be.
    for name in ["ioctl", "mmap", "prctl", "eventfd", "memfd_create"] {
        let has_name = |call: &String| call.split(' ').nth(1) == Some(name);
        assert!(sound.calls.iter().any(has_name), "no {name} among {:#?}", sound.calls);
    }
    let numbers: Vec<usize> = sound.calls.iter().map(|call| number(call)).collect();
    assert!(numbers.iter().copied().eq(1..=numbers.len()), "calls are missing: {numbers:?}");

    let failures = failures(&sound.calls);
    let (mut ended, mut coped, mut absent) = (0, Vec::new(), Vec::new());
    let mut wrong = Vec::new();
    for (number, errno) in &failures {
        let seen = run(&POWER_OFF, Some((*number, *errno)));
        // What it is in this run: threads take turns as they like.
        let call = match seen.failed() {
            Some(call) => format!("{call} ({})", errno.1),
            None => format!("{} (not made)", sound.calls[*number - 1]),
        };
        let words = seen.words().unwrap_or_else(|| seen.stderr.trim_end());
        println!("    {call}: {:?} {words}", seen.code());
        let complaints = seen.complaints();
        if !complaints.is_empty() {
            let stderr = seen.stderr.trim_end();
            wrong.push(format!("call {call}: {}\n{stderr}", complaints.join("; ")));
        }
        match (seen.failed(), seen.code()) {
            (None, _) => absent.push(call),
            (_, Some(0)) => coped.push(call),
            _ => ended += 1,
        }
    }
    println!("    {} calls whose failure the VMM copes with: {}", coped.len(), coped.join(", "));
    println!(
        "    {} calls in a run; {} failures: {ended} ended it with an error, it coped with {}, {} \
         were not made again",
        sound.calls.len(),
        failures.len(),
        coped.len(),
        absent.len(),
    );
    assert!(wrong.is_empty(), "{} failures:\n{}", wrong.len(), wrong.join("\n"));
    assert!(absent.len() <= OF_THREADS, "calls that were not made again: {absent:#?}");
}
