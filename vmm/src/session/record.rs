//! What a named VM leaves: its events, its ledger, and how it ended.
//!
//! They are written while it runs, as an end in a signal handler (exit status 7 and 8) or by SIGKILL leaves no
//! time for that. The files are few and bounded: events in two of 1 MiB, the ledger in two that are written in turn
//! (so that one is whole at any moment), of 4,096 pages at most, and a line for the end. The next VM of that name
//! begins them anew; those of the VM before stay once more, as `previous.…`. Where a VM that ended as it was to
//! leaves nothing (see [`forget`]), they stay until one fails.

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

/// The length at which a file of events is put aside, in bytes.
const MAX_EVENTS: u64 = 1 << 20;
/// The most pages of each list of the ledger that are kept.
const MAX_PAGES: usize = 4096;
/// The ledger is written no more often than this.
const PAUSE: Duration = Duration::from_secs(1);
/// Nor does it take more than one part in so many of the time.
const SHARE: u32 = 50;

/// The file of events, a line of JSON each.
pub const EVENTS: &str = "events";
/// That of the events before.
pub const OLDER_EVENTS: &str = "events.1";
/// The two files of the ledger, the older and the newer in whatever order.
pub const LEDGERS: [&str; 2] = ["ledger.0", "ledger.1"];
/// The file that says how the VM ended.
pub const END: &str = "end";
const FILES: [&str; 5] = [EVENTS, OLDER_EVENTS, LEDGERS[0], LEDGERS[1], END];
/// Bytes of the line for the end for which there is room from the start: the disk may be full then.
const RESERVED: usize = 1024;

fn previous(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("previous.{name}"))
}

fn unix_now() -> f64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or(Duration::ZERO).as_secs_f64()
}

/// Writes down what is to be left, in `dir`, until the monitor ends; for the VM called `name`.
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
    // Both are for handlers, and stay as long as the process.
    dying::prepare(end.into_raw_fd(), words.into_bytes().leak());
    Ok(())
}

/// Fills the file with empty lines, which say nothing.
fn reserve(end: &mut File) -> io::Result<()> {
    end.write_all(&[b'\n'; RESERVED])?;
    end.rewind()
}

/// Takes away what the last VM has left in `dir`; what the one before it left there takes its place.
pub fn forget(dir: &Path) {
    for file in FILES {
        let own = dir.join(file);
        // There may be neither.
        let _ = std::fs::remove_file(&own);
        let _ = std::fs::rename(previous(dir, file), &own);
    }
    // With something of the one before in it, it stays.
    let _ = std::fs::remove_dir(dir);
}

/// Whether something is left of the VM of this process.
#[must_use]
pub fn are_kept() -> bool {
    dying::file().is_some()
}

/// Words for the end of a run.
#[must_use]
pub fn where_to_look(name: &str) -> String {
    format!(
        "its events and last ledger are kept: mce-relay events --vm {name}, mce-relay status --vm {name}"
    )
}

/// Writes the ledger down after each event, as often as is good.
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
                // The same one is tried again: the other is whole.
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

/// How many there are of what is kept in part.
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
        let (pages, predicted) = (ledger.len(), ledger.predicted().len());
        Self { pages, predicted, past: ledger.past().len() }
    }
}

fn write_ledger(relay: &Handle, info: &VmInfo, slot: &File) -> io::Result<()> {
    let counts = serde_json::to_string(&relay.inspect(Counts::of))?;
    let begin = format!("{{\"unix_time\":{},\"in_all\":{counts},\"status\":", unix_now());
    // One that is not complete is no JSON.
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
    /// In words; not of one that ended in a handler, whose stderr has them.
    #[serde(default)]
    pub how: Option<String>,
}

/// Writes down how the VM of this process ended, if it has a name.
pub fn end(status: u8, how: &str) {
    let Some(mut file) = dying::file() else { return };
    let line = json!({ "status": status, "unix_time": unix_now(), "how": how });
    if let Err(error) = writeln!(file, "{line}") {
        log::warn!("how the VM ended cannot be kept: {error}");
    }
}
