//! Asks the agent in a guest, by the socket of the guest's second serial port.
//!
//! Its answers come from a guest, and are believed only as far as they concern that guest.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mce_relay_vmm::outlets::peer::{self, Peer};
use mce_relay_vmm::words::counted;
use serde::Deserialize;
use serde_json::Value;

/// How long the agent may take; an emulated guest is slow.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is checked whether something holds up the VMM.
const LOOK: Duration = Duration::from_secs(5);
/// The longest line that is accepted from the agent.
const MAX_LINE: u64 = 1 << 20;
/// The longest name of a process; the kernel's own limit is 15 for a program's and 63 for its own.
const MAX_NAME: usize = 64;
/// At most this many characters of an agent's error are shown; its longest one has fewer.
const MAX_SHOWN: usize = 400;

/// Why the agent gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// What was asked for cannot be the name of a process.
    #[error("{0:?} is no process; expected its pid in the guest, or its name without blanks")]
    Name(String),
    /// No process listens there.
    #[error(
        "no guest's second serial port is to be reached at {path}; expected the path that \
         `mce-relay run --serial2 socket=PATH` was given",
        path = .path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The VMM itself does not run.
    #[error("the VM at {path} does not answer: {peer}", path = .path.display())]
    Stands {
        /// The socket.
        path: PathBuf,
        /// Its process.
        peer: Peer,
    },
    /// The VMM has not taken the connection.
    #[error(
        "somebody else is connected to the agent's port at {path}, or the guest does not take what \
         somebody sent there before; it is for one client at a time, so end the other",
        path = .path.display()
    )]
    Taken {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The guest did not answer, or not completely.
    #[error(
        "no agent answers at {path}; wait until the guest is up, and see that it runs one on its \
         second serial port, as the guest image does",
        path = .path.display()
    )]
    Silent {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The answer is not an agent's.
    #[error("what answers at {path} is no agent: {what}", path = .path.display())]
    Stranger {
        /// The socket.
        path: PathBuf,
        /// What was not understood.
        what: String,
    },
    /// The agent refused.
    #[error("the guest's agent says: {0}")]
    Refused(String),
}

/// An address as the agent writes it.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Hex(#[serde(with = "mce_relay::hex")] u64);

/// A page of a process in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessPage {
    /// Guest-physical address.
    pub gpa: u64,
    /// Virtual address in that process.
    pub va: u64,
    /// The area that it lies in, as /proc/PID/maps calls it; without control characters.
    pub area: String,
}

/// A process in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its pid there.
    pub pid: u32,
    /// Its name; without control characters.
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
    process_within(socket, which, max, PATIENCE)
}

fn process_within(
    socket: &Path,
    which: &str,
    max: u32,
    patience: Duration,
) -> Result<Process, AgentError> {
    let unfit = |c: char| c.is_whitespace() || c.is_control();
    if which.is_empty() || which.len() > MAX_NAME || which.contains(unfit) {
        return Err(AgentError::Name(which.chars().take(MAX_NAME).collect()));
    }
    let path = || socket.to_owned();
    let stranger = |what: String| AgentError::Stranger { path: path(), what };
    let (stream, pid) = peer::connect(socket, patience).map_err(|source| {
        let peer = Peer::listening_at(socket);
        match source.kind() {
            io::ErrorKind::WouldBlock if peer.is_held() => {
                AgentError::Stands { path: path(), peer }
            }
            _ => AgentError::Connect { path: path(), source },
        }
    })?;
    let mut port = Port::new(stream, pid, patience);

    // An agent answers unknown words, too, and repeats the first one. So answers before the one to this mark belong to
    // an earlier client that has left, and may name another process's pages. The empty line ends a line that such a
    // client left unfinished.
    let mark = format!("sync-{:016x}", fastrand::u64(..));
    let asked = format!("\n{mark}\nprocess {which} {max}\n");
    let failed = |source: io::Error, port: &Port| match port.held() {
        _ if source.kind() == io::ErrorKind::InvalidData => stranger(source.to_string()),
        Some(peer) => AgentError::Stands { path: path(), peer },
        None if port.is_unread() => AgentError::Taken { path: path(), source },
        None => AgentError::Silent { path: path(), source },
    };
    port.send(&asked).map_err(|source| failed(source, &port))?;

    let (mut is_first, mut is_ours) = (true, false);
    loop {
        let line = port.line().map_err(|source| failed(source, &port))?;
        let value: Value = match serde_json::from_slice(&line) {
            Ok(value) => value,
            // The port keeps the end of unread output, so the first line may be incomplete.
            Err(_) if is_first && line.trim_ascii_end().ends_with(b"}") => Value::Null,
            Err(error) => {
                let line = plain(String::from_utf8_lossy(&line).trim_end());
                return Err(stranger(format!("{error} in {line:?}")));
            }
        };
        is_first = false;
        if value["reply"] == mark {
            is_ours = true;
        }
        // Skips events, and replies to other clients.
        if !is_ours || value["reply"] != "process" {
            continue;
        }
        if value["ok"] != true {
            return Err(AgentError::Refused(plain(value["error"].as_str().unwrap_or("it failed"))));
        }
        let Reply { pid, comm, pages } =
            serde_json::from_value(value).map_err(|error| stranger(plain(&error.to_string())))?;
        let count = u32::try_from(pages.len()).unwrap_or(u32::MAX);
        if !(1..=max).contains(&count) {
            let pages = counted(u64::from(count), "page");
            return Err(stranger(format!("it gave {pages} when asked for 1 to {max}")));
        }
        let page = |ReplyPage { gpa, va, area }: ReplyPage| ProcessPage {
            gpa: gpa.0,
            va: va.0,
            area: plain(&area),
        };
        let pages = pages.into_iter().map(page).collect();
        return Ok(Process { pid, comm: plain(&comm), pages });
    }
}

/// Text from a guest, cut to a length and without control characters for a terminal.
fn plain(words: &str) -> String {
    let harmless = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    words.chars().take(MAX_SHOWN).map(harmless).collect()
}

/// A connection to the agent, with its deadline.
struct Port {
    lines: BufReader<UnixStream>,
    /// The VMM's process, as [`peer::connect`] returns it.
    pid: u32,
    patience: Duration,
    deadline: Instant,
}

impl Port {
    fn new(stream: UnixStream, pid: u32, patience: Duration) -> Self {
        Self { lines: BufReader::new(stream), pid, patience, deadline: Instant::now() + patience }
    }

    /// The VMM, if something keeps it from running.
    fn held(&self) -> Option<Peer> {
        Some(Peer::of(self.pid)).filter(Peer::is_held)
    }

    fn send(&mut self, text: &str) -> io::Result<()> {
        let mut stream = self.lines.get_ref();
        stream.set_write_timeout(Some(self.patience))?;
        stream.write_all(text.as_bytes())
    }

    /// The next line.
    fn line(&mut self) -> io::Result<Vec<u8>> {
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let words = format!("no answer came within {:?}", self.patience);
                return Err(io::Error::new(io::ErrorKind::TimedOut, words));
            }
            self.lines.get_ref().set_read_timeout(Some(left.min(LOOK)))?;
            let room = MAX_LINE.saturating_sub(line.len() as u64);
            match (&mut self.lines).take(room).read_until(b'\n', &mut line) {
                Ok(0) if room == 0 => {
                    let words = "a line without end";
                    return Err(io::Error::new(io::ErrorKind::InvalidData, words));
                }
                Ok(0) => {
                    let words = "the VMM has closed the port";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, words));
                }
                Ok(_) => {}
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock && self.held().is_none() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(line)
    }

    /// Whether the VMM has not read everything that was sent. It takes the next client only when the previous one has
    /// gone, and until then leaves a client's data in the socket.
    fn is_unread(&self) -> bool {
        let mut bytes: libc::c_int = 0;
        // SAFETY: TIOCOUTQ, which is SIOCOUTQ for a socket, writes one int; the descriptor is open.
        let done = unsafe {
            libc::ioctl(self.lines.get_ref().as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes)
        };
        done == 0 && bytes > 0
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    const REPLY: &str = concat!(
        "{\"reply\":\"process\",\"ok\":true,\"pid\":7,\"comm\":\"sh\",\"pages\":",
        "[{\"gpa\":\"0x5000\",\"va\":\"0x7f00\",\"area\":\"[heap]\"}]}\n",
    );

    fn reply() -> Process {
        let page = ProcessPage { gpa: 0x5000, va: 0x7f00, area: "[heap]".to_owned() };
        Process { pid: 7, comm: "sh".to_owned(), pages: vec![page] }
    }

    /// What becomes of a request when `before` is what waits at the port, and `after` what the agent
    /// says to it.
    fn answered(before: &str, after: &str) -> Result<Process, AgentError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let listener = UnixListener::bind(&path).unwrap();
        let (before, after) = (before.to_owned(), after.to_owned());
        let server = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream);
            let mut next = || {
                let mut line = String::new();
                lines.read_line(&mut line).unwrap();
                line
            };
            assert_eq!(next(), "\n", "ends what somebody left unfinished");
            let mark = next();
            assert_eq!(next(), "process sh 2\n");
            let mark = mark.trim_end();
            assert!(mark.len() <= 32, "the agent repeats no more of a word");
            let text = format!("{before}{{\"reply\":\"{mark}\",\"ok\":false}}\n{after}");
            // A client that has read enough closes before all is written.
            let _ = lines.get_mut().write_all(text.as_bytes());
        });
        let result = process(&path, "sh", 2);
        server.join().unwrap();
        result
    }

    #[test]
    fn pages_are_taken_from_between_the_events() {
        let event = "{\"event\":\"kmsg\",\"line\":\"x\"}\n";
        let found = answered(event, &format!("{event}{REPLY}"));
        assert_eq!(found.unwrap(), reply());
    }

    #[test]
    fn what_others_left_at_the_port_is_passed_over() {
        let older = REPLY.replace("0x5000", "0x666000").replace(":7,", ":6,");
        let failed = "{\"reply\":\"process\",\"ok\":false,\"error\":\"not yours\"}\n";
        let half = "t\":\"kmsg\",\"line\":\"x\"}\n";
        assert_eq!(answered(&format!("{half}{older}{failed}"), REPLY).unwrap(), reply());
        let error = answered(&format!("{older}{half}"), REPLY).unwrap_err();
        assert!(
            matches!(error, AgentError::Stranger { .. }),
            "only the first can be half: {error}"
        );
    }

    #[test]
    fn what_goes_wrong_is_said() {
        let no = "{\"reply\":\"process\",\"ok\":false,\"error\":\"no \\u001b[2Jsh\"}\n";
        let error = answered("", no).unwrap_err();
        assert!(
            matches!(&error, AgentError::Refused(words) if words == "no \u{fffd}[2Jsh"),
            "{error}"
        );
        let error = answered("login: \n", "").unwrap_err();
        assert!(error.to_string().contains("login:"), "{error}");
        let error = answered("", "{\"event\":\"kmsg\"").unwrap_err();
        assert!(matches!(error, AgentError::Silent { .. }), "{error}");
        let error = process(Path::new("/nowhere/agent"), "sh", 1).unwrap_err();
        assert!(error.to_string().contains("--serial2"), "{error}");
        for name in ["a b", "", "a\n", &"x".repeat(65)] {
            let error = process(Path::new("/nowhere/agent"), name, 1).unwrap_err();
            assert!(error.to_string().contains("is no process"), "{error}");
        }
    }

    #[test]
    fn no_more_is_taken_than_was_asked_for() {
        let page = "{\"gpa\":\"0x5000\",\"va\":\"0x7f00\",\"area\":\"x\"}";
        for pages in ["", &[page; 3].join(",")] {
            let text = format!(
                "{{\"reply\":\"process\",\"ok\":true,\"pid\":7,\"comm\":\"sh\",\"pages\":[{pages}]}}\n"
            );
            let error = answered("", &text).unwrap_err();
            assert!(error.to_string().contains("asked for 1 to 2"), "{error}");
        }
        let error = answered("", &"x".repeat((1 << 20) + 1)).unwrap_err();
        assert!(error.to_string().contains("without end"), "{error}");
    }

    #[test]
    fn a_port_that_others_use_is_told_from_a_guest_without_an_agent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let listener = UnixListener::bind(&path).unwrap();
        let soon = Duration::from_millis(200);
        // No connection is accepted.
        let error = process_within(&path, "sh", 1, soon).unwrap_err();
        assert!(error.to_string().contains("somebody else"), "{error}");
        drop(listener.accept().unwrap());
        // The server reads everything and answers nothing.
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut taken = Vec::new();
            stream.read_to_end(&mut taken).unwrap();
        });
        let error = process_within(&path, "sh", 1, soon).unwrap_err();
        assert!(matches!(error, AgentError::Silent { .. }), "{error}");
        server.join().unwrap();
    }
}
