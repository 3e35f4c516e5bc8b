//! Any bytes to the API's socket, and any body to each of its paths: every answer is HTTP with a status that
//! docs/openapi.json has, and one that is JSON is JSON.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use mce_relay_vmm::api::current::Current;
use mce_relay_vmm::api::server::Api;
use mce_relay_vmm::events::hub::Hub;
use mce_relay_vmm::sandbox::seccomp::Filters;

static SOCKET: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("mce-relay-fuzz-{}", std::process::id()));
    let api = Api::start(&path, Current::default(), Hub::default(), &Filters::default()).unwrap();
    // As long as the process.
    std::mem::forget(api);
    path
});

const PATHS: [&str; 6] =
    ["vm.retire", "vm.poison", "vm.inject", "vm.pause", "vm.memory?gpa=0&len=1", "relay.events"];
/// Of the document, and what hyper says of what is no HTTP.
const STATUSES: [u16; 12] = [200, 204, 400, 404, 405, 408, 409, 413, 414, 431, 500, 503];

fuzz_target!(|bytes: &[u8]| {
    let Some((first, body)) = bytes.split_first() else { return };
    let request = match PATHS.get(usize::from(*first)) {
        Some(path) => {
            let head = format!(
                "PUT /api/v1/{path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
                body.len()
            );
            [head.as_bytes(), body].concat()
        }
        None => body.to_vec(),
    };
    let mut stream = UnixStream::connect(&*SOCKET).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    // It may have heard enough.
    let _ = stream.write_all(&request);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    if stream.read_to_end(&mut answer).is_err() {
        return;
    }
    let mut rest = answer.as_slice();
    // Several requests have several answers.
    if !rest.is_empty() {
        assert!(rest.starts_with(b"HTTP/1."), "{:?}", String::from_utf8_lossy(rest));
        let status: u16 = std::str::from_utf8(&rest[9..12]).unwrap().parse().unwrap();
        assert!(STATUSES.contains(&status) || status == 100, "{status}");
        assert_ne!(status, 500, "{:?}", String::from_utf8_lossy(rest));
        let end = rest.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
        let head = String::from_utf8_lossy(&rest[..end]).to_ascii_lowercase();
        rest = &rest[end + 4..];
        let len = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        if head.contains("content-type: application/json")
            && let Some(len) = len.and_then(|len| len.parse::<usize>().ok())
            && rest.len() >= len
            && len > 0
        {
            serde_json::from_slice::<serde_json::Value>(&rest[..len]).unwrap();
        }
    }
});
