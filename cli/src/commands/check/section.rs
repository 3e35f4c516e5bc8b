//! One check's line, and a group of them.

use std::borrow::Cow;

use serde::Serialize;

use crate::commands::check::gap::{Found, Gap};

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// It is there.
    Ok,
    /// It is not there, or not as it should be; the relay works without it.
    Missing,
    /// It is not there, and no error can be relayed without it.
    Needed,
    /// It is there, and should not be.
    InTheWay,
    /// This user is not shown it, or it depends on something that is missing.
    Unknown,
}

/// One check's line.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// Its group.
    pub group: &'static str,
    /// What was checked.
    pub name: &'static str,
    /// The result.
    pub standing: Standing,
    /// What was seen.
    pub found: String,
    /// What to do about it; empty where nothing has to be done.
    pub mend: Cow<'static, str>,
}

/// A group to which lines are added.
pub(crate) struct Section<'a> {
    pub(super) group: &'static str,
    pub(super) lines: &'a mut Vec<Line>,
}

impl Section<'_> {
    /// Adds the line for `found`. If something is missing, `missing` is the result to show, and `mend` what to do about
    /// it.
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
