//! Asks a running VM by its API socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A VM that has not answered by then will not.
const PATIENCE: Duration = Duration::from_secs(30);
/// Header fields in an answer of ours; far more than it has.
const MAX_HEADERS: usize = 32;
/// And all of them together, in bytes.
const MAX_HEAD: u64 = 64 << 10;

/// Why a VM did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error(
        "cannot reach a VM at {path}; it is the path that was given to `mce-relay run --api-socket`",
        path = .path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The conversation broke off.
    #[error("the VM at {path} did not answer", path = .path.display())]
    Talk {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Something else than this VMM listens there.
    #[error("what listens at {path} is not an mce-relay VM: {what}", path = .path.display())]
    Stranger {
        /// The socket.
        path: PathBuf,
        /// What was not understood.
        what: String,
    },
    /// What it says of its process is not so.
    #[error(
        "what listens at {path} says that it is process {says}, and the kernel says that it is {is} (0: one of \
         another PID namespace); nothing is done to another process's memory. Run this command in the VM's PID \
         namespace (nsenter --pid), and ask no socket whose owner you do not trust",
        path = .path.display()
    )]
    OtherProcess {
        /// The socket.
        path: PathBuf,
        /// The process by its own words.
        says: u32,
        /// The process that listens, by the kernel's.
        is: u32,
    },
    /// The VM answered with an error.
    #[error("the VM says: {error} (HTTP status {status})")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// Its words.
        error: String,
    },
}

/// `GET /api/v1/<what>`.
///
/// # Errors
/// See [`ClientError`].
pub fn get<T: DeserializeOwned>(socket: &Path, what: &str) -> Result<T, ClientError> {
    let path = || socket.to_owned();
    let talk = |source| ClientError::Talk { path: path(), source };
    let answer = open(socket, "GET", what, &[])?;
    // As it comes: a long ledger is not to be here twice.
    serde_json::from_reader(answer.reader()).map_err(|error| match error.is_io() {
        true => talk(error.into()),
        false => ClientError::Stranger { path: path(), what: error.to_string() },
    })
}

/// An answer that names the process that gives it.
pub trait OfProcess: DeserializeOwned {
    /// That process.
    fn pid(&self) -> u32;
}

/// As [`get`], for whoever goes on to that process's /proc: it is the one that listens at the socket.
///
/// # Errors
/// See [`ClientError`].
pub fn get_of_process<T: OfProcess>(socket: &Path, what: &str) -> Result<T, ClientError> {
    let path = || socket.to_owned();
    let talk = |source| ClientError::Talk { path: path(), source };
    let answer = open(socket, "GET", what, &[])?;
    let is = listener(answer.stream.get_ref()).map_err(talk)?;
    let told: T = understood(socket, &answer.body().map_err(talk)?)?;
    match told.pid() {
        says if says == is => Ok(told),
        says => Err(ClientError::OtherProcess { path: path(), says, is }),
    }
}

/// The process that listens at the other end, as this one's PID namespace has it; 0 where it has it not
/// (SO_PEERCRED, unix(7)).
fn listener(stream: &UnixStream) -> io::Result<u32> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = libc::socklen_t::try_from(size_of_val(&peer)).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `len` bytes to `peer`, which is that long, and `len`; both live.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    match result {
        0 => Ok(peer.pid.cast_unsigned()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `GET /api/v1/<what>` of what is not JSON: the bytes of the answer, all of them.
///
/// # Errors
/// See [`ClientError`].
pub fn get_bytes(socket: &Path, what: &str) -> Result<Vec<u8>, ClientError> {
    ask(socket, "GET", what, &[])
}

fn understood<T: DeserializeOwned>(socket: &Path, body: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(body)
        .map_err(|error| ClientError::Stranger { path: socket.to_owned(), what: error.to_string() })
}

/// `PUT /api/v1/<what>` without a body.
///
/// # Errors
/// See [`ClientError`].
pub fn put(socket: &Path, what: &str) -> Result<(), ClientError> {
    ask(socket, "PUT", what, &[]).map(drop)
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
    understood(socket, &ask(socket, "PUT", what, &body)?)
}

/// `GET /api/v1/<what>` of what comes line by line, for as long as there is more.
///
/// # Errors
/// See [`ClientError`].
pub fn lines(socket: &Path, what: &str) -> Result<Lines, ClientError> {
    let (answer, path) = (open(socket, "GET", what, &[])?, socket.to_owned());
    let stream = answer
        .into_stream()
        .map_err(|source| ClientError::Talk { path: socket.to_owned(), source })?;
    Ok(Lines { lines: stream.lines(), path })
}

/// Lines of an answer that goes on.
pub struct Lines {
    lines: io::Lines<Box<dyn BufRead + Send>>,
    path: PathBuf,
}

impl Iterator for Lines {
    type Item = Result<String, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        let talk = |source| ClientError::Talk { path: self.path.clone(), source };
        self.lines.next().map(|line| line.map_err(talk))
    }
}

/// An answer whose head has been read.
struct Answer {
    stream: BufReader<UnixStream>,
    status: u16,
    chunked: bool,
    /// Its length in bytes, where that was said.
    len: Option<u64>,
}

impl Answer {
    /// The rest of it, however long that takes.
    fn into_stream(self) -> io::Result<Box<dyn BufRead + Send>> {
        self.stream.get_ref().set_read_timeout(None)?;
        Ok(if self.chunked {
            Box::new(BufReader::new(chunked_transfer::Decoder::new(self.stream)))
        } else {
            Box::new(self.stream)
        })
    }

    /// Its body, which has to come without a longer break.
    fn reader(self) -> Box<dyn Read> {
        if self.chunked {
            Box::new(BufReader::new(chunked_transfer::Decoder::new(self.stream)))
        } else {
            Box::new(self.stream.take(self.len.unwrap_or(u64::MAX)))
        }
    }

    fn body(self) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        if self.chunked {
            chunked_transfer::Decoder::new(self.stream).read_to_end(&mut body)?;
        } else {
            // JSON shows that its end is missing; plain bytes do not.
            self.stream.take(self.len.unwrap_or(u64::MAX)).read_to_end(&mut body)?;
            if self.len.is_some_and(|len| (body.len() as u64) < len) {
                return Err(io::Error::other("its answer is cut short"));
            }
        }
        Ok(body)
    }
}

/// Asks, and reads the head of the answer; one that is no success is an error.
fn open(socket: &Path, method: &str, what: &str, body: &[u8]) -> Result<Answer, ClientError> {
    let path = || socket.to_owned();
    let mut stream = UnixStream::connect(socket)
        .map_err(|source| ClientError::Connect { path: path(), source })?;
    let mut head = Vec::new();
    let mut talk = || {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let asked = format!(
            "{method} /api/v1/{what} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n",
            body.len()
        );
        // A VMM that refuses the body answers without taking it all.
        let sent = stream.write_all(asked.as_bytes()).and_then(|()| stream.write_all(body));
        let mut stream = BufReader::new(stream.try_clone()?);
        while !head.ends_with(b"\r\n\r\n") {
            let line = (&mut stream).take(MAX_HEAD).read_until(b'\n', &mut head);
            if line? == 0 || head.len() as u64 > MAX_HEAD {
                sent?;
                break;
            }
        }
        Ok(stream)
    };
    let stream = talk().map_err(|source| ClientError::Talk { path: path(), source })?;

    let stranger = |what: String| ClientError::Stranger { path: path(), what };
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Response::new(&mut headers);
    match parsed.parse(&head) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Err(stranger("its answer has no end".to_owned())),
        Err(error) => return Err(stranger(error.to_string())),
    }
    let header = |name: &str| {
        let found = parsed.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
        found.map(|header| String::from_utf8_lossy(header.value).trim().to_ascii_lowercase())
    };
    let answer = Answer {
        stream,
        status: parsed.code.unwrap_or_default(),
        chunked: header("transfer-encoding").is_some_and(|coding| coding == "chunked"),
        len: header("content-length").and_then(|len| len.parse().ok()),
    };
    match answer.status {
        200..=299 => Ok(answer),
        status => {
            let body = answer.body().unwrap_or_default();
            let error = serde_json::from_slice::<serde_json::Value>(&body)
                .ok()
                .and_then(|body| body["error"].as_str().map(str::to_owned))
                .unwrap_or_else(|| String::from_utf8_lossy(&body).into_owned());
            Err(ClientError::Refused { status, error })
        }
    }
}

fn ask(socket: &Path, method: &str, what: &str, body: &[u8]) -> Result<Vec<u8>, ClientError> {
    let answer = open(socket, method, what, body)?;
    if answer.status == 204 {
        return Ok(Vec::new());
    }
    answer.body().map_err(|source| ClientError::Talk { path: socket.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::show;

    /// What `ask` makes of a server that answers with `body`, and says that it has `len` bytes.
    fn answered<T>(body: &[u8], len: usize, ask: impl FnOnce(&Path) -> T) -> T {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
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
                get_of_process::<crate::api::Ping>(path, "vmm.ping")
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
                    assert!(!whole && show::with_causes(&error).contains("cut short"), "{error}")
                }
            }
        }
    }

    #[test]
    fn a_socket_that_is_not_there_is_named() {
        let error = get::<serde_json::Value>(Path::new("/nowhere/api"), "vmm.ping").unwrap_err();
        assert!(error.to_string().contains("/nowhere/api"), "{error}");
    }
}
