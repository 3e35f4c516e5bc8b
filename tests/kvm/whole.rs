//! A whole `mce-relay run` in this process, with a kernel of a few instructions: what the command
//! does with its guest, without a guest that has to boot.

use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use clap::Parser;
use mce_relay_cli::args::commands::{Cli, Command};
use mce_relay_cli::client::requests;
use mce_relay_tests::tiny::elf;
use mce_relay_vmm::api::types::vm::{Status, VmInfo};
use mce_relay_vmm::session::run;
use serde_json::Value;
use tempfile::TempDir;

pub use mce_relay_tests::tiny::POWER_OFF;

const PATIENCE: Duration = Duration::from_secs(30);

/// A `mce-relay run` on a thread of its own.
pub struct Vmm {
    dir: TempDir,
    thread: JoinHandle<u8>,
}

impl Vmm {
    /// Runs `code` with `options` in addition to those that every test needs.
    pub fn start(code: &[u8], options: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        std::fs::write(at("kernel"), elf(code)).unwrap();
        let serial = format!("file={}", at("serial"));
        let (kernel, api, events) = (at("kernel"), at("api"), at("events"));
        // A page of a memfd stays in the page cache while userfaultfd marks it: a guest that touches it in
        // between finds it, where anonymous memory would be an error of KVM.
        let memory = "size=32M,shared=on";
        let common = ["mce-relay", "run", "--kernel", &kernel, "--memory", memory];
        let files = ["--serial", &serial, "--api-socket", &api, "--event-monitor", &events];
        let line = common.iter().chain(&files).chain(options);
        let Command::Run(args) = Cli::parse_from(line).command else { unreachable!() };
        let thread = std::thread::spawn(move || run::run(&args.config()).unwrap());
        Self { dir, thread }
    }

    /// Its API socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("api")
    }

    /// What runs, as soon as something does that `wanted` accepts.
    pub fn info(&self, wanted: impl Fn(&VmInfo) -> bool) -> VmInfo {
        let start = Instant::now();
        loop {
            let info = requests::get::<VmInfo>(&self.socket(), "vm.info");
            match info {
                Ok(info) if wanted(&info) => return info,
                info => assert!(start.elapsed() < PATIENCE, "{info:?}\n{:#?}", self.events()),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// `relay.status`.
    pub fn status(&self) -> Status {
        requests::get(&self.socket(), "relay.status").unwrap()
    }

    /// `PUT /api/v1/<what>`.
    pub fn put(&self, what: &str) {
        requests::put(&self.socket(), what).unwrap();
    }

    /// The events so far, without a last one that is half written.
    pub fn events(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.dir.path().join("events")).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// What the guest wrote to its first serial port; complete after the end.
    pub fn serial(&self) -> Vec<u8> {
        std::fs::read(self.dir.path().join("serial")).unwrap()
    }

    /// Waits for the end, and sees that it comes with `status`.
    pub fn ends_with(&mut self, status: u8) {
        let start = Instant::now();
        while !self.thread.is_finished() {
            assert!(start.elapsed() < PATIENCE, "it does not end: {:#?}", self.events());
            std::thread::sleep(Duration::from_millis(5));
        }
        let thread = std::mem::replace(&mut self.thread, std::thread::spawn(|| 0));
        assert_eq!(thread.join().unwrap(), status, "{:#?}", self.events());
    }
}
