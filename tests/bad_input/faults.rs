//! What a user gets when a call to the kernel fails that hardly ever does: each call that a whole
//! run makes of KVM, for memory, for an eventfd and for the memory-failure policy fails in turn
//! (tests/faults/fail.rs, preloaded), those of a reboot, too, and those that tell the guest of a memory
//! failure. The VMM says so and ends, or does without; it neither hangs nor panics, leaves no socket
//! behind, and the terminal is as it was. Which calls it does without is in [`DOES_WITHOUT`].

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use mce_relay::{FailureKind, State, UndeliverableReason};
use mce_relay_cli::client::requests;
use mce_relay_tests::hooked::library;
use mce_relay_tests::lab;
use mce_relay_tests::left::{Place, Running};
use mce_relay_tests::tiny::{POWER_OFF, elf};
use mce_relay_vmm::api::types::means::Means;
use mce_relay_vmm::api::types::pages::{Gpa, Poison, Poisoning};
use mce_relay_vmm::api::types::vm::{Status, VmInfo};
use serde_json::Value;
use tempfile::TempDir;

use crate::terminal::Terminal;

/// tests/faults/fail.rs.
const LIBRARY: &str = "libfail.so";
/// How long a run may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// mov ecx, 1 << 18; 1: loop 1b. It keeps the guest busy long enough to look at the terminal.
const DAWDLE: [u8; 7] = [0xb9, 0x00, 0x00, 0x04, 0x00, 0xe2, 0xfe];

/// ud2, and nothing to handle it: a triple fault, and after three of them the VM ends with status 4.
const DIE: [u8; 2] = [0x0f, 0x0b];
const DIED: i32 = 4;

/// With this fail.rs marks the call that fails.
const FAILS: &str = " fails";
/// Calls that the threads of two vCPUs make (reading the machine-check state of each, and the KVM_RUNs that
/// fail.rs counts): how many of them a run comes to before its guest is off is a matter of chance.
const OF_THREADS: usize = 13;

// include/uapi/linux/kvm.h
const KVM_GET_MSRS: &str = "ioctl 0xc008ae88";
const KVM_GET_VCPU_EVENTS: &str = "ioctl 0x8040ae9f";
const KVM_GET_REGS: &str = "ioctl 0x8090ae81";
const KVM_GET_MP_STATE: &str = "ioctl 0x8004ae98";
const KVM_GET_SREGS: &str = "ioctl 0x8138ae83";
const KVM_X86_SET_MCE: &str = "ioctl 0x4040ae9e";

// include/uapi/asm-generic/mman-common.h
const MADV_DONTNEED: &str = "madvise 0x4";
const MADV_POPULATE_WRITE: &str = "madvise 0x17";

/// The calls that the VMM does without, each with what becomes of it. Any other ends it.
const DOES_WITHOUT: [(&str, &str); 13] = [
    ("madvise 0xe", "MADV_HUGEPAGE: advice"),
    ("madvise 0x10", "MADV_DONTDUMP: advice about the devices' mapping"),
    ("madvise 0x4", "MADV_DONTNEED: the devices' page tables are as the guest's memory was before"),
    (
        "madvise 0x16",
        "MADV_POPULATE_READ: bad pages that no signal names are looked for without it",
    ),
    ("ioctl 0xae03", "KVM_CHECK_EXTENSION: KVM has less than it has"),
    ("ioctl 0x4068aea3", "KVM_ENABLE_CAP, of MSRs in user space: a warning"),
    ("ioctl 0x4188aec6", "KVM_X86_SET_MSR_FILTER: the same"),
    // What is to be told waits; an AR would not: see `an_ar_that_cannot_be_told`.
    (KVM_GET_MSRS, "a vCPU's state: a warning"),
    (KVM_GET_VCPU_EVENTS, "the same"),
    (KVM_GET_REGS, "the same"),
    (KVM_GET_MP_STATE, "the same"),
    (KVM_GET_SREGS, "the same"),
    // While it runs it is an error of KVM that ends it.
    ("ioctl 0xae80", "KVM_RUN of a vCPU, when another has just ended the run"),
];

/// The same of a reboot, in addition.
const REBOOTS_WITHOUT: [(&str, &str); 3] = [
    ("fallocate 0x3", "a hole for the file of guest RAM: the guest finds its old memory"),
    (MADV_DONTNEED, "the same of anonymous memory"),
    (MADV_POPULATE_WRITE, "prefault=on: the guest gets memory as it uses it, and a warning"),
];

/// With DIR for the run's directory. Of a VM with them all guest RAM is a file, and none of it anonymous.
const DEVICES: [&str; 6] =
    ["--rng", "src=/dev/urandom", "--console", "null", "--vsock", "cid=3,socket=DIR/vsock"];

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
    /// What it ends with when nothing fails.
    sound: i32,
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
    let at = fail.map(|(number, (errno, _))| {
        [("MCE_RELAY_FAIL_AT", number.to_string()), ("MCE_RELAY_FAIL_ERRNO", errno.to_string())]
    });
    let sound = if code == DIE { DIED } else { 0 };
    let more = [&["--seccomp", seccomp], DEVICES.as_slice()].concat();
    Run::start(code, &more, at.as_slice().as_flattened()).end(sound)
}

/// A VM that runs.
struct Run {
    dir: TempDir,
    terminal: Terminal,
    before: [libc::tcflag_t; 4],
    child: Child,
}

impl Run {
    /// Starts it with a guest of `code`, with `more` options, and with these variables for fail.rs.
    fn start(code: &[u8], more: &[&str], env: &[(&str, String)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("kernel"), elf(code)).unwrap();
        let stderr = File::create(at("stderr")).unwrap();
        let terminal = Terminal::new();
        let before = terminal.modes();
        let child = terminal.start_with(|command| {
            command
                .args(["--memory-zone", "size=16M,shared=on"])
                .args(["--memory-zone", "size=16M,prefault=on"])
                .args(["--cpus", "2", "--kernel"])
                .arg(at("kernel"))
                .args(["--api-socket", &format!("path={}", at("api").display())])
                .args(["--event-monitor", &format!("path={}", at("events").display())])
                .args(
                    more.iter().map(|word| word.replace("DIR", &dir.path().display().to_string())),
                )
                .stderr(stderr)
                // It could silence the errors that are looked for.
                .env_remove("RUST_LOG")
                .env("LD_PRELOAD", library(LIBRARY).unwrap())
                .env("MCE_RELAY_FAIL_LOG", at("calls"))
                .env("MCE_RELAY_FAIL_WHILE", at("now"))
                .envs(env.iter().map(|(name, value)| (name, value)));
        });
        terminal.drain();
        Self { dir, terminal, before, child }
    }

    /// Starts one in which `calls` are to fail at times, and waits until its guest takes machine checks: see
    /// [`takes_machine_checks`].
    fn start_failing(go: u64, more: &[&str], calls: &str) -> Self {
        let more = [&["--seccomp", "false", "--cpu-vendor", "amd"], more].concat();
        let code = takes_machine_checks(go);
        let run = Self::start(&code, &more, &[("MCE_RELAY_FAIL_CALLS", calls.to_owned())]);
        run.wait_for("the first boot", |run| run.boot() == Some(1));
        run.wait_for("the guest", |run| {
            lab::read_memory(run.child.id(), run.hva(go + READY)).unwrap() == 1
        });
        run
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        String::from_utf8_lossy(&std::fs::read(self.path(name)).unwrap_or_default()).into_owned()
    }

    fn wait_for(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            let late = start.elapsed() > PATIENCE;
            assert!(
                !late,
                "{what} does not come: {}\n{}",
                self.text("stderr"),
                self.text("events")
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn info(&self) -> Option<VmInfo> {
        requests::get(&self.path("api"), "vm.info").ok()
    }

    fn boot(&self) -> Option<u32> {
        self.info().map(|info| info.boot)
    }

    /// Whether the calls fail from now on.
    fn fail(&self, now: bool) {
        match now {
            true => drop(File::create(self.path("now")).unwrap()),
            false => std::fs::remove_file(self.path("now")).unwrap(),
        }
    }

    /// Forges a memory failure, by an AR on vCPU 0.
    fn forge(&self, kind: FailureKind, gpa: u64) {
        let asked = Poison { gpas: vec![Gpa(gpa)], via: Means::Signal, kind, vcpu: 0 };
        // A vCPU's thread comes a moment after the VM.
        self.wait_for("the thread of vCPU 0", |run| {
            let done: Vec<Poisoning> =
                requests::put_json(&run.path("api"), "vm.poison", &asked).unwrap();
            done.iter().all(|page| page.error.is_none())
        });
    }

    /// What has become of the page, if it is known and the VM runs.
    fn state(&self, gpa: u64) -> Option<State> {
        let status: Status = requests::get(&self.path("api"), "relay.status").ok()?;
        status.pages.into_iter().find(|page| page.gpa == gpa).map(|page| page.state)
    }

    /// Writes a byte into guest RAM.
    fn write(&self, gpa: u64, byte: u8) {
        lab::write_memory(self.child.id(), self.hva(gpa), byte);
    }

    fn hva(&self, gpa: u64) -> u64 {
        let info = self.info().unwrap();
        let block = info.block(gpa).unwrap();
        block.hva + (gpa - block.gpa)
    }

    /// Ends it by the API.
    fn shut_down(self) -> Seen {
        requests::put(&self.path("api"), "vm.shutdown").unwrap();
        self.end(0)
    }

    /// Waits for its end, which is with `sound` when nothing fails.
    fn end(mut self, sound: i32) -> Seen {
        let start = Instant::now();
        let mut was_raw = false;
        let status = loop {
            was_raw |= self.terminal.modes() != self.before;
            if let Some(status) = self.child.try_wait().unwrap() {
                break Some(status);
            }
            if start.elapsed() > PATIENCE {
                self.child.kill().unwrap();
                self.child.wait().unwrap();
                break None;
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        // Threads write their lines as they come to it.
        let mut calls: Vec<String> = self.text("calls").lines().map(str::to_owned).collect();
        calls.sort_by_key(|call| number(call));
        Seen {
            sound,
            status,
            stderr: self.text("stderr"),
            calls,
            was_raw,
            is_restored: self.terminal.modes() == self.before,
            // Not `exists`, which takes what it cannot look at for absent.
            left_socket: self.path("api").try_exists().unwrap(),
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // Where a test ends it, there is nothing left to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
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
            (_, Some(code)) if code == self.sound => {}
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

    fail_in_turn(&sound, &POWER_OFF, failures(&sound.calls), &DOES_WITHOUT, OF_THREADS);
}

/// The guest dies at once, and is started again: from the first call that makes its memory good to the first
/// that does so the next time.
pub fn every_call_of_a_reboot() {
    let sound = run(&DIE, None);
    assert!(sound.code() == Some(DIED) && sound.complaints().is_empty(), "{sound:#?}");
    let punches = sound.calls.iter().filter(|call| call.split(' ').nth(1) == Some("fallocate"));
    let punches: Vec<usize> = punches.map(|call| number(call)).collect();
    // Each reboot empties the files of both zones.
    let [first, _, second, _] = punches[..] else { panic!("two reboots: {:#?}", sound.calls) };
    let mut failures = failures(&sound.calls);
    failures.retain(|(number, _)| (first..second).contains(number));
    let without = [DOES_WITHOUT.as_slice(), &REBOOTS_WITHOUT].concat();
    // The number of calls of all boots before is a matter of chance.
    fail_in_turn(&sound, &DIE, failures, &without, 3 * OF_THREADS);
}

/// Runs `code` again and again, each time with one of `failures`. A call that the VMM does without is one of
/// `without`; so many are not made again at most.
fn fail_in_turn(
    sound: &Seen,
    code: &[u8],
    failures: Vec<(usize, Errno)>,
    without: &[(&str, &str)],
    may_be_absent: usize,
) {
    let (mut ended, mut coped, mut absent) = (0, Vec::new(), Vec::new());
    let mut wrong = Vec::new();
    for (number, errno) in &failures {
        let seen = run(code, Some((*number, *errno)));
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
            (Some(failed), code) if code == Some(seen.sound) => {
                let what = failed.split_once(' ').map(|(_, what)| what);
                if !without.iter().any(|(known, _)| Some(*known) == what) {
                    wrong.push(format!(
                        "call {call}: the VMM does without it; it is not one of {without:?}"
                    ));
                }
                coped.push(call);
            }
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
    assert!(absent.len() <= may_be_absent, "calls that were not made again: {absent:#?}");
}

/// Pages of the guest in its zone that is shared, and in the one that is not.
const SHARED: u64 = 0x80_0000;
const PRIVATE: u64 = 0x100_0000;

/// So far behind that byte a guest says that it takes machine checks.
const READY: u64 = 8;

/// A guest that takes machine checks, as Linux does, and dies when there is a byte at `go`.
fn takes_machine_checks(go: u64) -> Vec<u8> {
    /// Where the code begins: see `elf`.
    const CODE: u32 = 0x10_0000;
    /// #MC
    const VECTOR: usize = 18;
    let [go, ready] = [go, go + READY].map(|gpa| u32::try_from(gpa).unwrap().to_le_bytes());
    // mov esp, 2 MiB; lidt [idtr]; mov eax, cr4; or eax, 1 << 6 (MCE); mov cr4, eax; mov byte [ready], 1;
    // 1: cmp byte [go], 0; je 1b; ud2
    let mut code = vec![0xbc, 0, 0, 0x20, 0, 0x0f, 0x01, 0x1d];
    let idtr_at = code.len();
    code.extend([0, 0, 0, 0, 0x0f, 0x20, 0xe0, 0x83, 0xc8, 0x40, 0x0f, 0x22, 0xe0]);
    code.extend([&[0xc6, 0x05], ready.as_slice(), &[1]].concat());
    code.extend([&[0x80, 0x3d], go.as_slice(), &[0, 0x74, 0xf7, 0x0f, 0x0b]].concat());
    let handler = CODE + u32::try_from(code.len()).unwrap();
    // mov ecx, MC0_STATUS; xor eax, eax; xor edx, edx; 2: wrmsr; add ecx, 4; cmp ecx, MC10_STATUS; jb 2b;
    // mov ecx, MCG_STATUS; wrmsr; jmp to the start. No iret, which not every KVM emulates where it has to.
    code.extend([0xb9, 0x01, 0x04, 0, 0, 0x31, 0xc0, 0x31, 0xd2, 0x0f, 0x30, 0x83, 0xc1, 0x04]);
    code.extend([
        0x81, 0xf9, 0x29, 0x04, 0, 0, 0x72, 0xf3, 0xb9, 0x7a, 0x01, 0, 0, 0x0f, 0x30, 0xe9,
    ]);
    let back = i32::try_from(code.len() + 4).unwrap();
    code.extend((-back).to_le_bytes());
    // The only gate: a 32-bit interrupt gate in the code segment of the boot (selector 0x10).
    let idt = CODE + u32::try_from(code.len()).unwrap();
    code.resize(code.len() + 8 * VECTOR, 0);
    let [a, b, c, d] = handler.to_le_bytes();
    code.extend([a, b, 0x10, 0, 0, 0x8e, c, d]);
    let idtr = CODE + u32::try_from(code.len()).unwrap();
    code.extend(u16::try_from(8 * VECTOR + 7).unwrap().to_le_bytes());
    code.extend(idt.to_le_bytes());
    code[idtr_at..idtr_at + 4].copy_from_slice(&idtr.to_le_bytes());
    code
}

/// The state of a vCPU cannot be read, or a record not be put in, when the guest has touched a bad page: the
/// policy applies, with the reason. Until then the same guest takes what it is told.
pub fn an_ar_that_cannot_be_told() {
    // The MP state of a vCPU with CR4.MCE is known without a call. This guest has its interrupts off, so what comes with its
    // exits does not say all.
    let state = [KVM_GET_MSRS, KVM_GET_VCPU_EVENTS, KVM_GET_REGS, KVM_GET_SREGS];
    let reads = state.map(|call| (call, UndeliverableReason::NoState));
    for (call, why) in reads.into_iter().chain([(KVM_X86_SET_MCE, UndeliverableReason::Refused)]) {
        let run = Run::start_failing(PRIVATE, &[], call);
        run.forge(FailureKind::ActionRequired, SHARED);
        run.wait_for("the guest's acknowledgement", |run| {
            matches!(run.state(SHARED), Some(State::Acknowledged { .. }))
        });
        run.fail(true);
        run.forge(FailureKind::ActionRequired, PRIVATE + 0x1000);
        let seen = run.end(0);
        println!("    {call}: {:?} {}", seen.code(), seen.words().unwrap_or_default());
        assert_eq!((seen.code(), seen.complaints()), (Some(6), vec![]), "{call}: {}", seen.stderr);
        let words = format!("bad page at {:#x} (RIP ", PRIVATE + 0x1000);
        assert!(seen.stderr.contains(&words), "{call}: {}", seen.stderr);
        assert!(seen.stderr.contains(&why.to_string()), "{call}: {}", seen.stderr);
    }
}

/// The same with an AO: it is undeliverable where KVM refuses the record, and waits while the state is not
/// known. The guest goes on.
pub fn an_ao_that_cannot_be_told() {
    for (call, waits) in [(KVM_GET_MSRS, true), (KVM_X86_SET_MCE, false)] {
        let more = ["--ao-channel", "mce"];
        let run = Run::start_failing(PRIVATE, &more, call);
        let injected =
            |gpa| move |run: &Run| matches!(run.state(gpa), Some(State::Injected { .. }));
        run.forge(FailureKind::ActionOptional, SHARED);
        run.wait_for("the first record", injected(SHARED));
        run.fail(true);
        let late = PRIVATE + 0x1000;
        run.forge(FailureKind::ActionOptional, late);
        run.wait_for("the second page", |run| run.state(late).is_some());
        if waits {
            std::thread::sleep(Duration::from_millis(500));
            let state = run.state(late);
            assert!(matches!(state, Some(State::Seen | State::Waiting { .. })), "{state:?}");
            run.fail(false);
            run.wait_for("the second record", injected(late));
        } else {
            let refused = State::Undeliverable { why: UndeliverableReason::Refused };
            run.wait_for("the refusal", |run| run.state(late) == Some(refused));
            run.fail(false);
        }
        let seen = run.shut_down();
        assert!(seen.failed().is_some(), "{call} was not made: {:#?}", seen.calls);
        assert_eq!((seen.code(), seen.complaints()), (Some(0), vec![]), "{call}: {}", seen.stderr);
    }
}

/// How a reboot with a bad page goes when calls fail.
#[derive(Debug, Clone, Copy)]
enum Reboot {
    /// The page has this event, and the guest runs again.
    Runs(&'static str),
    /// It ends with this status.
    Ends(i32),
}

/// Calls that fail as long as it takes, when the guest dies and a page of it is bad (forged: it is whole).
pub fn a_reboot_without_good_memory() {
    use Reboot::{Ends, Runs};
    let cases = [
        // A page that cannot be made anew one way is so the other. The guest finds its old memory where the
        // call is of all of it; so what it dies of is in the other zone.
        ("fallocate", PRIVATE, SHARED, Runs("healed")),
        (MADV_DONTNEED, SHARED, PRIVATE, Runs("healed")),
        // There is no memory for it.
        (MADV_POPULATE_WRITE, PRIVATE, SHARED, Runs("removed")),
        (MADV_POPULATE_WRITE, SHARED, PRIVATE, Runs("removed")),
        // It dies of the same byte again and again.
        ("fallocate,madvise 0x4", PRIVATE, SHARED, Ends(DIED)),
        // There is no new VM.
        ("mmap", PRIVATE, SHARED, Ends(1)),
    ];
    for (calls, go, zone, expected) in cases {
        let run = Run::start_failing(go, &["--ao-channel", "mce"], calls);
        let bad = zone + 0x5000;
        run.forge(FailureKind::ActionOptional, bad);
        run.wait_for("the bad page", |run| run.state(bad).is_some());
        run.fail(true);
        run.write(go, 1);
        let (seen, status) = match expected {
            Ends(status) => (run.end(0), status),
            Runs(event) => {
                run.wait_for("the second boot", |run| run.boot() == Some(2));
                // What came before is written down then, too.
                run.wait_for("its event", |run| run.text("events").contains(r#""boot":2"#));
                let events = run.text("events");
                let events: Vec<Value> =
                    events.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
                let of_it = |name: &str| {
                    let of_it = |event: &&Value| {
                        event["event"] == name && event["properties"]["gpa"] == format!("{bad:#x}")
                    };
                    events.iter().filter(of_it).count()
                };
                let healed_or_removed = (of_it("healed"), of_it("removed"));
                let once = if event == "healed" { (1, 0) } else { (0, 1) };
                assert_eq!(healed_or_removed, once, "{calls}: {events:#?}");
                (run.shut_down(), 0)
            }
        };
        println!("    {calls}: {:?} {}", seen.code(), seen.words().unwrap_or_default());
        assert!(seen.failed().is_some(), "{calls} were not made: {:#?}", seen.calls);
        assert_eq!(
            (seen.code(), seen.complaints()),
            (Some(status), vec![]),
            "{calls}: {}",
            seen.stderr
        );
    }
}

/// KVM hands over a store to a slot that is read-only, or is being changed, as if RAM were a device. The page is a good
/// one, so the store is made.
pub fn a_store_that_kvm_hands_over() {
    const GPA: u64 = 0x30_0123;
    // mov dword ptr [GPA], 0x5a6b7c8d; 1: jmp 1b
    let place = Place::new(&[0xc7, 0x05, 0x23, 0x01, 0x30, 0, 0x8d, 0x7c, 0x6b, 0x5a, 0xeb, 0xfe]);
    let mut command = place.run(&["--serial", "off", "--name", "n"]);
    command.env("LD_PRELOAD", library(LIBRARY).unwrap()).env("MCE_RELAY_READ_ONLY", "1");
    let mut vm = place.started(command, "mce-relay/n.sock");
    let stored = |vm: &Running<'_>| {
        let info = vm.info().unwrap();
        let block = info.block(GPA).unwrap();
        let byte = |at| lab::read_memory(vm.pid(), block.hva + (GPA + at - block.gpa)).unwrap();
        u32::from_le_bytes([0, 1, 2, 3].map(byte)) == 0x5a6b_7c8d
    };
    vm.wait("the store", stored);
    let status: Status = requests::get(vm.socket(), "relay.status").unwrap();
    assert_eq!(status.pages.len(), 0, "no page is bad");
}
