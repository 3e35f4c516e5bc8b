//! A client's stream, shared by the server that talks on it and the task that watches whether the client is there.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::sleep;

/// How often a client that has closed its writing half is checked for being there.
const LOOK: Duration = Duration::from_secs(1);

/// The stream, shared.
#[derive(Clone)]
pub(super) struct Shared(Arc<UnixStream>);

impl Shared {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self(Arc::new(stream))
    }

    /// Returns when the client has closed the connection. A client that has only closed its writing half (shutdown)
    /// still reads.
    pub(super) async fn gone(self) {
        loop {
            // EPOLLRDHUP comes with both, and once. PRIORITY is used because a unix stream never has what it stands
            // for; READABLE would return at once whenever the client has sent more than was read.
            if self.0.ready(Interest::PRIORITY).await.is_err() {
                return;
            }
            // With WRITABLE this returns at once, with EPOLLHUP if that came.
            match self.0.ready(Interest::WRITABLE | Interest::READABLE).await {
                Ok(ready) if !ready.is_write_closed() => sleep(LOOK).await,
                _ => return,
            }
        }
    }
}

impl AsyncRead for Shared {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(context))?;
            match self.0.try_read(into.initialize_unfilled()) {
                Ok(read) => {
                    into.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Shared {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(context))?;
            match self.0.try_write_vectored(pieces) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return Poll::Ready(done),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The stream is closed with the connection, which ends now.
        Poll::Ready(Ok(()))
    }
}
