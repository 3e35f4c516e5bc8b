//! Reads the record that a named VM has left.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use mce_relay_vmm::api::types::vm::Status;
use mce_relay_vmm::session::record::{Counts, END, EVENTS, End, LEDGERS, OLDER_EVENTS};
use serde::{Deserialize, Serialize};

/// The ledger with the time at which it was written.
#[derive(Debug, Clone, Deserialize)]
struct Kept {
    unix_time: f64,
    in_all: Counts,
    status: Status,
}

/// The record of a named VM.
#[derive(Debug, Clone)]
pub struct Record {
    dir: PathBuf,
    /// The VM's name.
    pub name: String,
    /// How it ended; `None` if it could not record that (SIGKILL, say).
    pub end: Option<End>,
    ledger: Option<Kept>,
}

/// A record as a program reads it.
#[derive(Debug, Serialize)]
pub struct Left<'a> {
    /// How it ended.
    ended: Option<&'a End>,
    /// When the ledger was written, in seconds since 1970.
    as_of: Option<f64>,
    /// How many pages there were; fewer may be listed.
    in_all: Option<Counts>,
    #[serde(flatten)]
    status: Option<&'a Status>,
}

impl Record {
    /// Reads the record in `dir`, if there is one of a VM called `name`.
    #[must_use]
    pub fn read(dir: &Path, name: &str) -> Option<Self> {
        dir.join(EVENTS).symlink_metadata().ok()?;
        let text = |file: &str| std::fs::read_to_string(dir.join(file)).unwrap_or_default();
        // The first line counts: a handler may have appended one after the end was recorded.
        let end = text(END).lines().find_map(|line| serde_json::from_str(line).ok());
        let ledgers = LEDGERS.iter().filter_map(|file| serde_json::from_str(&text(file)).ok());
        let ledger = ledgers.max_by(|a: &Kept, b: &Kept| a.unix_time.total_cmp(&b.unix_time));
        Some(Self { dir: dir.to_owned(), name: name.to_owned(), end, ledger })
    }

    /// The user who owned the VM.
    #[must_use]
    pub fn uid(&self) -> Option<u32> {
        self.dir.symlink_metadata().ok().map(|found| found.uid())
    }

    /// The last ledger, if there is one.
    #[must_use]
    pub fn status(&self) -> Option<&Status> {
        self.ledger.as_ref().map(|kept| &kept.status)
    }

    /// The record in the form that is printed as JSON.
    #[must_use]
    pub fn left(&self) -> Left<'_> {
        let kept = self.ledger.as_ref();
        Left {
            ended: self.end.as_ref(),
            as_of: kept.map(|kept| kept.unix_time),
            in_all: kept.map(|kept| kept.in_all),
            status: self.status(),
        }
    }

    /// Its events, a line of JSON each, the oldest first.
    #[must_use]
    pub fn events(&self) -> Vec<String> {
        let text = |file: &str| std::fs::read(self.dir.join(file)).unwrap_or_default();
        let all = [text(OLDER_EVENTS), text(EVENTS)].concat();
        String::from_utf8_lossy(&all).lines().map(str::to_owned).collect()
    }

    /// How it ended, in a line.
    #[must_use]
    pub fn headline(&self) -> String {
        let name = &self.name;
        match &self.end {
            Some(End { status, unix_time, how }) => {
                let how = how.as_ref().map(|how| format!(": {how}")).unwrap_or_default();
                format!("{name} ended, exit status {status}, at {}{how}", when(*unix_time))
            }
            None => {
                let heard = self.ledger.as_ref().map(|kept| kept.unix_time);
                let heard = heard.map(|time| format!(", after {}", when(time)));
                format!("{name} ended without a word, killed perhaps{}", heard.unwrap_or_default())
            }
        }
    }

    /// How many bad, predicted and past pages of the ledger are not kept.
    #[must_use]
    pub fn left_out(&self) -> Counts {
        let Some(Kept { in_all, status, .. }) = &self.ledger else { return Counts::default() };
        Counts {
            pages: in_all.pages.saturating_sub(status.pages.len()),
            predicted: in_all.predicted.saturating_sub(status.predicted.len()),
            past: in_all.past.saturating_sub(status.past.len()),
        }
    }

    /// A line about the ledger: its time, and what is missing in it.
    #[must_use]
    pub fn about_the_ledger(&self) -> Option<String> {
        let Kept { unix_time, in_all, status } = self.ledger.as_ref()?;
        let missing = |what: &str, all: usize, kept: usize| {
            (all > kept).then(|| format!("; of {all} {what} {kept} were kept"))
        };
        let parts = [
            missing("bad pages", in_all.pages, status.pages.len()),
            missing("predicted pages", in_all.predicted, status.predicted.len()),
            missing("past pages", in_all.past, status.past.len()),
        ];
        let missing: String = parts.into_iter().flatten().collect();
        Some(format!("its ledger as it was at {}{missing}:", when(*unix_time)))
    }
}

/// A time of day, in UTC.
fn when(unix_time: f64) -> String {
    let since = Duration::try_from_secs_f64(unix_time).unwrap_or_default();
    let time = SystemTime::UNIX_EPOCH.checked_add(since).and_then(|t| Timestamp::try_from(t).ok());
    time.map_or_else(|| format!("{unix_time} s"), |time| format!("{time:.3}"))
}
