//! What happened, for people and programs: a line on the log, a line of JSON in the event monitor's
//! file, and the same to clients of the API. In the VMM's process.
//!
//! The shape is Cloud Hypervisor's: `{"timestamp":{"secs":…,"nanos":…},"source":…,"event":…,
//! "properties":{…}}`, the timestamp counted from the start of the VMM. `docs/events.md` has every
//! field. A thread that reports an event never waits for a reader: see [`hub`].

pub mod counts;
pub mod entry;
pub mod hub;
pub mod lines;
pub mod monitor;
pub mod written;
