//! `mce-relay events` and `status --follow`: follow events as they happen.

use std::io::{self, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant, SystemTime};

use console::{Style, Term};
use jiff::Timestamp;
use mce_relay::Event;
use mce_relay_vmm::api::types::vm::Status;
use mce_relay_vmm::api::types::vm_event::VmEvent;
use mce_relay_vmm::words;
use serde_json::{Value, json};

use crate::client::error::ClientError;
use crate::client::record::Record;
use crate::client::requests;
use crate::commands::status;
use crate::output::screen;

/// The least time between two displays of a status, however much happens.
const LEAST: Duration = Duration::from_millis(200);
/// The longest time between two, as waiting times grow and an unnoticed pause has to show.
const MOST: Duration = Duration::from_secs(5);
/// How long after the VM's end the stream of events may take to end.
const ENDING: Duration = Duration::from_secs(1);

/// Why events cannot be followed (any longer).
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The VM does not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The output could not be written.
    #[error("cannot write the result")]
    Write(#[source] io::Error),
}

/// Whether the reader of the output is still there; that it has gone is no error.
fn written(result: io::Result<()>) -> Result<bool, FollowError> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(FollowError::Write(error)),
    }
}

/// Prints the events of the VM behind `socket`; with `follow` also future ones, until the VM ends.
///
/// # Errors
/// See [`FollowError`].
pub fn events(socket: &Path, follow: bool, json: bool) -> Result<(), FollowError> {
    let what = if follow { "relay.events?follow=true" } else { "relay.events" };
    let mut out = io::stdout();
    let mut timeline = Timeline::new(screen::stdout().colour);
    for next in watched(requests::lines(socket, what)?) {
        let line = match next {
            Next::Line(line) => line?,
            Next::End | Next::Unread => return Ok(()),
        };
        let line = if json { line } else { timeline.line(&line) };
        // Flushed after each line, as a user may be watching.
        if !written(writeln!(out, "{line}").and_then(|()| out.flush()))? {
            return Ok(());
        }
    }
    Ok(())
}

/// What a follower waits for.
#[derive(Debug)]
enum Next {
    Line(Result<String, ClientError>),
    /// There are no more lines.
    End,
    /// The reader of this command's output has gone.
    Unread,
}

/// The lines as they arrive, and the end of the output's reader. One line is read ahead.
fn watched(lines: requests::Lines) -> Receiver<Next> {
    let (tell, told) = sync_channel(1);
    let unread = tell.clone();
    std::thread::spawn(move || {
        wait_until_unread();
        // The receiver may have ended already.
        let _ = unread.send(Next::Unread);
    });
    std::thread::spawn(move || {
        for line in lines {
            if tell.send(Next::Line(line)).is_err() {
                return;
            }
        }
        let _ = tell.send(Next::End);
    });
    told
}

/// Returns when the output cannot reach a reader any more: the other end of a pipe was closed. For a file it never
/// returns.
fn wait_until_unread() {
    // POLLERR and POLLHUP are reported without being asked for.
    let mut stdout = libc::pollfd { fd: libc::STDOUT_FILENO, events: 0, revents: 0 };
    loop {
        // SAFETY: one pollfd, which lives; the descriptor is looked at only.
        let found = unsafe { libc::poll(&raw mut stdout, 1, -1) };
        if found > 0 {
            return;
        }
        // Interrupted by a signal.
    }
}

/// Prints the events that a VM has left. `follow`: the user asked to follow, which is not possible.
///
/// # Errors
/// See [`FollowError`].
pub fn record(record: &Record, follow: bool, json: bool) -> Result<(), FollowError> {
    eprintln!("mce-relay: {}; {}", record.headline(), the_last(follow, "its last events:"));
    let mut out = io::stdout();
    let mut timeline = Timeline::new(screen::stdout().colour);
    for line in record.events() {
        let line = if json { line } else { timeline.line(&line) };
        if !written(writeln!(out, "{line}"))? {
            return Ok(());
        }
    }
    written(out.flush()).map(drop)
}

/// A note on `what` a VM has left, which the user may have wanted to follow.
#[must_use]
pub fn the_last(follow: bool, what: &str) -> String {
    match follow {
        true => format!("there is nothing more to follow; {what}"),
        false => what.to_owned(),
    }
}

/// Events as lines for people.
#[derive(Debug)]
pub struct Timeline {
    colour: bool,
    /// When the VMM began to count time, once a boot event has said it.
    start: Option<SystemTime>,
    last: Option<Duration>,
}

impl Timeline {
    /// A timeline without events.
    #[must_use]
    pub fn new(colour: bool) -> Self {
        Self { colour, start: None, last: None }
    }

    /// Formats one event (a line of JSON): when, how long after the one before, and what. A line that is no event is
    /// returned as it is.
    pub fn line(&mut self, line: &str) -> String {
        let Ok(event) = serde_json::from_str::<Value>(line) else { return line.to_owned() };
        let number = |field: &str| event["timestamp"][field].as_u64().unwrap_or_default();
        // The numbers are only shown, so any value will do.
        let nanos = Duration::from_nanos(number("nanos"));
        let time = Duration::from_secs(number("secs")).saturating_add(nanos);
        if let Some(unix) = event["properties"]["unix_time"].as_f64()
            && let Ok(unix) = Duration::try_from_secs_f64(unix)
        {
            self.start = SystemTime::UNIX_EPOCH.checked_add(unix).and_then(|t| t.checked_sub(time));
        }
        let when = self.start.and_then(|start| start.checked_add(time));
        let when = match when.and_then(|when| Timestamp::try_from(when).ok()) {
            Some(when) => format!("{when:.3}"),
            None => format!("{:>12.3} s", time.as_secs_f64()),
        };
        let since = self.last.map_or(Duration::ZERO, |last| time.saturating_sub(last));
        self.last = Some(time);
        let (words, style) = in_words(&event);
        let words =
            if self.colour { style.force_styling(true).apply_to(words).to_string() } else { words };
        format!("{when} {:>+9.3}  {words}", since.as_secs_f64())
    }
}

/// The event's text and style.
fn in_words(event: &Value) -> (String, Style) {
    let plain = Style::new();
    let typed = json!({ "event": event["event"], "properties": event["properties"] });
    let source = event["source"].as_str().unwrap_or_default();
    match source {
        "memory" => match serde_json::from_value::<Event>(typed) {
            Ok(event) => {
                let style = match &event {
                    Event::Injected { .. } => plain.yellow(),
                    Event::Acknowledged { .. } | Event::Healed { .. } => plain.green(),
                    Event::Undeliverable { .. }
                    | Event::Removed { .. }
                    | Event::Outside { .. }
                    | Event::Overrun { .. } => plain.red(),
                    _ => plain,
                };
                return (event.to_string(), style);
            }
            Err(error) => log::debug!("{error}: {event}"),
        },
        "vm" => match serde_json::from_value::<VmEvent>(typed) {
            Ok(event) => return (format!("VM: {event}"), plain.bold()),
            Err(error) => log::debug!("{error}: {event}"),
        },
        "monitor" if event["event"] == "missed" => {
            let events = event["properties"]["events"].as_u64().unwrap_or_default();
            let words = format!("{} missed here", words::counted(events, "event"));
            return (words, plain.red());
        }
        _ => {}
    }
    // An event of a newer VMM.
    (format!("{source}: {} {}", event["event"], event["properties"]), plain)
}

/// Shows the status of the VM behind `socket` again whenever something has happened.
///
/// # Errors
/// See [`FollowError`].
pub fn status(socket: &Path, json: bool) -> Result<(), FollowError> {
    let happens = watched(requests::lines(socket, "relay.events?follow=true")?);
    let terminal = screen::stdout().moves && !json;
    let mut last = String::new();
    loop {
        let status = match requests::get::<Status>(socket, "relay.status") {
            Ok(status) => Some(status),
            // The VM is between two boots.
            Err(ClientError::Refused { status: 503, .. }) => None,
            // The VM's end may show here before it shows in the stream of events.
            Err(_) if awaited(&happens, Instant::now() + ENDING, true) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if let Some(status) = status {
            let text = status::status_text(&status, json);
            if text != last && !written(put(&text, terminal))? {
                return Ok(());
            }
            last = text;
        }
        std::thread::sleep(LEAST);
        if awaited(&happens, Instant::now() + MOST, false) {
            return Ok(());
        }
    }
}

/// Takes all lines that have arrived, and if there are none waits until `deadline`: for any line, or with
/// `only_the_end` for the end alone. Returns whether the end has come.
fn awaited(happens: &Receiver<Next>, deadline: Instant, only_the_end: bool) -> bool {
    let mut deadline = deadline;
    loop {
        match happens.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            // Everything that has arrived is shown at once.
            Ok(Next::Line(Ok(_))) if only_the_end => {}
            Ok(Next::Line(Ok(_))) => deadline = Instant::now(),
            Err(RecvTimeoutError::Timeout) => return false,
            Ok(Next::Line(Err(_)) | Next::End | Next::Unread)
            | Err(RecvTimeoutError::Disconnected) => return true,
        }
    }
}

/// On a terminal it replaces the previous text; elsewhere it is appended.
fn put(text: &str, terminal: bool) -> io::Result<()> {
    if terminal {
        Term::stdout().clear_screen()?;
    }
    let mut out = io::stdout();
    out.write_all(text.as_bytes())?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeline_says_when_and_what() {
        let mut timeline = Timeline::new(false);
        let booting = r#"{"timestamp":{"secs":1,"nanos":500000000},"source":"vm","event":"booting","properties":{"boot":1,"unix_time":1000000001.5,"mcg_cap":"0x10a","vendor":"amd"}}"#;
        let line = timeline.line(booting);
        assert!(line.starts_with("2001-09-09T01:46:41.500Z    +0.000  VM: boot 1"), "{line}");
        let healed = r#"{"timestamp":{"secs":3,"nanos":0},"source":"memory","event":"healed","properties":{"gpa":"0x1000"}}"#;
        let line = timeline.line(healed);
        assert!(
            line.starts_with("2001-09-09T01:46:43.000Z    +1.500  healed: GPA 0x1000"),
            "{line}"
        );
        let missed = r#"{"timestamp":{"secs":3,"nanos":0},"source":"monitor","event":"missed","properties":{"events":7}}"#;
        assert!(timeline.line(missed).ends_with("7 events missed here"));
        let unknown = r#"{"timestamp":{"secs":3,"nanos":0},"source":"memory","event":"new","properties":{"x":1}}"#;
        assert!(timeline.line(unknown).ends_with(r#"memory: "new" {"x":1}"#));
        assert_eq!(timeline.line("no JSON"), "no JSON");
        let mut coloured = Timeline::new(true);
        assert!(coloured.line(healed).contains("\u{1b}["));
    }

    #[test]
    fn the_end_is_told_from_silence() {
        let (happened, happens) = sync_channel(8);
        let soon = || Instant::now() + Duration::from_millis(20);
        let something = || Next::Line(Ok(String::new()));
        happened.send(something()).unwrap();
        assert!(!awaited(&happens, soon(), true));
        for _ in 0..2 {
            happened.send(something()).unwrap();
        }
        assert!(!awaited(&happens, soon(), false), "all that has come is taken at once");
        assert!(happens.try_recv().is_err());
        for end in [Next::End, Next::Unread] {
            happened.send(something()).unwrap();
            happened.send(end).unwrap();
            assert!(awaited(&happens, soon(), true));
        }
        drop(happened);
        assert!(awaited(&happens, soon(), true));
    }

    #[test]
    fn numbers_that_cannot_be_are_shown_all_the_same() {
        let rescued = include_str!("../../../tests/fuzz/seeds/events/rescued-any");
        let shown = Timeline::new(false).line(rescued);
        assert!(shown.contains("rescued: of the"), "{shown}");
    }

    #[test]
    fn times_that_cannot_be_are_shown_all_the_same() {
        for line in [
            include_str!("../../../tests/fuzz/seeds/events/far-future"),
            include_str!("../../../tests/fuzz/seeds/events/long-ago"),
        ] {
            let shown = Timeline::new(false).line(line);
            assert!(shown.contains("booting"), "{shown}");
        }
    }
}
