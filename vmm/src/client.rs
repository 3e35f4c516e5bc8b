//! Asks a running VM by its API socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A VM that has not answered by then will not.
const PATIENCE: Duration = Duration::from_secs(30);
/// Header fields in an answer of ours; far more than it has.
const MAX_HEADERS: usize = 32;

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
    understood(socket, &ask(socket, "GET", what, &[])?)
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

fn ask(socket: &Path, method: &str, what: &str, body: &[u8]) -> Result<Vec<u8>, ClientError> {
    let path = || socket.to_owned();
    let mut stream = UnixStream::connect(socket)
        .map_err(|source| ClientError::Connect { path: path(), source })?;
    let mut answer = Vec::new();
    let mut talk = || {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        write!(
            stream,
            "{method} /api/v1/{what} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\
             Connection: close\r\nTE: identity\r\n\r\n",
            body.len()
        )?;
        stream.write_all(body)?;
        stream.read_to_end(&mut answer)
    };
    talk().map_err(|source| ClientError::Talk { path: path(), source })?;

    let stranger = |what: String| ClientError::Stranger { path: path(), what };
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Response::new(&mut headers);
    let start = match head.parse(&answer) {
        Ok(httparse::Status::Complete(start)) => start,
        Ok(httparse::Status::Partial) => return Err(stranger("its answer has no end".to_owned())),
        Err(error) => return Err(stranger(error.to_string())),
    };
    let chunked = head.headers.iter().any(|header| {
        header.name.eq_ignore_ascii_case("transfer-encoding")
            && header.value.eq_ignore_ascii_case(b"chunked")
    });
    let announced = head
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("content-length"))
        .and_then(|header| std::str::from_utf8(header.value).ok()?.trim().parse::<usize>().ok());
    let body = if chunked {
        unchunk(&answer[start..]).ok_or_else(|| stranger("a chunk is cut short".to_owned()))?
    } else {
        answer[start..].to_vec()
    };
    // JSON shows that its end is missing; plain bytes do not.
    if !chunked && announced.is_some_and(|len| body.len() < len) {
        return Err(stranger("its answer is cut short".to_owned()));
    }
    match head.code.unwrap_or_default() {
        200..=299 => Ok(body),
        status => {
            let error = serde_json::from_slice::<serde_json::Value>(&body)
                .ok()
                .and_then(|body| body["error"].as_str().map(str::to_owned))
                .unwrap_or_else(|| String::from_utf8_lossy(&body).into_owned());
            Err(ClientError::Refused { status, error })
        }
    }
}

/// The body behind HTTP's chunked coding, which the server uses for long answers.
fn unchunk(mut coded: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let httparse::Status::Complete((start, len)) = httparse::parse_chunk_size(coded).ok()?
        else {
            return None;
        };
        let end = start.checked_add(usize::try_from(len).ok()?)?;
        body.extend_from_slice(coded.get(start..end)?);
        if len == 0 {
            return Some(body);
        }
        coded = coded.get(end + 2..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_put_together() {
        assert_eq!(unchunk(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n").unwrap(), b"abcde");
        assert_eq!(unchunk(b"5\r\nabc"), None);
        assert_eq!(unchunk(b""), None);
    }

    #[test]
    fn bytes_are_taken_as_a_whole_or_not_at_all() {
        for (len, whole) in [(3, true), (4, false)] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("api");
            let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
            let server = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                // Nothing of the request may be left behind: closing would reset the connection.
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).unwrap();
                    request.push(byte[0]);
                }
                write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {len}\r\n\r\n").unwrap();
                stream.write_all(b"\0\xffa").unwrap();
            });
            let bytes = get_bytes(&path, "vm.memory");
            server.join().unwrap();
            match bytes {
                Ok(bytes) => assert!(whole && bytes == b"\0\xffa", "{bytes:?}"),
                Err(error) => assert!(!whole && error.to_string().contains("cut short"), "{error}"),
            }
        }
    }

    #[test]
    fn a_socket_that_is_not_there_is_named() {
        let error = get::<serde_json::Value>(Path::new("/nowhere/api"), "vmm.ping").unwrap_err();
        assert!(error.to_string().contains("/nowhere/api"), "{error}");
    }
}
