//! A console of the guest's, typed at as a person would.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::agent::PATIENCE;

/// A line of the guest's to the host.
#[derive(Debug)]
pub struct Line {
    stream: UnixStream,
    /// What came and was not asked for yet.
    text: String,
}

impl Line {
    /// Connects to the socket that the VMM has made for it.
    pub fn at(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        Self { stream, text: String::new() }
    }

    /// Types `text`.
    pub fn write(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).unwrap();
    }

    /// Waits until `wanted` has come, and returns what came up to its end.
    pub fn wait_for(&mut self, wanted: &str) -> String {
        self.wait_unless(wanted, || false).unwrap_or_default()
    }

    /// The same, as long as it has not `ended`.
    pub fn wait_unless(&mut self, wanted: &str, mut ended: impl FnMut() -> bool) -> Option<String> {
        let end = std::time::Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.text.find(wanted) {
                let rest = self.text.split_off(at + wanted.len());
                return Some(std::mem::replace(&mut self.text, rest));
            }
            if ended() {
                return None;
            }
            assert!(std::time::Instant::now() < end, "no {wanted:?} in {:?}", self.text);
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => panic!("the line was closed after {:?}", self.text),
                Ok(len) => self.text.push_str(&String::from_utf8_lossy(&bytes[..len])),
                Err(_) => {}
            }
        }
    }

    /// Has the shell on this line run `command`, and returns what it printed.
    pub fn run(&mut self, command: &str) -> String {
        // The echo of the command does not have the words that stand for its end.
        self.write(&format!("{command}; echo the\\ end=$?=\n"));
        self.wait_for("the end=0=")
    }
}
