//! Why there is no report.

use std::io;
use std::path::PathBuf;

use crate::client::error::ClientError;

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The VM does not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The events cannot be read.
    #[error("cannot read events from {from}")]
    Read {
        /// From where.
        from: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// There is more than fits.
    #[error(
        "{from} has more than {mib} MiB, the most that a report is made of; give it a part, as in \
             `tail -n 100000 FILE | mce-relay report --events - -o report.html`"
    )]
    TooMuch {
        /// From where.
        from: String,
        /// The limit.
        mib: u64,
    },
    /// A page was to go to a terminal.
    #[error(
        "-o is -, which writes a page of HTML to stdout, and stdout is a terminal; send it to a file or a program \
             (> FILE), name a FILE, or print JSON (--json)"
    )]
    Terminal,
    /// The report would replace what it is made of.
    #[error("-o {path} is the file of events that is read; choose another FILE", path = .0.display())]
    Itself(PathBuf),
    /// What is there cannot be replaced by a file.
    #[error("-o {path} is {what}, and a report is written to a file; choose another FILE, or - for stdout", path = .path.display())]
    NoFile {
        /// The path.
        path: PathBuf,
        /// What is there.
        what: &'static str,
    },
    /// The file cannot be written.
    #[error("cannot write the file {path}", path = .path.display())]
    Write {
        /// The path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}
