//! One request and its answer as it arrives, for callers that do nothing else meanwhile (by hyper's client).

use std::error::Error;
use std::io::{self, BufRead, Read};
use std::iter::successors;
use std::path::Path;

use http_body_util::BodyExt;
use hyper::body::{Bytes, Incoming};
use mce_relay_vmm::words::with_causes;
use tokio::runtime::{Builder, Runtime};

use super::error::ClientError;
use super::patience::{Patience, Watch};
use crate::client::ask::Asked;
use crate::client::ask::send;

/// How much of an error's text is read, in bytes.
const MAX_WORDS: u64 = 64 << 10;

/// An answer whose head has been read. Reading it returns the body; its errors contain a [`ClientError`].
pub(super) struct Answer {
    // Declared first, so dropped first: the runtime below still runs the rest of the connection.
    body: Incoming,
    /// The part of the body that has arrived and was not read yet.
    left: Bytes,
    runtime: Runtime,
    watch: Watch,
    /// Whether the body is a stream that ends when there is no more.
    endless: bool,
}

impl Answer {
    /// Sends the request; a status other than success is an error.
    pub(super) fn open(
        socket: &Path,
        asked: Asked<'_>,
        patience: Patience,
    ) -> Result<Self, ClientError> {
        let path = || socket.to_owned();
        let talk = |source| ClientError::Talk { path: path(), source };
        let runtime =
            Builder::new_current_thread().enable_io().enable_time().build().map_err(talk)?;
        let (response, watch) = runtime.block_on(async {
            if asked.changes() {
                // A stopped VM would carry the request out when it continues, long after it was reported as failed.
                let (stream, watch) = Watch::connect(socket, patience).await?;
                let there = watch.wait(send(stream, Asked::get("vmm.ping"))).await?;
                there.map_err(|error| watch.explain(client_error(socket, error)))?;
            }
            let (stream, mut watch) = Watch::connect(socket, patience).await?;
            watch.asked_for_change = asked.changes();
            let response = watch.wait(send(stream, asked)).await?;
            let response = response.map_err(|error| watch.explain(client_error(socket, error)))?;
            Ok((response, watch))
        })?;
        let status = response.status();
        let body = response.into_body();
        let mut answer = Self { body, left: Bytes::new(), runtime, watch, endless: false };
        if status.is_success() {
            return Ok(answer);
        }
        let mut words = Vec::new();
        // If it cannot be read the status has to suffice.
        let _ = answer.by_ref().take(MAX_WORDS).read_to_end(&mut words);
        let error = serde_json::from_slice::<serde_json::Value>(&words)
            .ok()
            .and_then(|body| body["error"].as_str().map(str::to_owned))
            .unwrap_or_else(|| String::from_utf8_lossy(&words).into_owned());
        Err(ClientError::Refused { status: status.as_u16(), error })
    }

    /// Marks the body as a stream that ends when there is no more.
    pub(super) fn endless(self) -> Self {
        Self { endless: true, ..self }
    }

    /// The process that answers, as the kernel has it; 0 if it is in another PID namespace.
    pub(super) fn pid(&self) -> u32 {
        self.watch.pid
    }

    /// The next part of the body; empty at its end.
    fn piece(&mut self) -> io::Result<Bytes> {
        loop {
            let next = self.body.frame();
            let next = match self.endless {
                true => Ok(self.runtime.block_on(next)),
                false => self.runtime.block_on(self.watch.wait(next)),
            };
            match next.map_err(io::Error::other)? {
                None => return Ok(Bytes::new()),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) if !data.is_empty() => return Ok(data),
                    _ => {}
                },
                // A follower of a stream knows how to report its end.
                Some(Err(error)) if self.endless => return Err(broken_off(error)),
                Some(Err(error)) => return Err(self.watch.cut(broken_off(error))),
            }
        }
    }
}

/// The error for a request that could not be sent or was not answered.
fn client_error(socket: &Path, error: Box<dyn Error + Send + Sync>) -> ClientError {
    let path = socket.to_owned();
    match error.downcast::<hyper::Error>() {
        Ok(error) if error.is_parse() => ClientError::Stranger { path, what: with_causes(&*error) },
        Ok(error) => ClientError::Talk { path, source: broken_off(*error) },
        Err(error) => ClientError::Talk { path, source: io::Error::other(error) },
    }
}

fn broken_off(error: hyper::Error) -> io::Error {
    let first: Option<&(dyn Error + 'static)> = Some(&error);
    let is_cut = successors(first, |error| (*error).source())
        .filter_map(|error| error.downcast_ref::<io::Error>())
        .any(|error| error.kind() == io::ErrorKind::UnexpectedEof);
    match is_cut || error.is_incomplete_message() {
        true => io::Error::new(io::ErrorKind::UnexpectedEof, "its answer is cut short"),
        false => io::Error::other(error),
    }
}

impl Read for Answer {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.fill_buf()?.read(into)?;
        self.consume(read);
        Ok(read)
    }
}

impl BufRead for Answer {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.left.is_empty() {
            self.left = self.piece()?;
        }
        Ok(&self.left)
    }

    fn consume(&mut self, count: usize) {
        drop(self.left.split_to(count.min(self.left.len())));
    }
}
