//! The words of the serial line: requests as plain words, replies and events as one line of
//! JSON each.
//!
//! Requests are words so that a person can type them; answers are JSON so that a test need not
//! guess. Addresses are strings, because a JSON number is a double to many readers and loses
//! the low bits of a 64-bit one.

use std::ops::RangeInclusive;

use serde::Serialize;

use crate::disk::reply as disk_reply;
use crate::disk::words as disk_words;
use crate::words::{Hex, number, optional, wrong};

/// Most pages that one `alloc` may ask for: more would make a reply that blocks the port.
pub const MAX_ALLOC: u32 = 4096;
/// Most pages that one `process` may ask for, for the same reason.
pub const MAX_PROCESS: usize = 4096;
/// And how many it gives where none are asked for.
const DEFAULT_PROCESS: usize = 64;

/// What memory a page of the agent is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Private anonymous memory.
    Anon,
    /// Shared anonymous memory, which the kernel keeps as an unnamed tmpfs file.
    Shared,
    /// Private anonymous memory, mlocked.
    Mlocked,
    /// A file's page that was read through its mapping and never written there.
    FileClean,
    /// A file's page that was written through its mapping.
    FileDirty,
    /// A transparent huge page of 2 MiB.
    Thp,
    /// A 2 MiB page of the hugetlb pool.
    Hugetlb,
}

impl Kind {
    const NAMES: [(&'static str, Self); 7] = [
        ("anon", Self::Anon),
        ("shared", Self::Shared),
        ("mlocked", Self::Mlocked),
        ("file-clean", Self::FileClean),
        ("file-dirty", Self::FileDirty),
        ("thp", Self::Thp),
        ("hugetlb", Self::Hugetlb),
    ];

    /// Size of one page of this kind, in bytes.
    pub fn bytes(self) -> usize {
        match self {
            Self::Thp | Self::Hugetlb => 2 << 20,
            _ => 4096,
        }
    }
}

/// How `touch` reaches a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// A load in user mode.
    Read,
    /// A store in user mode, of the word that is already there.
    Write,
    /// A system call that makes the kernel copy the 4 KiB from user memory.
    KernelCopy,
    /// Load after load in user mode, until one fails or half a minute has passed: so the CPU is in
    /// user mode when something from outside comes.
    Spin,
}

/// What `failures` is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Account {
    /// Give all of the account.
    Full,
    /// Give its numbers only: short, so that it can be asked for again and again.
    Count,
    /// Give its numbers and begin a new one.
    Reset,
}

/// One request, checked.
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    Ping,
    Alloc { kind: Kind, count: u32, runs: bool },
    Gpa { page: u32, offset: usize },
    Touch { page: u32, how: How, offset: usize },
    Check { except: Vec<RangeInclusive<u32>> },
    Interval { seconds: u32 },
    Log { on: bool },
    Failures { what: Account },
    Sigbus { quiet: Option<bool> },
    Dmesg { pattern: String },
    Early { on: bool },
    Cpu { cpu: usize },
    Online { cpu: usize, on: bool },
    Free { page: u32 },
    Process { which: String, max: usize },
    Claim { frames: Vec<RangeInclusive<u32>> },
    Meminfo,
    Clock,
    Failing { count: u32 },
    Disk(disk_words::Request),
    Echo { port: u32 },
    Kexec,
    Reboot,
    Poweroff,
    Panic,
}

const VERBS: &str = "ping, alloc, gpa, touch, check, interval, log, failures, sigbus, dmesg, \
                     early, cpu, online, free, process, claim, meminfo, clock, failing, disk-write, \
                     disk-verify, disk-load, echo, kexec, reboot, poweroff or panic";

/// The verb of a request line, for the reply; cut short, because a reply must stay short
/// whatever noise the port delivers.
pub fn verb(line: &str) -> String {
    line.split_whitespace().next().unwrap_or_default().chars().take(32).collect()
}

/// Reads one request line.
///
/// # Errors
/// A text that names the word that was not understood and the form that was expected.
pub fn parse(line: &str) -> Result<Request, String> {
    let mut words = line.split_whitespace();
    let verb = words.next().unwrap_or_default();
    let request = match verb {
        "ping" => Request::Ping,
        "alloc" => {
            let usage = "alloc KIND COUNT [runs], KIND one of anon, shared, mlocked, file-clean, \
                         file-dirty, thp, hugetlb; COUNT 1 to 4096";
            let kind = choice(words.next(), &Kind::NAMES, usage)?;
            let count = number(words.next(), usage)?;
            let count = match u32::try_from(count) {
                Ok(count @ 1..=MAX_ALLOC) => count,
                _ => return Err(wrong(&count.to_string(), usage)),
            };
            let runs = optional(words.next(), |w| choice(Some(w), &[("runs", true)], usage))?;
            Request::Alloc { kind, count, runs: runs.unwrap_or(false) }
        }
        "gpa" => {
            let usage = "gpa PAGE [OFFSET], OFFSET in bytes";
            Request::Gpa { page: page(words.next(), usage)?, offset: offset(words.next(), usage)? }
        }
        "touch" => {
            let usage = "touch PAGE read|write|kernel-copy|spin [OFFSET], OFFSET in bytes";
            let hows = [
                ("read", How::Read),
                ("write", How::Write),
                ("kernel-copy", How::KernelCopy),
                ("spin", How::Spin),
            ];
            Request::Touch {
                page: page(words.next(), usage)?,
                how: choice(words.next(), &hows, usage)?,
                offset: offset(words.next(), usage)?,
            }
        }
        "check" => {
            let usage = "check [except PAGE...], each a page or FIRST-LAST";
            match words.next() {
                None => Request::Check { except: Vec::new() },
                Some("except") => {
                    let except: Result<Vec<_>, _> =
                        words.by_ref().map(|w| pages(w, usage)).collect();
                    let except = except?;
                    if except.is_empty() {
                        return Err(wrong("nothing", usage));
                    }
                    Request::Check { except }
                }
                Some(other) => return Err(wrong(other, usage)),
            }
        }
        "interval" => {
            let usage = "interval SECONDS, whole seconds from 0 (no polling) to 86400";
            let seconds = number(words.next(), usage)?;
            match u32::try_from(seconds) {
                Ok(seconds @ 0..=86400) => Request::Interval { seconds },
                _ => return Err(wrong(&seconds.to_string(), usage)),
            }
        }
        "log" => Request::Log { on: on_off(words.next(), "log on|off")? },
        "failures" => {
            let all = [("count", Account::Count), ("reset", Account::Reset)];
            let what = optional(words.next(), |w| choice(Some(w), &all, "failures [count|reset]"))?;
            Request::Failures { what: what.unwrap_or(Account::Full) }
        }
        "sigbus" => {
            let all = [("events", false), ("count", true)];
            let quiet = |w| choice(Some(w), &all, "sigbus [events|count]");
            Request::Sigbus { quiet: optional(words.next(), quiet)? }
        }
        "early" => Request::Early { on: on_off(words.next(), "early on|off")? },
        "dmesg" => {
            // The rest of the line, blanks and all: kernel messages are looked for by phrases.
            let pattern = line.trim_start()[verb.len()..].trim();
            if pattern.is_empty() {
                return Err(wrong("nothing", "dmesg TEXT, the text to find in the log"));
            }
            return Ok(Request::Dmesg { pattern: pattern.to_owned() });
        }
        "cpu" => {
            let usage = "cpu N, a CPU number from 0 to 1023";
            match number(words.next(), usage)? {
                cpu @ 0..=1023 => Request::Cpu { cpu },
                cpu => return Err(wrong(&cpu.to_string(), usage)),
            }
        }
        "online" => {
            let usage = "online N on|off, N a CPU number from 0 to 1023";
            match number(words.next(), usage)? {
                cpu @ 0..=1023 => Request::Online { cpu, on: on_off(words.next(), usage)? },
                cpu => return Err(wrong(&cpu.to_string(), usage)),
            }
        }
        "free" => Request::Free { page: page(words.next(), "free PAGE")? },
        "process" => {
            let usage = "process PID|NAME [MAX], MAX pages, 1 to 4096";
            let which = words.next().ok_or_else(|| wrong("nothing", usage))?.to_owned();
            match optional(words.next(), |w| number(Some(w), usage))?.unwrap_or(DEFAULT_PROCESS) {
                max @ 1..=MAX_PROCESS => Request::Process { which, max },
                max => return Err(wrong(&max.to_string(), usage)),
            }
        }
        "claim" => {
            let usage = "claim FRAME..., each a page frame or FIRST-LAST";
            let frames: Result<Vec<_>, _> = words.by_ref().map(|w| pages(w, usage)).collect();
            let frames = frames?;
            if frames.is_empty() {
                return Err(wrong("nothing", usage));
            }
            Request::Claim { frames }
        }
        "meminfo" => Request::Meminfo,
        "clock" => Request::Clock,
        "failing" => {
            let usage = "failing COUNT, 1 to 4096 pages of the agent's own";
            match page(words.next(), usage)? {
                count @ 1..=MAX_ALLOC => Request::Failing { count },
                count => return Err(wrong(&count.to_string(), usage)),
            }
        }
        "echo" => {
            Request::Echo { port: page(words.next(), "echo PORT, a vsock port of the host's")? }
        }
        "kexec" => Request::Kexec,
        "reboot" => Request::Reboot,
        "poweroff" => Request::Poweroff,
        "panic" => Request::Panic,
        other => match disk_words::parse(other, &mut words) {
            Some(request) => Request::Disk(request?),
            None => return Err(wrong(other, VERBS)),
        },
    };
    match words.next() {
        None => Ok(request),
        Some(extra) => Err(format!("{extra:?} is one word too many for {verb}; leave it out")),
    }
}

fn choice<T: Copy>(word: Option<&str>, from: &[(&str, T)], usage: &str) -> Result<T, String> {
    let word = word.unwrap_or("nothing");
    from.iter()
        .find(|(name, _)| *name == word)
        .map(|(_, value)| *value)
        .ok_or_else(|| wrong(word, usage))
}

fn on_off(word: Option<&str>, usage: &str) -> Result<bool, String> {
    choice(word, &[("on", true), ("off", false)], usage)
}

fn page(word: Option<&str>, usage: &str) -> Result<u32, String> {
    let value = number(word, usage)?;
    u32::try_from(value).map_err(|_| wrong(&value.to_string(), usage))
}

/// A page, or `FIRST-LAST`.
fn pages(word: &str, usage: &str) -> Result<RangeInclusive<u32>, String> {
    match word.split_once('-') {
        None => page(Some(word), usage).map(|page| page..=page),
        Some((first, last)) => match (page(Some(first), usage)?, page(Some(last), usage)?) {
            (first, last) if first <= last => Ok(first..=last),
            _ => Err(wrong(word, usage)),
        },
    }
}

fn offset(word: Option<&str>, usage: &str) -> Result<usize, String> {
    Ok(optional(word, |w| number(Some(w), usage))?.unwrap_or(0))
}

/// `si_code` of a SIGBUS: the two of memory errors by name, any other as its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Code {
    /// `"AR"` or `"AO"`.
    Name(&'static str),
    /// Any other code.
    Number(i32),
}

/// What a SIGBUS said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Sigbus {
    /// Action required, action optional, or another code.
    pub code: Code,
    /// `si_addr`.
    pub addr: Hex,
    /// `si_addr_lsb`, only where the kernel fills it in: for AR and AO.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lsb: Option<i16>,
}

/// One page in the reply to `process`.
#[derive(Debug, Serialize)]
pub struct ProcessPage {
    /// Its guest-physical address.
    pub gpa: Hex,
    /// Its virtual address in the process.
    pub va: Hex,
    /// The area that it lies in, as /proc/PID/maps calls it.
    pub area: String,
}

/// One page in the reply to `alloc`.
#[derive(Debug, Serialize)]
pub struct PageInfo {
    /// Its number, never used again.
    pub page: u32,
    /// What it is made of.
    pub kind: Kind,
    /// Its virtual address in the agent.
    pub va: Hex,
    /// Its guest-physical address; absent where the kernel hides it (not root).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpa: Option<Hex>,
    /// Its size.
    pub bytes: usize,
}

/// How many page frames ended how, as the kernel's log says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Outcomes {
    /// Isolated.
    pub recovered: usize,
    /// Left as they were, in use by the kernel for instance.
    pub ignored: usize,
    /// To be isolated when they are next allocated.
    pub delayed: usize,
    /// Not isolated.
    pub failed: usize,
}

/// How many lines of the kernel's log say that something was lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Losses {
    /// "MCE records pool full": at least one machine check was not kept.
    pub pool_full: u64,
    /// "buffer overflow when queuing memory failure": a page was not isolated.
    pub overflow: u64,
    /// Lines that the log itself lost before they were read, so any of these.
    pub kmsg_lost: u64,
}

/// What a page's entry in the page table holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// A frame.
    Present,
    /// A swap slot, or a page in migration.
    Swapped,
    /// The marker of a poisoned page: the next touch raises SIGBUS.
    Hwpoison,
    /// Nothing. Linux 6.1 and 6.12 show this for a poisoned hugetlb page too.
    Absent,
}

/// How a touch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The access was made.
    Ok,
    /// The access raised SIGBUS.
    Sigbus,
    /// The system call failed.
    Errno,
}

/// What a reply holds beside `reply`, `ok` and `error`.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Body {
    None {},
    Ping {
        /// The agent's own, for `process`.
        pid: u32,
    },
    Alloc {
        pages: Vec<PageInfo>,
    },
    Process {
        pid: u32,
        /// Its name.
        comm: String,
        pages: Vec<ProcessPage>,
    },
    /// The compact form of the same.
    AllocRuns {
        kind: Kind,
        /// Size of each.
        bytes: usize,
        /// The number of the first; the others follow without a gap.
        first: u32,
        /// Where they are, in the order of their numbers: an address, and how many pages lie there
        /// one behind the other. Empty where the kernel hides it (not root).
        runs: Vec<(Hex, u32)>,
    },
    Gpa {
        page: u32,
        state: State,
        /// Where it is; for a page that is not present, where it last was.
        #[serde(skip_serializing_if = "Option::is_none")]
        gpa: Option<Hex>,
        /// Whether the kernel marks a frame of it as poisoned; absent where it does not say.
        #[serde(skip_serializing_if = "Option::is_none")]
        poisoned: Option<bool>,
    },
    Touch {
        page: u32,
        how: How,
        result: Outcome,
        #[serde(skip_serializing_if = "Option::is_none")]
        errno: Option<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        intact: Option<bool>,
        #[serde(skip_serializing_if = "Option::is_none")]
        sigbus: Option<Sigbus>,
        /// How long it took, a SIGBUS and the way back from its handler included.
        nanos: u64,
    },
    Check {
        /// Pages read in full and found as they were written.
        intact: usize,
        /// Pages this check found to be lost or changed.
        bad: Vec<u32>,
        /// Those of `bad` that could be read and held something else.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        changed: Vec<u32>,
        /// Pages not read, because the request named them or they are known to be bad: first page
        /// and number of pages of each run.
        skipped: Vec<(u32, u32)>,
    },
    Failures {
        /// Page frames that the kernel's log names as failed.
        pfns: usize,
        #[serde(flatten)]
        outcomes: Outcomes,
        #[serde(flatten)]
        losses: Losses,
        /// Lines "Machine check events logged", of which the kernel writes a few a minute at most.
        mce_logged: u64,
        /// When the last frame was named or its outcome said, in seconds on the log's clock.
        #[serde(skip_serializing_if = "Option::is_none")]
        last: Option<f64>,
        /// The page frames in ascending order: the first of each run, and its length.
        #[serde(skip_serializing_if = "Option::is_none")]
        runs: Option<Vec<(Hex, u32)>>,
    },
    Sigbus {
        /// Whether AOs are only counted.
        quiet: bool,
        /// AOs that this process has been sent so far. Signals coalesce, so there may be fewer than
        /// pages.
        ao: u32,
    },
    Claim {
        /// Page frames asked for.
        wanted: u64,
        /// Those of them that the agent came by.
        held: usize,
        /// Those of these that hold what was written to them.
        intact: usize,
        /// How much memory it took.
        mib: usize,
    },
    Interval {
        /// Seconds, read back from the kernel.
        interval: String,
    },
    Switch {
        on: bool,
    },
    Dmesg {
        /// How many lines matched; `lines` holds the last 100 of them.
        count: usize,
        lines: Vec<String>,
    },
    Cpu {
        cpu: i32,
    },
    Clock {
        /// Seconds, on the clock of the kernel's log.
        time: f64,
    },
    Failing {
        /// Seconds, from the first to the last page.
        seconds: f64,
    },
    Meminfo {
        hardware_corrupted_kb: u64,
    },
    Disk(disk_reply::Reply),
    Echo {
        /// Bytes that came and went back.
        bytes: u64,
    },
}

/// The one line that answers a request.
#[derive(Debug, Serialize)]
pub struct Reply {
    reply: String,
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(flatten)]
    body: Body,
}

impl Reply {
    /// The answer to `verb`.
    pub fn new(verb: String, result: Result<Body, String>) -> Self {
        let (body, error) = match result {
            Ok(body) => (body, None),
            Err(error) => (Body::None {}, Some(error)),
        };
        Self { reply: verb, ok: error.is_none(), error, body }
    }
}

/// A line that no request asked for.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    Hello {
        version: &'static str,
        kernel: String,
        cpus: u32,
        vendor: String,
        early_kill: bool,
    },
    Sigbus {
        #[serde(flatten)]
        sigbus: Sigbus,
        /// The agent's page at that address, if it is one.
        #[serde(skip_serializing_if = "Option::is_none")]
        page: Option<u32>,
    },
    /// SIGBUS signals that came faster than they could be reported.
    SigbusLost {
        count: u32,
    },
    Kmsg {
        seq: u64,
        /// Seconds since boot.
        time: f64,
        level: u8,
        line: String,
    },
    /// Records that the kernel overwrote before they were read.
    KmsgLost {},
    /// Where the buffers are that a `disk-load` under way transfers from and to.
    DiskLoad {
        write: disk_reply::Place,
        read: disk_reply::Place,
    },
    Error {
        error: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json<T: Serialize>(value: &T) -> String {
        serde_json::to_string(value).unwrap()
    }

    #[test]
    fn requests_are_understood() {
        let table = [
            ("ping", Request::Ping),
            ("alloc file-dirty 3", Request::Alloc { kind: Kind::FileDirty, count: 3, runs: false }),
            ("alloc anon 4096 runs", Request::Alloc { kind: Kind::Anon, count: 4096, runs: true }),
            ("gpa 7", Request::Gpa { page: 7, offset: 0 }),
            (
                "  touch 0   kernel-copy 0x1000 ",
                Request::Touch { page: 0, how: How::KernelCopy, offset: 4096 },
            ),
            ("check", Request::Check { except: vec![] }),
            ("check except 3 5", Request::Check { except: vec![3..=3, 5..=5] }),
            ("check except 0-4095 7", Request::Check { except: vec![0..=4095, 7..=7] }),
            ("interval 1", Request::Interval { seconds: 1 }),
            ("log off", Request::Log { on: false }),
            ("failures", Request::Failures { what: Account::Full }),
            ("failures count", Request::Failures { what: Account::Count }),
            ("failures reset", Request::Failures { what: Account::Reset }),
            ("sigbus", Request::Sigbus { quiet: None }),
            ("sigbus events", Request::Sigbus { quiet: Some(false) }),
            ("sigbus count", Request::Sigbus { quiet: Some(true) }),
            (
                "dmesg Memory failure: 0x12",
                Request::Dmesg { pattern: "Memory failure: 0x12".into() },
            ),
            ("early on", Request::Early { on: true }),
            ("cpu 1", Request::Cpu { cpu: 1 }),
            ("free 2", Request::Free { page: 2 }),
            ("process 17", Request::Process { which: "17".into(), max: 64 }),
            ("process sh 4096", Request::Process { which: "sh".into(), max: 4096 }),
            ("claim 7 0x10-0x1f", Request::Claim { frames: vec![7..=7, 16..=31] }),
            ("meminfo", Request::Meminfo),
            ("clock", Request::Clock),
            ("failing 512", Request::Failing { count: 512 }),
            ("echo 5000", Request::Echo { port: 5000 }),
            ("kexec", Request::Kexec),
            ("reboot", Request::Reboot),
            ("poweroff", Request::Poweroff),
            ("online 3 off", Request::Online { cpu: 3, on: false }),
            ("panic", Request::Panic),
        ];
        for (line, request) in table {
            assert_eq!(parse(line), Ok(request), "{line}");
        }
        for (name, kind) in Kind::NAMES {
            let line = format!("alloc {name} 1");
            assert_eq!(parse(&line), Ok(Request::Alloc { kind, count: 1, runs: false }));
            assert_eq!(json(&kind), format!("{name:?}"));
        }
    }

    #[test]
    fn bad_requests_name_the_word_and_the_form() {
        for (line, got, expected) in [
            ("jump", "\"jump\"", "poweroff"),
            ("alloc", "\"nothing\"", "alloc KIND COUNT"),
            ("alloc heap 1", "\"heap\"", "hugetlb"),
            ("alloc anon", "\"nothing\"", "1 to 4096"),
            ("alloc anon 0", "\"0\"", "1 to 4096"),
            ("alloc anon 5000", "\"5000\"", "1 to 4096"),
            ("alloc anon -1", "\"-1\"", "1 to 4096"),
            ("gpa x", "\"x\"", "gpa PAGE"),
            ("gpa 99999999999", "\"99999999999\"", "gpa PAGE"),
            ("touch 0", "\"nothing\"", "read|write|kernel-copy"),
            ("touch 0 lick", "\"lick\"", "read|write|kernel-copy"),
            ("touch 0 read here", "\"here\"", "OFFSET"),
            ("check 3", "\"3\"", "except PAGE"),
            ("echo", "\"nothing\"", "echo PORT"),
            ("check except", "\"nothing\"", "except PAGE"),
            ("check except 1-", "\"\"", "FIRST-LAST"),
            ("check except 7-3", "\"7-3\"", "FIRST-LAST"),
            ("alloc anon 1 run", "\"run\"", "[runs]"),
            ("failures all", "\"all\"", "count|reset"),
            ("sigbus on", "\"on\"", "events|count"),
            ("interval 0.5", "\"0.5\"", "whole seconds"),
            ("log", "\"nothing\"", "log on|off"),
            ("early maybe", "\"maybe\"", "early on|off"),
            ("dmesg ", "\"nothing\"", "dmesg TEXT"),
            ("cpu 4096", "\"4096\"", "0 to 1023"),
            ("process", "\"nothing\"", "process PID|NAME"),
            ("process sh 0", "\"0\"", "1 to 4096"),
            ("process 1 4097", "\"4097\"", "1 to 4096"),
            ("process sh some", "\"some\"", "MAX pages"),
            ("process sh 1 2", "\"2\"", "one word too many"),
            ("claim", "\"nothing\"", "claim FRAME"),
            ("claim 3-2", "\"3-2\"", "FIRST-LAST"),
            ("ping pong", "\"pong\"", "one word too many"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(got) && error.contains(expected), "{line}: {error}");
        }
    }

    #[test]
    fn noise_makes_a_short_reply() {
        let noise = "\u{fffd}".repeat(3000);
        let reply = json(&Reply::new(verb(&noise), parse(&noise).map(|_| Body::None {})));
        assert!(reply.len() < 1000, "{reply}");
    }

    #[test]
    fn replies_have_their_shape() {
        assert_eq!(
            json(&Reply::new("ping".into(), Ok(Body::None {}))),
            r#"{"reply":"ping","ok":true}"#
        );
        assert_eq!(
            json(&Reply::new("free".into(), Err("no".into()))),
            r#"{"reply":"free","ok":false,"error":"no"}"#
        );
        let sigbus = Sigbus { code: Code::Name("AR"), addr: Hex(0x1234), lsb: Some(12) };
        let touch = Body::Touch {
            page: 1,
            how: How::Read,
            result: Outcome::Sigbus,
            errno: None,
            intact: None,
            sigbus: Some(sigbus),
            nanos: 1500,
        };
        assert_eq!(
            json(&Reply::new("touch".into(), Ok(touch))),
            r#"{"reply":"touch","ok":true,"page":1,"how":"read","result":"sigbus","sigbus":{"code":"AR","addr":"0x1234","lsb":12},"nanos":1500}"#
        );
        let runs = vec![(Hex(0x1234000), 3), (Hex(0x1000), 1)];
        let body = Body::AllocRuns { kind: Kind::Anon, bytes: 4096, first: 17, runs };
        assert_eq!(
            json(&Reply::new("alloc".into(), Ok(body))),
            r#"{"reply":"alloc","ok":true,"kind":"anon","bytes":4096,"first":17,"runs":[["0x1234000",3],["0x1000",1]]}"#
        );
        let page = PageInfo {
            page: 0,
            kind: Kind::Anon,
            va: Hex(0x7000),
            gpa: Some(Hex(0x1234000)),
            bytes: 4096,
        };
        assert_eq!(
            json(&Reply::new("alloc".into(), Ok(Body::Alloc { pages: vec![page] }))),
            r#"{"reply":"alloc","ok":true,"pages":[{"page":0,"kind":"anon","va":"0x7000","gpa":"0x1234000","bytes":4096}]}"#
        );
    }

    #[test]
    fn pages_of_a_process_have_their_shape() {
        let page = ProcessPage { gpa: Hex(0x5000), va: Hex(0x7f00_1000), area: "[heap]".into() };
        let body = Body::Process { pid: 7, comm: "sh".into(), pages: vec![page] };
        assert_eq!(
            json(&Reply::new("process".into(), Ok(body))),
            r#"{"reply":"process","ok":true,"pid":7,"comm":"sh","pages":[{"gpa":"0x5000","va":"0x7f001000","area":"[heap]"}]}"#
        );
    }

    #[test]
    fn events_have_their_shape() {
        let sigbus = Sigbus { code: Code::Name("AO"), addr: Hex(0x1000), lsb: Some(12) };
        assert_eq!(
            json(&Event::Sigbus { sigbus, page: Some(0) }),
            r#"{"event":"sigbus","code":"AO","addr":"0x1000","lsb":12,"page":0}"#
        );
        let kmsg = Event::Kmsg { seq: 4, time: 1.5, level: 6, line: "a \"b\"".into() };
        assert_eq!(
            json(&kmsg),
            r#"{"event":"kmsg","seq":4,"time":1.5,"level":6,"line":"a \"b\""}"#
        );
        assert_eq!(json(&Event::KmsgLost {}), r#"{"event":"kmsg-lost"}"#);
    }
}
