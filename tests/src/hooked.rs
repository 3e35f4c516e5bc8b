//! A `mce-relay run` with a guest of a few instructions and tests/faults/hook.rs in it: a VMM whose own
//! memory a test can reach.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use mce_relay_vmm::client;
use serde_json::Value;
use tempfile::TempDir;

use crate::guest::binary;
use crate::tiny::elf;

const PATIENCE: Duration = Duration::from_secs(30);

/// 1: jmp 1b: a guest that is there and does nothing.
pub const SPIN: [u8; 2] = [0xeb, 0xfe];

/// A library to preload, beside the program that runs: target/release/deps/ has the one, and
/// target/release/examples/ the other.
///
/// # Errors
/// It is not there; says how it is built.
pub fn library(name: &str) -> Result<PathBuf, String> {
    let me = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut near = me.ancestors().skip(1).take(3).map(|dir| dir.join("examples").join(name));
    near.find(|path| path.is_file()).ok_or_else(|| {
        format!(
            "needs target/release/examples/{name} \
             (cargo build --release --examples -p mce-relay-tests)"
        )
    })
}

/// Has `command`, a `mce-relay run`, run `code` with the hook in it, and leave what it leaves in `dir`.
pub fn prepare(command: &mut Command, dir: &Path, code: &[u8]) {
    let at = |name: &str| dir.join(name);
    std::fs::write(at("kernel"), elf(code)).unwrap();
    command
        .arg("--kernel")
        .arg(at("kernel"))
        .args(["--api-socket", &format!("path={}", at("api").display())])
        .args(["--event-monitor", &format!("path={}", at("events").display())])
        .stderr(std::fs::File::create(at("stderr")).unwrap())
        .env("MCE_RELAY_HOOK", dir)
        .env("LD_PRELOAD", library("libhook.so").unwrap());
}

/// The VMM. Dropping it kills it.
#[derive(Debug)]
pub struct Hooked {
    child: Child,
    dir: TempDir,
}

impl Hooked {
    /// Takes a VMM that was prepared with `dir`, and waits until it answers.
    pub fn of(child: Child, dir: TempDir) -> Self {
        let mut hooked = Self { child, dir };
        hooked.wait_for("an answer of the API", |hooked| {
            client::get::<Value>(&hooked.path("api"), "vm.info").is_ok()
        });
        hooked
    }

    /// Starts one that has no terminal.
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(binary());
        command.args(["run", "--serial", "off", "--memory", "32M"]);
        prepare(&mut command, dir.path(), &SPIN);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        Self::of(child, dir)
    }

    /// A path in its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `done`.
    fn wait_for(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            let ended = self.child.try_wait().unwrap();
            assert!(
                ended.is_none() && start.elapsed() < PATIENCE,
                "{what} did not come, exit status {ended:?}: {}",
                self.stderr()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn address(&self, file: &str) -> u64 {
        let text = std::fs::read_to_string(self.path(file)).unwrap();
        u64::from_str_radix(text.strip_prefix("0x").unwrap(), 16).unwrap()
    }

    /// Where its page is.
    pub fn page(&mut self) -> u64 {
        self.wait_for("the hook's page", |hooked| hooked.path("page").exists());
        self.address("page")
    }

    /// Where the file was that it touched after it had been cut short.
    pub fn cut(&self) -> u64 {
        self.address("cut")
    }

    /// Has the hook do something.
    pub fn order(&self, what: &str) {
        std::fs::write(self.path("new"), what).unwrap();
        std::fs::rename(self.path("new"), self.path("do")).unwrap();
    }

    /// Waits for an event of this name; its properties.
    pub fn event(&mut self, name: &str) -> Value {
        let find = |hooked: &Self| {
            let text = std::fs::read_to_string(hooked.path("events")).unwrap_or_default();
            let events = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            events.into_iter().find(|event| event["event"] == name)
        };
        self.wait_for(name, |hooked| find(hooked).is_some());
        find(self).unwrap()["properties"].clone()
    }

    /// `PUT /api/v1/<what>`.
    pub fn put(&self, what: &str) {
        client::put(&self.path("api"), what).unwrap();
    }

    /// Waits for its end; how it ended, and what it said.
    pub fn ended(&mut self) -> (ExitStatus, String) {
        let start = Instant::now();
        loop {
            match self.child.try_wait().unwrap() {
                Some(status) => return (status, self.stderr()),
                None => assert!(start.elapsed() < PATIENCE, "it lives: {}", self.stderr()),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn stderr(&self) -> String {
        let text = std::fs::read(self.path("stderr")).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl Drop for Hooked {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
