//! Command lines that cannot be meant, with no VM to ask and with one that runs on.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use mce_relay_cli::client::requests;
use mce_relay_tests::guest::mce_relay;
use mce_relay_tests::lab;
use mce_relay_tests::spinning::Spinning;
use serde_json::Value;

use crate::refused;

/// Refused before anybody is asked.
pub fn command_lines() {
    const VM: [&str; 2] = ["--api-socket", "/nowhere/api"];
    let lines: &[(&[&str], bool, &[&str])] = &[
        (&[], false, &["Usage"]),
        (&["poisson"], false, &["poisson", "poison"]),
        (&["poison", "--via", "uffd", "--gpa", "0"], false, &["--vm", "--api-socket"]),
        (&["poison", "--vm", "a b", "--via", "uffd", "--gpa", "0"], false, &["\"a b\"", "letters"]),
        (&["poison", "--vm", "", "--via", "uffd", "--gpa", "0"], false, &["\"\"", "letters"]),
        (
            &["poison", "--vm", "nobody", "--vm", "b", "--via", "uffd", "--gpa", "0"],
            false,
            &["--vm"],
        ),
        (&["shutdown", "--now", "--timeout", "5"], true, &["--now", "--timeout"]),
        (&["shutdown", "--timeout", "-1"], true, &["-1"]),
        (&["poison", "--gpa", "0"], true, &["--via"]),
        (
            &["poison", "--via", "hammer", "--gpa", "0"],
            true,
            &["hammer", "hwpoison-inject", "uffd"],
        ),
        (
            &["poison", "--via", "uffd"],
            true,
            &["--gpa", "--random", "--pid", "Usage: mce-relay poison"],
        ),
        (&["poison", "--via", "uffd", "--random", "1.5"], true, &["1.5", "number of pages"]),
        (&["poison", "--via", "uffd", "--gpa", "0", "--random", "1"], true, &["--random"]),
        (&["poison", "--via", "uffd", "--random", "0"], true, &["0"]),
        (&["poison", "--via", "uffd", "--random", "-1"], true, &["-1"]),
        (&["poison", "--via", "uffd", "--random", "many"], true, &["many"]),
        (&["poison", "--via", "uffd", "--random", "1", "--seed", "0y1"], true, &["0y1", "seed"]),
        (&["poison", "--via", "uffd", "--gpa", "0", "--seed", "1"], true, &["--random N"]),
        (&["poison", "--via", "uffd", "--pid", "1"], true, &["--agent"]),
        (&["poison", "--via", "uffd", "--pid", "1", "--agent", "path="], true, &["empty"]),
        (&["poison", "--via", "uffd", "--gpa", "0", "--agent", "/x"], true, &["--pid"]),
        (
            &["poison", "--via", "uffd", "--pid", "1", "--agent", "/x", "--max", "0"],
            true,
            &["4096"],
        ),
        (&["poison", "--via", "uffd", "--gpa", "0..0"], true, &["0..0 is empty"]),
        (&["poison", "--via", "uffd", "--gpa", "99999999999999999999"], true, &["not a number"]),
        (&["poison", "--via", "signal", "--gpa", "0", "--kind", "ue"], true, &["ue", "ao", "ar"]),
        (&["poison", "--via", "signal", "--gpa", "0", "--kind", "ar"], true, &["--force"]),
        (&["poison", "--via", "uffd", "--gpa", "0", "--kind", "ar"], true, &["--via signal"]),
        (&["poison", "--via", "signal", "--gpa", "0", "--vcpu", "256"], true, &["256"]),
        (
            &["poison", "--via", "uffd", "--gpa", "0", "--filter-dev", "8:1"],
            true,
            &["hwpoison-inject"],
        ),
        (
            &["poison", "--via", "hwpoison-inject", "--gpa", "0", "--filter-dev", "sda"],
            true,
            &["sda", "MAJOR:MINOR"],
        ),
        (
            &["poison", "--via", "hwpoison-inject", "--gpa", "0", "--filter-flags", "anon"],
            true,
            &["MASK=VALUE"],
        ),
        (
            &["poison", "--via", "hwpoison-inject", "--gpa", "0", "--filter-flags", "blue=blue"],
            true,
            &["blue", "anon"],
        ),
        (
            &["poison", "--via", "hwpoison-inject", "--gpa", "0", "--filter-flags", "huge=anon"],
            true,
            &["not in the mask"],
        ),
        (
            &["poison", "--via", "hwpoison-inject", "--gpa", "0", "--filter-memcg", "mine"],
            true,
            &["mine", "inode"],
        ),
        (&["unpoison"], false, &["--pfn"]),
        (&["unpoison", "--pfn", "0xfoo"], false, &["0xfoo", "page frame number"]),
        (&["unpoison", "--pfn", "3..3"], false, &["3..3 is empty"]),
        (&["unpoison", "--pfn", "-1"], false, &["-1"]),
        (&["inject"], true, &["--status"]),
        (&["inject", "--status", "VALID"], true, &["VALID", "VAL", "srao"]),
        (&["inject", "--status", ""], true, &["\"\"", "VAL"]),
        (&["inject", "--status", "srao", "--mcg-status", "MCIPS"], true, &["MCIPS", "RIPV"]),
        (&["inject", "--status", "srao", "--bank", "300"], true, &["300"]),
        (&["inject", "--status", "srao", "--addr", "here"], true, &["here"]),
        (&["pages"], true, &["--gpa", "--map"]),
        (&["pages", "--map", "--gpa", "0"], true, &["--map"]),
        (&["pages", "--gpa", "0x2000..0x1000"], true, &["ends before it starts"]),
        (&["events", "--follow", "yes"], true, &["yes"]),
        (&["status", "--watch"], true, &["--watch"]),
        (&["status", "a"], false, &["--vm a"]),
        (&["memory", "read", "a", "--gpa", "0"], false, &["--vm a"]),
        (&["check", "--jsn"], false, &["--jsn", "--json"]),
        (&["completions", "cmd"], false, &["cmd", "bash"]),
        (&["man"], false, &["DIR"]),
        (&["list", "all"], false, &["all"]),
        (&["run", "--kernel", "x", "--name", "a/b"], false, &["a/b", "letters"]),
        (&["run", "--kernel", "x", "--name", "a", "--api-socket", "/x"], false, &["--api-socket"]),
    ];
    for (line, with_vm, named) in lines {
        let mut all: Vec<&str> = line.to_vec();
        if *with_vm {
            all.extend(VM);
        }
        refused(&mce_relay(&all), 2, named);
    }
    println!("    {} command lines", lines.len());
    // They make sense, and nobody is there.
    for line in [
        &["poison", "--vm", "nobody-at-all", "--via", "uffd", "--gpa", "0"][..],
        &["status", "--vm", "nobody-at-all"],
        &["events", "--vm", "nobody-at-all", "--follow"],
    ] {
        refused(&mce_relay(line), 1, &["nobody-at-all", "run --name"]);
    }
    refused(&mce_relay(&["man", "/proc/nowhere"]), 1, &["/proc/nowhere"]);
}

/// Refused by the VM, or for what it is; it runs on, with as many files open as before.
pub fn of_a_vm_that_runs() {
    let vm = Spinning::start(&["--cpus", "2"]);
    let before = lab::open_files(vm.pid());
    let lines: &[(&[&str], &[&str])] = &[
        (&["poison", "--via", "signal", "--gpa", "0x2000000"], &["0x2000000", "0x1ffffff"]),
        (&["poison", "--via", "uffd", "--gpa", "0x1fff000..0x2001000"], &["0x2000000"]),
        (&["poison", "--via", "uffd", "--random", "100000"], &["100000"]),
        (
            &["poison", "--via", "signal", "--kind", "ar", "--force", "--vcpu", "2", "--gpa", "0"],
            &["vCPU 2", "0 to 1"],
        ),
        (
            &["poison", "--via", "uffd", "--pid", "1", "--agent", "/nowhere/agent"],
            &["/nowhere/agent", "--serial2"],
        ),
        (&["inject", "--vcpu", "2", "--status", "srao"], &["vCPU 2", "0 to 1"]),
        (&["inject", "--bank", "10", "--status", "srao"], &["bank 10", "0 to 9"]),
        (&["inject", "--status", "UC+EN"], &["VAL"]),
        // Its guest has CR4.MCE clear, so this would be its end.
        (&["inject", "--status", "srao"], &["triple fault", "CR4.MCE", "force"]),
        (&["inject", "--status", "srar", "--broadcast"], &["triple fault", "force"]),
        (&["pages", "--gpa", "0x2000000"], &["0x2000000"]),
        (&["retire", "--gpa", "0x2000000"], &["0x2000000"]),
        (&["memory read", "--gpa", "0x1ffffff", "--len", "2"], &["0x2000000"]),
    ];
    for (line, named) in lines {
        refused(&vm.command(line[0], &line[1..]), 1, named);
    }
    // What can be said while it is paused.
    assert!(vm.command("pause", &[]).status.success());
    refused(&vm.command("inject", &["--status", "deferred"]), 1, &["paused", "resume"]);
    assert!(vm.command("resume", &[]).status.success());
    let out = vm.command("inject", &["--status", "srao", "--dry-run", "--json"]);
    let said: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(
        (&said["outlook"]["kvm"], &said["done"]),
        (&"triple-fault".into(), &serde_json::json!([]))
    );

    // It is said first, and then what came of it; JSON is one document.
    let deferred = ["--vcpu", "0", "--bank", "2", "--status", "deferred"];
    let text = String::from_utf8(vm.command("inject", &deferred).stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert!(
        matches!(&lines[..], [kvm, linux, done] if kvm.starts_with("KVM writes it into the bank")
            && linux.starts_with("Linux ") && done.starts_with("injected: vCPU 0, bank 2")),
        "{text}"
    );
    let deferred = ["--bank", "3", "--status", "deferred", "--json"];
    let out = vm.command("inject", &deferred);
    let said: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(
        (&said["outlook"]["kvm"], &said["done"][0]["outcome"]),
        (&"logs".into(), &"injected".into()),
        "{said}"
    );

    // The socket's last client may not have been seen to go yet.
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert!(lab::open_files(vm.pid()) <= before, "{before} files were open");
    assert!(vm.status().pages.is_empty(), "{:?}", vm.status().pages);
    assert_eq!(vm.shut_down().code(), Some(0));
}

/// A machine check by hand that the guest does not survive, with --force: it is said before and it is
/// so after.
pub fn a_machine_check_that_kills() {
    let vm = Spinning::start(&["--no-reboot"]);
    let out = vm.command("inject", &["--status", "srao", "--force"]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    println!("    {}", text.trim_end().replace('\n', "\n    "));
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(text.starts_with("KVM ends the guest (triple fault)"), "said first: {text}{stderr}");
    assert!(!text.contains("\ninjected"), "never said of what was not: {text}");
    let start = std::time::Instant::now();
    while requests::get::<Value>(&vm.socket(), "vmm.ping").is_ok() {
        assert!(start.elapsed().as_secs() < 10, "it lives");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(vm.stderr().contains("triple fault on vCPU 0"), "{}", vm.stderr());
}

/// A forged AR on a guest that cannot be told: labelled, and what the policy says.
pub fn a_forged_ar_of_a_guest_that_cannot_be_told() {
    let vm = Spinning::start(&["--on-undeliverable", "pause"]);
    let more = ["--via", "signal", "--kind", "ar", "--force", "--gpa", "0x3000"];
    let out = vm.command("poison", &more);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(String::from_utf8_lossy(&out.stdout).starts_with("FORGED"), "{out:?}");
    let start = std::time::Instant::now();
    while vm.info().pause_reason.is_none() {
        assert!(start.elapsed().as_secs() < 10, "{:?}", vm.status());
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let status = vm.status();
    let page = &status.pages[0];
    assert_eq!(
        (page.gpa, page.kind.to_string(), page.found_by.to_string()),
        (0x3000, "AR".into(), "forged signal".into())
    );
    let text = String::from_utf8(vm.command("status", &[]).stdout).unwrap();
    assert!(text.contains("FORGED and whole 1") && text.contains("PAUSED"), "{text}");
    let events = String::from_utf8(vm.command("events", &[]).stdout).unwrap();
    assert!(events.contains("caught: FORGED SIGBUS BUS_MCEERR_AR"), "{events}");
    assert!(events.contains("undeliverable: FORGED AR for GPA 0x3000"), "{events}");
    let pages = String::from_utf8(vm.command("pages", &["--gpa", "0x3000"]).stdout).unwrap();
    assert!(pages.contains("FORGED AR (the page is whole)"), "{pages}");
    let map = String::from_utf8(vm.command("pages", &["--map"]).stdout).unwrap();
    assert!(map.contains("f  FORGED and whole: 1 page"), "{map}");
}

/// What listens at a socket says that it is the process of a VM that it is not: nothing of that process is
/// looked at, and nothing of it goes bad. For a VM in another PID namespace it is the same.
pub fn a_socket_that_names_another_process() {
    let vm = Spinning::start(&[]);
    let told = |what: &str| -> Value { requests::get(&vm.socket(), what).unwrap() };
    let answers: Vec<(&str, String)> = ["vm.info", "relay.status", "vmm.ping"]
        .map(|what| (what, told(what).to_string()))
        .into_iter()
        .collect();
    let socket = vm.path("liar");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            answer(stream.unwrap(), &answers);
        }
    });
    let (says, is) = (vm.pid().to_string(), std::process::id().to_string());
    let named = ["liar", &says, &is, "PID namespace"];
    let at = format!("path={}", socket.display());
    for line in [
        &["pages", "--gpa", "0x1000"][..],
        &["poison", "--via", "uffd", "--gpa", "0x1000"],
        &["poison", "--via", "madvise", "--gpa", "0x1000"],
        &["poison", "--via", "hwpoison-inject", "--gpa", "0x1000", "--dry-run"],
        &["poison", "--via", "hwpoison-inject", "--gpa", "0x1000", "--filter-memcg", "own"],
    ] {
        refused(&mce_relay(&[line, &["--api-socket", &at]].concat()), 1, &named);
    }
    assert!(vm.status().pages.is_empty(), "{:?}", vm.status().pages);
    assert_eq!(vm.shut_down().code(), Some(0));
}

/// Answers one request with what belongs to its path.
fn answer(mut stream: UnixStream, answers: &[(&str, String)]) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    while lines.next().is_some_and(|line| !line.unwrap().is_empty()) {}
    let path = first.split(' ').nth(1).unwrap();
    let (_, body) = answers.iter().find(|(what, _)| path.ends_with(what)).unwrap();
    let len = body.len();
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {len}\r\n\r\n{body}").unwrap();
}
