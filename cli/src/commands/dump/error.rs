//! Why memory was not read, or not written down.

use std::io;
use std::path::{Path, PathBuf};

use crate::client::error::ClientError;

/// Why memory was not read.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The VM does not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// What was read is of two guests.
    #[error(
        "the guest started over while its memory was being read, so the parts do not fit together; \
         try again"
    )]
    StartedOver,
    /// An address is not guest RAM.
    #[error("GPA {gpa:#x} is not guest RAM; this guest has {ram}")]
    OutsideRam {
        /// The first such address.
        gpa: u64,
        /// Where there is RAM.
        ram: String,
    },
    /// A page is bad.
    #[error("poisoned at GPA {gpa:#x}{rest}", rest = readable(.before))]
    Poisoned {
        /// Guest-physical address of the first byte that could not be read.
        gpa: u64,
        /// How many bytes before it could be.
        before: u64,
    },
    /// There is no memory behind an address any more, and poison is not the reason.
    #[error("{error}{rest}", rest = readable(.before))]
    NoMemory {
        /// The VM's words.
        error: String,
        /// How many bytes before it could be read.
        before: u64,
    },
    /// No byte was asked for.
    #[error("--len is 0; expected 1 or more bytes")]
    Nothing,
    /// Nobody can read bytes there.
    #[error(
        "--raw writes the bytes as they are, and stdout is a terminal; \
         send them to a file or a program (> FILE), or leave --raw out"
    )]
    Terminal,
    /// There is something at the path already.
    #[error("{}", exists(.0))]
    Exists(PathBuf),
    /// A file could not be made.
    #[error("cannot make the file {path}", path = .path.display())]
    Create {
        /// The path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file could not be written; it has been removed.
    #[error("cannot write the file {path}, so it is removed again", path = .path.display())]
    Write {
        /// The path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Nobody can read a dump there.
    #[error(
        "FILE is -, which writes the dump to stdout, and stdout is a terminal; \
         send it to a file or a program (> FILE), or name a FILE"
    )]
    TerminalDump,
    /// A stream could not be written.
    #[error("cannot write to stdout")]
    WriteStream(#[source] io::Error),
    /// A stream has a beginning and no end.
    #[error("stdout has got {bytes} bytes, which are not a complete dump")]
    HalfAStream {
        /// How many bytes were written.
        bytes: u64,
        /// Why there are no more.
        #[source]
        source: Box<DumpError>,
    },
    /// More pages went bad meanwhile than a stream can say at its end.
    #[error(
        "more than {most} stretches of pages went bad while the dump was written; \
         name a FILE, in which there is room for them"
    )]
    TooManyLate {
        /// How many there is room for.
        most: usize,
    },
    /// The user, or somebody else, ended it.
    #[error(
        "ended by {}{}", signal_name(*.signal),
        .removed.as_ref().map_or_else(String::new, |path| format!("; {} is removed again", path.display()))
    )]
    Interrupted {
        /// By this signal.
        signal: i32,
        /// The file that had been begun.
        removed: Option<PathBuf>,
    },
}

impl DumpError {
    /// The same, of a dump to the file at `path`.
    pub(super) fn with_removed(self, path: &Path) -> Self {
        match self {
            Self::Interrupted { signal, .. } => {
                Self::Interrupted { signal, removed: Some(path.to_owned()) }
            }
            other => other,
        }
    }

    /// The signal that ended it, if one did.
    #[must_use]
    pub fn signal(&self) -> Option<i32> {
        match self {
            Self::Interrupted { signal, .. } => Some(*signal),
            Self::HalfAStream { source, .. } => source.signal(),
            _ => None,
        }
    }
}

fn exists(path: &Path) -> String {
    let shown = path.display();
    match path.metadata() {
        Ok(found) if found.is_dir() => format!("{shown} is a directory; name a FILE in it"),
        Ok(found) if !found.is_file() => {
            format!(
                "{shown} is no file, and a dump is written to a new one; choose another FILE, or - for stdout"
            )
        }
        _ => format!("{shown} exists, and is left as it is; remove it, or choose another FILE"),
    }
}

/// Of those that end a dump.
fn signal_name(signal: i32) -> &'static str {
    match signal {
        libc::SIGINT => "SIGINT (Ctrl-C)",
        libc::SIGHUP => "SIGHUP",
        _ => "SIGTERM",
    }
}

/// What can be had all the same.
fn readable(before: &u64) -> String {
    match before {
        0 => String::new(),
        1 => "; the byte before it can be read with --len 1".to_owned(),
        before => format!("; the {before} bytes before it can be read with --len {before}"),
    }
}
