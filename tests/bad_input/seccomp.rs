//! System calls that nobody needs, and those that somebody does: `--seccomp`, and `mce_relay::syscalls`.

use std::collections::{HashMap, HashSet};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use mce_relay::syscalls::{Call, HAND_ON, Is, LISTS, POLLED, RELAY, THREAD, VCPU};
use mce_relay_cli::client::requests;
use mce_relay_tests::guest::binary;
use mce_relay_tests::hooked::{Hooked, Stray};
use mce_relay_vmm::api::types::vm::VmInfo;

/// KVM_CREATE_VM, include/uapi/linux/kvm.h.
const KVM_CREATE_VM: u32 = 0xae01;

/// O_RDONLY and O_CLOEXEC: how a file is opened that is only looked at.
const TO_READ: u32 = 0o2_000_000;

/// A thread by its name, what it is made to call, and how it is called in the words.
const STRAYS: [(&str, Stray, &str); 14] = [
    ("mce-relay", Stray::any(libc::SYS_execve), "the main thread"),
    ("mce-relay", Stray::any(libc::SYS_ptrace), "the main thread"),
    ("vcpu0", Stray::any(libc::SYS_execve), "a vCPU's thread"),
    ("vcpu0", Stray::any(libc::SYS_openat), "a vCPU's thread"),
    ("vcpu0", Stray::with(libc::SYS_ioctl, 1, KVM_CREATE_VM), "a vCPU's thread"),
    ("vcpu0", Stray::with(libc::SYS_madvise, 2, 100), "a vCPU's thread"),
    ("vcpu0", Stray::with(libc::SYS_process_vm_readv, 0, 1), "a vCPU's thread"),
    ("mce-relay-ao", Stray::any(libc::SYS_openat), "the relay's thread"),
    ("mce-relay-ao", Stray::any(libc::SYS_socket), "the relay's thread"),
    ("api", Stray::with(libc::SYS_openat, 2, TO_READ), "the API's thread"),
    ("api", Stray::any(libc::SYS_openat), "the API's thread"),
    ("api", Stray::any(libc::SYS_statx), "the API's thread"),
    ("serial0", Stray::any(libc::SYS_openat), "a serial port's thread"),
    ("events-log", Stray::any(libc::SYS_openat), "the events' thread"),
];

fn start(mode: &str) -> Hooked {
    Hooked::start_with(&["--seccomp", mode])
}

/// A call that is on no list ends the VMM, with words and a status of its own, whichever thread makes it.
pub fn a_forbidden_call_ends_it() {
    for (thread, stray, words) in STRAYS {
        let mut vmm = start("true");
        vmm.stray(thread, stray);
        let (status, stderr) = vmm.ended();
        let line = stderr.lines().find(|line| line.contains("seccomp")).unwrap_or_default();
        println!("    {thread}, {stray:?}: {status}, {}", line.split("; ").next().unwrap());
        assert_eq!(status.code(), Some(8), "{thread}, {stray:?}: {stderr}");
        let said = format!("mce-relay: {words} made system call {}, ", stray.number);
        assert!(line.starts_with(&said), "{thread}, {stray:?}: {stderr}");
    }
}

/// The same calls are carried out where they are only logged, and where there is no filter.
pub fn it_is_carried_out_where_nobody_forbids_it() {
    for mode in ["log", "false"] {
        let mut vmm = start(mode);
        for (thread, stray, _) in STRAYS {
            vmm.stray(thread, stray);
            // It says so afterwards.
            vmm.strayed();
        }
        assert!(requests::get::<VmInfo>(&vmm.path("api"), "vm.info").is_ok(), "{mode}");
        vmm.put("vm.shutdown");
        let (status, stderr) = vmm.ended();
        assert_eq!(status.code(), Some(0), "{mode}: {stderr}");
    }
}

/// The table in docs/embedding.md has the component's lists, whole and nothing else; and the example that prints
/// them has as many.
pub fn the_document_has_the_components_lists() {
    let document = include_str!("../../docs/embedding.md");
    let mut rows: Vec<String> =
        LISTS.iter().flat_map(|(on, list)| list.iter().map(|call| row(on, call))).collect();
    let is_row = |line: &&str| LISTS.iter().any(|(on, _)| line.starts_with(&format!("| {on} | `")));
    let mut found: Vec<&str> = document.lines().filter(is_row).collect();
    rows.sort();
    found.sort_unstable();
    assert_eq!(found, rows);

    let example = binary().with_file_name("examples").join("seccomp");
    let out = Command::new(example).output().unwrap();
    let printed: HashMap<String, Vec<serde_json::Value>> =
        serde_json::from_slice(&out.stdout).unwrap();
    for (on, list) in LISTS {
        assert_eq!(printed[on].len(), list.len(), "{on}");
    }
}

/// A call's row.
fn row(on: &str, call: &Call) -> String {
    let given = (0..).zip(call.args).filter_map(|(index, is): (u8, _)| match is {
        Is::Any => None,
        Is::Value(value) => Some(format!("{index} = {value:#x}")),
        Is::OwnPid => Some(format!("{index} = own pid")),
    });
    let args = given.collect::<Vec<_>>().join(", ");
    format!("| {on} | `{}` | {args} | {} |", call.name, call.why)
}

/// How tests/src/bin/confined.rs ended.
fn confined(how: &str, left_out: Option<usize>) -> ExitStatus {
    let mut command = Command::new(binary().with_file_name("confined"));
    command.arg(how).args(left_out.map(|index| index.to_string()));
    let out = command.output().unwrap();
    let ended_well = out.status.success() || out.status.signal().is_some();
    assert!(ended_well, "{how} {left_out:?}: {}", String::from_utf8_lossy(&out.stderr));
    out.status
}

/// Calls of the component's lists that a run of `confined` need not come to.
fn is_occasional(how: &str, call: &Call) -> Option<&'static str> {
    match call.number {
        libc::SYS_write if how == "relay" => Some("no other relay has to be woken"),
        libc::SYS_pread64 if how == "relay" => {
            Some("nothing is swapped out, and the kernel need not count failures")
        }
        libc::SYS_mincore => Some("PAGEMAP_SCAN may do without"),
        _ => None,
    }
}

/// With the calls of the component's lists, its threads do all that they do; without any one of them they do
/// not.
pub fn the_components_lists_are_exact() {
    let (bus, sys) = (Some(libc::SIGBUS), Some(libc::SIGSYS));
    assert!(confined("relay", None).success());
    assert!(confined("start", None).success(), "a relay is started under a filter");
    assert!(confined("polled", None).success(), "a thread under a filter does a relay's work");
    assert_eq!(confined("handed-on", None).signal(), bus);
    assert_eq!(confined("vcpu", None).signal(), bus);
    if std::env::var_os("MCE_RELAY_LAB").is_some() {
        println!("    in the lab none is left out");
        return;
    }
    let hand_on: HashSet<_> = HAND_ON.iter().map(|call| call.number).collect();
    let (mut needed, mut occasional) = (0, Vec::new());
    for (how, list) in [("relay", RELAY), ("vcpu", VCPU), ("polled", POLLED)] {
        for (index, call) in list.iter().enumerate() {
            let how = match how {
                "relay" if hand_on.contains(&call.number) => "handed-on",
                other => other,
            };
            let status = confined(how, Some(index));
            match is_occasional(how, call) {
                Some(why) if status.signal() != sys => {
                    occasional.push(format!("{how}: {} ({why})", call.name));
                }
                _ => {
                    assert_eq!(status.signal(), sys, "{how} without {call:?}");
                    needed += 1;
                }
            }
        }
    }
    println!(
        "    {needed} calls of {} in three lists are needed (beside the {} of any thread), and these may be: {}",
        RELAY.len() + VCPU.len() + POLLED.len(),
        THREAD.len(),
        occasional.join("; ")
    );
}
