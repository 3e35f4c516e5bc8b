//! Each kind of page that mce-test's hwpoison suite walks: a process in the guest sees of its bad
//! page what it would see on bare metal. Bare metal is the lab's own host, where the same agent
//! runs as a process; there the kernel is told of a page by hwpoison-inject, without a relay.
//!
//! The agent's files lie in a tmpfs, which has no disk behind it: there "clean" means that nobody has written
//! to the page through its mapping, and the kernel drops no such page as if it could be read again.
//!
//! The two kernels need not be of one version. MCE_RELAY_GUEST_IMAGE boots another guest, to tell
//! what is the relay's doing from what is a kernel's.

use std::collections::VecDeque;
use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use mce_relay_cli::poison::host;
use mce_relay_cli::poison::host::hwpoison_inject::Injector;
use mce_relay_tests::agent::{PATIENCE, hex};
use mce_relay_tests::guest::{Guest, Options};
use mce_relay_vmm::host::page_frames;
use serde_json::Value;

const KINDS: &[&str] = &["anon", "mlocked", "file-clean", "file-dirty", "shared", "thp", "hugetlb"];

/// The guest's agent: static, so it runs anywhere. guest-image/build.sh puts it there.
const AGENT: &str = "../target/agent/x86_64-unknown-linux-gnu/release/agent";

const PAGE_SIZE: u64 = 4096;
/// Where in a huge page the bad 4 KiB are: not at its start, so that the two are told apart.
const INSIDE_HUGE: u64 = 0x5000;
/// Where in the bad 4 KiB they are touched, for the same reason.
const WORD: u64 = 0x88;
/// How long a signal may be under way after the host has marked the page. The kernel sends it
/// before the injector's write returns.
const UNDER_WAY: Duration = Duration::from_millis(200);

/// One way for a page of a process to go bad.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    /// The process has asked to be told at once (PR_MCE_KILL_EARLY).
    early: bool,
    /// How it touches the page afterwards, if it does.
    touch: Option<&'static str>,
}

/// The kernel knows of the page before anybody touches it.
const ANNOUNCED: &[Case] = &[
    Case { name: "early, AO", early: true, touch: None },
    Case { name: "late, AO", early: false, touch: None },
    Case { name: "late, read", early: false, touch: Some("read") },
    Case { name: "late, kernel-copy", early: false, touch: Some("kernel-copy") },
    // Told at once, and touches it all the same.
    Case { name: "early, read", early: true, touch: Some("read") },
];

/// The guest's kernel knows nothing: the touch is a machine check.
const UNANNOUNCED: &[Case] = &[
    Case { name: "unannounced read", early: false, touch: Some("read") },
    Case { name: "unannounced write", early: false, touch: Some("write") },
    // Who touches it first is told by that, whatever its policy.
    Case { name: "unannounced early", early: true, touch: Some("read") },
];

/// Where guest and bare metal may differ, and why: a kind or `any`, the name of a case, the reason.
/// The name alone stands for all that the process sees but the address that the signal names; that
/// is `name: address`. docs/outcomes.md has the same for people.
const DIFFERENCES: &[(&str, &str, &str)] = &[
    // mm/memory-failure.c: kill_proc names the page of the process that holds the bad frame
    // (collect_procs), which is what a machine check comes to on any machine. mm/memory.c: a fault
    // on an entry that says hwpoison names the address that faulted.
    ("any", "unannounced read: address", FAULT),
    ("any", "unannounced write: address", FAULT),
    ("any", "unannounced early: address", FAULT),
    ("hugetlb", "early, AO: address", HUGETLB),
    ("hugetlb", "early, read: address", HUGETLB),
];

/// Why the AO of a hugetlb page names another address.
const HUGETLB: &str = "for hugetlb Linux 6.1 (the guest) names the start of the huge page, 6.12 (the lab) the \
                       bad 4 KiB in it";

/// Why the touch of a page that nobody has announced names another address.
const FAULT: &str = "a machine check names the page; bare metal has none here, and its stand-in, a \
                     fault on an entry that is marked, names the word";

/// The lab's host or the guest, each with an agent.
trait Machine {
    fn name(&self) -> &'static str;
    /// Sends one request and waits for its reply; events that come first are kept.
    fn ask(&mut self, request: &str) -> Value;
    /// The oldest AO that was not taken yet; the caller knows that there is one.
    fn ao(&mut self) -> Value;
    /// Makes the page at a physical address of this machine bad.
    fn corrupt(&mut self, address: u64);
    /// Waits until this machine's kernel, which is told of that page, has done all it does.
    fn dealt_with(&mut self, address: u64);
}

impl Machine for Guest {
    fn name(&self) -> &'static str {
        "guest"
    }

    fn ask(&mut self, request: &str) -> Value {
        self.agent.ask(request)
    }

    fn ao(&mut self) -> Value {
        let found = self.agent.event(|event| event["event"] == "sigbus");
        found.unwrap_or_else(|error| panic!("no SIGBUS: {error}"))
    }

    fn corrupt(&mut self, address: u64) {
        self.poison(address, "hwpoison-inject");
    }

    fn dealt_with(&mut self, address: u64) {
        // Its last line about a page: "Sending SIGBUS" comes before the signal, this one after it.
        let start = format!("Memory failure: {:#x}: recovery action", address >> 12);
        let found = self.agent.event(|event| {
            event["event"] == "kmsg"
                && event["line"].as_str().is_some_and(|line| line.contains(&start))
        });
        found.unwrap_or_else(|error| panic!("no line {start:?}: {error}"));
    }
}

/// The agent as a process of this host.
struct BareMetal {
    agent: Child,
    requests: ChildStdin,
    lines: Receiver<String>,
    events: VecDeque<Value>,
    injector: Injector,
    /// Page frames that were poisoned.
    poisoned: Vec<u64>,
}

impl BareMetal {
    fn start() -> Self {
        let injector = Injector::open().unwrap();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(AGENT);
        let mut agent = Command::new(&path)
            .args(["-", "log=off"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let requests = agent.stdin.take().unwrap();
        let out = BufReader::new(agent.stdout.take().unwrap());
        // A pipe has no timeout; a channel has.
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let (events, poisoned) = (VecDeque::new(), Vec::new());
        Self { agent, requests, lines, events, injector, poisoned }
    }

    /// The next line that says something.
    fn line(&mut self) -> Value {
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                // The agent's last words begin with an empty one.
                Ok(line) if line.is_empty() => {}
                Ok(line) => {
                    let value: Value = serde_json::from_str(&line)
                        .unwrap_or_else(|error| panic!("{error}: {line:?}"));
                    if value["event"] == "error" {
                        println!("    bare metal: {line}");
                    }
                    return value;
                }
                Err(error) => panic!("no line of the agent on this host: {error}"),
            }
        }
    }
}

impl Machine for BareMetal {
    fn name(&self) -> &'static str {
        "bare metal"
    }

    fn ask(&mut self, request: &str) -> Value {
        writeln!(self.requests, "{request}").unwrap();
        loop {
            let value = self.line();
            if value.get("reply").is_some() {
                assert_eq!(value["ok"], true, "{request}: {value}");
                return value;
            }
            self.events.push_back(value);
        }
    }

    fn ao(&mut self) -> Value {
        let is_sigbus = |event: &Value| event["event"] == "sigbus";
        match self.events.iter().position(is_sigbus) {
            Some(at) => self.events.remove(at).unwrap(),
            None => loop {
                let value = self.line();
                if is_sigbus(&value) {
                    break value;
                }
                self.events.push_back(value);
            },
        }
    }

    fn corrupt(&mut self, address: u64) {
        let pfn = address >> 12;
        self.poisoned.push(pfn);
        // The kernel says so here when it could not isolate the page, too; what the process sees of
        // that is what counts.
        if let Err(error) = self.injector.corrupt(pfn) {
            println!("    bare metal: page frame {pfn:#x}: {error}");
        }
    }

    fn dealt_with(&mut self, address: u64) {
        let (pfn, start) = (address >> 12, Instant::now());
        while !page_frames::is_poisoned(pfn).unwrap() {
            assert!(start.elapsed() < PATIENCE, "page frame {pfn:#x} is not marked as poisoned");
            std::thread::sleep(Duration::from_millis(10));
        }
        std::thread::sleep(UNDER_WAY);
    }
}

impl Drop for BareMetal {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        // The lab is thrown away; a host of somebody's own is not.
        if std::env::var("MCE_RELAY_NATIVE").is_ok_and(|value| value == "1") {
            for pfn in &self.poisoned {
                if let Err(error) = host::unpoison::unpoison(*pfn) {
                    println!("== Host pfn {pfn:#x} stays out of use: {error}");
                }
            }
        }
    }
}

/// The page that goes bad.
struct Victim {
    number: u64,
    /// Where the process has it.
    va: u64,
    /// Its size.
    bytes: u64,
    /// Offset of the 4 KiB in it that go bad.
    bad: u64,
    /// Physical address of these, on their machine.
    address: u64,
}

impl Victim {
    fn alloc(machine: &mut dyn Machine, kind: &str) -> Self {
        let reply = machine.ask(&format!("alloc {kind} 1"));
        let page = &reply["pages"][0];
        let (number, bytes) = (page["page"].as_u64().unwrap(), page["bytes"].as_u64().unwrap());
        let bad = if bytes > PAGE_SIZE { INSIDE_HUGE } else { 0 };
        let now = machine.ask(&format!("gpa {number} {bad}"));
        assert_eq!(now["state"], "present", "{kind}: {now}");
        Self { number, va: hex(&page["va"]), bytes, bad, address: hex(&now["gpa"]) }
    }

    /// What an address in a signal names.
    fn named(&self, address: u64) -> &'static str {
        let start = self.va + self.bad;
        match address {
            _ if address == start => "its 4 KiB",
            _ if address == start + WORD => "the word",
            _ if (start..start + PAGE_SIZE).contains(&address) => "inside its 4 KiB",
            _ if address == self.va => "the huge page",
            _ if (self.va..self.va + self.bytes).contains(&address) => "elsewhere in the huge page",
            _ => "elsewhere",
        }
    }
}

/// What a process saw.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    /// What it was told, what its touch met, and what its page table holds now.
    what: String,
    /// What the addresses in its signals name.
    address: String,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address.as_str() {
            "" => f.write_str(&self.what),
            address => write!(f, "{} (names {address})", self.what),
        }
    }
}

fn signal(sigbus: &Value) -> String {
    let code = &sigbus["code"];
    let code = code.as_str().map_or_else(|| format!("SIGBUS {code}"), str::to_owned);
    match sigbus.get("lsb") {
        Some(lsb) => format!("{code} lsb {lsb}"),
        None => code,
    }
}

/// How many AOs the process has been sent so far. It takes a signal before it answers, so none of
/// them is under way when the kernel has sent it before.
fn aos(machine: &mut dyn Machine) -> u64 {
    machine.ask("sigbus")["ao"].as_u64().unwrap()
}

/// Has a new page go bad as `case` says. With `announced`, its machine's kernel is told at once.
fn outcome(machine: &mut dyn Machine, kind: &str, case: &Case, announced: bool) -> Outcome {
    machine.ask(if case.early { "early on" } else { "early off" });
    let victim = Victim::alloc(machine, kind);
    let number = victim.number;
    let before = aos(machine);
    machine.corrupt(victim.address);
    if announced {
        machine.dealt_with(victim.address);
    }
    let touched = case.touch.map(|how| {
        let offset = victim.bad + WORD;
        machine.ask(&format!("touch {number} {how} {offset}"))
    });

    let count = aos(machine) - before;
    let mut signals: Vec<Value> = (0..count).map(|_| machine.ao()).collect();
    let mut what: Vec<String> = signals.iter().map(signal).collect();
    if let Some(reply) = touched {
        let met = match reply["result"].as_str() {
            Some("ok") if reply["intact"] == false => "something else is there".to_owned(),
            Some("errno") => reply["errno"].as_str().unwrap().to_owned(),
            Some("sigbus") => signal(&reply["sigbus"]),
            Some(result) => result.to_owned(),
            None => panic!("{kind}: {reply}"),
        };
        what.push(met);
        signals.extend(reply.get("sigbus").cloned());
    }
    if what.is_empty() {
        what.push("no signal".to_owned());
    }
    let mut state = |offset: u64| {
        let reply = machine.ask(&format!("gpa {number} {offset}"));
        reply["state"].as_str().unwrap().to_owned()
    };
    what.push(state(victim.bad));
    if victim.bytes > PAGE_SIZE {
        // The rest of the huge page is lost with it or is not.
        what.push(format!("rest {}", state(0)));
    }
    machine.ask(&format!("free {number}"));
    let named: Vec<&str> = signals.iter().map(|s| victim.named(hex(&s["addr"]))).collect();
    Outcome { what: what.join(", "), address: named.join(", ") }
}

/// What stat(1) calls the file system at `path`.
fn file_system(path: &str) -> String {
    let out = Command::new("stat").args(["--file-system", "--format=%T", path]).output().unwrap();
    assert!(out.status.success(), "{path}: {}", String::from_utf8_lossy(&out.stderr));
    format!("a {}", String::from_utf8_lossy(&out.stdout).trim())
}

/// All kinds, each with all cases.
fn walk(machine: &mut dyn Machine, cases: &[Case], announced: bool) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for kind in KINDS {
        for case in cases {
            let outcome = outcome(machine, kind, case, announced);
            println!("    {}: {kind}: {}: {outcome}", machine.name(), case.name);
            outcomes.push(outcome);
        }
    }
    outcomes
}

/// Prints what was seen, and sees that the two differ only where [`DIFFERENCES`] says so.
fn compare(cases: &[Case], bare_metal: &[Outcome], guest: &[Outcome]) {
    let names = KINDS.iter().flat_map(|kind| cases.iter().map(move |case| (*kind, case.name)));
    let width = bare_metal.iter().map(|outcome| outcome.to_string().len()).max().unwrap_or(0);
    let line = |mark: &str, kind: &str, case: &str, bare_metal: &str, guest: &str| {
        format!("  {mark:1} {kind:10}  {case:17}  {bare_metal:width$}  {guest}")
    };
    let mut table = vec![line("", "kind", "case", "bare metal", "guest")];
    let mut occurred = vec![false; DIFFERENCES.len()];
    let mut unlisted = Vec::new();
    for ((kind, case), (bare_metal, guest)) in names.zip(bare_metal.iter().zip(guest)) {
        let mut different = Vec::new();
        if bare_metal.what != guest.what {
            different.push(case.to_owned());
        }
        if bare_metal.address != guest.address {
            different.push(format!("{case}: address"));
        }
        let mark = if different.is_empty() { "" } else { "*" };
        table.push(line(mark, kind, case, &bare_metal.to_string(), &guest.to_string()));
        for name in different {
            let mut listed = DIFFERENCES.iter();
            match listed.position(|(of, at, _)| [kind, "any"].contains(of) && *at == name) {
                Some(at) => occurred[at] = true,
                None => unlisted.push(format!("{kind}: {name}")),
            }
        }
    }
    let table = table.join("\n");
    println!("{table}");
    for ((kind, name, why), occurred) in DIFFERENCES.iter().zip(occurred) {
        let case = name.strip_suffix(": address").unwrap_or(name);
        if occurred {
            println!("    differs: {kind}: {name}: {why}");
        } else if cases.iter().any(|other| other.name == case) {
            println!("    note: {kind}: {name}: is listed as different and is the same");
        }
    }
    assert!(
        unlisted.is_empty(),
        "guest and bare metal differ, and it is not listed why:\n{}\n{table}",
        unlisted.join("\n")
    );
}

/// On bare metal the kernel is told of each page in any case: hwpoison-inject has no other way. So where it is
/// not to be told the process there does not ask for early kill: it would be sent an AO, which is no part of
/// it.
fn same_in(options: &Options, cases: &[Case], announced: bool) {
    println!(
        "    file-clean and file-dirty are files in {} on this host, and in a tmpfs in the guest: \"clean\" is \
         what nobody has written to through its mapping, and there is no disk to read it from again",
        file_system("/tmp")
    );
    let mut host = BareMetal::start();
    let stand_in: Vec<Case> =
        cases.iter().map(|case| Case { early: case.early && announced, ..*case }).collect();
    let on_bare_metal = walk(&mut host, &stand_in, true);
    drop(host);

    let mut guest = Guest::boot(options);
    let log = guest.agent.ask("dmesg Linux version");
    let kernel = log["lines"][0].as_str().and_then(|line| line.split_whitespace().nth(2));
    let own = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let kernels = format!("{} on bare metal, {}", own.trim(), kernel.unwrap_or("?"));
    println!("    Linux {kernels} in the guest");
    let in_guest = walk(&mut guest, cases, announced);
    guest.power_off();

    compare(cases, &on_bare_metal, &in_guest);
}

/// The kernel is told of the page while nobody touches it, and tells the process or does not. LMCE,
/// as a guest with that is told of AOs at once.
pub fn as_on_bare_metal() {
    same_in(&Options::intel(2, true), ANNOUNCED, true);
}

/// The guest's process runs into a page that nobody has told its kernel of: a machine check.
/// Nearest to that on bare metal is a touch of a page that the kernel has taken away.
pub fn touched_as_on_bare_metal() {
    same_in(&Options::intel(2, true).late(), UNANNOUNCED, false);
}
