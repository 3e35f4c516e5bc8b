//! A host that lacks something.

use std::process::{Command, Output, Stdio};

use mce_relay_tests::guest::{binary, image, mce_relay};

use crate::refused;
use crate::values::Vm;

/// `mce-relay run`, started by `wrapper`.
fn run_by(wrapper: &[&str]) -> Output {
    Command::new(wrapper[0])
        .args(&wrapper[1..])
        .arg(binary())
        .args(["run", "--serial", "off", "--kernel"])
        .arg(image("vmlinux"))
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

pub fn no_dev_kvm() {
    // A mount namespace of its own, in which /dev is empty.
    let hide = "mount -t tmpfs none /dev && exec \"$@\"";
    let out = run_by(&["unshare", "--mount", "sh", "-c", hide, "sh"]);
    refused(&out, 1, &["/dev/kvm", "modprobe"]);
}

pub fn no_permission_for_dev_kvm() {
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    refused(&run_by(&nobody), 1, &["/dev/kvm", "group"]);
}

pub fn check_without_memory_failure() {
    let out = mce_relay(&["check"]);
    let stdout = String::from_utf8_lossy(&out.stdout);
    assert_eq!(out.status.code(), Some(1), "{stdout}");
    let line = stdout.lines().find(|line| line.contains("memory failure handling")).unwrap();
    assert!(line.contains("NEEDED") && line.contains("CONFIG_MEMORY_FAILURE"), "{line}");
}

pub fn poison_without_memory_failure() {
    let vm = Vm::start();
    for via in ["hwpoison-inject", "madvise"] {
        let args = ["poison", "--api-socket", &vm.api, "--gpa", "16M", "--via", via];
        refused(&mce_relay(&args), 1, &["CONFIG_MEMORY_FAILURE", "make lab"]);
    }
}
