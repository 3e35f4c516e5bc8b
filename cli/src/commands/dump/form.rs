//! The form of a dump, and its target.

use std::io::Write;
use std::path::Path;

use serde::Serialize;

/// The form of a dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// An ELF core of the machine.
    Elf,
    /// A file in which the offset is the guest-physical address.
    Raw,
}

/// Where a dump goes.
pub enum Target<'a> {
    /// A file, which is made, sparse, with mode 0600; none may exist there.
    File(&'a Path),
    /// A stream, without seeking.
    Stream(&'a mut dyn Write),
}
