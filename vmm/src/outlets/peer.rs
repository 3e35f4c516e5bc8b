//! The process at the other end of a socket: its state when it does not answer, and what to do about it.

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fmt, fs, io};

use procfs::process::Process;
use tokio::net::UnixStream;

pub mod listener;

/// Where cgroups of version 2 are.
const CGROUP: &str = "/sys/fs/cgroup";
/// The VMM's thread that answers.
const API_THREAD: &str = "api";

/// A process that does not answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The process; 0 if it is in another PID namespace, or unknown.
    pub pid: u32,
    /// Its state.
    pub standing: Standing,
}

/// The state of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// A signal has stopped it (SIGSTOP, SIGTSTP).
    Stopped,
    /// A debugger holds it.
    Traced,
    /// Its cgroup, at this directory, is frozen.
    Frozen(PathBuf),
    /// It waits inside the kernel, and cannot be interrupted.
    InKernel,
    /// It could run.
    Alive,
    /// It has ended.
    Ended,
    /// Its state is not known.
    Unknown,
}

impl Peer {
    /// Looks at the process `pid`.
    #[must_use]
    pub fn of(pid: u32) -> Self {
        Self { pid, standing: standing(pid) }
    }

    /// Finds the process that listens at `socket` by the open files of each process, for when a connection cannot be
    /// made. Its state is unknown where this user may not see it.
    #[must_use]
    pub fn listening_at(socket: &Path) -> Self {
        Self::of(listener::pid(socket).unwrap_or(0))
    }

    /// Its state, in a word or two.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self.standing {
            Standing::Stopped => "stopped",
            Standing::Traced => "held by a debugger",
            Standing::Frozen(_) => "frozen",
            Standing::Ended => "ended",
            Standing::InKernel | Standing::Alive | Standing::Unknown => "not answering",
        }
    }

    /// Whether something from outside keeps it from running.
    #[must_use]
    pub fn is_held(&self) -> bool {
        matches!(self.standing, Standing::Stopped | Standing::Traced | Standing::Frozen(_))
    }

    /// What to do about it.
    #[must_use]
    pub fn advice(&self) -> String {
        let pid = self.pid;
        match &self.standing {
            Standing::Stopped => format!("`kill -CONT {pid}` lets it go on"),
            Standing::Traced => format!("end the debugger of process {pid}, or have it continue"),
            Standing::Frozen(dir) => format!(
                "`echo 0 > {}/cgroup.freeze` lets it go on (systemctl thaw, docker unpause)",
                dir.display()
            ),
            Standing::InKernel => format!(
                "see what it waits for: /proc/{pid}/task/*/stack as root (a disk that does not answer, as a rule)"
            ),
            Standing::Alive => format!(
                "the host may be overloaded, or other clients hold all of its connections (ss -xp); if that lasts, \
                 `kill {pid}` ends it"
            ),
            Standing::Ended => "start it again".to_owned(),
            Standing::Unknown => {
                "look at it where it runs: `ss -xlp` there names the process of the socket"
                    .to_owned()
            }
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pid = self.pid;
        match &self.standing {
            Standing::Stopped => write!(f, "its process {pid} is stopped"),
            Standing::Traced => write!(f, "a debugger holds its process {pid}"),
            Standing::Frozen(_) => write!(f, "the cgroup of its process {pid} is frozen"),
            Standing::InKernel => write!(f, "its process {pid} waits inside the kernel (state D)"),
            Standing::Alive => write!(f, "its process {pid} is there, and does not get to it"),
            Standing::Ended => write!(f, "its process {pid} has ended"),
            Standing::Unknown => f.write_str("its process is not to be seen from here"),
        }?;
        write!(f, "; {}", self.advice())
    }
}

fn standing(pid: u32) -> Standing {
    let Ok(id @ 1..) = i32::try_from(pid) else { return Standing::Unknown };
    let Ok(process) = Process::new(id) else { return Standing::Ended };
    let Ok(stat) = process.stat() else { return Standing::Ended };
    match stat.state {
        'T' => return Standing::Stopped,
        't' => return Standing::Traced,
        'Z' | 'X' => return Standing::Ended,
        _ => {}
    }
    if let Some(dir) = cgroup(pid)
        && is_frozen(&dir)
    {
        return Standing::Frozen(dir);
    }
    let api = process.tasks().into_iter().flatten().flatten().filter_map(|task| task.stat().ok());
    match api.filter(|stat| stat.comm == API_THREAD).any(|stat| stat.state == 'D') {
        true => Standing::InKernel,
        false => Standing::Alive,
    }
}

/// The directory of the process's cgroup of version 2.
fn cgroup(pid: u32) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new(CGROUP).join(path))
}

fn is_frozen(cgroup: &Path) -> bool {
    let events = fs::read_to_string(cgroup.join("cgroup.events")).unwrap_or_default();
    events.lines().any(|line| line == "frozen 1")
}

/// Connects to `socket` within a time, even if its queue of waiting connections is full at first. Also returns the
/// process that listens, as the kernel has it; 0 if it is in another PID namespace.
///
/// # Errors
/// No process listens there, or its queue stays full (`WouldBlock`).
pub fn connect(
    socket: &Path,
    within: Duration,
) -> io::Result<(std::os::unix::net::UnixStream, u32)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let stream = tokio::time::timeout(within, connect_patiently(socket));
        let full = || io::Error::new(io::ErrorKind::WouldBlock, "too many wait for it already");
        let stream = stream.await.map_err(|_| full())??;
        let pid = pid_of(&stream)?;
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        Ok((stream, pid))
    })
}

/// The process at the other end (SO_PEERCRED, unix(7)); 0 for one of another PID namespace.
pub fn pid_of(stream: &UnixStream) -> io::Result<u32> {
    Ok(stream.peer_cred()?.pid().map_or(0, i32::cast_unsigned))
}

/// Connects, waiting for a place if the queue of waiting connections is full.
pub async fn connect_patiently(socket: &Path) -> io::Result<UnixStream> {
    /// Between two tries.
    const AGAIN: Duration = Duration::from_millis(50);
    loop {
        match UnixStream::connect(socket).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                tokio::time::sleep(AGAIN).await;
            }
            done => return done,
        }
    }
}

/// What is at a path at which a socket is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// No process listens there.
    Nobody,
    /// A process accepts connections there, or cannot be asked.
    Somebody,
    /// A process listens there and does not answer.
    Silent(Peer),
}

/// What is at the path `socket`; returns `within` that time in any case.
#[must_use]
pub fn holder(socket: &Path, within: Duration) -> Holder {
    let silent = |peer: Peer| match peer.is_held() {
        true => Holder::Silent(peer),
        false => Holder::Somebody,
    };
    match connect(socket, within) {
        // The connection waits in the queue; a stopped process leaves it there.
        Ok((_, pid)) => silent(Peer::of(pid)),
        Err(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => Holder::Nobody,
            io::ErrorKind::WouldBlock => Holder::Silent(Peer::listening_at(socket)),
            _ => Holder::Somebody,
        },
    }
}

/// Whether a process listens at `socket`, even a busy or stopped one.
#[must_use]
pub fn listens(socket: &Path) -> bool {
    match connect(socket, Duration::ZERO) {
        Ok(_) => true,
        Err(error) => error.kind() == io::ErrorKind::WouldBlock,
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_alive_stopped_and_ended() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let pid = child.id();
        let wait_for = |expected: Standing| {
            let start = std::time::Instant::now();
            while Peer::of(pid).standing != expected {
                assert!(start.elapsed() < Duration::from_secs(20), "{:?}", Peer::of(pid));
                std::thread::sleep(Duration::from_millis(5));
            }
            Peer::of(pid).to_string()
        };
        wait_for(Standing::Alive);
        for (signal, expected) in [
            (libc::SIGSTOP, Standing::Stopped),
            (libc::SIGCONT, Standing::Alive),
            (libc::SIGKILL, Standing::Ended),
        ] {
            // SAFETY: sends a signal to a child that has not been waited for.
            unsafe { libc::kill(pid.cast_signed(), signal) };
            let words = wait_for(expected);
            assert!(words.contains(&pid.to_string()), "{words}");
            assert_eq!(words.contains("kill -CONT"), signal == libc::SIGSTOP, "{words}");
        }
        child.wait().unwrap();
        assert_eq!(Peer::of(pid).standing, Standing::Ended);
        assert_eq!(Peer::of(0).standing, Standing::Unknown);
    }

    #[test]
    fn a_frozen_cgroup_says_so() {
        let dir = tempfile::tempdir().unwrap();
        for (events, frozen) in
            [("populated 1\nfrozen 1\n", true), ("populated 1\nfrozen 0\n", false)]
        {
            fs::write(dir.path().join("cgroup.events"), events).unwrap();
            assert_eq!(is_frozen(dir.path()), frozen);
        }
    }

    #[test]
    fn whoever_does_not_accept_listens_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        assert!(!listens(&path));
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        // SAFETY: takes no pointer; a second time it changes how many may wait.
        assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 1) }, 0);
        let mut waiting = Vec::new();
        while let Ok(stream) = connect(&path, Duration::from_millis(300)) {
            waiting.push(stream);
            assert!(waiting.len() < 100, "there is no end to them");
        }
        assert!(!waiting.is_empty() && listens(&path));
        let soon = Duration::from_millis(100);
        let Holder::Silent(peer) = holder(&path, soon) else { panic!("{:?}", holder(&path, soon)) };
        assert_eq!(peer.pid, std::process::id());
        drop(listener);
        assert!(!listens(&path));
        assert_eq!(holder(&path, soon), Holder::Nobody);
    }
}
