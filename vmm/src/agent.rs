//! Asks the agent in a guest, by the socket of the guest's second serial port.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;

/// How long the agent may take; an emulated guest takes its time.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest line that is taken for one of its.
const MAX_LINE: u64 = 1 << 20;

/// Why the agent gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Nobody listens there.
    #[error(
        "cannot reach the guest's second serial port at {path}; it is the path that was given to \
         `mce-relay run --serial2 socket=PATH`",
        path = .path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The guest says nothing, or not all of it.
    #[error(
        "no agent answers at {path}: the guest is not up yet, has no agent on its second serial port, or \
         somebody else is connected to it (one client at a time)",
        path = .path.display()
    )]
    Silent {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// What came is not an agent's.
    #[error("what answers at {path} is no agent: {what}", path = .path.display())]
    Stranger {
        /// The socket.
        path: PathBuf,
        /// What was not understood.
        what: String,
    },
    /// It has no such pages.
    #[error("the guest's agent says: {0}")]
    Refused(String),
}

/// An address as the agent writes it.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Hex(#[serde(with = "mce_relay::event::hex")] u64);

/// A page of a process in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessPage {
    /// Guest-physical address.
    pub gpa: u64,
    /// Virtual address in that process.
    pub va: u64,
    /// The area that it lies in, as /proc/PID/maps calls it.
    pub area: String,
}

/// A process in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its pid there.
    pub pid: u32,
    /// Its name.
    pub comm: String,
    /// Some of its pages, at least one.
    pub pages: Vec<ProcessPage>,
}

#[derive(Deserialize)]
struct Reply {
    pid: u32,
    comm: String,
    pages: Vec<ReplyPage>,
}

#[derive(Deserialize)]
struct ReplyPage {
    gpa: Hex,
    va: Hex,
    area: String,
}

/// Asks for pages of the process `which` of the guest (its pid or its name), `max` at most.
///
/// # Errors
/// See [`AgentError`].
pub fn process(socket: &Path, which: &str, max: u32) -> Result<Process, AgentError> {
    if which.is_empty() || which.contains(|c: char| c.is_whitespace() || c.is_control()) {
        let words =
            format!("{which:?} is no process; expected its pid, or its name without blanks");
        return Err(AgentError::Refused(words));
    }
    let path = || socket.to_owned();
    let mut stream = UnixStream::connect(socket)
        .map_err(|source| AgentError::Connect { path: path(), source })?;
    let silent = |source| AgentError::Silent { path: path(), source };
    writeln!(stream, "process {which} {max}").map_err(silent)?;
    let deadline = Instant::now() + PATIENCE;
    let mut lines = BufReader::new(stream);
    loop {
        let line = next_line(&mut lines, deadline).map_err(silent)?;
        let stranger = |what: String| AgentError::Stranger { path: path(), what };
        let value: Value = serde_json::from_slice(&line).map_err(|error| {
            stranger(format!("{error} in {:?}", String::from_utf8_lossy(&line).trim_end()))
        })?;
        // Events, and the reply to what somebody asked before.
        if value["reply"] != "process" {
            continue;
        }
        if value["ok"] != true {
            let words = value["error"].as_str().unwrap_or("it failed").to_owned();
            return Err(AgentError::Refused(words));
        }
        let Reply { pid, comm, pages } =
            serde_json::from_value(value).map_err(|error| stranger(error.to_string()))?;
        let page =
            |ReplyPage { gpa, va, area }: ReplyPage| ProcessPage { gpa: gpa.0, va: va.0, area };
        return Ok(Process { pid, comm, pages: pages.into_iter().map(page).collect() });
    }
}

fn next_line(lines: &mut BufReader<UnixStream>, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let words = format!("nothing came within {} s", PATIENCE.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, words));
        }
        lines.get_ref().set_read_timeout(Some(left))?;
        let room = MAX_LINE.saturating_sub(line.len() as u64);
        match lines.take(room).read_until(b'\n', &mut line) {
            Ok(0) if room == 0 => return Err(io::Error::other("a line without end")),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// What becomes of a request that is answered so.
    fn answered(lines: &'static str) -> Result<Process, AgentError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut stream = BufReader::new(stream);
            let mut asked = String::new();
            stream.read_line(&mut asked).unwrap();
            assert_eq!(asked, "process sh 2\n");
            stream.get_mut().write_all(lines.as_bytes()).unwrap();
        });
        let result = process(&path, "sh", 2);
        server.join().unwrap();
        result
    }

    #[test]
    fn pages_are_taken_from_between_the_events() {
        let found = answered(concat!(
            "{\"event\":\"kmsg\",\"line\":\"x\"}\n",
            "{\"reply\":\"process\",\"ok\":true,\"pid\":7,\"comm\":\"sh\",\"pages\":",
            "[{\"gpa\":\"0x5000\",\"va\":\"0x7f00\",\"area\":\"[heap]\"}]}\n",
        ));
        let page = ProcessPage { gpa: 0x5000, va: 0x7f00, area: "[heap]".to_owned() };
        assert_eq!(found.unwrap(), Process { pid: 7, comm: "sh".to_owned(), pages: vec![page] });
    }

    #[test]
    fn what_goes_wrong_is_said() {
        let error =
            answered("{\"reply\":\"process\",\"ok\":false,\"error\":\"no sh\"}\n").unwrap_err();
        assert!(matches!(&error, AgentError::Refused(words) if words == "no sh"), "{error}");
        let error = answered("login: \n").unwrap_err();
        assert!(error.to_string().contains("login:"), "{error}");
        let error = answered("{\"event\":\"kmsg\"").unwrap_err();
        assert!(matches!(error, AgentError::Silent { .. }), "{error}");
        let error = process(Path::new("/nowhere/agent"), "sh", 1).unwrap_err();
        assert!(error.to_string().contains("--serial2"), "{error}");
        let error = process(Path::new("/nowhere/agent"), "a b", 1).unwrap_err();
        assert!(error.to_string().contains("\"a b\""), "{error}");
    }
}
