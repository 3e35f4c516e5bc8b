//! The client and the server of the API, each against the other.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mce_relay_vmm::api::current::Current;
use mce_relay_vmm::api::server::{Api, ApiError, MAX_FOLLOWERS};
use mce_relay_vmm::api::types::vm::VmInfo;
use mce_relay_vmm::api::types::vm_event::VmEvent;
use mce_relay_vmm::events::entry::What;
use mce_relay_vmm::events::hub::{Hub, KEPT};
use mce_relay_vmm::outlets::sockets::BindError;
use mce_relay_vmm::sandbox::seccomp::Filters;
use serde_json::Value;
use tempfile::TempDir;

use crate::client::requests;

const FOLLOW: &str = "GET /api/v1/relay.events?follow=true HTTP/1.1\r\nHost: x\r\n\r\n";

fn served() -> (TempDir, PathBuf, Hub, Api) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api");
    let hub = Hub::default();
    let api = Api::start(&path, Current::default(), hub.clone(), &Filters::default()).unwrap();
    (dir, path, hub, api)
}

fn ask(path: &Path, request: &str) -> UnixStream {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    stream
}

fn status_of(stream: UnixStream) -> String {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line
}

#[test]
fn a_path_that_exists_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api");
    std::fs::write(&path, "mine").unwrap();
    let error =
        Api::start(&path, Current::default(), Hub::default(), &Filters::default()).err().unwrap();
    assert!(matches!(error, ApiError::Bind { source: BindError::Exists, .. }), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
}

#[test]
fn the_socket_is_its_owners_and_goes_with_the_server() {
    let (_dir, path, _hub, api) = served();
    let mode = path.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let ping: Value = requests::get(&path, "vmm.ping").unwrap();
    assert_eq!(ping["pid"], std::process::id());
    let error = requests::get::<VmInfo>(&path, "vm.info").unwrap_err().to_string();
    assert!(error.contains("between two boots"), "{error}");
    let error = requests::get::<VmInfo>(&path, "nothing").unwrap_err().to_string();
    assert!(error.contains("/api/v1/nothing"), "{error}");
    let error = requests::put(&path, "vmm.ping").unwrap_err().to_string();
    assert!(error.contains("PUT"), "{error}");
    drop(api);
    assert!(!path.exists());
}

#[test]
fn whoever_is_slow_holds_up_nobody() {
    let (_dir, path, _hub, _api) = served();
    let _silent = UnixStream::connect(&path).unwrap();
    let _half = ask(&path, "PUT /api/v1/vm.retire HTTP/1.1\r\nHos");
    let length = "PUT /api/v1/vm.retire HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{";
    let _body: Vec<UnixStream> = (0..8).map(|_| ask(&path, length)).collect();
    for _ in 0..3 {
        requests::get::<Value>(&path, "vmm.ping").unwrap();
    }
}

#[test]
fn what_is_too_long_is_refused() {
    let (_dir, path, _hub, _api) = served();
    let announced =
        "PUT /api/v1/vm.retire HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n";
    let status = status_of(ask(&path, announced));
    assert!(status.contains("413"), "{status}");

    let mut chunks = ask(
        &path,
        "PUT /api/v1/vm.retire HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
    );
    let chunk = format!("10000\r\n{}\r\n", " ".repeat(0x10000));
    // It is cut off somewhere on the way.
    let sent = (0..1000).take_while(|_| chunks.write_all(chunk.as_bytes()).is_ok()).count();
    assert!(sent < 1000, "{sent} chunks of 64 KiB were taken");

    let mut header = ask(&path, "GET /api/v1/vmm.ping HTTP/1.1\r\nX: ");
    let sent = (0..10_000).take_while(|_| header.write_all(&[b'x'; 1024]).is_ok()).count();
    assert!(sent < 1000, "{sent} KiB of a header were taken");
    requests::get::<Value>(&path, "vmm.ping").unwrap();
}

#[test]
fn events_are_streamed_and_come_to_an_end() {
    let (_dir, path, hub, api) = served();
    let emit = |count| (0..count).for_each(|_| hub.emit(What::Vm(VmEvent::Resumed {})));
    emit(3);
    let kept = requests::get_bytes(&path, "relay.events").unwrap();
    assert_eq!(kept.split(|byte| *byte == b'\n').count(), 3 + 1);

    let mut stream = ask(&path, "GET /api/v1/relay.events?follow=true HTTP/1.1\r\nHost: x\r\n\r\n");
    let mut got = vec![0; 64];
    stream.read_exact(&mut got).unwrap();
    emit(5);
    hub.end();
    drop(api);
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    got.extend(rest);
    let text = String::from_utf8(got).unwrap();
    assert_eq!(text.matches("resumed").count(), 8, "{text}");
    assert!(text.ends_with("0\r\n\r\n"), "the stream is complete: {text}");
}

#[test]
fn a_client_that_has_said_everything_gets_its_answer() {
    let (_dir, path, hub, _api) = served();
    let mut stream =
        ask(&path, "GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("\"pid\""), "{answer}");

    // One that follows events goes on getting them.
    let mut follower = ask(&path, FOLLOW);
    follower.shutdown(std::net::Shutdown::Write).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    hub.emit(What::Vm(VmEvent::Resumed {}));
    hub.end();
    let mut events = String::new();
    follower.read_to_string(&mut events).unwrap();
    assert_eq!(events.matches("resumed").count(), 1, "{events}");
}

/// No event happens, so nothing is written to clients that have gone.
#[test]
fn a_follower_that_goes_gives_its_place_back_at_once() {
    let (_dir, path, hub, _api) = served();
    hub.emit(What::Vm(VmEvent::Resumed {}));
    let follow = || {
        let mut head = BufReader::new(ask(&path, FOLLOW));
        let mut line = String::new();
        head.read_line(&mut line).unwrap();
        (line, head)
    };
    for round in 0..4 {
        let start = Instant::now();
        let mut followers = Vec::new();
        while followers.len() < MAX_FOLLOWERS {
            let (status, follower) = follow();
            match status.contains("200") {
                true => followers.push(follower),
                false => {
                    assert!(start.elapsed() < Duration::from_secs(20), "{round}: {status}")
                }
            }
        }
        let (status, _) = follow();
        assert!(status.contains("503"), "{round}: {status}");
        for follower in &followers {
            // Some say first that they have nothing more to say.
            if round % 2 == 1 {
                follower.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
            }
        }
    }
    assert!(hub.waiting() <= MAX_FOLLOWERS, "{} are kept to be woken", hub.waiting());
}

#[test]
fn a_follower_that_does_not_read_is_told_what_it_missed() {
    let (_dir, path, hub, _api) = served();
    let stuck = ask(&path, "GET /api/v1/relay.events?follow=true HTTP/1.1\r\nHost: x\r\n\r\n");
    let mut stuck = BufReader::new(stuck);
    let mut line = String::new();
    hub.emit(What::Vm(VmEvent::Resumed {}));
    while !line.contains("resumed") {
        line.clear();
        stuck.read_line(&mut line).unwrap();
    }
    let count = 2 * KEPT as u64;
    (0..count).for_each(|_| hub.emit(What::Vm(VmEvent::Resumed {})));
    let (mut got, mut missed) = (0, 0);
    while got + missed < count {
        line.clear();
        stuck.read_line(&mut line).unwrap();
        match serde_json::from_str::<Value>(&line) {
            Ok(event) if event["event"] == "missed" => {
                assert_eq!(event["source"], "monitor");
                missed += event["properties"]["events"].as_u64().unwrap();
            }
            Ok(event) if event["event"] == "resumed" => got += 1,
            // The sizes of chunks.
            _ => {}
        }
    }
    assert_eq!(got + missed, count);
    assert!(missed > 0);
}
