//! The result of a check: what was found, or why something was not.

use std::error::Error;
use std::fmt::Display;
use std::fs;
use std::io::{self, ErrorKind};
use std::iter::successors;

use mce_relay_vmm::words::with_causes;

/// The usual mount point of debugfs.
pub(super) const DEBUGFS: &str = "/sys/kernel/debug";
/// The usual mount point of tracefs. Not the one below debugfs: looking there would mount it.
const TRACEFS: &str = "/sys/kernel/tracing";
/// What to do about something that this user is not shown.
pub(super) const AS_ROOT: &str = "run as root";
/// The same, if this user is root already.
const OUTSIDE: &str = "look on the host itself: root of a container, a user namespace or a locked-down kernel may not \
                       see it either";

/// What to do about something that this process is not shown.
pub(super) fn to_see() -> &'static str {
    // SAFETY: has no preconditions.
    match unsafe { libc::geteuid() } {
        0 => OUTSIDE,
        _ => AS_ROOT,
    }
}

/// What was found, in words, or why it cannot be said to be there.
pub(super) type Found = Result<String, Gap>;

/// Why something cannot be said to be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Gap {
    /// It is not there, or not as it should be.
    Missing(String),
    /// It is there, and should not be.
    InTheWay(String),
    /// It is not known whether it is there.
    Unknown {
        /// Why not.
        found: String,
        /// What to do to know more.
        mend: &'static str,
    },
}

impl Gap {
    fn hidden(what: impl Display) -> Self {
        Self::Unknown { found: format!("{what} cannot be seen by this user"), mend: to_see() }
    }

    /// The gap for an error on using `what`.
    pub(super) fn io(what: impl Display, error: &io::Error) -> Self {
        match error.kind() {
            ErrorKind::PermissionDenied => Self::hidden(what),
            ErrorKind::NotFound => Self::Missing(format!("no {what}")),
            _ => Self::Missing(format!("{what}: {error}")),
        }
    }

    /// The same for an error whose text says what it is about.
    pub(super) fn of(what: impl Display, error: &(dyn Error + 'static)) -> Self {
        let denied = successors(Some(error), |error| (*error).source())
            .filter_map(|error| error.downcast_ref::<io::Error>())
            .any(|error| error.kind() == ErrorKind::PermissionDenied);
        if denied { Self::hidden(what) } else { Self::Missing(with_causes(error)) }
    }
}

/// `path` in a shorter form, if it is in a well-known file system.
fn in_words(path: &str) -> String {
    for (root, name) in [(DEBUGFS, "debugfs"), (TRACEFS, "tracefs")] {
        if let Some(file) = path.strip_prefix(root).and_then(|rest| rest.strip_prefix('/')) {
            return format!("{file} in {name}");
        }
    }
    path.to_owned()
}

/// Whether there is something at `path`.
pub(super) fn there(path: &str) -> Found {
    let words = in_words(path);
    match fs::metadata(path) {
        Ok(_) => Ok(words),
        Err(error) => Err(Gap::io(words, &error)),
    }
}

/// The text of the file at `path`.
pub(super) fn read(path: &str) -> Found {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(error) => Err(Gap::io(in_words(path), &error)),
    }
}

/// The value of the sysctl `vm.name`.
pub(super) fn sysctl(name: &str) -> Found {
    read(&format!("/proc/sys/vm/{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open it")]
    struct Outer(#[source] io::Error);

    #[test]
    fn what_this_user_may_not_see_is_not_missing() {
        let hidden =
            Gap::Unknown { found: "a file cannot be seen by this user".to_owned(), mend: to_see() };
        for errno in [libc::EACCES, libc::EPERM] {
            let error = io::Error::from_raw_os_error(errno);
            assert_eq!(Gap::io("a file", &error), hidden);
            assert_eq!(Gap::of("a file", &Outer(error)), hidden, "somewhere among the causes");
        }
        let error = io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(Gap::io("a file", &error), Gap::Missing("no a file".to_owned()));
        let Gap::Missing(words) = Gap::of("a file", &Outer(error)) else { panic!("hidden") };
        assert!(words.starts_with("cannot open it: No such file"), "{words}");
    }

    #[test]
    fn files_of_debugfs_are_named_without_their_long_path() {
        assert_eq!(in_words("/sys/kernel/debug/hwpoison/x"), "hwpoison/x in debugfs");
        assert_eq!(in_words("/sys/kernel/tracing/events/x"), "events/x in tracefs");
        for path in [DEBUGFS, "/sys/kernel/debugger/x", "/dev/kvm"] {
            assert_eq!(in_words(path), path);
        }
    }
}
