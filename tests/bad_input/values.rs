//! Values that cannot be meant.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mce_relay_tests::guest::{binary, image, mce_relay};

use crate::refused;

fn run(args: &[&str]) -> std::process::Output {
    let mut all = vec!["run", "--serial", "off"];
    all.extend(args);
    mce_relay(&all)
}

fn kernel() -> String {
    image("vmlinux").display().to_string()
}

pub fn memory_of_zero() {
    refused(&run(&["--kernel", &kernel(), "--memory", "size=0"]), 1, &["0 bytes"]);
}

pub fn more_memory_than_there_is() {
    let out = run(&["--kernel", &kernel(), "--memory", "size=512T"]);
    refused(&out, 1, &[&(512u64 << 40).to_string(), "this host has"]);
}

pub fn memory_that_is_not_a_size() {
    refused(&run(&["--kernel", "x", "--memory", "size=lots"]), 2, &["lots", "512M"]);
}

pub fn a_kernel_that_is_not_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notes.txt");
    std::fs::write(&path, "not a kernel\n".repeat(1000)).unwrap();
    let path = path.display().to_string();
    refused(&run(&["--kernel", &path]), 1, &[&path, "vmlinux", "bzImage"]);
}

pub fn a_kernel_that_is_not_there() {
    refused(&run(&["--kernel", "/nowhere/vmlinux"]), 1, &["/nowhere/vmlinux"]);
}

pub fn an_initramfs_that_is_not_there() {
    let out = run(&["--kernel", &kernel(), "--initramfs", "/nowhere/initramfs"]);
    refused(&out, 1, &["/nowhere/initramfs"]);
}

pub fn no_vcpus() {
    refused(&run(&["--kernel", "x", "--cpus", "0"]), 2, &["\"0\"", "1 to 254"]);
}

pub fn a_serial_mode_that_is_none() {
    refused(&mce_relay(&["run", "--kernel", "x", "--serial", "pty"]), 2, &["pty", "socket=PATH"]);
}

pub fn an_api_socket_path_that_exists() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api");
    std::fs::write(&path, "somebody's").unwrap();
    let argument = format!("path={}", path.display());
    let out = run(&["--kernel", "x", "--api-socket", &argument]);
    refused(&out, 1, &[&path.display().to_string(), "remove it"]);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "somebody's", "left as it was");
}

pub fn an_event_monitor_that_cannot_be_written() {
    let out = run(&["--kernel", "x", "--event-monitor", "path=/nowhere/events"]);
    refused(&out, 1, &["/nowhere/events"]);
}

pub fn a_vm_that_is_not_there() {
    let out = mce_relay(&["status", "--api-socket", "/nowhere/api"]);
    refused(&out, 1, &["/nowhere/api", "--api-socket"]);
}

pub fn a_gpa_that_is_not_a_number() {
    let args = ["poison", "--api-socket", "/x", "--via", "madvise", "--gpa", "0xyz"];
    refused(&mce_relay(&args), 2, &["0xyz", "0x1000"]);
}

/// A VM that is only there to be asked.
pub struct Vm {
    pub child: Child,
    pub api: String,
    _dir: tempfile::TempDir,
}

impl Vm {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let api = format!("path={}", path.display());
        let child = Command::new(binary())
            .args(["run", "--serial", "off", "--memory", "size=128M"])
            .args(["--kernel", &kernel(), "--api-socket", &api])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while !mce_relay(&["status", "--api-socket", &api]).status.success() {
            assert!(start.elapsed() < Duration::from_secs(60), "the VM's API does not answer");
            std::thread::sleep(Duration::from_millis(50));
        }
        Self { child, api, _dir: dir }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn a_gpa_outside_ram() {
    let vm = Vm::start();
    for gpa in ["3G", "0x8000000", "0xffffffffffffffff"] {
        let args = ["poison", "--api-socket", &vm.api, "--via", "hwpoison-inject", "--gpa", gpa];
        refused(&mce_relay(&args), 1, &["is not guest RAM", "0x0 to 0x7ffffff"]);
    }
    assert!(mce_relay(&["status", "--api-socket", &vm.api]).status.success(), "the VM runs on");
}
