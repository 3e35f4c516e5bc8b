//! The agent as a person meets it: started with `-`, spoken to line by line.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use serde_json::Value;

/// Starts the agent, sends `requests`, and returns what it said until its end.
fn talk(arguments: &[&str], requests: &str) -> Vec<Value> {
    let mut agent = Command::new(env!("CARGO_BIN_EXE_agent"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = agent.stdin.take().unwrap();
    stdin.write_all(requests.as_bytes()).unwrap();
    drop(stdin);
    let lines = BufReader::new(agent.stdout.take().unwrap()).lines();
    let lines = lines
        .map(|line| {
            let line = line.unwrap();
            serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line}: {e}"))
        })
        .collect();
    assert!(agent.wait().unwrap().success());
    lines
}

#[test]
fn every_request_has_one_reply_in_order() {
    let requests = "ping\r\n\n\ralloc anon 3\ntouch 1 read\ntouch 1 kernel-copy\nfree 1\n\
                    check except 0\nlog off\nearly off\nearly on\ncpu 0\njump\ngpa 77\npoweroff\n\
                    alloc anon 2 runs\nsigbus count\nfailures count\nclaim 1\n";
    let has_log = std::fs::File::open("/dev/kmsg").is_ok();
    let mut lines = talk(&["-", "log=off"], requests);
    // Where there is no log, that is said once.
    lines.retain(|line| line["event"] != "error");
    assert_eq!(lines[0]["event"], "hello", "{:?}", lines[0]);
    assert_eq!(lines[0]["early_kill"], true);
    let seen: Vec<String> = lines[1..]
        .iter()
        .map(|line| format!("{} {}", line["reply"].as_str().unwrap(), line["ok"]))
        .collect();
    let expected = [
        "ping true",
        "alloc true",
        "touch true",
        "touch true",
        "free true",
        "check true",
        "log true",
        "early true",
        "early true",
        "cpu true",
        "jump false",
        "gpa false",
        "poweroff false",
        "alloc true",
        "sigbus true",
        if has_log { "failures true" } else { "failures false" },
        "claim false",
    ];
    assert_eq!(seen, expected);
    assert!(lines[1]["pid"].as_u64().is_some_and(|pid| pid > 0), "{:?}", lines[1]);
    assert_eq!(lines[2]["pages"].as_array().unwrap().len(), 3);
    assert_eq!(lines[3]["intact"], true);
    assert_eq!(lines[4]["result"], "ok");
    assert_eq!(lines[6]["intact"], 1);
    assert_eq!(lines[6]["skipped"], serde_json::json!([[0, 1]]));
    assert_eq!(lines[8]["on"], false);
    assert_eq!(lines[9]["on"], true);
    assert_eq!(lines[14]["first"], 3);
    assert_eq!(lines[15]["quiet"], true);
}

#[test]
fn wrong_arguments_are_explained() {
    for arguments in [&[][..], &["-", "loud"], &["/no/such/port"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_agent")).args(arguments).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success());
        assert!(error.contains("expected") || error.contains("/no/such/port"), "{error}");
    }
}
