//! Writes a report, as a whole or not at all.

use std::ffi::CString;
use std::fs::{self, File, Metadata, Permissions};
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use mce_relay_vmm::outlets::directory::named;

use super::error::ReportError;
use crate::output::print;

/// More symbolic links, one after another, are not followed, as by the kernel.
const LINKS: usize = 40;
/// So many names that are taken are tried, of 64 random bits each.
const TRIES: usize = 100;

/// Where a report goes.
#[derive(Debug)]
pub enum Target {
    /// To stdout.
    Stdout,
    /// To this file, which is replaced when the report is complete.
    File(PathBuf),
}

impl Target {
    /// Looks whether a report can go to `path` (`-` is stdout), before anything is read. `events` is the file that it is
    /// made of; `page` that it is a page, which nobody reads on a terminal.
    ///
    /// # Errors
    /// It is a terminal, the file of events itself, or no file.
    pub fn check(path: &Path, events: Option<&Path>, page: bool) -> Result<Self, ReportError> {
        let events = events.and_then(|events| match events.as_os_str() == "-" {
            true => of_stream(io::stdin().as_fd()),
            false => events.metadata().ok(),
        });
        let is_read = |found: &Metadata| {
            events.as_ref().is_some_and(|events| {
                found.is_file() && (events.dev(), events.ino()) == (found.dev(), found.ino())
            })
        };
        if path.as_os_str() == "-" {
            return match page && io::stdout().is_terminal() {
                true => Err(ReportError::Terminal),
                false if of_stream(io::stdout().as_fd()).is_some_and(|found| is_read(&found)) => {
                    Err(ReportError::Itself(path.to_owned()))
                }
                false => Ok(Self::Stdout),
            };
        }
        let Ok(found) = path.metadata() else {
            let what = "a symbolic link that leads to itself";
            let target = followed(path);
            return target
                .map(Self::File)
                .ok_or(ReportError::NoFile { path: path.to_owned(), what });
        };
        let what = match found.file_type() {
            kind if kind.is_dir() => Some("a directory"),
            kind if !kind.is_file() => Some("no file"),
            _ => None,
        };
        if let Some(what) = what {
            return Err(ReportError::NoFile { path: path.to_owned(), what });
        }
        if is_read(&found) {
            return Err(ReportError::Itself(path.to_owned()));
        }
        // Of a symbolic link the file that it leads to is replaced.
        Ok(Self::File(path.canonicalize().unwrap_or_else(|_| path.to_owned())))
    }

    /// Writes `text`.
    ///
    /// # Errors
    /// The file cannot be written; what was there is still there then.
    pub fn write(&self, text: &str) -> Result<ExitCode, ReportError> {
        match self {
            Self::Stdout => Ok(print::raw(text.as_bytes())),
            Self::File(path) => {
                replace(path, text).map_err(|source| ReportError::Write {
                    path: path.clone(),
                    source: named(path, source),
                })?;
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

/// What a descriptor of this process leads to.
fn of_stream(fd: BorrowedFd<'_>) -> Option<Metadata> {
    File::from(fd.try_clone_to_owned().ok()?).metadata().ok()
}

/// Where `path`, at which there is no file, leads to; `None` if that has no end.
fn followed(path: &Path) -> Option<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        match path.read_link() {
            // An absolute one takes the place of all.
            Ok(to) => path = path.parent().unwrap_or(Path::new("")).join(to),
            Err(_) => return Some(path),
        }
    }
    None
}

fn replace(path: &Path, text: &str) -> io::Result<()> {
    // A path of one part is in the working directory.
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut options = File::options();
    // As the events, which say where the VMM has the guest's memory, a report is its owner's alone.
    options.write(true).mode(0o600);
    // Without a name until it is complete: nothing is left of it however this program ends.
    let unnamed = options.clone().custom_flags(libc::O_TMPFILE).open(dir);
    if let Ok(mut file) = unnamed {
        fill(&mut file, text, path)?;
        if let Ok(((), name)) = with_a_name(dir, |name| link(&file, name)) {
            return rename(&name, path);
        }
    }
    // A file system that has no files without a name (NFS, say), or a system without /proc.
    let (mut file, name) = with_a_name(dir, |name| options.clone().create_new(true).open(name))?;
    match fill(&mut file, text, path) {
        Ok(()) => rename(&name, path),
        Err(error) => {
            // The error that is told is the first one.
            let _ = fs::remove_file(&name);
            Err(error)
        }
    }
}

/// Does something with a name in `dir` that is not taken: whatever was left behind does not matter. It is short, as the
/// report's own may be as long as a name can be.
fn with_a_name<T>(
    dir: &Path,
    mut make: impl FnMut(&Path) -> io::Result<T>,
) -> io::Result<(T, PathBuf)> {
    let mut tries = 0;
    loop {
        let name = dir.join(format!(".mce-relay-report.{:016x}", fastrand::u64(..)));
        match make(&name) {
            Ok(made) => return Ok((made, name)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && tries < TRIES => {
                tries += 1
            }
            Err(error) => return Err(error),
        }
    }
}

/// Gives a file without a name one.
fn link(file: &File, name: &Path) -> io::Result<()> {
    let from = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let to = CString::new(name.as_os_str().as_bytes())?;
    let (here, flags) = (libc::AT_FDCWD, libc::AT_SYMLINK_FOLLOW);
    // SAFETY: both are strings that end with 0 and live until the call returns, and the call keeps neither.
    match unsafe { libc::linkat(here, from.as_ptr(), here, to.as_ptr(), flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn rename(name: &Path, path: &Path) -> io::Result<()> {
    fs::rename(name, path).inspect_err(|_| {
        // The error that is told is the first one.
        let _ = fs::remove_file(name);
    })
}

fn fill(file: &mut File, text: &str, path: &Path) -> io::Result<()> {
    file.write_all(text.as_bytes())?;
    if let Ok(before) = path.metadata() {
        keep_access(file, &before)?;
    }
    file.sync_all()
}

/// Whoever was let read the last report may read this one, and nobody else: owner and group are kept where this user may
/// give the file to them, and where the group is another one now its members get no more than everybody.
fn keep_access(file: &File, before: &Metadata) -> io::Result<()> {
    let (uid, gid) = (before.uid(), before.gid());
    if fchown(file, Some(uid), Some(gid)).is_err() {
        // Their owner may give files to any of his groups.
        let _ = fchown(file, None, Some(gid));
    }
    let mut mode = before.mode() & 0o777;
    if file.metadata()?.gid() != gid {
        mode &= !0o070 | (mode & 0o007) << 3;
    }
    file.set_permissions(Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().permissions().mode() & 0o777
    }

    fn files(dir: &Path) -> usize {
        fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn a_report_takes_the_place_of_the_last_one() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("r.html"), dir.path().join("link"));
        let write = |path: &Path, text: &str| {
            Target::check(path, None, true).unwrap().write(text).unwrap();
        };
        write(&path, "one");
        assert_eq!(mode(&path), 0o600);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        symlink("r.html", &link).unwrap();
        write(&link, "two");
        assert_eq!((fs::read_to_string(&path).unwrap().as_str(), mode(&path)), ("two", 0o644));
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!(files(dir.path()), 2);
    }

    #[test]
    fn a_link_is_followed_whether_it_leads_to_a_file_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("sub")).unwrap();
        symlink("sub/link", at("first")).unwrap();
        symlink("r.html", at("sub/link")).unwrap();
        for text in ["one", "two"] {
            Target::check(&at("first"), None, true).unwrap().write(text).unwrap();
            assert_eq!(fs::read_to_string(at("sub/r.html")).unwrap(), text);
        }
        assert!(at("first").is_symlink() && at("sub/link").is_symlink());
        symlink("loop", at("loop")).unwrap();
        let error = Target::check(&at("loop"), None, true).unwrap_err().to_string();
        assert!(error.contains("leads to itself"), "{error}");
        // A link of the kernel's, which leads to what has no name.
        let (_, pipe) = io::pipe().unwrap();
        let to_pipe = PathBuf::from(format!("/proc/self/fd/{}", pipe.as_raw_fd()));
        let error = Target::check(&to_pipe, None, true).unwrap_err().to_string();
        assert!(error.contains("is no file"), "{error}");
    }

    /// The longest name that a file can have, and a name of no length beside it.
    #[test]
    fn a_long_name_is_no_obstacle() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r".repeat(255));
        Target::check(&path, None, true).unwrap().write("x").unwrap();
        assert_eq!((fs::read_to_string(&path).unwrap().as_str(), files(dir.path())), ("x", 1));
    }

    #[test]
    fn a_name_that_is_taken_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let mut tried = Vec::new();
        let made = with_a_name(dir.path(), |name| {
            tried.push(name.to_owned());
            let taken = tried.len() < 3;
            if taken { Err(io::ErrorKind::AlreadyExists.into()) } else { Ok(()) }
        });
        assert_eq!(made.unwrap().1, tried[2]);
        assert!(tried[0] != tried[1]);
    }

    /// As the group cannot be kept by everybody, only what holds for all is seen here.
    #[test]
    fn owner_and_group_stay_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.html");
        fs::write(&path, "").unwrap();
        let other = match std::os::unix::fs::chown(&path, Some(1), Some(1)) {
            Ok(()) => 1,
            Err(_) => path.metadata().unwrap().uid(),
        };
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        Target::check(&path, None, true).unwrap().write("x").unwrap();
        let found = path.metadata().unwrap();
        assert_eq!((found.uid(), mode(&path), found.len()), (other, 0o640, 1));
    }

    #[test]
    fn what_cannot_be_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let events = dir.path().join("events");
        fs::write(&events, "x").unwrap();
        let refused =
            |path: &Path| Target::check(path, Some(&events), true).unwrap_err().to_string();
        assert!(refused(&events).contains("is the file of events that is read"));
        assert!(refused(dir.path()).contains("is a directory"));
        assert!(refused(Path::new("/dev/null")).contains("is no file"));
    }

    #[test]
    fn nothing_is_left_of_what_failed() {
        let dir = tempfile::tempdir().unwrap();
        let nowhere = dir.path().join("no/report.html");
        let error = Target::check(&nowhere, None, true).unwrap().write("x").unwrap_err();
        let words = mce_relay_vmm::words::with_causes(&error);
        assert!(words.contains("make it (mkdir -p)"), "{words}");
        let target = dir.path().join("r");
        fs::create_dir(&target).unwrap();
        Target::File(target).write("x").unwrap_err();
        assert_eq!(files(dir.path()), 1);
    }
}
