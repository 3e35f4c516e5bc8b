//! How long a VM may take to answer, and how a busy VM is told from one that does not respond.
//!
//! Some requests take long, and no limit suits all of them. So the limit is on silence, not on the answer: from time to
//! time the VM is pinged on another connection, which it answers whatever else it is doing.
//! whatever else it is doing.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::{Duration, SystemTime};

use mce_relay_vmm::outlets::peer::{Peer, connect_patiently, pid_of};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout};

use super::ask::{Asked, send};
use super::error::ClientError;
use crate::client::life::Life;

/// How long an answer is waited for before the VM is pinged.
const QUIET: Duration = Duration::from_secs(3);
/// How long that ping may take. After both times together the user is told.
const PING: Duration = Duration::from_secs(2);
/// After this much silence the VM counts as not answering.
const SILENCE: Duration = Duration::from_secs(20);
/// How long a VM may take.
#[derive(Debug, Clone, Copy)]
pub(super) enum Patience {
    /// As long as the VM answers pings. The user is told of a silence.
    WhileItLives,
    /// Until this time, for everything together.
    Until(Instant),
}

/// The process at the other end of a connection, and how long to wait for it.
#[derive(Debug)]
pub(super) struct Watch {
    socket: PathBuf,
    /// As the kernel has it; 0 if it is in another PID namespace.
    pub(super) pid: u32,
    patience: Patience,
    /// A request that changes the VM was sent.
    pub(super) asked_for_change: bool,
    begun: SystemTime,
}

impl Watch {
    /// Connects to `socket`.
    pub(super) async fn connect(
        socket: &Path,
        patience: Patience,
    ) -> Result<(UnixStream, Self), ClientError> {
        let path = || socket.to_owned();
        // The process is not known yet.
        let begun = SystemTime::now();
        let mut watch = Self { socket: path(), pid: 0, patience, asked_for_change: false, begun };
        let stream = watch
            .wait(connect_patiently(socket))
            .await?
            .map_err(|source| ClientError::Connect { path: path(), source })?;
        watch.pid = pid_of(&stream).map_err(|source| ClientError::Talk { path: path(), source })?;
        Ok((stream, watch))
    }

    /// Waits for `what`.
    pub(super) async fn wait<T>(&self, what: impl Future<Output = T>) -> Result<T, ClientError> {
        match self.patience {
            Patience::Until(end) => {
                let left = end.saturating_duration_since(Instant::now());
                timeout(left, what).await.map_err(|_| self.silent(left))
            }
            Patience::WhileItLives => self.wait_while_it_lives(what).await,
        }
    }

    async fn wait_while_it_lives<T>(
        &self,
        what: impl Future<Output = T>,
    ) -> Result<T, ClientError> {
        let mut what = pin!(what);
        let mut silent_since = Instant::now();
        let mut said = false;
        loop {
            if let Ok(done) = timeout(QUIET, what.as_mut()).await {
                return Ok(done);
            }
            let is_there = tokio::select! {
                biased;
                done = what.as_mut() => return Ok(done),
                is_there = is_there(&self.socket) => is_there,
            };
            if is_there {
                silent_since = Instant::now();
                continue;
            }
            let silent = silent_since.elapsed();
            if silent >= SILENCE {
                return Err(self.silent(silent));
            }
            if !said {
                said = true;
                eprintln!("mce-relay: {}; waiting (Ctrl-C ends this)", self.silent(silent));
            }
        }
    }

    /// The error for an answer that broke off.
    pub(super) fn cut(&self, source: io::Error) -> io::Error {
        let path = self.socket.clone();
        match self.explain(ClientError::Talk { path, source }) {
            ClientError::Talk { source, .. } => source,
            ended => io::Error::other(ended),
        }
    }

    /// Explains an error by the VM's end, if it has ended.
    pub(super) fn explain(&self, error: ClientError) -> ClientError {
        // A caller with a short time limit does not wait for that.
        if !matches!((&error, self.patience), (ClientError::Talk { .. }, Patience::WhileItLives)) {
            return error;
        }
        match Life::of(&self.socket, self.pid) {
            life if life.is_over_soon() => life.ended_since(self.begun),
            _ => error,
        }
    }

    fn silent(&self, silent: Duration) -> ClientError {
        let (path, secs) = (self.socket.clone(), silent.as_secs());
        let asked = self.asked_for_change;
        let peer = match self.pid {
            0 => Peer::listening_at(&path),
            pid => Peer::of(pid),
        };
        ClientError::Silent { path, secs, peer, asked }
    }
}

/// Whether the VM answers a ping.
async fn is_there(socket: &Path) -> bool {
    let ping = async {
        match connect_patiently(socket).await {
            Ok(stream) => send(stream, Asked::get("vmm.ping")).await.is_ok(),
            Err(_) => false,
        }
    };
    timeout(PING, ping).await.unwrap_or(false)
}
