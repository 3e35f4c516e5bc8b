//! The component in other programs than ours: one without a guest (relay/examples/cache.rs) loses one entry
//! instead of its life when a page of its own goes bad, and the guest of another VMM (relay/examples/embed.rs)
//! goes on with the next page.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use mce_relay_cli::poison::host::hwpoison_inject;
use mce_relay_tests::guest::binary;
use mce_relay_tests::lab;
use mce_relay_vmm::host::page_frames;

/// One of the component's examples.
struct Program {
    child: Child,
    ask: ChildStdin,
    lines: Receiver<String>,
}

impl Program {
    fn start(name: &'static str, args: &[&str]) -> Self {
        let program = binary().with_file_name("examples").join(name);
        let mut child = Command::new(&program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let (send, lines) = channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                println!("    {name} | {line}");
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        let ask = child.stdin.take().unwrap();
        Self { child, ask, lines }
    }

    fn wait_for(&mut self, start: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(Duration::from_secs(20));
            let line = line.unwrap_or_else(|error| panic!("no line {start:?}: {error}"));
            if line.starts_with(start) {
                return line;
            }
        }
    }

    fn ask(&mut self, words: &str, answer: &str) -> String {
        writeln!(self.ask, "{words}").unwrap();
        self.wait_for(answer)
    }

    /// Poisons the page that holds `key` of the cache's.
    fn poison_entry(&mut self, key: &str) {
        let line = self.ask(&format!("where {key}"), &format!("{key} at "));
        self.poison(address(&line));
    }

    /// Poisons the page at `address`, by the injector.
    fn poison(&self, address: u64) {
        let pfn = lab::host_physical(self.child.id(), address) >> 12;
        std::fs::write(hwpoison_inject::CORRUPT_PFN, format!("{pfn:#x}")).unwrap();
        assert!(page_frames::is_poisoned(pfn).unwrap());
    }
}

/// The address at the end of `line`.
fn address(line: &str) -> u64 {
    u64::from_str_radix(line.rsplit_once("0x").unwrap().1, 16).unwrap()
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The kernel signals a thread that has SIGBUS blocked and waits for a descriptor.
pub fn a_relay_in_an_event_loop() {
    let mut program = Program::start("event_loop", &[]);
    let line = program.wait_for("ready");
    program.poison(address(&line));
    // Its first look at the page tables may find the page before the signal is taken.
    program.wait_for("caught: SIGBUS BUS_MCEERR_AO");
    // The loop has gone on.
    program.ask("", "bad pages: 1");
}

pub fn a_cache_loses_one_entry() {
    let mut cache = Program::start("cache", &[]);
    cache.wait_for("ready");
    for key in ["a", "b", "c", "d"] {
        cache.ask(&format!("put {key} the value of {key}"), &format!("put {key}"));
    }
    cache.poison_entry("b");
    let lost = cache.wait_for("lost b");
    assert!(lost.contains("4096 bytes"), "{lost}");
    cache.ask("get b", "b is not there");
    cache.ask("list", "3 entries: a c d");
    // And once more in the same place, which is whole again by then.
    cache.ask("put b again", "put b");
    assert_eq!(cache.ask("get b", "b = "), "b = again");
    for key in ["a", "c", "d"] {
        cache.poison_entry(key);
    }
    // Read at once: an error, or gone already, and never the end of the process.
    for key in ["a", "c", "d"] {
        cache.ask(&format!("get {key}"), &format!("{key} is not there"));
    }
    let start = std::time::Instant::now();
    loop {
        let line = cache.ask("list", "");
        if line == "1 entries: b" {
            break;
        }
        assert!(start.elapsed().as_secs() < 20, "{line}");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(cache.ask("get b", "b = "), "b = again");
    writeln!(cache.ask, "quit").unwrap();
    assert_eq!(cache.child.wait().unwrap().code(), Some(0));
}

/// An AO and an AR, or two ARs, of real pages under a guest that nothing of our VMM has to do with.
pub fn the_guest_of_another_vmm_lives() {
    for (late, first) in [(false, 0xd000), (true, 0x8000)] {
        let args: &[&str] = if late { &["--outside", "--late"] } else { &["--outside"] };
        let mut vmm = Program::start("embed", args);
        let ram = address(&vmm.wait_for("ready"));
        // Early, nobody touches the first page; the guest loads from the other one by then.
        for page in [first, 0x9000] {
            vmm.poison(ram + page);
            vmm.wait_for(&format!("guest: machine check for {page:#x}"));
        }
        vmm.wait_for("the guest lives");
        assert_eq!(vmm.child.wait().unwrap().code(), Some(0));
    }
}
