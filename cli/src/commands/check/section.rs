//! One thing that was looked at, and those that belong together.

use std::borrow::Cow;

use serde::Serialize;

use crate::commands::check::gap::{Found, Gap};

/// How a thing stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// It is there.
    Ok,
    /// It is not there, or not as it should be, and something else has to do.
    Missing,
    /// It is not there, and no error can be relayed without it.
    Needed,
    /// It is there, and should not be.
    InTheWay,
    /// It cannot be seen by this user, or not without something else that is not there.
    Unknown,
}

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// What it has to do with.
    pub group: &'static str,
    /// What.
    pub name: &'static str,
    /// How it stands.
    pub standing: Standing,
    /// What was seen.
    pub found: String,
    /// What to do about it; empty where nothing has to be done.
    pub mend: Cow<'static, str>,
}

/// A group of lines that is being written.
pub(crate) struct Section<'a> {
    pub(super) group: &'static str,
    pub(super) lines: &'a mut Vec<Line>,
}

impl Section<'_> {
    /// The line for what was `found`; where it is `missing`, this is how that stands and how it is
    /// mended.
    pub(super) fn add(
        &mut self,
        name: &'static str,
        found: Found,
        missing: Standing,
        mend: impl Into<Cow<'static, str>>,
    ) {
        let (standing, found, mend) = match found {
            Ok(found) => (Standing::Ok, found, "".into()),
            Err(Gap::Missing(found)) => (missing, found, mend.into()),
            Err(Gap::InTheWay(found)) => (Standing::InTheWay, found, mend.into()),
            Err(Gap::Unknown { found, mend }) => (Standing::Unknown, found, mend.into()),
        };
        self.lines.push(Line { group: self.group, name, standing, found, mend });
    }
}
