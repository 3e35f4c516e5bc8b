//! Why memory was not read, or a dump not written.

use std::io;
use std::path::{Path, PathBuf};

use crate::client::error::ClientError;

/// Why memory was not read.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The VM does not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The guest started over meanwhile, so two guests were read.
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
        /// The ranges of guest RAM.
        ram: String,
    },
    /// A page is bad.
    #[error("poisoned at GPA {gpa:#x}{rest}", rest = readable(.before))]
    Poisoned {
        /// Guest-physical address of the first byte that could not be read.
        gpa: u64,
        /// How many bytes before it can be read.
        before: u64,
    },
    /// There is no memory behind an address any more; not because of poison.
    #[error("{error}{rest}", rest = readable(.before))]
    NoMemory {
        /// The VM's reason.
        error: String,
        /// How many bytes before it can be read.
        before: u64,
    },
    /// No byte was asked for.
    #[error("--len is 0; expected 1 or more bytes")]
    Nothing,
    /// Raw bytes were to go to a terminal.
    #[error(
        "--raw writes the bytes as they are, and stdout is a terminal; \
         send them to a file or a program (> FILE), or leave --raw out"
    )]
    Terminal,
    /// The path exists already.
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
    /// A dump was to go to a terminal.
    #[error(
        "FILE is -, which writes the dump to stdout, and stdout is a terminal; \
         send it to a file or a program (> FILE), or name a FILE"
    )]
    TerminalDump,
    /// A stream could not be written.
    #[error("cannot write to stdout")]
    WriteStream(#[source] io::Error),
    /// Writing a stream ended early; what was written stays.
    #[error("stdout has got {bytes} bytes, which are not a complete dump")]
    HalfAStream {
        /// How many bytes were written.
        bytes: u64,
        /// Why it ended.
        #[source]
        source: Box<DumpError>,
    },
    /// More pages went bad meanwhile than the note at the end of a stream can list.
    #[error(
        "more than {most} stretches of pages went bad while the dump was written; \
         name a FILE, in which there is room for them"
    )]
    TooManyLate {
        /// How many it can list.
        most: usize,
    },
    /// A signal ended it.
    #[error(
        "ended by {}{}", signal_name(*.signal),
        .removed.as_ref().map_or_else(String::new, |path| format!("; {} is removed again", path.display()))
    )]
    Interrupted {
        /// By this signal.
        signal: i32,
        /// The incomplete file, which was removed.
        removed: Option<PathBuf>,
    },
}

impl DumpError {
    /// Names the file at `path` as removed.
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

/// The name of a signal that ends a dump.
fn signal_name(signal: i32) -> &'static str {
    match signal {
        libc::SIGINT => "SIGINT (Ctrl-C)",
        libc::SIGHUP => "SIGHUP",
        _ => "SIGTERM",
    }
}

/// How to read the bytes before a bad page.
fn readable(before: &u64) -> String {
    match before {
        0 => String::new(),
        1 => "; the byte before it can be read with --len 1".to_owned(),
        before => format!("; the {before} bytes before it can be read with --len {before}"),
    }
}
