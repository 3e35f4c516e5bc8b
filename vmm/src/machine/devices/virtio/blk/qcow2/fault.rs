//! What can be wrong with a qcow2 image.

use std::io;

use thiserror::Error;

/// Why an image cannot be used.
#[derive(Debug, Error)]
pub enum Fault {
    /// It cannot be read.
    #[error("cannot read its {what} at byte {at:#x}: {source}")]
    Read {
        /// What should be there.
        what: &'static str,
        /// Where, in the file.
        at: u64,
        /// The cause.
        source: io::Error,
    },
    /// It is damaged, cut short, or no such image.
    #[error("its {field} is {value:#x}; expected {expected}")]
    Unsound {
        /// A field of the header (as the format's description calls it) or of a table.
        field: String,
        /// Its value.
        value: u64,
        /// What it should be.
        expected: String,
    },
    /// It has what this program does not.
    #[error("its {field} is {value:#x}; expected 0, as no disk may have {what}")]
    Unsupported {
        /// A field of the header.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What that stands for.
        what: &'static str,
    },
    /// It is sound, and yet cannot be opened.
    #[error("{0}")]
    Open(io::Error),
}

/// Says what is wrong with a field.
pub(super) fn unsound(field: impl Into<String>, value: u64, expected: impl Into<String>) -> Fault {
    Fault::Unsound { field: field.into(), value, expected: expected.into() }
}
