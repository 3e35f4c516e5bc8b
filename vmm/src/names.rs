//! Names of running VMs: where their API sockets are.
//!
//! A name is a socket in a directory that belongs to the user alone. Beside the sockets is what each name's last
//! VM has left, see [`records`]: few files of limited size, which the next one replaces.

use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

mod list;
mod others;

pub use list::{List, Listed, list};

use crate::peer::{self, Holder, Peer, listens};
use crate::records::{self, Record};

/// The longest name, in bytes: a socket's path has room for 107.
const MAX_LEN: usize = 48;
/// How long the VM that may have a name may leave a connection waiting.
const ANSWER: Duration = Duration::from_secs(1);
const SUFFIX: &str = ".sock";
/// The directory beside the sockets, with one for each name.
const RECORDS: &str = "records";

/// The name of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmName(String);

impl VmName {
    /// The name itself.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let begins = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        if begins && text.len() <= MAX_LEN && text.chars().all(good) {
            return Ok(Self(text.to_owned()));
        }
        Err(format!(
            "{text:?} is no name for a VM; expected 1 to {MAX_LEN} letters, digits, '-', '_' and '.', \
             a letter or digit first"
        ))
    }
}

/// A VM as a user names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// By its name.
    Name(VmName),
    /// By the path of its socket.
    Path(PathBuf),
}

impl FromStr for Which {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains('/') {
            return Ok(Self::Path(text.into()));
        }
        let expected = |error| format!("{error}; or a path with a '/' in it");
        text.parse().map(Self::Name).map_err(expected)
    }
}

/// Why a name leads nowhere.
#[derive(Debug, thiserror::Error)]
pub enum NameError {
    /// No VM is called so.
    #[error("{}", unknown(.name, .dir, .ended, .others))]
    Unknown {
        /// The name.
        name: String,
        /// Where its socket would be.
        dir: PathBuf,
        /// How the last one ended.
        ended: String,
        /// Which do run.
        others: String,
    },
    /// One runs already.
    #[error("a VM called {0:?} runs already; choose another name")]
    Taken(String),
    /// One is there, and does not answer.
    #[error(
        "a VM called {name:?} is there already, and does not answer: {peer}. Or choose another name"
    )]
    Silent {
        /// The name.
        name: String,
        /// Its process.
        peer: Peer,
    },
    /// The directory of the sockets is no good.
    #[error("cannot use {dir} for the sockets of named VMs", dir = .dir.display())]
    Dir {
        /// The directory.
        dir: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn unknown(name: &str, dir: &Path, ended: &str, others: &str) -> String {
    match ended {
        "" => format!("no VM is called {name:?} in {}; {others}", dir.display()),
        ended => format!("{ended}; {others}"),
    }
}

/// Where this user's sockets are.
fn dir() -> PathBuf {
    // SAFETY: has no preconditions.
    let uid = unsafe { libc::getuid() };
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if !dir.is_empty() => Path::new(&dir).join("mce-relay"),
        _ if uid == 0 => "/run/mce-relay".into(),
        _ => std::env::temp_dir().join(format!("mce-relay-{uid}")),
    }
}

/// The directory of a named VM's socket. When this is dropped, and it was the last VM's, it goes if it lies
/// among temporary files, where nobody else would take it away.
#[derive(Debug)]
pub struct Leaving {
    dir: PathBuf,
    /// What the VM has left, where nobody will want to look at it.
    record: Option<PathBuf>,
}

impl Leaving {
    /// Of the socket at `path`.
    #[must_use]
    pub fn of(path: &Path) -> Option<Self> {
        let dir = path.parent()?;
        (dir == self::dir() && dir.parent() == Some(std::env::temp_dir().as_path()))
            .then(|| Self { dir: dir.to_owned(), record: None })
    }

    /// The VM called `name` ended as somebody wanted it to: its record goes, too. That of the one before it, which
    /// then did not, stays.
    pub fn forget(&mut self, name: &VmName) {
        self.record = Some(record_dir_in(&self.dir, &name.0));
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        if let Some(record) = &self.record {
            records::forget(record);
            let _ = std::fs::remove_dir(self.dir.join(RECORDS));
        }
        // Of other VMs it is not empty, and stays.
        if let Err(error) = std::fs::remove_dir(&self.dir) {
            log::debug!("{} stays: {error}", self.dir.display());
        }
    }
}

fn socket_in(dir: &Path, name: &VmName) -> PathBuf {
    dir.join(format!("{}{SUFFIX}", name.0))
}

/// The path for the socket of a new VM called `name`. There may be one at which nobody listens any more.
///
/// # Errors
/// The name is taken, or there is no directory for it.
pub fn claim(name: &VmName) -> Result<PathBuf, NameError> {
    claim_in(&dir(), name)
}

fn claim_in(dir: &Path, name: &VmName) -> Result<PathBuf, NameError> {
    let failed = |source| NameError::Dir { dir: dir.to_owned(), source };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    // In /tmp somebody else may have been there first.
    let found = dir.symlink_metadata().map_err(failed)?;
    // SAFETY: has no preconditions.
    let uid = unsafe { libc::geteuid() };
    if !found.is_dir() || found.uid() != uid || found.mode() & 0o022 != 0 {
        let words = "it is not a directory of this user's that nobody else can write to";
        return Err(failed(io::Error::other(words)));
    }
    let path = socket_in(dir, name);
    // Of two who come here at once the second is told when it makes its socket.
    match peer::holder(&path, ANSWER) {
        Holder::Nobody => Ok(path),
        Holder::Somebody => Err(NameError::Taken(name.0.clone())),
        Holder::Silent(peer) => Err(NameError::Silent { name: name.0.clone(), peer }),
    }
}

/// Where the VM called `name` leaves its [record](crate::records).
#[must_use]
pub fn record_dir(name: &VmName) -> PathBuf {
    record_dir_in(&dir(), &name.0)
}

fn record_dir_in(dir: &Path, name: &str) -> PathBuf {
    dir.join(RECORDS).join(name)
}

/// What the VM called `name` has left, if none runs.
#[must_use]
pub fn record(name: &VmName) -> Option<Record> {
    record_in(&dir(), name)
}

fn record_in(dir: &Path, name: &VmName) -> Option<Record> {
    match listens(&socket_in(dir, name)) {
        true => None,
        false => Record::read(&record_dir_in(dir, &name.0), &name.0),
    }
}

/// What the last VM has left whose API socket was at `socket`, if it had a name.
#[must_use]
pub fn record_of(socket: &Path) -> Option<Record> {
    let name: VmName = socket.file_name()?.to_str()?.strip_suffix(SUFFIX)?.parse().ok()?;
    Record::read(&record_dir_in(socket.parent()?, &name.0), &name.0)
}

/// What named VMs have left in `dir` that do not run, by name.
fn ended(dir: &Path) -> Vec<Record> {
    let entries = std::fs::read_dir(dir.join(RECORDS)).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok()?.parse().ok());
    let mut found: Vec<Record> = names.filter_map(|name| record_in(dir, &name)).collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// The socket of the VM that is meant.
///
/// # Errors
/// No VM of that name runs.
pub fn find(which: &Which) -> Result<PathBuf, NameError> {
    match which {
        Which::Path(path) => Ok(path.clone()),
        Which::Name(name) => find_in(&dir(), name, &others::dirs),
    }
}

/// In `dir`; whoever else has one is looked for in the `other` directories.
fn find_in(
    dir: &Path,
    name: &VmName,
    other: &dyn Fn() -> Vec<PathBuf>,
) -> Result<PathBuf, NameError> {
    let path = socket_in(dir, name);
    if listens(&path) {
        return Ok(path);
    }
    let names: Vec<String> = sockets(dir).into_iter().map(|(name, _)| name).collect();
    let elsewhere = others::paths(&other(), dir, name);
    let others = match (elsewhere.as_slice(), names.as_slice()) {
        ([], []) => {
            "none runs that has a name (`mce-relay run --name NAME` gives it one)".to_owned()
        }
        ([], names) => format!("running: {}", names.join(", ")),
        (paths, _) => format!(
            "other users have one; name the one that is meant by its path: {}",
            paths
                .iter()
                .map(|path| format!("--vm {}", path.display()))
                .collect::<Vec<_>>()
                .join(", ")
        ),
    };
    let ended = Record::read(&record_dir_in(dir, &name.0), &name.0);
    let ended = ended.map(|record| record.headline()).unwrap_or_default();
    Err(NameError::Unknown { name: name.0.clone(), dir: dir.to_owned(), ended, others })
}

/// Sockets in `dir` at which somebody listens, by name.
fn sockets(dir: &Path) -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut found: Vec<(String, PathBuf)> = entries
        .filter_map(|entry| {
            let file = entry.file_name().into_string().ok()?;
            let name = file.strip_suffix(SUFFIX)?.to_owned();
            // Not through a link: it may lead to anything that listens.
            let is_socket = entry.file_type().is_ok_and(|kind| kind.is_socket());
            let is_name = name.parse::<VmName>().is_ok();
            (is_socket && is_name && listens(&entry.path())).then(|| (name, entry.path()))
        })
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::show;

    #[test]
    fn names_and_paths() {
        for good in ["a", "vm-1", "A.b_c", "0"] {
            assert!(matches!(good.parse(), Ok(Which::Name(_))), "{good}");
        }
        assert_eq!("./a".parse(), Ok(Which::Path("./a".into())));
        let long = "x".repeat(49);
        for bad in ["", ".", "..", "-a", "a b", "ä", &long] {
            assert!(bad.parse::<Which>().unwrap_err().contains("expected 1 to 48"), "{bad}");
        }
    }

    #[test]
    fn a_name_is_claimed_found_and_left() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("new/mce-relay");
        let name: VmName = "a".parse().unwrap();
        let error = find_in(&dir, &name, &Vec::new).unwrap_err().to_string();
        assert!(error.contains("\"a\"") && error.contains("run --name"), "{error}");

        let path = claim_in(&dir, &name).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(find_in(&dir, &name, &Vec::new).unwrap(), path);
        assert!(matches!(claim_in(&dir, &name), Err(NameError::Taken(_))));
        let error = find_in(&dir, &"b".parse().unwrap(), &Vec::new).unwrap_err().to_string();
        assert!(error.contains("running: a"), "{error}");

        // As after a VMM that was killed.
        drop(listener);
        assert!(find_in(&dir, &name, &Vec::new).is_err());
        assert_eq!(claim_in(&dir, &name).unwrap(), path);
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let top = tempfile::tempdir().unwrap();
        std::fs::set_permissions(top.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let error = claim_in(top.path(), &"a".parse().unwrap()).unwrap_err();
        assert!(show::with_causes(&error).contains("nobody else"), "{error}");
    }
}
