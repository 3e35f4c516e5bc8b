//! Requests to a running VM by its API socket.

use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mce_relay_vmm::api::types::vm::{Ping, Status, VmInfo};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use crate::client::answer::Answer;
use crate::client::ask::Asked;
use crate::client::error::ClientError;
use crate::client::patience::Patience;

/// The longest answer that [`get_soon`] accepts, in bytes.
const MAX_IN_PASSING: u64 = 1 << 20;

/// `GET /api/v1/<what>`.
///
/// # Errors
/// See [`ClientError`].
pub fn get<T: DeserializeOwned>(socket: &Path, what: &str) -> Result<T, ClientError> {
    read(socket, &mut Answer::open(socket, Asked::get(what), Patience::WhileItLives)?)
}

/// As [`get`]; also returns the process that answers, as the kernel has it; 0 if it is in another PID namespace.
///
/// # Errors
/// See [`ClientError`].
pub fn get_and_pid<T: DeserializeOwned>(
    socket: &Path,
    what: &str,
) -> Result<(u32, T), ClientError> {
    let mut answer = Answer::open(socket, Asked::get(what), Patience::WhileItLives)?;
    Ok((answer.pid(), read(socket, &mut answer)?))
}

/// Parses an answer as it arrives, so that a long ledger is not in memory twice. By `dyn Read`, as each type of reader
/// would add a parser to the program.
fn read<T: DeserializeOwned>(socket: &Path, answer: &mut dyn Read) -> Result<T, ClientError> {
    serde_json::from_reader(BufReader::new(answer)).map_err(|error| match error.is_io() {
        true => broken(socket, error.into()),
        false => ClientError::Stranger { path: socket.to_owned(), what: error.to_string() },
    })
}

/// As [`get`], with a limit of `within` for the whole answer, for callers that ask many VMs. Also returns the process
/// that answers, as the kernel has it; 0 if it is in another PID namespace.
///
/// # Errors
/// See [`ClientError`].
pub fn get_soon<T: DeserializeOwned>(
    socket: &Path,
    what: &str,
    within: Duration,
) -> Result<(u32, T), ClientError> {
    let patience = Patience::Until(Instant::now() + within);
    let answer = Answer::open(socket, Asked::get(what), patience)?;
    Ok((answer.pid(), read(socket, &mut answer.take(MAX_IN_PASSING))?))
}

/// An answer that names the process of the VM.
pub trait OfProcess: DeserializeOwned {
    /// That process.
    fn pid(&self) -> u32;
}

/// As [`get`], for callers that use that process's /proc next: the process that the answer names is the one that
/// listens at the socket.
///
/// # Errors
/// See [`ClientError`].
pub fn get_of_process<T: OfProcess>(socket: &Path, what: &str) -> Result<T, ClientError> {
    let path = || socket.to_owned();
    let (is, told): (u32, T) = get_and_pid(socket, what)?;
    match told.pid() {
        says if says == is => Ok(told),
        says => Err(ClientError::OtherProcess { path: path(), says, is }),
    }
}

/// `GET /api/v1/<what>` with an answer that is not JSON: returns all its bytes.
///
/// # Errors
/// See [`ClientError`].
pub fn get_bytes(socket: &Path, what: &str) -> Result<Vec<u8>, ClientError> {
    ask(socket, Asked::get(what))
}

/// `PUT /api/v1/<what>` without a body.
///
/// # Errors
/// See [`ClientError`].
pub fn put(socket: &Path, what: &str) -> Result<(), ClientError> {
    ask(socket, Asked { method: "PUT", what, body: &[] }).map(drop)
}

/// `PUT /api/v1/<what>` with `body` as JSON.
///
/// # Errors
/// See [`ClientError`].
pub fn put_json<T: DeserializeOwned>(
    socket: &Path,
    what: &str,
    body: &impl Serialize,
) -> Result<T, ClientError> {
    // Plain structs of strings and numbers: their serialisation cannot fail.
    let body = serde_json::to_vec(body).unwrap_or_default();
    read(socket, &mut &*ask(socket, Asked { method: "PUT", what, body: &body })?)
}

/// `GET /api/v1/<what>` with an answer that comes line by line as long as there is more.
///
/// # Errors
/// See [`ClientError`].
pub fn lines(socket: &Path, what: &str) -> Result<Lines, ClientError> {
    let answer = Answer::open(socket, Asked::get(what), Patience::WhileItLives)?;
    Ok(Lines { lines: answer.endless().lines(), path: socket.to_owned() })
}

/// Lines of an answer that goes on.
pub struct Lines {
    lines: io::Lines<Answer>,
    path: PathBuf,
}

impl Iterator for Lines {
    type Item = Result<String, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.lines.next().map(|line| line.map_err(|source| broken(&self.path, source)))
    }
}

fn ask(socket: &Path, asked: Asked<'_>) -> Result<Vec<u8>, ClientError> {
    let mut body = Vec::new();
    match Answer::open(socket, asked, Patience::WhileItLives)?.read_to_end(&mut body) {
        Ok(_) => Ok(body),
        Err(source) => Err(broken(socket, source)),
    }
}

/// The error for an answer that broke off.
fn broken(socket: &Path, source: io::Error) -> ClientError {
    source
        .downcast::<ClientError>()
        .unwrap_or_else(|source| ClientError::Talk { path: socket.to_owned(), source })
}

impl OfProcess for VmInfo {
    fn pid(&self) -> u32 {
        self.pid
    }
}

impl OfProcess for Status {
    fn pid(&self) -> u32 {
        self.vm.pid
    }
}

impl OfProcess for Ping {
    fn pid(&self) -> u32 {
        self.pid
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    use super::*;
    use mce_relay_vmm::words;

    /// What `ask` makes of a server that answers with `body`, and says that it has `len` bytes.
    fn answered<T>(body: &[u8], len: usize, ask: impl FnOnce(&Path) -> T) -> T {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                // Nothing of the request may be left behind: closing would reset the connection.
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).unwrap();
                    request.push(byte[0]);
                }
                write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {len}\r\n\r\n").unwrap();
                stream.write_all(body).unwrap();
            });
            ask(&path)
        })
    }

    #[test]
    fn the_process_is_the_one_that_listens() {
        let own = std::process::id();
        for (pid, believed) in [(own, true), (1, false), (0, false)] {
            let body = format!(r#"{{"version":"","pid":{pid},"name":null}}"#);
            let told = answered(body.as_bytes(), body.len(), |path| {
                get_of_process::<Ping>(path, "vmm.ping")
            });
            match told {
                Ok(ping) => assert!(believed && ping.pid == own),
                Err(ClientError::OtherProcess { says, is, .. }) => {
                    assert!(!believed);
                    assert_eq!((says, is), (pid, own));
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    #[test]
    fn bytes_are_taken_as_a_whole_or_not_at_all() {
        for (len, whole) in [(3, true), (4, false)] {
            match answered(b"\0\xffa", len, |path| get_bytes(path, "vm.memory")) {
                Ok(bytes) => assert!(whole && bytes == b"\0\xffa", "{bytes:?}"),
                Err(error) => {
                    assert!(!whole && words::with_causes(&error).contains("cut short"), "{error}")
                }
            }
        }
    }

    #[test]
    fn a_socket_that_is_not_there_is_named() {
        let error = get::<serde_json::Value>(Path::new("/nowhere/api"), "vmm.ping").unwrap_err();
        assert!(error.to_string().contains("/nowhere/api"), "{error}");
    }

    #[test]
    fn what_is_no_vm_is_told_from_one_that_breaks_off() {
        let dir = tempfile::tempdir().unwrap();
        for (at, words) in
            ["SSH-2.0-x\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Le", ""].iter().enumerate()
        {
            let path = dir.path().join(format!("{at}"));
            let listener = UnixListener::bind(&path).unwrap();
            let server = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).unwrap();
                stream.write_all(words.as_bytes()).unwrap();
            });
            let error = get::<serde_json::Value>(&path, "vmm.ping").unwrap_err();
            server.join().unwrap();
            assert_eq!(matches!(error, ClientError::Stranger { .. }), at == 0, "{error:?}");
            assert_eq!(words::with_causes(&error).contains("cut short"), at != 0, "{error:?}");
        }
    }

    /// No connection is accepted, as by a stopped VMM.
    #[test]
    fn who_says_nothing_has_its_process_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let _listener = UnixListener::bind(&path).unwrap();
        let soon = Duration::from_millis(100);
        let Err(ClientError::Silent { peer, .. }) =
            get_soon::<serde_json::Value>(&path, "vm.info", soon)
        else {
            panic!("there was an answer");
        };
        assert_eq!(peer.pid, std::process::id());
    }

    /// One request takes long, and another is answered meanwhile: the VM is there.
    #[test]
    fn who_works_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut slow, _) = listener.accept().unwrap();
            let mut request = [0; 4096];
            let _ = slow.read(&mut request).unwrap();
            // Nothing is said until it was asked twice whether the VM is there.
            for _ in 0..2 {
                let (mut ping, _) = listener.accept().unwrap();
                let read = ping.read(&mut request).unwrap();
                assert!(request[..read].starts_with(b"GET /api/v1/vmm.ping "));
                ping.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").unwrap();
            }
            slow.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n7").unwrap();
        });
        assert_eq!(get::<u32>(&path, "vm.extents").unwrap(), 7);
        server.join().unwrap();
    }
}
