//! An event as a line of JSON.

use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use crate::events::entry::{Next, What};

/// The line of JSON, with its line feed, that a follower is sent for `next`; `None` at the end.
#[must_use]
pub fn line_of(next: &Next) -> Option<String> {
    match next {
        Next::Event(entry) => Some(match &entry.what {
            What::Memory(event) => line(entry.time, "memory", event),
            What::Vm(event) => line(entry.time, "vm", event),
        }),
        // Not an event: the follower is told that it was too slow.
        Next::Missed { events, time } => {
            let missed = json!({ "event": "missed", "properties": { "events": events } });
            Some(line(*time, "monitor", &missed))
        }
        Next::End => None,
    }
}

/// One event as a line of JSON, with its line feed.
pub(crate) fn line(time: Duration, source: &str, event: &impl Serialize) -> String {
    let mut value = json!({
        "timestamp": { "secs": time.as_secs(), "nanos": time.subsec_nanos() },
        "source": source,
    });
    // Events are enums tagged with "event" and "properties", so they always are objects.
    if let (Some(line), Ok(Value::Object(event))) =
        (value.as_object_mut(), serde_json::to_value(event))
    {
        line.extend(event);
    }
    format!("{value}\n")
}
