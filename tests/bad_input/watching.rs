//! What those see who watch a VM: it runs, something happens, and it ends.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use mce_relay::{Page, State};
use mce_relay_tests::guest::binary;
use mce_relay_tests::hooked::SPIN;
use mce_relay_tests::spinning::{Nobody, Spinning};
use mce_relay_tests::tiny::{self, elf, takes_the_power_button};
use mce_relay_vmm::api::types::pause::Panic;
use mce_relay_vmm::api::types::vm::VmInfo;
use serde_json::Value;

use crate::refused;

const PATIENCE: Duration = Duration::from_secs(20);

/// The lines that a child prints, as it prints them.
fn lines(child: &mut Child) -> Receiver<String> {
    let stdout = child.stdout.take().unwrap();
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            // Nobody may be listening any more.
            let _ = sender.send(line);
        }
    });
    lines
}

/// Waits for a line with `text` in it.
fn wait_for(lines: &Receiver<String>, what: &str, text: &str) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let line = lines.recv_timeout(left).unwrap_or_else(|_| panic!("{what} shows no {text}"));
        if line.contains(text) {
            return line;
        }
    }
}

/// Waits for the end; the exit status.
fn end_of(child: &mut Child, what: &str) -> Option<i32> {
    let start = Instant::now();
    loop {
        match child.try_wait().unwrap() {
            Some(status) => return status.code(),
            None if start.elapsed() > PATIENCE => panic!("{what} does not end"),
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// `events --follow` and `status --follow`, in words and as JSON: what happens is shown as it happens, and
/// the VM's end is theirs, without an error.
pub fn events_and_status_are_followed_to_the_end() {
    let vm = Spinning::start(&[]);
    let mut followers: Vec<(String, Child, Receiver<String>)> = Vec::new();
    for command in ["events", "status"] {
        for more in [&["--follow"][..], &["--follow", "--json"]] {
            let mut child = vm.spawn(command, more);
            let shown = lines(&mut child);
            followers.push((format!("{command} {}", more.join(" ")), child, shown));
        }
    }
    // They are there before anything happens.
    for (what, _, shown) in &followers {
        let is_json = what.contains("--json");
        let first = match (what.starts_with("events"), is_json) {
            (true, true) => r#""event":"booting""#,
            (true, false) => "VM: boot 1",
            (false, true) => r#""pages":[]"#,
            (false, false) => "no bad pages",
        };
        wait_for(shown, what, first);
    }
    let out = vm.command("poison", &["--via", "signal", "--gpa", "0x5000"]);
    assert!(out.status.success(), "{out:?}");
    for (what, _, shown) in &followers {
        let line = match what.starts_with("events") {
            true => wait_for(shown, what, "seen"),
            false => wait_for(shown, what, "0x5000"),
        };
        println!("    {what}: {}", line.chars().take(100).collect::<String>());
        if what.contains("--json") {
            serde_json::from_str::<Value>(&line).unwrap();
        }
        assert!(line.contains("0x5000"), "{what}: {line}");
    }
    assert_eq!(vm.shut_down().code(), Some(0));
    for (what, child, _) in &mut followers {
        assert_eq!(end_of(child, what), Some(0), "{what}");
    }
}

/// A VM that has a name is listed, found by it, and the only one that is called so.
pub fn a_vm_is_found_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, elf(&SPIN)).unwrap();
    let command = |args: &[&str]| {
        let mut command = Command::new(binary());
        command.args(args).env("XDG_RUNTIME_DIR", dir.path()).stdin(Stdio::null());
        command
    };
    let tool = |args: &[&str]| -> Output { command(args).output().unwrap() };
    let run = ["run", "--name", "watched", "--serial", "off", "--memory", "32M", "--kernel"];
    let run = [&run[..], &[kernel.to_str().unwrap()]].concat();
    let mut vmm = command(&run).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while !tool(&["status", "--vm", "watched"]).status.success() {
        assert!(vmm.try_wait().unwrap().is_none() && start.elapsed() < PATIENCE, "it does not run");
        std::thread::sleep(Duration::from_millis(10));
    }

    let out = tool(&["list", "--json"]);
    let listed: Value = serde_json::from_slice(&out.stdout).unwrap();
    println!("    {listed}");
    let text = listed.to_string();
    let socket = dir.path().join("mce-relay/watched.sock");
    for part in ["\"watched\"", socket.to_str().unwrap(), &vmm.id().to_string()] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let list = String::from_utf8(tool(&["list"]).stdout).unwrap();
    assert!(list.contains("watched"), "{list}");
    let status: Value =
        serde_json::from_slice(&tool(&["status", "--vm", "watched", "--json"]).stdout).unwrap();
    assert_eq!(
        (&status["vm"]["name"], &status["vm"]["pid"]),
        (&"watched".into(), &vmm.id().into())
    );
    refused(&tool(&run), 1, &["watched", "another name"]);

    // Its guest listens to no power button.
    refused(&tool(&["shutdown", "--vm", "watched"]), 1, &["power button", "shutdown --now"]);
    assert!(tool(&["shutdown", "--now", "--vm", "watched"]).status.success());
    assert_eq!(end_of(&mut vmm, "run"), Some(0));
    let list = String::from_utf8(tool(&["list"]).stdout).unwrap();
    assert!(!list.contains("watched"), "{list}");
    refused(&tool(&["pause", "--vm", "watched"]), 1, &["watched", "exit status 0"]);
}

/// A guest that says it has panicked is shown as such until it starts over, and what can be done about it
/// works.
pub fn a_panic_is_seen_until_the_guest_starts_over() {
    let vm = Spinning::start_with(&tiny::panics(), &["--cpus", "2"]);
    let words = |command: &str| {
        let out = vm.command(command, &[]);
        assert!(out.status.success(), "{command}: {out:?}");
        String::from_utf8(out.stdout).unwrap()
    };
    let has_panicked = |boot| {
        let start = Instant::now();
        let seen = |info: VmInfo| info.boot == boot && info.panic == Some(Panic::Panicked);
        while !vm.running().is_some_and(seen) {
            assert!(start.elapsed() < PATIENCE, "it does not panic: {:?}", vm.running());
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    has_panicked(1);
    let status = words("status");
    assert!(status.contains("PANICKED: ") && status.contains("mce-relay reset"), "{status}");
    let events = words("events");
    let panics =
        |events: &str| events.lines().filter(|line| line.ends_with("kernel has panicked")).count();
    assert_eq!(events.matches("panicked, and its crash kernel takes over").count(), 1, "{events}");
    assert_eq!(panics(&events), 1, "once, though it said so twice: {events}");
    assert!(vm.stderr().contains("mce-relay reset --api-socket"), "without -v: {}", vm.stderr());
    let metrics = metrics(&vm);
    for line in [
        "mce_relay_panicked 1",
        r#"mce_relay_guest_panics_total{kind="crash-loaded"} 1"#,
        r#"mce_relay_guest_panics_total{kind="panicked"} 1"#,
    ] {
        assert!(metrics.lines().any(|known| known == line), "{line}: {metrics}");
    }
    let out = vm.command("shutdown", &[]);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{stderr}");
    for part in ["kernel has panicked", "mce-relay reset", "shutdown --now"] {
        assert!(stderr.contains(part), "{part}: {stderr}");
    }

    assert_eq!(words("reset"), "the guest has started over: boot 2\n");
    has_panicked(2);
    let out = vm.command("reset", &["--json"]);
    let done: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(done["boot"], 3);
    has_panicked(3);
    let events = words("events");
    assert_eq!(events.matches("reset by the API; starting the guest again").count(), 2, "{events}");
    assert_eq!(panics(&events), 3, "{events}");
    let out = vm.command("shutdown", &["--now", "--json"]);
    let done: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((&done["asked"], &done["ended"]), (&false.into(), &true.into()));
    assert_eq!(vm.ended().code(), Some(0));
}

/// The power button: a guest that listens to it powers off, and one that is paused is not asked.
pub fn the_power_button_is_the_guests_to_answer() {
    let vm = Spinning::start_with(takes_the_power_button(), &["--cpus", "2"]);
    assert!(vm.command("pause", &[]).status.success());
    refused(&vm.command("shutdown", &[]), 1, &["paused", "resume it first"]);
    assert!(vm.command("resume", &[]).status.success());
    // It may not have come to its interrupt yet.
    let start = Instant::now();
    let out = loop {
        let out = vm.command("shutdown", &["--json"]);
        if out.status.success() {
            break out;
        }
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(stderr.contains("does not listen"), "{stderr}");
        assert!(start.elapsed() < PATIENCE, "it never listens");
    };
    let done: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((&done["asked"], &done["ended"]), (&true.into(), &true.into()));
    assert_eq!(vm.ended().code(), Some(0));
}

/// A guest that hears the button and does nothing about it: the command says so when its time is over.
pub fn a_guest_that_does_not_power_off_goes_on() {
    let mut code = takes_the_power_button().to_vec();
    // Its handler comes back to where it was.
    code[0x60] = 0xf4;
    code[0x61..0x63].copy_from_slice(&[0xeb, 0xfd]);
    let vm = Spinning::start_with(&code, &[]);
    let start = Instant::now();
    let asked = loop {
        let out = vm.command("shutdown", &["--timeout", "1"]);
        let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(1), "{stderr}");
        if !stderr.contains("does not listen") {
            break stderr;
        }
        assert!(start.elapsed() < PATIENCE, "it never listens");
    };
    assert!(asked.contains("within 1 s") && asked.contains("shutdown --now"), "{asked}");
    let out = vm.command("shutdown", &["--timeout", "0"]);
    assert_eq!(String::from_utf8_lossy(&out.stdout), "the guest was asked to power off\n");
    assert!(vm.running().is_some(), "it goes on");
    assert_eq!(vm.shut_down().code(), Some(0));
}

/// `reset` of a VM that does not start its guest over.
pub fn a_reset_with_no_reboot_is_the_end() {
    let vm = Spinning::start(&["--no-reboot"]);
    refused(&vm.command("reset", &[]), 1, &["--no-reboot"]);
    assert!(vm.stderr().contains("reset by the API"), "{}", vm.stderr());
    assert_eq!(vm.ended().code(), Some(3));
}

/// What `GET /metrics` says.
fn metrics(vm: &Spinning) -> String {
    let mut stream = UnixStream::connect(vm.socket()).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// `events --follow | head -1` and the like: who reads has gone, nothing happens, and the command ends.
pub fn followers_end_with_their_reader() {
    let vm = Spinning::start(&[]);
    for (command, more) in [
        ("events", &["--follow"][..]),
        ("events", &["--follow", "--json"]),
        ("status", &["--follow"]),
        ("status", &["--follow", "--json"]),
    ] {
        let what = format!("{command} {}", more.join(" "));
        let mut child = vm.spawn(command, more);
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "{what} shows nothing");
        // The reader is gone with the pipe.
        let start = Instant::now();
        assert_eq!(end_of(&mut child, &what), Some(0), "{what}");
        println!("    {what}: ended {:.2} s after its reader", start.elapsed().as_secs_f64());
    }
    assert_eq!(vm.shut_down().code(), Some(0));
}

/// Root asks for a user's VM by its name: it is told where that is, and `list --all` shows it.
pub fn vms_of_other_users_are_named_to_root() {
    let dir = tempfile::tempdir().unwrap();
    let theirs = dir.path().join("theirs");
    std::fs::create_dir(&theirs).unwrap();
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, elf(&SPIN)).unwrap();
    let [program] = Nobody.settle(dir.path(), [&binary()]);
    std::os::unix::fs::chown(&theirs, Some(Nobody::ID), Some(Nobody::ID)).unwrap();
    let mut run = Nobody.command(&program, dir.path());
    run.args(["run", "--name", "theirs", "--serial", "off", "--memory", "32M", "--kernel"]);
    run.arg(&kernel).env("XDG_RUNTIME_DIR", &theirs);
    let mut vmm = run.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();

    let own = dir.path().join("own");
    let tool = |args: &[&str]| -> Output {
        let mut tool = Command::new(binary());
        tool.args(args).env("XDG_RUNTIME_DIR", &own).stdin(Stdio::null()).output().unwrap()
    };
    let socket = theirs.join("mce-relay/theirs.sock");
    let socket = socket.to_str().unwrap();
    let start = Instant::now();
    while !tool(&["status", "--vm", socket]).status.success() {
        assert!(vmm.try_wait().unwrap().is_none() && start.elapsed() < PATIENCE, "it does not run");
        std::thread::sleep(Duration::from_millis(10));
    }
    refused(&tool(&["status", "--vm", "theirs"]), 1, &["theirs", &format!("--vm {socket}")]);
    let mine: Value = serde_json::from_slice(&tool(&["list", "--json"]).stdout).unwrap();
    assert_eq!(mine, Value::Array(Vec::new()));
    let all: Value = serde_json::from_slice(&tool(&["list", "--all", "--json"]).stdout).unwrap();
    let vm = all.as_array().unwrap().iter().find(|vm| vm["socket"] == socket);
    let vm = vm.unwrap_or_else(|| panic!("{all}"));
    println!("    {vm}");
    assert_eq!((&vm["uid"], &vm["state"]), (&Nobody::ID.into(), &"running".into()), "{vm}");
    let text = String::from_utf8(tool(&["list", "--all"]).stdout).unwrap();
    assert!(
        ["nobody", "65534"].iter().any(|user| text.contains(user)) && text.contains(socket),
        "{text}"
    );
    assert!(tool(&["shutdown", "--now", "--vm", socket]).status.success());
    assert_eq!(end_of(&mut vmm, "run"), Some(0));
}

/// `GET /metrics`, as a collector gets it, with a page in the ledger.
pub fn metrics_have_the_page() {
    let vm = Spinning::start(&[]);
    let out = vm.command("poison", &["--via", "signal", "--gpa", "0x5000"]);
    assert!(out.status.success(), "{out:?}");
    let start = Instant::now();
    let waits = |page: &Page| matches!(page.state, State::Waiting { .. });
    while !vm.status().pages.first().is_some_and(waits) {
        assert!(start.elapsed() < PATIENCE, "it does not wait: {:?}", vm.status());
        std::thread::sleep(Duration::from_millis(10));
    }
    let answer = metrics(&vm);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(
        head.to_ascii_lowercase().contains("content-type: text/plain; version=0.0.4"),
        "{head}"
    );
    for line in [
        "mce_relay_boots_total 1",
        r#"mce_relay_signals_total{forged="true",kind="AO",thread="relay"} 1"#,
        r#"mce_relay_pages_seen_total{found_by="forged signal"} 1"#,
        // Its guest never opens its machine-check handler, so it is told of nothing.
        r#"mce_relay_pages{state="waiting"} 1"#,
        r#"mce_relay_pages{state="acknowledged"} 0"#,
        "mce_relay_told_seconds_count 0",
        r#"mce_relay_told_seconds_bucket{le="+Inf"} 0"#,
        "mce_relay_acknowledged_seconds_count 0",
        "mce_relay_paused 0",
    ] {
        assert!(body.lines().any(|known| known == line), "{line}: {body}");
    }
    let oldest = body.lines().find_map(|l| l.strip_prefix("mce_relay_oldest_waiting_seconds "));
    let oldest: f64 = oldest.unwrap().parse().unwrap();
    assert!(oldest > 0.0 && oldest < 60.0, "{oldest}");
    assert_eq!(vm.shut_down().code(), Some(0));
}
