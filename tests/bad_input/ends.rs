//! What is left of a VM with a name that has ended, however it did; and sockets that outlive a guest, but not
//! their VM.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use mce_relay_cli::client::requests;
use mce_relay_tests::guest::binary;
use mce_relay_tests::hooked::{SPIN, Stray, library, stray};
use mce_relay_tests::left::{AGAIN, Place, RESET, Running, WAIT, say};
use mce_relay_tests::spinning::Nobody;
use mce_relay_vmm::api::types::means::Means;
use mce_relay_vmm::api::types::pages::{Gpa, Poison, Poisoning};
use mce_relay_vmm::api::types::vm::{Status, VmInfo};
use serde_json::Value;

use crate::refused;

const COM2: u16 = 0x2f8;
const PATIENCE: Duration = Duration::from_secs(60);
/// The page that is said to be bad.
const PAGE: u64 = 0x3000;

fn forge(vm: &Running<'_>, kind: mce_relay::FailureKind) {
    let asked = Poison { gpas: vec![Gpa(PAGE)], via: Means::Signal, kind, vcpu: 0 };
    let done: Vec<Poisoning> = requests::put_json(vm.socket(), "vm.poison", &asked).unwrap();
    assert!(done.iter().all(|page| page.error.is_none()), "{done:?}");
}

fn start<'a>(place: &'a Place, more: &[&str]) -> Running<'a> {
    let mut command = place.run(&["--name", "n", "--serial", "off"]);
    command
        .args(more)
        .env("MCE_RELAY_HOOK", place.path(""))
        .env("LD_PRELOAD", library("libhook.so").unwrap());
    place.started(command, "mce-relay/n.sock")
}

fn text(place: &Place, args: &[&str]) -> (String, String) {
    let out = place.tool(args);
    let stderr = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.success(), "{args:?}: {stderr}");
    (String::from_utf8(out.stdout).unwrap(), stderr)
}

/// Sees that the commands tell of the end with `status`, and of the page.
fn told(place: &Place, status: i32, how: &str) {
    let ended = format!("n ended, exit status {status}, at 2");
    let (shown, _) = text(place, &["status", "--vm", "n"]);
    println!("    {}", shown.replace('\n', "\n    "));
    assert!(shown.starts_with(&ended) && shown.contains(how), "{shown}");
    assert!(shown.contains("its ledger as it was at 2") && shown.contains("0x3000"), "{shown}");
    let (shown, _) = text(place, &["status", "--vm", "n", "--json"]);
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(
        (&shown["ended"]["status"], &shown["pages"][0]["gpa"], &shown["in_all"]["pages"]),
        (&status.into(), &"0x3000".into(), &1.into()),
        "{shown}"
    );
    assert!(shown["as_of"].is_f64() && shown["vm"]["pid"].is_u64(), "{shown}");

    let (lines, words) = text(place, &["events", "--vm", "n"]);
    assert!(words.contains(&ended), "{words}");
    assert!(lines.contains("boot 1") && lines.contains("by forged signal"), "{lines}");
    assert!(!words.contains("follow"), "{words}");
    let (_, words) = text(place, &["status", "--vm", "n", "--follow"]);
    assert!(words.contains(&ended) && words.contains("nothing more to follow"), "{words}");
    let (lines, words) = text(place, &["events", "--vm", "n", "--json", "--follow"]);
    assert!(words.contains(&ended) && words.contains("nothing more to follow"), "{words}");
    let events: Vec<Value> =
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(events.iter().any(|event| event["properties"]["gpa"] == "0x3000"), "{lines}");
    // Whoever wants the VM itself is told, too.
    refused(&place.tool(&["pause", "--vm", "n"]), 1, &[&ended]);
    for entry in std::fs::read_dir(place.path("mce-relay/records/n")).unwrap() {
        let entry = entry.unwrap();
        let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{entry:?}");
    }
}

fn known(vm: &mut Running<'_>) {
    vm.wait("the page", |vm| {
        let status = requests::get::<Status>(vm.socket(), "relay.status");
        status.is_ok_and(|status| !status.pages.is_empty())
    });
}

/// Waits until the ledger with the page is on disk.
fn kept(place: &Place, vm: &mut Running<'_>) {
    vm.wait("the ledger on disk", |_| {
        (0..2).any(|slot| {
            let ledger = place.text(&format!("mce-relay/records/n/ledger.{slot}"));
            // All of it: one that is being written is no JSON.
            ledger.contains("0x3000") && serde_json::from_str::<Value>(&ledger).is_ok()
        })
    });
}

/// The exit status 6, with the words on where to look.
pub fn events_and_ledger_after_exit_6() {
    use mce_relay::mca::FailureKind::ActionRequired;
    let place = Place::new(&SPIN);
    let vm = start(&place, &[]);
    forge(&vm, ActionRequired);
    assert_eq!(vm.ended().code(), Some(6), "{}", place.text("stderr"));
    let stderr = place.text("stderr");
    println!("    {}", stderr.trim_end().replace('\n', "\n    "));
    assert!(stderr.contains("events --vm n") && stderr.contains("status --vm n"), "{stderr}");
    told(&place, 6, "touched the bad page at 0x3000");

    // The next one of that name begins anew, and what was stays once more.
    let vm = start(&place, &[]);
    let (shown, _) = text(&place, &["status", "--vm", "n"]);
    assert!(!shown.contains("ended"), "it runs: {shown}");
    vm.shut_down();
    let (shown, _) = text(&place, &["status", "--vm", "n"]);
    assert!(shown.starts_with("n ended, exit status 0") && !shown.contains("0x3000"), "{shown}");
    let before = place.text("mce-relay/records/n/previous.events");
    assert!(before.contains("undeliverable"), "{before}");
}

/// The exit status 7: memory of the VMM itself is bad, which it learns in a signal handler.
pub fn events_and_ledger_after_exit_7() {
    use mce_relay::mca::FailureKind::ActionOptional;
    let place = Place::new(&SPIN);
    let mut vm = start(&place, &[]);
    forge(&vm, ActionOptional);
    known(&mut vm);
    kept(&place, &mut vm);
    // Whole at once: it is read again and again.
    std::fs::write(place.path("new"), "forge-ar").unwrap();
    std::fs::rename(place.path("new"), place.path("do")).unwrap();
    assert_eq!(vm.ended().code(), Some(7), "{}", place.text("stderr"));
    let stderr = place.text("stderr");
    println!("    {}", stderr.trim_end().replace('\n', "\n    "));
    assert!(stderr.contains("events --vm n"), "{stderr}");
    told(&place, 7, "");
    assert!(!place.path("mce-relay/n.sock").exists(), "its socket is gone");
}

/// The exit status 8: a system call that is on no list.
pub fn events_and_ledger_after_exit_8() {
    use mce_relay::mca::FailureKind::ActionOptional;
    let place = Place::new(&SPIN);
    let mut vm = start(&place, &[]);
    forge(&vm, ActionOptional);
    known(&mut vm);
    kept(&place, &mut vm);
    stray(vm.pid(), "events-log", Stray::any(libc::SYS_openat));
    assert_eq!(vm.ended().code(), Some(8), "{}", place.text("stderr"));
    let stderr = place.text("stderr");
    println!("    {}", stderr.trim_end().replace('\n', "\n    "));
    assert!(stderr.contains("events --vm n"), "{stderr}");
    told(&place, 8, "");
    assert!(!place.path("mce-relay/n.sock").exists(), "its socket is gone");
}

/// Killed: nobody could say how it ended, and everything else is there.
pub fn events_and_ledger_after_a_kill() {
    let place = Place::new(&SPIN);
    let mut vm = start(&place, &[]);
    forge(&vm, mce_relay::FailureKind::ActionOptional);
    known(&mut vm);
    kept(&place, &mut vm);
    vm.signal(libc::SIGKILL);
    assert_eq!(vm.ended().code(), None);
    let (shown, _) = text(&place, &["status", "--vm", "n"]);
    assert!(shown.starts_with("n ended without a word") && shown.contains("0x3000"), "{shown}");
    let (lines, _) = text(&place, &["events", "--vm", "n"]);
    assert!(lines.contains("by forged signal"), "{lines}");
    start(&place, &[]).shut_down();
}

/// One that was killed, one that ended with a status, and one that runs.
pub fn those_that_have_ended_are_listed() {
    let place = Place::new(&SPIN);
    let socket = |name: &str| format!("mce-relay/{name}.sock");
    let start = |name: &str| place.start(&socket(name), &["--name", name, "--serial", "off"]);
    let (killed, told, runs) = (start("killed"), start("told"), start("runs"));
    killed.signal(libc::SIGKILL);
    told.signal(libc::SIGTERM);
    killed.ended();
    assert_eq!(told.ended().code(), Some(143));
    let list = |args: &[&str]| -> Vec<Value> {
        let (text, _) = text(&place, &[&["list", "--json"], args].concat());
        let all: Vec<Value> = serde_json::from_str(&text).unwrap();
        let ours = ["killed", "told", "runs"];
        all.into_iter().filter(|vm| ours.contains(&vm["name"].as_str().unwrap())).collect()
    };
    let running = list(&[]);
    assert!(running.len() == 1 && running[0]["exit_status"].is_null(), "{running:?}");
    let all = list(&["--all"]);
    let of = |name: &str| all.iter().find(|vm| vm["name"] == name).unwrap();
    assert_eq!((all.len(), &of("runs")["state"]), (3, &"running".into()), "{all:?}");
    for (name, status) in [("killed", Value::Null), ("told", 143.into())] {
        let vm = of(name);
        println!("    {vm}");
        assert_eq!((&vm["state"], &vm["exit_status"]), (&"ended".into(), &status), "{vm}");
        assert_eq!(vm["ended_at"].is_null(), status.is_null(), "{vm}");
        assert!(vm["socket"].is_null() && vm["pid"].is_null() && vm["uid"].is_u64(), "{vm}");
    }
    let (shown, _) = text(&place, &["list", "--all"]);
    println!("    {}", shown.trim_end().replace('\n', "\n    "));
    assert!(shown.contains("exit status 143") && shown.contains("killed perhaps"), "{shown}");
    runs.shut_down();
}

/// Among temporary files a VM that ends well leaves nothing, and keeps what one before it left that did not.
pub fn what_a_failed_boot_left_among_temporary_files_stays() {
    let place = Place::new(&SPIN);
    let (dir, kernel, tmp) = (place.path("theirs"), place.path("kernel"), place.path("theirs/tmp"));
    std::fs::create_dir_all(&tmp).unwrap();
    let [program] = Nobody.settle(&dir, [&binary()]);
    for open in [place.path(""), kernel.clone()] {
        std::fs::set_permissions(open, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    std::os::unix::fs::chown(&tmp, Some(Nobody::ID), Some(Nobody::ID)).unwrap();
    let command = || {
        let mut command = Nobody.command(&program, &dir);
        command.env("TMPDIR", &tmp).env_remove("XDG_RUNTIME_DIR").stdin(Stdio::null());
        command
    };
    let socket = format!("theirs/tmp/mce-relay-{}/n.sock", Nobody::ID);
    let start = || {
        let mut run = command();
        run.args(["run", "--name", "n", "--serial", "off", "--memory", "32M", "--kernel"]);
        run.arg(&kernel);
        place.started(run, &socket)
    };
    let failing = start();
    forge(&failing, mce_relay::FailureKind::ActionRequired);
    assert_eq!(failing.ended().code(), Some(6), "{}", place.text("stderr"));
    for _ in 0..2 {
        start().shut_down();
        let out = command().args(["status", "--vm", "n"]).output().unwrap();
        let shown = String::from_utf8(out.stdout).unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(shown.starts_with("n ended, exit status 6"), "{shown}: {stderr}");
    }
}

/// A guest says a byte and resets itself, four times; who is connected to its port gets all of them on the same
/// connection.
pub fn a_client_stays_connected_over_reboots() {
    let place = Place::new(&[&WAIT[..], &say(COM2, "x"), &RESET].concat());
    let (port, api) = (place.argument("socket", "port"), place.argument("path", "api"));
    let options = ["--serial", "off", "--serial2", &port, "--api-socket", &api];
    let mut vm = place.start("api", &options);
    let mode = place.path("port").metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut client = UnixStream::connect(place.path("port")).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    for boot in 2..6 {
        vm.next_boot(boot);
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x", "boot {boot}");
        client.write_all(b"y").unwrap();
    }
    vm.shut_down();
    assert_eq!(client.read(&mut [0]).unwrap(), 0, "at the end it is closed");
    assert!(!place.path("port").exists());
}

/// Whoever comes to the socket of virtio-vsock while the guest has no driver waits, also over reboots; a VM that was killed
/// leaves it in nobody's way.
pub fn the_vsock_socket_stays_over_reboots() {
    let place = Place::new(&[&WAIT[..], &RESET].concat());
    let (socket, path) = (place.argument("socket", "v"), place.path("v"));
    let (vsock, api) = (format!("cid=3,{socket}"), place.argument("path", "api"));
    let options = ["--serial", "off", "--vsock", &vsock, "--api-socket", &api];
    let killed = place.start("api", &options);
    killed.signal(libc::SIGKILL);
    killed.ended();
    assert!(path.exists());

    let mut vm = place.start("api", &options);
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let other = ["--serial", "off", "--vsock", &vsock];
    refused(&place.run(&other).output().unwrap(), 1, &["/v", "listens there already"]);
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"CONNECT 1\n").unwrap();
    client.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    for boot in 2..6 {
        vm.next_boot(boot);
        let waits = client.read(&mut [0]).unwrap_err();
        assert_eq!(waits.kind(), std::io::ErrorKind::WouldBlock, "boot {boot}");
        UnixStream::connect(&path).unwrap();
    }
    vm.shut_down();
    assert!(!path.exists());

    let long = format!("cid=3,{socket}{}", "x".repeat(100));
    let long = ["--serial", "off", "--vsock", &long];
    refused(&place.run(&long).output().unwrap(), 1, &["at most 96", "PATH_PORT"]);
}

/// What a VM that was killed has left behind is in the way of nobody, whatever it was for; what somebody else
/// has put there is.
pub fn sockets_that_were_left_behind() {
    let place = Place::new(&[&WAIT[..], &say(COM2, "x"), &AGAIN, &SPIN].concat());
    let (port, api) = (place.argument("socket", "port"), place.argument("path", "api"));
    let options = ["--serial", "off", "--serial2", &port, "--api-socket", &api];
    for _ in 0..2 {
        let vm = place.start("api", &options);
        assert!(UnixStream::connect(place.path("port")).is_ok());
        vm.signal(libc::SIGKILL);
        vm.ended();
        assert!(place.path("port").exists() && place.path("api").exists());
    }
    // While one runs, another VM gets neither.
    let vm = place.start("api", &options);
    refused(&place.run(&options).output().unwrap(), 1, &["listens there already"]);
    let other = place.argument("path", "other");
    let options = ["--serial", "off", "--serial2", &port, "--api-socket", &other];
    refused(&place.run(&options).output().unwrap(), 1, &["port", "listens there already"]);
    assert!(UnixStream::connect(place.path("port")).is_ok());
    vm.shut_down();

    std::fs::write(place.path("port"), "precious").unwrap();
    refused(&place.run(&options).output().unwrap(), 1, &["port", "remove it"]);
    assert_eq!(place.text("port"), "precious");
}

/// Ten VMs are started at once, with the same name or the same paths, over what was left behind: one runs, and
/// its sockets are there.
pub fn of_ten_that_start_at_once_one_runs() {
    let place = Place::new(&SPIN);
    std::fs::create_dir(place.path("mce-relay")).unwrap();
    let (port, api) = (place.argument("socket", "port"), place.argument("path", "api"));
    let by_name = ["--serial", "off", "--name", "n"];
    let by_path = ["--serial", "off", "--serial2", &port, "--api-socket", &api];
    for (options, socket) in [(&by_name[..], "mce-relay/n.sock"), (&by_path, "api")] {
        for round in 0..3 {
            drop(UnixListener::bind(place.path(socket)));
            let mut all: Vec<Child> = (0..10)
                .map(|_| {
                    let mut command = place.run(options);
                    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
                })
                .collect();
            let ended = wait_for_all_but_one(&mut all);
            let codes: Vec<_> = ended.iter().map(ExitStatus::code).collect();
            assert_eq!(codes, [Some(1); 9], "round {round}");
            let winner = all.pop().unwrap();
            let pid = runs(&place.path(socket));
            assert_eq!(pid, winner.id(), "round {round}: its socket is its own");
            requests::put(&place.path(socket), "vm.shutdown").unwrap();
            assert_eq!(winner.wait_with_output().unwrap().status.code(), Some(0));
            assert!(!place.path(socket).exists());
        }
    }
}

/// Waits until one of `all` is left; how the others ended.
fn wait_for_all_but_one(all: &mut Vec<Child>) -> Vec<ExitStatus> {
    let start = Instant::now();
    let mut ended = Vec::new();
    while all.len() > 1 {
        assert!(start.elapsed() < PATIENCE, "{} of them run", all.len());
        all.retain_mut(|child| match child.try_wait().unwrap() {
            Some(status) => {
                ended.push(status);
                false
            }
            None => true,
        });
        std::thread::sleep(Duration::from_millis(5));
    }
    ended
}

fn runs(socket: &Path) -> u32 {
    let start = Instant::now();
    loop {
        match requests::get::<VmInfo>(socket, "vm.info") {
            Ok(info) => return info.pid,
            Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
