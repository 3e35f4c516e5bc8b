//! A program without a guest (relay/examples/cache.rs): a page of its own goes bad, and it loses one entry
//! instead of its life.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use mce_relay_tests::guest::binary;
use mce_relay_tests::lab;
use mce_relay_vmm::host;

struct Cache {
    child: Child,
    ask: ChildStdin,
    lines: Receiver<String>,
}

impl Cache {
    fn start() -> Self {
        let program = binary().with_file_name("examples").join("cache");
        let mut child = Command::new(&program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let (send, lines) = channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                println!("    cache | {line}");
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        let ask = child.stdin.take().unwrap();
        let mut cache = Self { child, ask, lines };
        cache.wait_for("ready");
        cache
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

    /// Poisons the page that holds `key`, by the injector.
    fn poison(&mut self, key: &str) {
        let line = self.ask(&format!("where {key}"), &format!("{key} at "));
        let address = line.rsplit_once("0x").unwrap().1;
        let address = u64::from_str_radix(address, 16).unwrap();
        let pfn = lab::host_physical(self.child.id(), address) >> 12;
        std::fs::write(host::CORRUPT_PFN, format!("{pfn:#x}")).unwrap();
        assert!(host::is_poisoned(pfn).unwrap());
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn a_cache_loses_one_entry() {
    let mut cache = Cache::start();
    for key in ["a", "b", "c", "d"] {
        cache.ask(&format!("put {key} the value of {key}"), &format!("put {key}"));
    }
    cache.poison("b");
    let lost = cache.wait_for("lost b");
    assert!(lost.contains("4096 bytes"), "{lost}");
    cache.ask("get b", "b is not there");
    cache.ask("list", "3 entries: a c d");
    // And once more in the same place, which is whole again by then.
    cache.ask("put b again", "put b");
    assert_eq!(cache.ask("get b", "b = "), "b = again");
    for key in ["a", "c", "d"] {
        cache.poison(key);
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
