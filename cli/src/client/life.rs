//! Whether the VM that a command works on still runs. A command of many steps has to tell the VM's end from an error of
//! one page.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use mce_relay_vmm::outlets::peer::{self, Peer, Standing};
use mce_relay_vmm::session::record::End;

use crate::client::error::ClientError;
use crate::client::names;

/// How long a VM may take to end after it has broken off a connection.
pub(super) const BROKEN_OFF: Duration = Duration::from_secs(1);
/// Time between two looks.
pub(super) const LOOK: Duration = Duration::from_millis(10);

/// The process of a VM.
#[derive(Debug)]
pub struct Life {
    pub(super) socket: PathBuf,
    pub(super) pid: u32,
    /// Readable once the process has ended; `None` where no pidfd can be made.
    process: Option<OwnedFd>,
    begun: SystemTime,
}

impl Life {
    /// For the VM behind `socket`, whose process is `pid` (0 if it is in another PID namespace).
    #[must_use]
    pub fn of(socket: &Path, pid: u32) -> Self {
        let begun = SystemTime::now();
        Self { socket: socket.to_owned(), pid, process: open(pid).ok(), begun }
    }

    /// For the VM that listens at `socket`; `None` if none does.
    #[must_use]
    pub fn at(socket: &Path) -> Option<Self> {
        let (_, pid) = peer::connect(socket, BROKEN_OFF).ok()?;
        Some(Self::of(socket, pid))
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        match &self.process {
            Some(process) => is_readable(process, Duration::ZERO),
            None => self.pid != 0 && Peer::of(self.pid).standing == Standing::Ended,
        }
    }

    /// As [`Self::is_over`], for a VM that has broken off a connection; it is not asked, but given a moment.
    pub(crate) fn is_over_soon(&self) -> bool {
        match &self.process {
            Some(process) => is_readable(process, BROKEN_OFF),
            None => self.is_over(),
        }
    }

    /// The error that says that it has ended, and how, where that is known.
    #[must_use]
    pub fn ended(&self) -> ClientError {
        self.ended_since(self.begun)
    }

    /// As [`Self::ended`], for a VM that ran at the time `begun`.
    pub(crate) fn ended_since(&self, begun: SystemTime) -> ClientError {
        let since_1970 = begun.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let record = names::record_of(&self.socket);
        // An older end is that of an earlier VM of the name.
        let end = record.and_then(|record| record.end);
        let end = end.filter(|end| end.unix_time >= since_1970.as_secs_f64());
        let how = end.map(|End { status, how, .. }| {
            let how = how.map(|how| format!(": {how}")).unwrap_or_default();
            format!(" (exit status {status}{how})")
        });
        ClientError::Ended { path: self.socket.clone(), how: how.unwrap_or_default() }
    }
}

/// See pidfd_open(2).
fn open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match RawFd::try_from(fd) {
        // SAFETY: a descriptor that the kernel has just made, owned by nobody else.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn is_readable(fd: &OwnedFd, within: Duration) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let millis = i32::try_from(within.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one entry that lives as long as the call. Interrupted by a signal it counts as not readable.
    unsafe { libc::poll(&raw mut poll, 1, millis) == 1 }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn an_end_is_seen_and_is_why_nobody_answers() {
        let socket = Path::new("/nowhere/api");
        let mut process = Command::new("sleep").arg("1000").spawn().unwrap();
        let life = Life::of(socket, process.id());
        assert!(!life.is_over());
        process.kill().unwrap();
        assert!(life.ends(), "also before anybody has waited for it");
        process.wait().unwrap();
        assert!(life.is_over() && Life::of(socket, process.id()).is_over());
        let source = io::Error::from(io::ErrorKind::NotFound);
        let error = life.explain(ClientError::Connect { path: socket.to_owned(), source });
        assert_eq!(error.to_string(), "the VM at /nowhere/api has ended");
        assert!(!Life::of(socket, std::process::id()).is_over());
    }
}
