//! Finds the VM that a command is about: the sockets and records of named VMs.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use mce_relay_vmm::outlets::peer::listens;
use mce_relay_vmm::session::names::{RECORDS, SUFFIX, VmName, dir, record_dir_in, socket_in};

use crate::client::other_users;
use crate::client::record::Record;

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

/// No running VM has this name.
#[derive(Debug, thiserror::Error)]
#[error("{}", unknown(.name, .dir, .ended, .others))]
pub struct FindError {
    /// The name.
    name: String,
    /// Where its socket would be.
    dir: PathBuf,
    /// How the last one of this name ended.
    ended: String,
    /// Which VMs run.
    others: String,
}

fn unknown(name: &str, dir: &Path, ended: &str, others: &str) -> String {
    match ended {
        "" => format!("no VM is called {name:?} in {}; {others}", dir.display()),
        ended => format!("{ended}; {others}"),
    }
}

/// The record of the VM called `name`, if none of that name runs.
#[must_use]
pub fn record(name: &VmName) -> Option<Record> {
    record_in(&dir(), name)
}

fn record_in(dir: &Path, name: &VmName) -> Option<Record> {
    match listens(&socket_in(dir, name)) {
        true => None,
        false => Record::read(&record_dir_in(dir, name.as_str()), name.as_str()),
    }
}

/// The record of the last VM whose API socket was at `socket`, if it had a name.
#[must_use]
pub fn record_of(socket: &Path) -> Option<Record> {
    let name: VmName = socket.file_name()?.to_str()?.strip_suffix(SUFFIX)?.parse().ok()?;
    Record::read(&record_dir_in(socket.parent()?, name.as_str()), name.as_str())
}

/// The records in `dir` of VMs that do not run, by name.
pub(crate) fn ended(dir: &Path) -> Vec<Record> {
    let entries = std::fs::read_dir(dir.join(RECORDS)).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok()?.parse().ok());
    let mut found: Vec<Record> = names.filter_map(|name| record_in(dir, &name)).collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// The socket of the VM `which`.
///
/// # Errors
/// No VM of that name runs.
pub fn find(which: &Which) -> Result<PathBuf, FindError> {
    match which {
        Which::Path(path) => Ok(path.clone()),
        Which::Name(name) => find_in(&dir(), name, &other_users::dirs),
    }
}

/// Looks in `dir`, and for the text of an error in the `other` directories, too.
pub(crate) fn find_in(
    dir: &Path,
    name: &VmName,
    other: &dyn Fn() -> Vec<PathBuf>,
) -> Result<PathBuf, FindError> {
    let path = socket_in(dir, name);
    if listens(&path) {
        return Ok(path);
    }
    let names: Vec<String> = sockets(dir).into_iter().map(|(name, _)| name).collect();
    let elsewhere = other_users::paths(&other(), dir, name);
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
    let ended = Record::read(&record_dir_in(dir, name.as_str()), name.as_str());
    let ended = ended.map(|record| record.headline()).unwrap_or_default();
    Err(FindError { name: name.as_str().to_owned(), dir: dir.to_owned(), ended, others })
}

/// Sockets in `dir` at which a process listens, by name.
pub(crate) fn sockets(dir: &Path) -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut found: Vec<(String, PathBuf)> = entries
        .filter_map(|entry| {
            let file = entry.file_name().into_string().ok()?;
            let name = file.strip_suffix(SUFFIX)?.to_owned();
            // Links are not followed: they may lead to any socket.
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
    fn a_name_is_found() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path();
        let name: VmName = "a".parse().unwrap();
        let error = find_in(dir, &name, &Vec::new).unwrap_err().to_string();
        assert!(error.contains("\"a\"") && error.contains("run --name"), "{error}");

        let path = socket_in(dir, &name);
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(find_in(dir, &name, &Vec::new).unwrap(), path);
        let error = find_in(dir, &"b".parse().unwrap(), &Vec::new).unwrap_err().to_string();
        assert!(error.contains("running: a"), "{error}");

        // As after a VMM that was killed.
        drop(listener);
        assert!(find_in(dir, &name, &Vec::new).is_err());
    }
}
