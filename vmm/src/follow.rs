//! `mce-relay events` and `status --follow`: what happens, as it happens.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant, SystemTime};

use console::{Style, Term};
use jiff::Timestamp;
use mce_relay::Event;
use serde_json::{Value, json};

use crate::api::Status;
use crate::client::{self, ClientError};
use crate::events::VmEvent;
use crate::show;

/// A status is shown again no more often than this, however much happens.
const LEAST: Duration = Duration::from_millis(200);
/// And no less often, as times pass and a pause may not be noticed otherwise.
const MOST: Duration = Duration::from_secs(5);
/// How long the stream of events may take to end after the VM has.
const ENDING: Duration = Duration::from_secs(1);

/// Why there is nothing (more) to follow.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The VM does not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// What was to be shown could not be.
    #[error("cannot write the result")]
    Write(#[source] io::Error),
}

/// Without an error when the reader of what is written has gone away.
fn written(result: io::Result<()>) -> Result<bool, FollowError> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(FollowError::Write(error)),
    }
}

/// Prints the events of the VM behind `socket`; with `follow` also those to come, until it ends.
///
/// # Errors
/// See [`FollowError`].
pub fn events(socket: &Path, follow: bool, json: bool) -> Result<(), FollowError> {
    let what = if follow { "relay.events?follow=true" } else { "relay.events" };
    let mut out = io::stdout();
    let mut timeline = Timeline::new(out.is_terminal() && console::colors_enabled());
    for line in client::lines(socket, what)? {
        let line = line?;
        let line = if json { line } else { timeline.line(&line) };
        // Each at once, as somebody may be watching.
        if !written(writeln!(out, "{line}").and_then(|()| out.flush()))? {
            return Ok(());
        }
    }
    Ok(())
}

/// Events as lines for people.
#[derive(Debug)]
pub struct Timeline {
    colour: bool,
    /// When the VMM began to count, where a boot has said so.
    start: Option<SystemTime>,
    last: Option<Duration>,
}

impl Timeline {
    /// One that has seen nothing yet.
    #[must_use]
    pub fn new(colour: bool) -> Self {
        Self { colour, start: None, last: None }
    }

    /// One event (a line of JSON): when, how long after the one before, and what. What is no event is given
    /// back as it is.
    pub fn line(&mut self, line: &str) -> String {
        let Ok(event) = serde_json::from_str::<Value>(line) else { return line.to_owned() };
        let number = |field: &str| event["timestamp"][field].as_u64().unwrap_or_default();
        // Whatever these numbers are, they are only shown.
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

/// What it says, and how that looks.
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
            let words = format!("{} events were missed here", event["properties"]["events"]);
            return (words, plain.red());
        }
        _ => {}
    }
    // Of a VMM that is newer than this.
    (format!("{source}: {} {}", event["event"], event["properties"]), plain)
}

/// Shows the status of the VM behind `socket` again and again: whenever something has happened.
///
/// # Errors
/// See [`FollowError`].
pub fn status(socket: &Path, json: bool) -> Result<(), FollowError> {
    let (happened, happens) = channel();
    let lines = client::lines(socket, "relay.events?follow=true")?;
    std::thread::spawn(move || {
        for line in lines {
            // Only that something has happened is of interest here; the VM's end ends this thread.
            if line.is_err() || happened.send(()).is_err() {
                return;
            }
        }
    });
    let terminal = io::stdout().is_terminal() && !json;
    let mut last = String::new();
    loop {
        let status = match client::get::<Status>(socket, "relay.status") {
            Ok(status) => Some(status),
            // Between two boots.
            Err(ClientError::Refused { status: 503, .. }) => None,
            // The VM's end shows here first, or there.
            Err(_) if has_ended(&happens) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if let Some(status) = status {
            let text = show::status_text(&status, json);
            if text != last && !written(put(&text, terminal))? {
                return Ok(());
            }
            last = text;
        }
        std::thread::sleep(LEAST);
        match happens.recv_timeout(MOST) {
            // All that has come meanwhile is shown at once.
            Ok(()) => while happens.try_recv().is_ok() {},
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

/// Whether nothing happens any more, once what has happened is taken.
fn has_ended(happens: &Receiver<()>) -> bool {
    let deadline = Instant::now() + ENDING;
    loop {
        match happens.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(()) => {}
            Err(RecvTimeoutError::Timeout) => return false,
            Err(RecvTimeoutError::Disconnected) => return true,
        }
    }
}

/// On a terminal in the place of what was there before; anywhere else below it.
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
        assert!(timeline.line(missed).ends_with("7 events were missed here"));
        let unknown = r#"{"timestamp":{"secs":3,"nanos":0},"source":"memory","event":"new","properties":{"x":1}}"#;
        assert!(timeline.line(unknown).ends_with(r#"memory: "new" {"x":1}"#));
        assert_eq!(timeline.line("no JSON"), "no JSON");
        let mut coloured = Timeline::new(true);
        assert!(coloured.line(healed).contains("\u{1b}["));
    }

    #[test]
    fn the_end_is_told_from_silence() {
        let (happened, happens) = channel();
        happened.send(()).unwrap();
        assert!(!has_ended(&happens));
        happened.send(()).unwrap();
        drop(happened);
        assert!(has_ended(&happens));
    }

    #[test]
    fn times_that_cannot_be_are_shown_all_the_same() {
        for line in [
            include_str!("../../tests/fuzz/seeds/events/far-future"),
            include_str!("../../tests/fuzz/seeds/events/long-ago"),
        ] {
            let shown = Timeline::new(false).line(line);
            assert!(shown.contains("booting"), "{shown}");
        }
    }
}
