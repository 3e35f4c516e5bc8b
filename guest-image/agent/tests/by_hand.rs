//! The agent as a person meets it: started with `-` or on a socket, spoken to line by line.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

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
    let has_log = File::open("/dev/kmsg").is_ok();
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

/// A request and its reply; what comes between is no reply.
fn ask(port: &mut (impl Read + Write), request: &str) -> Value {
    writeln!(port, "{request}").unwrap();
    let mut lines = BufReader::new(port).lines();
    loop {
        let line: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        if line["reply"] == *request.split(' ').next().unwrap() {
            return line;
        }
    }
}

#[test]
fn an_agent_on_a_socket_ends_with_its_client() {
    let (mut client, agent) = UnixStream::pair().unwrap();
    let port = || Stdio::from(OwnedFd::from(agent.try_clone().unwrap()));
    let mut child = Command::new(env!("CARGO_BIN_EXE_agent"))
        .args(["socket", "log=off"])
        .stdin(port())
        .stdout(port())
        .spawn()
        .unwrap();
    drop(agent);
    assert_eq!(ask(&mut client, "ping")["ok"], true);
    drop(client);
    assert!(child.wait().unwrap().success());
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Connects to a port of this machine's own vsock.
fn vsock(port: u32) -> io::Result<File> {
    // SAFETY: all-zero is a valid sockaddr_vm, of which a pointer is passed with its size; the descriptor is
    // fresh and given to nobody else.
    unsafe {
        let fd = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = File::from_raw_fd(fd);
        let mut address: libc::sockaddr_vm = std::mem::zeroed();
        address.svm_family = libc::AF_VSOCK.try_into().unwrap();
        (address.svm_cid, address.svm_port) = (libc::VMADDR_CID_LOCAL, port);
        let bytes = size_of_val(&address).try_into().unwrap();
        match libc::connect(socket.as_raw_fd(), (&raw const address).cast(), bytes) {
            0 => Ok(socket),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[test]
fn over_vsock_each_client_has_an_agent_of_its_own() {
    let port = 0x4000_0000 | std::process::id();
    let mut server = Command::new(env!("CARGO_BIN_EXE_agent"));
    let server = server.args([&format!("vsock:{port}"), "log=off"]).stderr(Stdio::piped());
    let mut server = Server(server.spawn().unwrap());
    let begun = Instant::now();
    let mut client = loop {
        match vsock(port) {
            Ok(client) => break client,
            // Nobody listens yet.
            Err(e) if e.raw_os_error() == Some(libc::ECONNRESET) => {
                assert!(begun.elapsed() < Duration::from_secs(20), "{e}");
                sleep(Duration::from_millis(20));
            }
            Err(e) => {
                eprintln!("SKIPPED the agent over vsock: this machine has no vsock to itself: {e}");
                return;
            }
        }
    };
    let first = ask(&mut client, "ping");
    assert_eq!(ask(&mut client, "alloc anon 1")["pages"][0]["page"], 0);
    drop(client);
    let mut client = vsock(port).unwrap();
    assert_ne!(ask(&mut client, "ping")["pid"], first["pid"]);
    assert_eq!(ask(&mut client, "alloc anon 1")["pages"][0]["page"], 0);
    assert!(server.0.try_wait().unwrap().is_none(), "the server goes on");
}

#[test]
fn disks_are_written_and_verified() {
    let path = std::env::temp_dir().join(format!("agent-{}-by-hand", std::process::id()));
    File::create_new(&path).unwrap().set_len(1 << 20).unwrap();
    let disk = path.to_str().unwrap();
    let requests = format!(
        "disk-write {disk} 0 0x2000 1\ndisk-verify {disk} 0 0x3000 1\ndisk-load {disk} 0x10000 2 1\n"
    );
    let lines = talk(&["-", "log=off"], &requests);
    std::fs::remove_file(&path).unwrap();
    let found = |key: &str, name: &str| lines.iter().find(|line| line[key] == name).unwrap();
    assert_eq!(found("reply", "disk-write")["written"], 2);
    let verified = found("reply", "disk-verify");
    assert_eq!(verified["intact"], 2);
    assert_eq!(verified["different"][0]["found"], "zeros");
    assert!(found("event", "disk-load")["write"]["va"].is_string());
    let loaded = found("reply", "disk-load");
    assert_eq!(loaded["wrong"], 0, "{loaded}");
    assert_eq!(loaded["generations"].as_array().unwrap().len(), 16);
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
