//! Files that are appended to as long as the process lives: a guest's console, the events.
//!
//! The thread that writes such a file opens nothing, as its seccomp filter has no call for that. The main thread opens
//! it: once, when everything else is checked; again when the file has become too long ([`attend`]) or the user has
//! moved it away ([`reopen`], on SIGHUP). It leaves the new file where the writer finds it.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use log::{debug, warn};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::outlets::directory;

/// How long a writer waits before it retries after a failure (a full disk, say).
pub const RETRY: Duration = Duration::from_secs(1);

/// A file to write to, and its limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFile {
    /// Its path; the file is made with mode 0600 if it does not exist.
    pub path: PathBuf,
    /// Length in bytes above which the file is renamed to `PATH.1`, which it replaces, and a new one is begun.
    pub max_size: Option<u64>,
}

impl<T: Into<PathBuf>> From<T> for LogFile {
    fn from(path: T) -> Self {
        Self { path: path.into(), max_size: None }
    }
}

impl LogFile {
    /// Checks, without touching anything, whether there can be such a file.
    ///
    /// # Errors
    /// It is a directory, or would be in one that is not there.
    pub fn check(&self) -> io::Result<()> {
        match self.path.metadata() {
            Ok(found) if found.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let named = |error| directory::named(&self.path, error);
                match directory::of(&self.path).metadata().map_err(named)?.is_dir() {
                    true => Ok(()),
                    false => Err(named(io::ErrorKind::NotADirectory.into())),
                }
            }
            Err(error) => Err(directory::named(&self.path, error)),
        }
    }
}

/// What a writer and the main thread share of one file.
#[derive(Debug)]
struct Shared {
    path: PathBuf,
    flags: i32,
    regular: bool,
    wake: Arc<EventFd>,
    /// The writer asks for another file, as this one is too long.
    too_long: AtomicBool,
    /// Device and inode of the file that was opened last.
    id: Mutex<(u64, u64)>,
    /// The file with which the writer goes on.
    next: Mutex<Option<(File, u64)>>,
}

/// Every file of this process, and the eventfd that wakes the main thread for them.
#[derive(Debug, Default)]
struct Registry {
    wake: Option<Arc<EventFd>>,
    files: Vec<Weak<Shared>>,
}

/// The descriptor of the registry's `wake`, for signal handlers; -1 while there is none.
static WAKE: AtomicI32 = AtomicI32::new(-1);

static REGISTRY: Mutex<Registry> = Mutex::new(Registry { wake: None, files: Vec::new() });

fn registry() -> MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    fn wake(&mut self) -> io::Result<Arc<EventFd>> {
        if let Some(wake) = &self.wake {
            return Ok(Arc::clone(wake));
        }
        let wake = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        // The registry keeps it as long as the process.
        WAKE.store(wake.as_raw_fd(), Ordering::Release);
        self.wake = Some(Arc::clone(&wake));
        Ok(wake)
    }

    fn files(&mut self) -> Vec<Arc<Shared>> {
        self.files.retain(|file| file.strong_count() > 0);
        self.files.iter().filter_map(Weak::upgrade).collect()
    }
}

/// Makes the eventfd by which [`wake`] wakes the main thread.
///
/// # Errors
/// No more file descriptors.
pub fn prepare() -> io::Result<()> {
    registry().wake().map(drop)
}

/// Wakes the main thread, if it waits for [`wanted`]. May be called in a signal handler.
pub fn wake() {
    let fd = WAKE.load(Ordering::Acquire);
    let one = 1_u64.to_ne_bytes();
    // SAFETY: write is async-signal-safe, and the buffer is valid for its length. On -1 it fails.
    unsafe { libc::write(fd, one.as_ptr().cast(), one.len()) };
}

/// A descriptor that is readable when [`attend`] has something to do; `None` while there is no file.
#[must_use]
pub fn wanted() -> Option<RawFd> {
    registry().wake.as_ref().map(|wake| wake.as_raw_fd())
}

/// Renames files that have become too long, and begins new ones. For the main thread.
pub fn attend() {
    let mut registry = registry();
    if let Some(wake) = &registry.wake {
        // Empty if it was read already.
        let _ = wake.read();
    }
    for file in registry.files() {
        if file.too_long.swap(false, Ordering::AcqRel)
            && let Err(error) = file.rotate()
        {
            let path = file.path.display();
            warn!("cannot begin {path} anew, though it is too long: {error}; it goes on growing");
        }
    }
}

/// Makes a write beyond the limit of files' sizes (RLIMIT_FSIZE) fail, where it would otherwise end the process.
pub fn survive_limits() {
    // SAFETY: to ignore a signal takes no handler.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Opens all files by their paths again, as the user may have moved the old ones away. For the main thread.
pub fn reopen() {
    for file in registry().files() {
        if let Err(error) = file.reopen() {
            let path = file.path.display();
            warn!("cannot open {path} again: {error}; what was it before is written to");
        }
    }
}

/// `PATH.1` for `PATH`.
#[must_use]
pub fn older(path: &Path) -> PathBuf {
    let mut older = path.as_os_str().to_owned();
    older.push(".1");
    older.into()
}

fn open(path: &Path, flags: i32) -> io::Result<File> {
    let made =
        OpenOptions::new().append(true).create(true).mode(0o600).custom_flags(flags).open(path);
    made.map_err(|error| directory::named(path, error))
}

fn id(found: &Metadata) -> (u64, u64) {
    (found.dev(), found.ino())
}

/// Locks a file for this process as long as it is open (flock): of two processes that write to one file, each would
/// rename what the other writes.
fn lock(file: &File) -> io::Result<()> {
    // SAFETY: flock takes no pointer.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::WouldBlock => Err(io::Error::other(
            "a running VM, or another option of this one, writes to that file; give each a file of its own",
        )),
        // Some file systems have no locks.
        error => {
            debug!("a file to write to cannot be locked: {error}");
            Ok(())
        }
    }
}

impl Shared {
    fn rotate(&self) -> io::Result<()> {
        // If another file is at the path, the old one has been moved away already, and the new one must not be touched.
        if self.is_at_its_path()? {
            std::fs::rename(&self.path, older(&self.path))?;
        }
        self.reopen()
    }

    fn reopen(&self) -> io::Result<()> {
        if !self.regular {
            return Ok(());
        }
        // The lock belongs to the open file, and would conflict with a second one.
        if self.is_at_its_path()? {
            return Ok(());
        }
        let file = open(&self.path, self.flags)?;
        lock(&file)?;
        let found = file.metadata()?;
        let len = found.len();
        *self.id() = id(&found);
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = Some((file, len));
        Ok(())
    }
}

impl Shared {
    fn id(&self) -> MutexGuard<'_, (u64, u64)> {
        self.id.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the file that was opened last is still the one at the path.
    fn is_at_its_path(&self) -> io::Result<bool> {
        match self.path.metadata() {
            Ok(found) => Ok(id(&found) == *self.id()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// A file to append to, for its writer.
#[derive(Debug)]
pub struct Appended {
    file: File,
    len: u64,
    max_size: Option<u64>,
    /// The length at which the writer asks for another file.
    ask_at: u64,
    /// It ended in the middle of a line when it was opened.
    mid_line: bool,
    shared: Arc<Shared>,
}

impl Appended {
    /// Opens the file. With `wait`, opening a FIFO waits for a reader, and writes wait for room.
    ///
    /// # Errors
    /// It cannot be opened, another VM writes to it, or its size is to be limited and it is no regular file.
    pub fn open(to: &LogFile, wait: bool) -> io::Result<Self> {
        let mut registry = registry();
        let wake = registry.wake()?;
        let flags = libc::O_NOCTTY | if wait { 0 } else { libc::O_NONBLOCK };
        let file = open(&to.path, flags)?;
        let found = file.metadata()?;
        let (regular, len) = (found.is_file(), found.len());
        if to.max_size.is_some() && !regular {
            return Err(io::Error::other("max-size is for regular files, and this is none"));
        }
        if regular {
            lock(&file)?;
        }
        // An absolute path without links, so that a later open leads to the same place.
        let path = to.path.canonicalize().unwrap_or_else(|_| to.path.clone());
        let mid_line = regular && len > 0 && !ends_in_line_feed(&path, len);
        let (too_long, next) = (AtomicBool::new(false), Mutex::new(None));
        let id = Mutex::new(id(&found));
        let shared = Arc::new(Shared { path, flags, regular, wake, too_long, id, next });
        registry.files.push(Arc::downgrade(&shared));
        let ask_at = to.max_size.unwrap_or(u64::MAX);
        Ok(Self { file, len, max_size: to.max_size, ask_at, mid_line, shared })
    }

    /// Its path, without links.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Whether it is a regular file: one that keeps what is written, and can be full.
    #[must_use]
    pub fn is_regular(&self) -> bool {
        self.shared.regular
    }

    /// Whether there was something in it when it was opened.
    #[must_use]
    pub fn was_begun(&self) -> bool {
        self.shared.regular && self.len > 0
    }

    /// Whether its contents at that time end in the middle of a line.
    #[must_use]
    pub fn is_mid_line(&self) -> bool {
        self.mid_line
    }

    /// Continues with the file that the main thread has opened meanwhile; returns whether there is one.
    pub fn put_aside(&mut self) -> bool {
        let next = self.shared.next.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((file, len)) = next else { return false };
        (self.file, self.len) = (file, len);
        self.ask_at = self.max_size.unwrap_or(u64::MAX);
        true
    }
}

impl Write for Appended {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.len = self.len.saturating_add(n as u64);
        if self.len > self.ask_at {
            // Ask again when it has grown by as much and is still the same file.
            self.ask_at = self.len.saturating_add(self.max_size.unwrap_or(u64::MAX));
            self.shared.too_long.store(true, Ordering::Release);
            // It fails only when the counter is full, and then the main thread is awake anyway.
            let _ = self.shared.wake.write(1);
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsRawFd for Appended {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Whether the last byte of a file is a line feed; true where the file may not be read.
fn ends_in_line_feed(path: &Path, len: u64) -> bool {
    let mut last = [b'\n'];
    let read = File::open(path).and_then(|file| file.read_exact_at(&mut last, len - 1));
    read.is_err() || last == *b"\n"
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn it_is_appended_to_and_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let mut file = Appended::open(&path.clone().into(), true).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!file.was_begun() && !file.is_mid_line());
        file.write_all(b"one").unwrap();
        drop(file);
        let mut file = Appended::open(&path.clone().into(), true).unwrap();
        assert!(file.was_begun() && file.is_mid_line());
        file.write_all(b"two\n").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"onetwo\n");
        drop(file);
        assert!(!Appended::open(&path.into(), true).unwrap().is_mid_line());
    }

    #[test]
    fn a_long_one_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let to = LogFile { path: path.clone(), max_size: Some(4) };
        let mut file = Appended::open(&to, true).unwrap();
        file.write_all(b"1234").unwrap();
        attend();
        assert!(!file.put_aside(), "no longer than it may be");
        for round in [b"5", b"6"] {
            file.write_all(round).unwrap();
            attend();
            assert!(file.put_aside());
            file.write_all(b"abcd").unwrap();
        }
        assert_eq!(std::fs::read(older(&path)).unwrap(), b"abcd6");
        assert_eq!(std::fs::read(&path).unwrap(), b"abcd");
    }

    #[test]
    fn one_that_was_moved_away_is_opened_again() {
        let dir = tempfile::tempdir().unwrap();
        let (path, moved) = (dir.path().join("out"), dir.path().join("moved"));
        let mut file = Appended::open(&path.clone().into(), true).unwrap();
        file.write_all(b"1").unwrap();
        std::fs::rename(&path, &moved).unwrap();
        file.write_all(b"2").unwrap();
        reopen();
        assert!(file.put_aside());
        file.write_all(b"3").unwrap();
        assert_eq!(std::fs::read(&moved).unwrap(), b"12");
        assert_eq!(std::fs::read(&path).unwrap(), b"3");
    }

    #[test]
    fn what_is_in_its_place_by_now_is_not_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let (path, moved) = (dir.path().join("out"), dir.path().join("moved"));
        let to = LogFile { path: path.clone(), max_size: Some(4) };
        let mut file = Appended::open(&to, true).unwrap();
        file.write_all(b"1234").unwrap();
        std::fs::rename(&path, &moved).unwrap();
        std::fs::write(&path, b"made for it\n").unwrap();
        file.write_all(b"5").unwrap();
        attend();
        assert!(!older(&path).exists(), "it was not too long");
        assert!(file.put_aside());
        file.write_all(b"6").unwrap();
        assert_eq!(std::fs::read(&moved).unwrap(), b"12345");
        assert_eq!(std::fs::read(&path).unwrap(), b"made for it\n6");

        // One that another VM has is left to it.
        std::fs::remove_file(&path).unwrap();
        let other = Appended::open(&path.clone().into(), true).unwrap();
        reopen();
        assert!(!file.put_aside());
        drop(other);
        reopen();
        assert!(file.put_aside());
    }

    #[test]
    fn one_writes_to_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let to: LogFile = dir.path().join("out").into();
        let file = Appended::open(&to, true).unwrap();
        let error = Appended::open(&to, true).unwrap_err();
        assert!(error.to_string().contains("a file of its own"), "{error}");
        drop(file);
        Appended::open(&to, true).unwrap();
        for _ in 0..2 {
            Appended::open(&"/dev/null".into(), false).unwrap();
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let limited = LogFile { path: "/dev/null".into(), max_size: Some(1) };
        let error = Appended::open(&limited, false).unwrap_err();
        assert!(error.to_string().contains("regular files"), "{error}");
        assert!(Appended::open(&"/dev/null".into(), false).is_ok());
        for (path, good) in [
            (dir.path().join("new"), true),
            ("/dev/null".into(), true),
            ("new".into(), true),
            (dir.path().to_owned(), false),
            (dir.path().join("no/such"), false),
            ("/dev/null/x".into(), false),
        ] {
            assert_eq!(LogFile::from(&path).check().is_ok(), good, "{path:?}");
        }
    }
}
