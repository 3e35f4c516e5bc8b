//! Sends one request.

use std::error::Error;
use std::io::{self};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

/// Most bytes in the head of an answer, and in each piece of its body.
const MAX_BUFFER: usize = 64 << 10;

/// A request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked<'a> {
    pub(super) method: &'static str,
    /// Path behind `/api/v1/`, and query.
    pub(super) what: &'a str,
    pub(super) body: &'a [u8],
}

impl<'a> Asked<'a> {
    pub(super) fn get(what: &'a str) -> Self {
        Self { method: "GET", what, body: &[] }
    }

    /// Whether it changes the VM.
    pub(crate) fn changes(&self) -> bool {
        self.method != "GET"
    }

    fn request(&self) -> io::Result<Request<Full<Bytes>>> {
        Request::builder()
            .method(self.method)
            .uri(format!("/api/v1/{}", self.what))
            .header(HOST, "localhost")
            .header(CONNECTION, "close")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::copy_from_slice(self.body)))
            .map_err(io::Error::other)
    }
}

/// Sends a request on `stream`; returns the head of the answer, with its body to come.
pub(super) async fn send(
    stream: UnixStream,
    asked: Asked<'_>,
) -> Result<Response<Incoming>, Box<dyn Error + Send + Sync>> {
    let request = asked.request()?;
    let (mut sender, connection) =
        http1::Builder::new().max_buf_size(MAX_BUFFER).handshake(TokioIo::new(stream)).await?;
    // An error of the connection shows in the answer, too.
    tokio::spawn(connection);
    Ok(sender.send_request(request).await?)
}
