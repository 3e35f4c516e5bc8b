//! Writes a report, as a whole or not at all.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use mce_relay_vmm::outlets::directory::named;

use super::error::ReportError;
use crate::output::print;

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
        if path.as_os_str() == "-" {
            return match page && io::stdout().is_terminal() {
                true => Err(ReportError::Terminal),
                false => Ok(Self::Stdout),
            };
        }
        let Ok(found) = path.metadata() else { return Ok(Self::File(path.to_owned())) };
        let what = match found.file_type() {
            kind if kind.is_dir() => Some("a directory"),
            kind if !kind.is_file() => Some("no file"),
            _ => None,
        };
        if let Some(what) = what {
            return Err(ReportError::NoFile { path: path.to_owned(), what });
        }
        let same = |other: fs::Metadata| (other.dev(), other.ino()) == (found.dev(), found.ino());
        if events.and_then(|events| events.metadata().ok()).is_some_and(same) {
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

fn replace(path: &Path, text: &str) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?;
    let mut new_name = std::ffi::OsString::from(".");
    new_name.push(name);
    new_name.push(format!(".{}.new", std::process::id()));
    let new = path.with_file_name(new_name);
    // As the events, which say where the VMM has the guest's memory, a report is its owner's alone.
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&new)?;
    let written = write_and_rename(&mut file, text, &new, path);
    if written.is_err() {
        // The error that is told is the first one.
        let _ = fs::remove_file(&new);
    }
    written
}

fn write_and_rename(file: &mut File, text: &str, new: &Path, path: &Path) -> io::Result<()> {
    file.write_all(text.as_bytes())?;
    if let Ok(before) = path.metadata() {
        // Whoever was let read the last one may read this one.
        file.set_permissions(before.permissions())?;
    }
    file.sync_all()?;
    fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

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
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        std::os::unix::fs::symlink("r.html", &link).unwrap();
        write(&link, "two");
        assert_eq!((fs::read_to_string(&path).unwrap().as_str(), mode(&path)), ("two", 0o644));
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!(files(dir.path()), 2);
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
