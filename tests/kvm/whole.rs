//! A whole `mce-relay run` in this process, with a kernel of a few instructions: what the command
//! does with its guest, without a guest that has to boot.

use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use clap::Parser;
use mce_relay_vmm::api::{Status, VmInfo};
use mce_relay_vmm::cli::{Cli, Command};
use mce_relay_vmm::{client, run};
use serde_json::Value;
use tempfile::TempDir;

/// mov dx, 0x600; mov al, S5 and SLP_EN; out dx, al; hlt.
pub const POWER_OFF: [u8; 8] = [0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4];

const PATIENCE: Duration = Duration::from_secs(30);

/// An ELF file with a PVH note and one segment at 1 MiB, where `code` begins in 32-bit mode.
fn elf(code: &[u8]) -> Vec<u8> {
    const ENTRY: u32 = 0x10_0000;
    const HEADERS: u64 = 64 + 2 * 56;
    let mut note = Vec::new();
    // Lengths of name and value, and XEN_ELFNOTE_PHYS32_ENTRY.
    [4_u32, 4, 18].iter().for_each(|word| note.extend(word.to_le_bytes()));
    note.extend(b"Xen\0");
    note.extend(ENTRY.to_le_bytes());
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // Type EXEC, machine x86-64, version, entry, program headers, no sections, flags, sizes.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    [u64::from(ENTRY), 64, 0].iter().for_each(|word| file.extend(word.to_le_bytes()));
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    let mut header = |kind: u32, offset: u64, address: u64, len: u64| {
        file.extend(kind.to_le_bytes());
        file.extend([5, 0, 0, 0]);
        for word in [offset, address, address, len, len, 4] {
            file.extend(word.to_le_bytes());
        }
    };
    header(4, HEADERS, 0, note.len() as u64);
    header(1, HEADERS + note.len() as u64, u64::from(ENTRY), code.len() as u64);
    file.extend(note);
    file.extend(code);
    file
}

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
        let common = ["mce-relay", "run", "--kernel", &kernel, "--memory", "32M"];
        let files = ["--serial", &serial, "--api-socket", &api, "--event-monitor", &events];
        let line = common.iter().chain(&files).chain(options);
        let Command::Run(args) = Cli::parse_from(line).command else { unreachable!() };
        let thread = std::thread::spawn(move || run::run(&args).unwrap());
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
            let info = client::get::<VmInfo>(&self.socket(), "vm.info");
            match info {
                Ok(info) if wanted(&info) => return info,
                info => assert!(start.elapsed() < PATIENCE, "{info:?}\n{:#?}", self.events()),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// `relay.status`.
    pub fn status(&self) -> Status {
        client::get(&self.socket(), "relay.status").unwrap()
    }

    /// `PUT /api/v1/<what>`.
    pub fn put(&self, what: &str) {
        client::put(&self.socket(), what).unwrap();
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
