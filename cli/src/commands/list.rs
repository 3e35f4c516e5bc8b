//! `mce-relay list`: the VMs that run, and their states.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fmt, fs};

use mce_relay_vmm::api::types::pause::Panic;
use mce_relay_vmm::api::types::vm::{Ping, VmInfo};
use mce_relay_vmm::host::accounts;
use mce_relay_vmm::outlets::peer::Peer;
use mce_relay_vmm::session::names::dir;
use mce_relay_vmm::words;
use serde::Serialize;

use crate::client::error::ClientError;
use crate::client::names::{ended, sockets};
use crate::client::record::Record;
use crate::client::{other_users, requests};
use crate::output::table::{self, Cell};

/// How long the answers are waited for. All VMs are asked at the same time.
const PATIENCE: Duration = Duration::from_secs(2);

/// The named VMs that run, and on request those that have ended.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct List {
    vms: Vec<Listed>,
    /// Whether other users' are among them.
    #[serde(skip)]
    all: bool,
}

/// One of them.
#[derive(Debug, Serialize)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Its API socket; null when it has ended.
    pub socket: Option<PathBuf>,
    /// The user whose VM that is.
    pub uid: Option<u32>,
    /// The VMM's process; null when nothing is known of it.
    pub pid: Option<u32>,
    /// Bytes of guest RAM; null between two boots, and when it does not answer.
    pub memory: Option<u64>,
    /// Whether its vCPUs are held; null likewise.
    pub paused: Option<bool>,
    /// What the guest has reported of a panic; null if it has not, and when it does not answer.
    pub panic: Option<Panic>,
    /// Its state, in a word or two.
    pub state: String,
    /// The exit status of `run`; null while it runs, and if it could not record that (SIGKILL, say).
    pub exit_status: Option<u8>,
    /// When it ended, in seconds since 1970; null likewise.
    pub ended_at: Option<f64>,
    /// What to do about its state; null where nothing has to be done.
    pub advice: Option<String>,
}

impl Listed {
    fn ask(name: String, socket: PathBuf) -> Self {
        let uid = fs::symlink_metadata(&socket).ok().map(|found| found.uid());
        let (pid, paused, panic, memory, state, advice) =
            match requests::get_soon(&socket, "vm.info", PATIENCE) {
                Ok((pid, info)) => {
                    let info: VmInfo = info;
                    let memory =
                        info.memory.iter().fold(0_u64, |sum, block| sum.saturating_add(block.len));
                    let state = standing(info.paused, info.panic).to_owned();
                    (pid, Some(info.paused), info.panic, Some(memory), state, None)
                }
                Err(ClientError::Silent { peer, .. }) => {
                    let Peer { pid, .. } = peer;
                    (pid, None, None, None, peer.word().to_owned(), Some(peer.to_string()))
                }
                Err(ClientError::Refused { status: 503, .. }) => {
                    let ping = requests::get_soon::<Ping>(&socket, "vmm.ping", PATIENCE);
                    let pid = ping.map_or(0, |(pid, _)| pid);
                    (pid, None, None, None, "between two boots".to_owned(), None)
                }
                Err(error) => (
                    0,
                    None,
                    None,
                    None,
                    "not answering".to_owned(),
                    Some(words::with_causes(&error)),
                ),
            };
        let pid = (pid != 0).then_some(pid);
        let (socket, exit_status, ended_at) = (Some(socket), None, None);
        Self { name, socket, uid, pid, memory, paused, panic, state, exit_status, ended_at, advice }
    }

    /// One that has ended.
    fn ended(record: Record) -> Self {
        let end = record.end.as_ref();
        Self {
            socket: None,
            uid: record.uid(),
            pid: None,
            memory: None,
            paused: None,
            panic: None,
            state: "ended".to_owned(),
            exit_status: end.map(|end| end.status),
            ended_at: end.map(|end| end.unix_time),
            advice: None,
            name: record.name,
        }
    }

    /// Its state, and its exit status if it has ended.
    fn standing(&self) -> String {
        match (self.socket.is_none(), self.exit_status) {
            (true, Some(status)) => format!("{}, exit status {status}", self.state),
            (true, None) => format!("{}, killed perhaps", self.state),
            (false, _) => self.state.clone(),
        }
    }
}

/// The state of a VM that answers.
fn standing(paused: bool, panic: Option<Panic>) -> &'static str {
    match (paused, panic) {
        (true, Some(_)) => "panicked, paused",
        (true, None) => "paused",
        (false, Some(Panic::Panicked)) => "panicked",
        (false, Some(Panic::CrashLoaded)) => "panicked, in its crash kernel",
        (false, None) => "running",
    }
}

/// Finds them; with `all` also other users', and the records of those that have ended.
#[must_use]
pub fn list(all: bool) -> List {
    let mut dirs = if all { other_users::dirs() } else { Vec::new() };
    dirs.push(dir());
    dirs.sort();
    dirs.dedup();
    let mut vms: Vec<Listed> = std::thread::scope(|scope| {
        let asking: Vec<_> = dirs
            .iter()
            .flat_map(|dir| sockets(dir))
            .map(|(name, socket)| scope.spawn(|| Listed::ask(name, socket)))
            .collect();
        // A panic on one of these threads has been reported already.
        asking.into_iter().filter_map(|asked| asked.join().ok()).collect()
    });
    if all {
        vms.extend(dirs.iter().flat_map(|dir| ended(dir)).map(Listed::ended));
    }
    List { vms, all }
}

impl fmt::Display for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.vms.is_empty() {
            return f.write_str(match self.all {
                true => "no VM with a name runs that this user may see, and none has left a record",
                // SAFETY: has no preconditions.
                false if unsafe { libc::geteuid() } == 0 => {
                    "no VM of root's with a name runs; `list --all` shows other users', and those that have ended"
                }
                false => {
                    "no VM of this user's with a name runs; `list --all` shows those that have ended, and for root \
                     other users'"
                }
            });
        }
        let mut header = vec!["name", "pid", "memory", "state", "API socket"];
        if self.all {
            header.insert(1, "user");
        }
        let mut table = table::sheet(&header);
        for vm in &self.vms {
            let Listed { name, socket, uid, pid, memory, .. } = vm;
            let unknown = if socket.is_some() { "?" } else { "-" };
            let mut row = vec![
                Cell::new(name),
                Cell::new(pid.map_or(unknown.to_owned(), |pid| pid.to_string())),
                Cell::new(memory.map_or(unknown.to_owned(), |len| format!("{} MiB", len >> 20))),
                Cell::new(vm.standing()),
                Cell::new(socket.as_deref().map_or(unknown.to_owned(), shown)),
            ];
            if self.all {
                row.insert(1, Cell::new(uid.map_or("?".to_owned(), accounts::user)));
            }
            table.add_row(row);
        }
        write!(f, "{table}")?;
        for Listed { name, advice, .. } in &self.vms {
            if let Some(advice) = advice {
                write!(f, "\n{name}: {advice}")?;
            }
        }
        Ok(())
    }
}

/// A path as text without control characters, as other users choose it.
fn shown(path: &Path) -> String {
    path.display().to_string().replace(char::is_control, "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_says_how_each_stands() {
        for (paused, panic, words) in [
            (false, None, "running"),
            (true, None, "paused"),
            (false, Some(Panic::Panicked), "panicked"),
            (false, Some(Panic::CrashLoaded), "panicked, in its crash kernel"),
            (true, Some(Panic::Panicked), "panicked, paused"),
        ] {
            assert_eq!(standing(paused, panic), words);
        }
    }

    #[test]
    fn what_does_not_answer_comes_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let listed = Listed::ask("a".to_owned(), path);
        assert_eq!((listed.pid, listed.paused), (Some(std::process::id()), None));
        assert_eq!(listed.state, "not answering");
        let list = List { vms: vec![listed], all: true };
        let text = list.to_string();
        assert!(text.contains("overloaded") && !text.contains("boots"), "{text}");
        let json = serde_json::to_value(&list).unwrap();
        assert!(json[0]["advice"].as_str().unwrap().contains("overloaded"), "{json}");
    }
}
