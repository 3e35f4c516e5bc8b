//! Names of running VMs: where their API sockets are.
//!
//! A name is a socket in a directory that belongs to the user alone. Beside the sockets is the record that each name's
//! last VM left, see [`record`]: few files of limited size, which the next VM of that name replaces.

use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::outlets::peer::{self, Holder, Peer};
use crate::session::record;

/// The longest name, in bytes: a socket's path has room for 107.
const MAX_LEN: usize = 48;
/// How long a VM that may have the name may leave a connection waiting.
const ANSWER: Duration = Duration::from_secs(1);
/// The suffix of a socket's file name, behind the VM's name.
pub const SUFFIX: &str = ".sock";
/// The directory of the records, beside the sockets, with a directory for each name.
pub const RECORDS: &str = "records";

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

/// Why a VM cannot have this name.
#[derive(Debug, thiserror::Error)]
pub enum NameError {
    /// A VM with this name runs already.
    #[error("a VM called {0:?} runs already; choose another name")]
    Taken(String),
    /// A VM with this name exists, and does not answer.
    #[error(
        "a VM called {name:?} is there already, and does not answer: {peer}. Or choose another name"
    )]
    Silent {
        /// The name.
        name: String,
        /// Its process.
        peer: Peer,
    },
    /// The directory of the sockets cannot be used.
    #[error("cannot use {dir} for the sockets of named VMs", dir = .dir.display())]
    Dir {
        /// The directory.
        dir: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Where this user's sockets are.
pub fn dir() -> PathBuf {
    // SAFETY: has no preconditions.
    let uid = unsafe { libc::getuid() };
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if !dir.is_empty() => Path::new(&dir).join("mce-relay"),
        _ if uid == 0 => "/run/mce-relay".into(),
        _ => std::env::temp_dir().join(format!("mce-relay-{uid}")),
    }
}

/// The directory of a named VM's socket. Dropping this removes the directory if no other VM uses it and it lies among
/// temporary files, where nothing else would remove it.
#[derive(Debug)]
pub struct Leaving {
    dir: PathBuf,
    /// The VM's record, if it is to be removed.
    record: Option<PathBuf>,
}

impl Leaving {
    /// For the socket at `path`.
    #[must_use]
    pub fn of(path: &Path) -> Option<Self> {
        let dir = path.parent()?;
        (dir == self::dir() && dir.parent() == Some(std::env::temp_dir().as_path()))
            .then(|| Self { dir: dir.to_owned(), record: None })
    }

    /// Notes that the VM called `name` ended as the user wanted: its record is removed, too. The record of the VM
    /// before it, which had failed, stays.
    pub fn forget(&mut self, name: &VmName) {
        self.record = Some(record_dir_in(&self.dir, &name.0));
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        if let Some(record) = &self.record {
            record::forget(record);
            let _ = std::fs::remove_dir(self.dir.join(RECORDS));
        }
        // It is not empty, and stays, while other VMs use it.
        if let Err(error) = std::fs::remove_dir(&self.dir) {
            log::debug!("{} stays: {error}", self.dir.display());
        }
    }
}

/// The socket in `dir` of the VM called `name`.
#[must_use]
pub fn socket_in(dir: &Path, name: &VmName) -> PathBuf {
    dir.join(format!("{}{SUFFIX}", name.0))
}

/// The path for the socket of a new VM called `name`. A socket at which no process listens any more may be there.
///
/// # Errors
/// The name is taken, or there is no directory for it.
pub fn claim(name: &VmName) -> Result<PathBuf, NameError> {
    claim_in(&dir(), name)
}

fn claim_in(dir: &Path, name: &VmName) -> Result<PathBuf, NameError> {
    let failed = |source| NameError::Dir { dir: dir.to_owned(), source };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    // In /tmp another user may have made it before.
    let found = dir.symlink_metadata().map_err(failed)?;
    // SAFETY: has no preconditions.
    let uid = unsafe { libc::geteuid() };
    if !found.is_dir() || found.uid() != uid || found.mode() & 0o022 != 0 {
        let words = "it is not a directory of this user's that nobody else can write to";
        return Err(failed(io::Error::other(words)));
    }
    let path = socket_in(dir, name);
    // If two processes come here at once, the second one's error is reported when it makes its socket.
    match peer::holder(&path, ANSWER) {
        Holder::Nobody => Ok(path),
        Holder::Somebody => Err(NameError::Taken(name.0.clone())),
        Holder::Silent(peer) => Err(NameError::Silent { name: name.0.clone(), peer }),
    }
}

/// Where the VM called `name` leaves its [`record`].
#[must_use]
pub fn record_dir(name: &VmName) -> PathBuf {
    record_dir_in(&dir(), &name.0)
}

/// Where in `dir` the VM called `name` leaves its record.
#[must_use]
pub fn record_dir_in(dir: &Path, name: &str) -> PathBuf {
    dir.join(RECORDS).join(name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::words;

    #[test]
    fn a_name_is_claimed_and_left() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("new/mce-relay");
        let name: VmName = "a".parse().unwrap();
        let path = claim_in(&dir, &name).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        assert!(matches!(claim_in(&dir, &name), Err(NameError::Taken(_))));

        // As after a VMM that was killed. A process that another test starts has the socket, too, until it runs its program.
        drop(listener);
        let begun = std::time::Instant::now();
        let claimed = loop {
            match claim_in(&dir, &name) {
                Err(NameError::Taken(_)) if begun.elapsed().as_secs() < 10 => {
                    std::thread::yield_now();
                }
                other => break other.unwrap(),
            }
        };
        assert_eq!(claimed, path);
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let top = tempfile::tempdir().unwrap();
        std::fs::set_permissions(top.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let error = claim_in(top.path(), &"a".parse().unwrap()).unwrap_err();
        assert!(words::with_causes(&error).contains("nobody else"), "{error}");
    }
}
