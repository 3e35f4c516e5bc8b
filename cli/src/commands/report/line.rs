//! One line of a file of events: what it is, whoever wrote it.

use mce_relay::Event;
use mce_relay_vmm::api::types::vm_event::VmEvent;
use serde::Deserialize;
use serde_json::{Value, json};

/// What a line says.
#[derive(Debug)]
pub enum Said {
    /// Something of the guest's memory.
    Memory(Event),
    /// Something of the VM.
    Vm(VmEvent),
    /// So many events are not in the file.
    Missed(u64),
    /// An event of a newer version: its source and its name.
    Unknown(String),
}

/// An event with its time.
#[derive(Debug)]
pub struct Line {
    /// Microseconds since the start of the VMM.
    pub at: u64,
    /// What it says.
    pub said: Said,
}

#[derive(Deserialize)]
struct Stamp {
    secs: u64,
    nanos: u64,
}

#[derive(Deserialize)]
struct Raw {
    timestamp: Stamp,
    source: String,
    event: String,
    #[serde(default)]
    properties: Value,
}

impl Line {
    /// Reads a line.
    ///
    /// # Errors
    /// It is no event: what is wrong with it.
    pub fn read(text: &str) -> Result<Self, String> {
        let raw: Raw = serde_json::from_str(text)
            .map_err(|error| error.to_string().replace(" at line 1 column ", ", at column "))?;
        let Raw { timestamp: Stamp { secs, nanos }, source, event, properties } = raw;
        // Any time will do: it is only shown and compared.
        let at = secs.saturating_mul(1_000_000).saturating_add(nanos / 1000);
        let typed = || json!({ "event": event, "properties": properties });
        let said = match source.as_str() {
            "memory" => serde_json::from_value(typed()).map(Said::Memory).ok(),
            "vm" => serde_json::from_value(typed()).map(Said::Vm).ok(),
            "monitor" if event == "missed" => properties["events"].as_u64().map(Said::Missed),
            _ => None,
        };
        Ok(Self { at, said: said.unwrap_or_else(|| Said::Unknown(format!("{source}: {event}"))) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(source: &str, event: &str, properties: &str) -> Line {
        Line::read(&format!(
            r#"{{"timestamp":{{"secs":1,"nanos":2000}},"source":"{source}","event":"{event}","properties":{properties}}}"#
        ))
        .unwrap()
    }

    #[test]
    fn every_kind_of_line() {
        let healed = read("memory", "healed", r#"{"gpa":"0x1000"}"#);
        assert_eq!(healed.at, 1_000_002);
        assert!(matches!(healed.said, Said::Memory(Event::Healed { gpa: 0x1000, .. })));
        assert!(matches!(read("vm", "resumed", "{}").said, Said::Vm(VmEvent::Resumed {})));
        let missed = read("monitor", "missed", r#"{"events":7}"#);
        assert!(matches!(missed.said, Said::Missed(7)));
    }

    /// A newer version may have new events, and new forms of those that are known.
    #[test]
    fn what_is_not_known_is_no_error() {
        for (source, event, properties) in [
            ("memory", "moved", r#"{"gpa":"0x1000"}"#),
            ("memory", "healed", r#"{"gpa":4096}"#),
            ("vm", "booting", "{}"),
            ("gpu", "new", "[]"),
            ("monitor", "missed", "{}"),
        ] {
            let Said::Unknown(name) = read(source, event, properties).said else {
                panic!("{event}")
            };
            assert_eq!(name, format!("{source}: {event}"));
        }
    }

    #[test]
    fn what_is_no_event_is_one() {
        for bad in ["", "no JSON", "{}", "[1]", r#"{"event":"healed","source":"memory"}"#, "\0"] {
            Line::read(bad).unwrap_err();
        }
    }

    #[test]
    fn times_that_cannot_be() {
        let far = include_str!("../../../../tests/fuzz/seeds/events/far-future");
        assert_eq!(Line::read(far).map(|line| line.at), Ok(1_000_000));
        let ago = include_str!("../../../../tests/fuzz/seeds/events/long-ago");
        assert_eq!(Line::read(ago).map(|line| line.at), Ok(u64::MAX));
    }
}
