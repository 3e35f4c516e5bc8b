//! Sockets that other processes find by their path: accessible to their owner only, and removed at the end.
//!
//! A socket that a killed process has left is replaced, if it belongs to this user and no process answers at it. The
//! check, the making and the removal are done under a lock of the directory (flock), so that two processes at the same
//! time cannot remove one another's socket.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use log::{debug, warn};

use crate::outlets::directory;
use crate::outlets::files;
use crate::outlets::peer::{self, Holder, Peer};

pub mod for_handlers;

/// How long another process's lock is waited for; each is held for a moment only.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a process that listens at the path may leave a connection waiting; the lock is held meanwhile.
const ANSWER: Duration = Duration::from_millis(500);

/// Why a socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A process answers there.
    #[error("a running process listens there already; choose another path")]
    Answers,
    /// A process listens there and does not answer.
    #[error("somebody listens there already, and does not answer: {0}. Or choose another path")]
    Silent(Peer),
    /// Something else is at the path.
    #[error(
        "the path exists, and is not a socket of this user's that nobody listens at; if nobody needs it, \
         remove it, or choose another path"
    )]
    Exists,
    /// The system refuses.
    #[error(transparent)]
    Os(#[from] io::Error),
}

/// A socket's path; dropping this removes it, if it still is that socket.
#[derive(Debug)]
pub struct BoundPath {
    path: PathBuf,
    /// Device and inode. They cannot be reused while the listener is open.
    id: (u64, u64),
    _listener: UnixListener,
    _for_handlers: Option<for_handlers::Entry>,
}

/// Listens at `path`, with mode 0600.
///
/// # Errors
/// See [`BindError`].
pub fn bind(path: &Path) -> Result<(UnixListener, BoundPath), BindError> {
    let lock = lock(path);
    if let Ok(found) = path.symlink_metadata() {
        if lock.is_none() || !found.file_type().is_socket() || found.uid() != own_uid() {
            return Err(BindError::Exists);
        }
        match peer::holder(path, ANSWER) {
            Holder::Nobody => {
                std::fs::remove_file(path)?;
                debug!("nobody listened at {}: replaced", path.display());
            }
            Holder::Somebody => return Err(BindError::Answers),
            Holder::Silent(peer) => return Err(BindError::Silent(peer)),
        }
    }
    let listener = {
        // SAFETY: umask takes no pointer. It applies to the whole process; no other thread makes files.
        let before = unsafe { libc::umask(0o177) };
        let listener = UnixListener::bind(path);
        // SAFETY: as above.
        unsafe { libc::umask(before) };
        listener.map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => BindError::Exists,
            _ => BindError::Os(directory::named(path, error)),
        })?
    };
    let made = path.symlink_metadata()?;
    let id = (made.dev(), made.ino());
    let bound = BoundPath {
        path: path.to_owned(),
        id,
        _listener: listener.try_clone()?,
        _for_handlers: for_handlers::Entry::new(path, id),
    };
    files::prepare()?;
    Ok((listener, bound))
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        let _lock = lock(&self.path);
        let now = self.path.symlink_metadata();
        if now.is_ok_and(|now| (now.dev(), now.ino()) == self.id)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            warn!("cannot remove the socket {}: {error}", self.path.display());
        }
    }
}

fn own_uid() -> u32 {
    // SAFETY: has no preconditions.
    unsafe { libc::geteuid() }
}

/// Locks the directory of `path` until this is dropped. `None` where it cannot be locked: then no socket is replaced,
/// and making one at a free path needs no lock.
fn lock(path: &Path) -> Option<File> {
    let mut options = File::options();
    let dir = options.read(true).custom_flags(libc::O_DIRECTORY).open(directory::of(path)).ok()?;
    let start = Instant::now();
    loop {
        // SAFETY: flock takes no pointer.
        if unsafe { libc::flock(dir.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
            return Some(dir);
        }
        if start.elapsed() > PATIENCE {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn it_is_made_for_its_owner_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (listener, bound) = bind(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        assert!(matches!(bind(&path), Err(BindError::Answers)));
        drop((listener, bound));
        assert!(!path.exists());
    }

    #[test]
    fn one_that_was_left_behind_is_replaced_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let (_listener, bound) = bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        // Another socket is at the path now, and stays.
        std::fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(bound);
        UnixStream::connect(&path).unwrap();

        let file = dir.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        assert!(matches!(bind(&file), Err(BindError::Exists)));
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
        let error = bind(&dir.path().join("none/s")).unwrap_err().to_string();
        assert!(error.contains("/none is not there"), "{error}");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(matches!(bind(&link), Err(BindError::Exists)));
    }

    #[test]
    fn of_many_at_the_same_time_one_gets_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        for _ in 0..20 {
            // Left behind.
            drop(UnixListener::bind(&path).unwrap());
            let barrier = Barrier::new(10);
            let bound: Vec<_> = std::thread::scope(|scope| {
                let one = || {
                    barrier.wait();
                    bind(&path).ok()
                };
                let threads: Vec<_> = (0..10).map(|_| scope.spawn(one)).collect();
                threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(bound.len(), 1);
            UnixStream::connect(&path).unwrap();
        }
    }
}
