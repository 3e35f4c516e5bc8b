//! Writes events to a file, a line of JSON each.
//!
//! Writing is retried when it fails (on a full disk, say). Events wait in the ring meanwhile; those that are dropped
//! from it are counted in a line of their own (`missed`), as for any other reader.

use std::io::{ErrorKind, Write};
use std::time::{Duration, Instant};

use log::warn;

use super::entry::Next;
use super::hub::Follower;
use super::lines::line_of;
use crate::outlets::files::{Appended, RETRY};

/// About how much is written in one piece, in bytes.
const PIECE: usize = 32 << 10;
/// How long the end of the VM waits for a file that cannot be written to.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// Writes all events, until there will be no more.
pub(super) fn write(follower: Follower, file: Appended) {
    Writer { follower, text: Vec::new(), done: 0, ended: false, file }.run();
}

struct Writer {
    follower: Follower,
    file: Appended,
    /// Whole lines, of which `done` bytes are written.
    text: Vec<u8>,
    done: usize,
    ended: bool,
}

impl Writer {
    fn run(mut self) {
        if self.file.is_mid_line() {
            self.text.push(b'\n');
        }
        loop {
            self.gather();
            if self.text.is_empty() {
                return;
            }
            if let Err(error) = self.write_out() {
                // Logged before the wait, which the end of the events may cut short.
                let path = self.file.path().display();
                if !self.file.is_regular() {
                    warn!(
                        "event monitor: cannot write to {path}: {error}; no more events are written"
                    );
                    return;
                }
                warn!(
                    "event monitor: cannot write to {path}: {error}; it is tried again every second"
                );
                if !self.keep_trying() {
                    return;
                }
            }
        }
    }

    /// Takes the events that are there, and waits only if there is none. Nothing is taken only at the end.
    fn gather(&mut self) {
        while !self.ended && self.text.len() < PIECE {
            let next = match self.follower.take() {
                Some(next) => next,
                None if self.text.is_empty() => self.follower.wait(),
                None => return,
            };
            self.push(&next);
        }
    }

    fn push(&mut self, next: &Next) {
        match line_of(next) {
            Some(line) => self.text.extend_from_slice(line.as_bytes()),
            None => self.ended = true,
        }
    }

    fn write_out(&mut self) -> std::io::Result<()> {
        if self.file.put_aside() {
            // The record that was half written to the old file is written whole to the new one.
            let written = &self.text[..self.done];
            self.done = written.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        }
        while self.done < self.text.len() {
            match self.file.write(&self.text[self.done..]) {
                Ok(n) => self.done += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.text.clear();
        self.done = 0;
        Ok(())
    }

    /// Retries until writing works; returns whether it does.
    fn keep_trying(&mut self) -> bool {
        let mut end = None;
        loop {
            let ended = match end {
                None => self.follower.rest(RETRY),
                Some(_) => {
                    // The ring has ended, so no event will wake this thread.
                    std::thread::park_timeout(RETRY / 10);
                    true
                }
            };
            if self.write_out().is_ok() {
                warn!("event monitor: {} can be written to again", self.file.path().display());
                return true;
            }
            if ended && Instant::now() > *end.get_or_insert_with(|| Instant::now() + END_PATIENCE) {
                self.count_lost();
                return false;
            }
        }
    }

    fn count_lost(&mut self) {
        while !self.ended {
            let next = self.follower.wait();
            self.push(&next);
        }
        let lines = self.text[self.done..].iter().filter(|byte| **byte == b'\n').count();
        warn!("event monitor: {}: {lines} events were not written", self.file.path().display());
    }
}
