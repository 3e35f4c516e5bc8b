//! A host that lacks something.

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};

use mce_relay_tests::guest::{binary, image, mce_relay};
use serde_json::Value;

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
    // Where KVM is loaded a module is not what is missing.
    match std::fs::exists("/sys/class/misc/kvm/dev") {
        Ok(true) => refused(&out, 1, &["/dev/kvm", "--device", "mknod"]),
        _ => refused(&out, 1, &["/dev/kvm", "make lab"]),
    }
}

pub fn no_permission_for_dev_kvm() {
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    refused(&run_by(&nobody), 1, &["/dev/kvm", "permission"]);
}

/// The line of `check` for `name`, as a user without privileges sees it whose /dev/kvm `change` has changed.
fn line_of(change: &str, name: &str) -> Value {
    // In a mount namespace of its own, with a node of its own.
    let script = format!(
        "set -e; mount -t tmpfs -o mode=755 none \"$2\"; cd \"$2\"; mknod -m 660 kvm c 10 232; cp \"$1\" tool; \
         {change}; mount --bind kvm /dev/kvm; \
         exec setpriv --reuid=65534 --regid=65534 --clear-groups \"$2/tool\" check --json"
    );
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let out = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script, "sh"])
        .arg(binary())
        .arg(dir.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&out.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&out.stderr)));
    let lines = report["lines"].as_array().unwrap();
    lines.iter().find(|line| line["name"] == name).unwrap().clone()
}

/// What is advised would help: a group where the group may, and where it may not something else.
pub fn what_check_advises_for_dev_kvm() {
    let mut cases = vec![
        ("chmod 600 kvm".to_owned(), "setfacl".to_owned(), "-aG root"),
        ("chown 0:54321 kvm".to_owned(), "--group-add 54321".to_owned(), "usermod"),
    ];
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    if let Some(group) = groups.lines().find(|line| !line.starts_with("root:")) {
        let mut fields = group.split(':');
        let (name, gid) = (fields.next().unwrap(), fields.nth(1).unwrap());
        cases.push((format!("chown 0:{gid} kvm"), format!("usermod -aG {name} "), "setfacl"));
    }
    for (change, helps, not) in cases {
        let line = line_of(&change, "/dev/kvm");
        let mend = line["mend"].as_str().unwrap();
        println!("    {change}: {mend}");
        assert_eq!(line["standing"], "needed", "{line}");
        assert!(mend.contains(&helps) && !mend.contains(not), "{change}: {line}");
    }
}

/// A kernel that does not count lost memory says nothing of it; it is not that there is none.
pub fn check_knows_what_it_does_not_know() {
    let report: Value = serde_json::from_slice(&mce_relay(&["check", "--json"]).stdout).unwrap();
    let line =
        report["lines"].as_array().unwrap().iter().find(|line| line["name"] == "memory lost");
    let line = line.unwrap();
    assert_eq!(line["standing"], "unknown", "{line}");
    assert!(line["mend"].as_str().unwrap().contains("CONFIG_MEMORY_FAILURE"), "{line}");
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
