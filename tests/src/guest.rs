//! A guest under `mce-relay run`, started and watched as a user would.

use std::cell::RefCell;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::agent::{Agent, PATIENCE, Page, hex};

/// The guest kernel's command line. A slow console makes a machine check slow, so it says little.
/// noxsave: the emulated host lets guests change XCR0 without KVM noticing.
const CMDLINE: &str = "console=ttyS0,115200 loglevel=4 panic=-1 noxsave";

/// What to boot.
#[derive(Debug, Clone)]
pub struct Options {
    /// `--cpu-vendor`.
    pub vendor: &'static str,
    /// `--cpus`.
    pub cpus: usize,
    /// `--lmce`.
    pub lmce: &'static str,
    /// `--memory`.
    pub memory: &'static str,
    /// `--mce-kill`.
    pub kill: &'static str,
    /// Pass the guest's kernel log and the relay's account on, for people to watch.
    pub echo: bool,
}

impl Options {
    /// An AMD guest.
    pub fn amd(cpus: usize) -> Self {
        Self { vendor: "amd", cpus, lmce: "on", memory: "size=256M", kill: "early", echo: false }
    }

    /// An Intel-style guest that has every vCPU called for each error, or, with `lmce`, one.
    pub fn intel(cpus: usize, lmce: bool) -> Self {
        Self { vendor: "intel", lmce: if lmce { "on" } else { "off" }, ..Self::amd(cpus) }
    }

    /// The same, with errors taken only when the guest touches them.
    pub fn late(self) -> Self {
        Self { kill: "late", ..self }
    }
}

/// The `mce-relay` binary, next to the test that runs (or MCE_RELAY_BIN).
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("MCE_RELAY_BIN") {
        return path.into();
    }
    let me = std::env::current_exe().unwrap();
    let near = me.ancestors().skip(1).map(|dir| dir.join("mce-relay"));
    near.take(3).find(|path| path.is_file()).expect("target/release/mce-relay; run `make build`")
}

/// A file of the guest image.
pub fn image(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest-image").join(name)
}

/// Runs `mce-relay` with `args` to its end.
pub fn mce_relay(args: &[&str]) -> Output {
    Command::new(binary()).args(args).stdin(Stdio::null()).output().unwrap()
}

/// A running guest. Dropping it kills it, and prints what is known if a test is failing.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    dir: TempDir,
    /// The host's page frames that were poisoned for it, `0x…`.
    poisoned: RefCell<Vec<String>>,
    /// The agent in it.
    pub agent: Agent,
}

impl Guest {
    /// Boots a guest and waits for its agent.
    pub fn boot(options: &Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let argument = |form: &str, name: &str| format!("{form}={}", at(name).display());
        let log = std::fs::File::create(at("log")).unwrap();
        let mut child = Command::new(binary())
            .arg("-v")
            .arg("run")
            .args(["--kernel".as_ref(), image("vmlinux").as_os_str()])
            .args(["--initramfs".as_ref(), image("initramfs.cpio").as_os_str()])
            .args(["--cmdline", CMDLINE])
            .args(["--cpus", &options.cpus.to_string(), "--memory", options.memory])
            .args(["--cpu-vendor", options.vendor, "--lmce", options.lmce])
            .args(["--mce-kill", options.kill, "--no-reboot"])
            .args(["--serial", &argument("file", "console")])
            .args(["--serial2", &argument("socket", "agent")])
            .args(["--api-socket", &argument("path", "api")])
            .args(["--event-monitor", &argument("path", "events")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(if options.echo { Stdio::piped() } else { log.into() })
            .spawn()
            .unwrap();
        if let Some(stderr) = child.stderr.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    println!("  relay | {line}");
                }
            });
        }
        match Agent::connect(&at("agent"), options.echo) {
            Ok(agent) => Self { child, dir, poisoned: RefCell::default(), agent },
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                tell(&dir);
                panic!("the guest did not come up: {error}");
            }
        }
    }

    /// The VMM's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Runs `mce-relay <command> --api-socket … args`.
    pub fn command(&self, command: &str, args: &[&str]) -> Output {
        let socket = format!("path={}", self.dir.path().join("api").display());
        let mut all = vec![command, "--api-socket", &socket];
        all.extend(args);
        mce_relay(&all)
    }

    /// Poisons the host's page behind `gpa`; the command's account of it.
    pub fn poison(&self, gpa: u64, via: &str) -> Value {
        let out = self.command("poison", &["--gpa", &format!("{gpa:#x}"), "--via", via, "--json"]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let done: Value = serde_json::from_slice(&out.stdout).unwrap();
        self.poisoned.borrow_mut().push(done["pfn"].as_str().unwrap().to_owned());
        done
    }

    /// What `mce-relay status --json` says.
    pub fn status(&self) -> Value {
        let out = self.command("status", &["--json"]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout).unwrap()
    }

    /// The ledger's entry for `page`.
    pub fn ledger(&self, page: Page) -> Option<Value> {
        let status = self.status();
        status["pages"].as_array()?.iter().find(|entry| hex(&entry["gpa"]) == page.gpa).cloned()
    }

    /// The VMM's events so far.
    pub fn events(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.dir.path().join("events")).unwrap();
        // The last line may be half written.
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits for the event `name` about `page`; its properties.
    pub fn event(&self, name: &str, page: Page) -> Value {
        let start = Instant::now();
        loop {
            let found = self.events().into_iter().find(|event| {
                let properties = &event["properties"];
                event["event"] == name
                    && properties.get("gpa").is_some_and(|gpa| hex(gpa) == page.gpa)
            });
            match found {
                Some(event) => return event["properties"].clone(),
                None if start.elapsed() > PATIENCE => {
                    panic!("no event {name:?} for {:#x}: {:#?}", page.gpa, self.events())
                }
                None => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Asks the guest to power off, and sees that the VMM ends well.
    pub fn power_off(mut self) {
        self.agent.ask("poweroff");
        let start = Instant::now();
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if start.elapsed() > PATIENCE => panic!("the guest does not power off"),
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        assert_eq!(status.code(), Some(0), "the VMM's exit status after power-off");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::env::var("MCE_RELAY_NATIVE").is_ok_and(|value| value == "1") {
            for pfn in self.poisoned.borrow().iter() {
                give_back(pfn);
            }
        }
        if std::thread::panicking() {
            tell(&self.dir);
        }
    }
}

/// Has this host take a page frame back into use, now that nobody has it mapped any more.
fn give_back(pfn: &str) {
    let out = mce_relay(&["unpoison", "--pfn", pfn]);
    if out.status.success() {
        println!("== Host pfn {pfn} is back in use.");
    } else {
        let why = String::from_utf8_lossy(&out.stderr);
        println!("== Host pfn {pfn} stays out of use: {}", why.trim_end());
    }
}

/// Prints the end of everything a guest and its VMM have left.
fn tell(dir: &TempDir) {
    for name in ["log", "console", "events"] {
        let text = std::fs::read(dir.path().join(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        println!("--- {name} (last lines)");
        for line in &lines[lines.len().saturating_sub(40)..] {
            println!("{line}");
        }
    }
}
