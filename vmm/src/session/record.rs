//! The record that a named VM leaves: its events, its ledger, and how it ended.
//!
//! It is written while the VM runs, as an end in a signal handler (exit status 7 and 8) or by SIGKILL leaves no time
//! for that. The files are few and bounded: two of events of 1 MiB each; two of the ledger, of 4,096 pages at most,
//! written in turn so that one is whole at any moment; and one with a line for the end. The next VM of that name begins
//! them anew and keeps the previous VM's once more, as `previous.…`. Among temporary files (see
//! [`super::names::Leaving`]) a VM that ends as the user wanted removes its own (see [`forget`]), so the record of an
//! earlier failure stays there until the next one.

use std::fs::{DirBuilder, File};
use std::io::{self, Seek, Write};
use std::os::fd::IntoRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use mce_relay::{Handle, Ledger};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::api::current::Current;
use crate::api::status::StatusPieces;
use crate::api::types::vm::VmInfo;
use crate::events::entry::Next;
use crate::events::hub::Follower;
use crate::events::monitor::Monitor;
use crate::outlets::files::{Appended, LogFile};

pub mod dying;

/// The length at which a file of events is replaced by a new one, in bytes.
const MAX_EVENTS: u64 = 1 << 20;
/// The most pages of each list of the ledger that are kept.
const MAX_PAGES: usize = 4096;
/// The least time between two writes of the ledger.
const PAUSE: Duration = Duration::from_secs(1);
/// Writing it takes at most one part in this many of the time.
const SHARE: u32 = 50;

/// The file of events, a line of JSON each.
pub const EVENTS: &str = "events";
/// The file of earlier events.
pub const OLDER_EVENTS: &str = "events.1";
/// The two files of the ledger; either may be the newer one.
pub const LEDGERS: [&str; 2] = ["ledger.0", "ledger.1"];
/// The file that says how the VM ended.
pub const END: &str = "end";
const FILES: [&str; 5] = [EVENTS, OLDER_EVENTS, LEDGERS[0], LEDGERS[1], END];
/// Bytes that are reserved from the start for the line about the end, as the disk may be full then.
const RESERVED: usize = 1024;

fn previous(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("previous.{name}"))
}

fn unix_now() -> f64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or(Duration::ZERO).as_secs_f64()
}

/// Keeps the record of the VM called `name` in `dir`, until the monitor ends.
///
/// # Errors
/// The files cannot be made.
pub fn begin(dir: &Path, name: &str, monitor: &Monitor, current: &Current) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    for file in FILES {
        let (from, to) = (dir.join(file), previous(dir, file));
        match std::fs::rename(&from, &to) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let _ = std::fs::remove_file(&to);
            }
            result => result?,
        }
    }
    let new =
        |file: &str| File::options().write(true).create_new(true).mode(0o600).open(dir.join(file));
    let slots = [new(LEDGERS[0])?, new(LEDGERS[1])?];
    let mut end = new(END)?;
    reserve(&mut end)?;
    let events = LogFile { path: dir.join(EVENTS), max_size: Some(MAX_EVENTS) };
    monitor.write_on("kept", Appended::open(&events, true)?)?;
    let current = current.clone();
    monitor.spawn("ledger", move |follower| keep_ledger(follower, &current, &slots))?;
    let words = format!("mce-relay: {}\n", where_to_look(name));
    // Signal handlers use both, so they stay as long as the process.
    dying::prepare(end.into_raw_fd(), words.into_bytes().leak());
    Ok(())
}

/// Fills the file with empty lines, which mean nothing.
fn reserve(end: &mut File) -> io::Result<()> {
    end.write_all(&[b'\n'; RESERVED])?;
    end.rewind()
}

/// Removes the record of the last VM in `dir`, and puts the previous VM's in its place.
pub fn forget(dir: &Path) {
    for file in FILES {
        let own = dir.join(file);
        // Both may be missing.
        let _ = std::fs::remove_file(&own);
        let _ = std::fs::rename(previous(dir, file), &own);
    }
    // Not empty, and kept, if it has the previous VM's record.
    let _ = std::fs::remove_dir(dir);
}

/// Whether a record is kept of this process's VM.
#[must_use]
pub fn are_kept() -> bool {
    dying::file().is_some()
}

/// Where the record can be read, for the message at the end of a run.
#[must_use]
pub fn where_to_look(name: &str) -> String {
    format!(
        "its events and last ledger are kept: mce-relay events --vm {name}, mce-relay status --vm {name}"
    )
}

/// Writes the ledger after events, within the limits above.
fn keep_ledger(mut follower: Follower, current: &Current, slots: &[File; 2]) {
    let (mut turn, mut failing) = (0_usize, false);
    loop {
        let mut ended = matches!(follower.wait(), Next::End);
        while let Some(next) = follower.take() {
            ended |= matches!(next, Next::End);
            if ended {
                break;
            }
        }
        let begun = Instant::now();
        if let Some((relay, info)) = current.last() {
            match write_ledger(&relay, &info, &slots[turn % slots.len()]) {
                Ok(()) => {
                    turn += 1;
                    failing = false;
                }
                // The same file is retried: the other one is whole.
                Err(error) if !failing => {
                    failing = true;
                    log::warn!("the ledger cannot be kept: {error}; it is tried again");
                }
                Err(_) => {}
            }
        }
        if ended {
            return;
        }
        follower.rest(PAUSE.max(begun.elapsed() * SHARE));
    }
}

/// Full counts of lists that are kept in part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Bad pages.
    pub pages: usize,
    /// Pages that are whole and predicted to fail.
    pub predicted: usize,
    /// Pages that were bad in an earlier boot.
    pub past: usize,
}

impl Counts {
    fn of(ledger: &Ledger) -> Self {
        let (pages, predicted) = (ledger.len(), ledger.predicted_len());
        Self { pages, predicted, past: ledger.past().len() }
    }
}

fn write_ledger(relay: &Handle, info: &VmInfo, slot: &File) -> io::Result<()> {
    let counts = serde_json::to_string(&relay.inspect(Counts::of))?;
    let begin = format!("{{\"unix_time\":{},\"in_all\":{counts},\"status\":", unix_now());
    // A file that is written in part is not valid JSON.
    slot.set_len(0)?;
    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        slot.write_all_at(bytes, at)?;
        at += bytes.len() as u64;
        io::Result::Ok(())
    };
    put(begin.as_bytes())?;
    for piece in StatusPieces::at_most(relay.clone(), info, MAX_PAGES) {
        put(&piece)?;
    }
    put(b"}\n")
}

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct End {
    /// The exit status of `run`.
    pub status: u8,
    /// When, in seconds since 1970.
    pub unix_time: f64,
    /// In words; empty for a VM that ended in a handler, whose stderr has them.
    #[serde(default)]
    pub how: Option<String>,
}

/// Records how the VM of this process ended, if it has a name.
pub fn end(status: u8, how: &str) {
    let Some(mut file) = dying::file() else { return };
    let line = json!({ "status": status, "unix_time": unix_now(), "how": how });
    if let Err(error) = writeln!(file, "{line}") {
        log::warn!("how the VM ended cannot be kept: {error}");
    }
}
