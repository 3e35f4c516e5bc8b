//! What happened, for people and programs: a line on the log, a line of JSON in the event monitor's
//! file, and the same to clients of the API.
//!
//! The shape is Cloud Hypervisor's: `{"timestamp":{"secs":…,"nanos":…},"source":…,"event":…,
//! "properties":{…}}`, the timestamp counted from the start of the VMM. `docs/events.md` has every
//! field. Nobody who reports an event waits for those who read it: see [`hub`].

pub mod counts;
pub mod hub;
mod written;

use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use log::{Level, info, log, warn};
use mce_relay::FailureKind;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::control::{Panic, PauseReason};
use crate::files::{Appended, LogFile};
use crate::seccomp::{Filters, Thread};
use crate::show::counted;
pub use hub::{Entry, Follower, Hub, Next, What};

/// Why events cannot be written down.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The event monitor's file could not be opened.
    #[error("cannot open the event monitor's file {path}", path = .path.display())]
    File {
        /// The path asked for.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// There is nobody to write.
    #[error("cannot start a thread that writes events down")]
    Thread(#[source] io::Error),
}

/// Something that happened to the virtual machine itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "event", content = "properties")]
pub enum VmEvent {
    /// A boot begins.
    Booting {
        /// 1 for the first boot of this process.
        boot: u32,
        /// Seconds since 1970, to place the other timestamps by.
        unix_time: f64,
        /// What the guest was shown as IA32_MCG_CAP.
        mcg_cap: String,
        /// The guest's vendor.
        vendor: mce_relay::mca::Vendor,
    },
    /// The guest has ended, or was ended.
    Ended {
        /// How.
        how: String,
        /// The exit status that stands for it.
        status: u8,
    },
    /// The guest is started again, with whole memory.
    Reset {
        /// What made that necessary.
        reason: String,
        /// The user's policy had it reset, not the guest itself.
        by_policy: bool,
    },
    /// The vCPUs leave the guest and wait.
    Paused {
        /// FallbackReason.
        #[serde(flatten)]
        reason: PauseReason,
        /// How the user goes on from here.
        #[serde(skip)]
        way_on: String,
    },
    /// The vCPUs go on.
    Resumed {},
    /// The guest says that its kernel has panicked.
    Panicked {
        /// How the user goes on from here.
        #[serde(skip)]
        way_on: String,
    },
    /// The guest says that its kernel has panicked and its crash kernel takes over.
    CrashLoaded {},
}

impl VmEvent {
    /// What nobody asked for and somebody may have to act on is shown without being asked for.
    fn level(&self) -> Level {
        match self {
            Self::Paused { reason: PauseReason::Undeliverable(_), .. }
            | Self::Reset { by_policy: true, .. }
            | Self::Panicked { .. }
            | Self::CrashLoaded {} => Level::Warn,
            _ => Level::Info,
        }
    }
}

impl std::fmt::Display for VmEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Booting { boot, mcg_cap, vendor, .. } => {
                write!(f, "boot {boot}: {vendor}-style guest, MCG_CAP {mcg_cap}")
            }
            Self::Ended { how, status } => write!(f, "ended: {how} (exit status {status})"),
            Self::Reset { reason, .. } => write!(f, "{reason}; starting the guest again"),
            Self::Paused { reason, way_on } if way_on.is_empty() => write!(f, "paused: {reason}"),
            Self::Paused { reason, way_on } => write!(f, "paused: {reason}; {way_on}"),
            Self::Resumed {} => f.write_str("resumed"),
            Self::Panicked { way_on } if way_on.is_empty() => Panic::Panicked.fmt(f),
            Self::Panicked { way_on } => write!(f, "{}; {way_on}", Panic::Panicked),
            Self::CrashLoaded {} => Panic::CrashLoaded.fmt(f),
        }
    }
}

/// Writes events down, on threads of its own. Dropping it ends the hub and writes what is left.
#[derive(Debug)]
pub struct Monitor {
    hub: Hub,
    filters: Filters,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Monitor {
    /// Starts writing to the log, on a thread under `filters`.
    ///
    /// # Errors
    /// See [`MonitorError`].
    pub fn start(filters: &Filters) -> Result<Self, MonitorError> {
        let (hub, filters) = (Hub::default(), filters.clone());
        let monitor = Self { hub, filters, threads: Mutex::default() };
        monitor.spawn("log", write_log).map_err(MonitorError::Thread)?;
        Ok(monitor)
    }

    /// Has a thread follow the events from the first on that is kept. One for each who writes them down: a
    /// terminal that is held must not hold up a file.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn spawn(
        &self,
        what: &str,
        body: impl FnOnce(Follower) + Send + 'static,
    ) -> io::Result<()> {
        let follower = self.hub.follow();
        let thread =
            self.filters.spawn(Thread::Events, format!("events-{what}"), move || body(follower))?;
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    /// Appends all events to a file, those that there were already, too.
    ///
    /// # Errors
    /// See [`MonitorError`].
    pub fn write_to(&self, to: &LogFile) -> Result<(), MonitorError> {
        self.write_on("file", open(to)?).map_err(MonitorError::Thread)
    }

    /// The same to a file that is open, on a thread called so.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn write_on(&self, what: &str, file: Appended) -> io::Result<()> {
        self.spawn(what, move |follower| written::write(follower, file))
    }

    /// Where the events are.
    #[must_use]
    pub fn hub(&self) -> &Hub {
        &self.hub
    }

    /// A sink for the relay: quick, does not block.
    pub fn for_relay(&self) -> Box<dyn Fn(&mce_relay::Event) + Send + Sync> {
        let hub = self.hub.clone();
        Box::new(move |event| hub.emit(What::Memory(event.clone())))
    }

    /// A sink for what other threads report of the VM: quick, does not block.
    pub fn for_vm(&self) -> impl Fn(VmEvent) + Send + Sync + 'static {
        let hub = self.hub.clone();
        move |event| hub.emit(What::Vm(event))
    }

    /// Reports an event of the VM.
    pub fn emit(&self, event: VmEvent) {
        self.hub.emit(What::Vm(event));
    }

    /// There are no more events; returns when all are written down.
    pub fn end(&self) {
        self.hub.end();
        for thread in self.threads.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = thread.join();
        }
    }
}

/// Opens a file for [`Monitor::write_on`].
///
/// # Errors
/// See [`MonitorError`].
pub fn open(to: &LogFile) -> Result<Appended, MonitorError> {
    Appended::open(to, true).map_err(|source| MonitorError::File { path: to.path.clone(), source })
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.end();
    }
}

fn write_log(mut follower: Follower) {
    loop {
        match follower.wait() {
            Next::Event(entry) => match &entry.what {
                What::Memory(event) if is_of_the_vmm(event) => warn!(
                    target: "relay",
                    "{event}: memory of the VMM itself went bad; the VMM goes on, and ends should it \
                     touch that"
                ),
                What::Memory(event) => info!(target: "relay", "{event}"),
                What::Vm(event) => log!(target: "vm", event.level(), "{event}"),
            },
            Next::Missed { events, .. } => {
                let events = counted(events, "event");
                warn!(target: "vm", "{events} not logged: the log is too slow");
            }
            Next::End => return,
        }
    }
}

/// Whether it is of the VMM's own memory, and the VMM lives. (An AR of it ends the process, with a line of its
/// own.)
fn is_of_the_vmm(event: &mce_relay::Event) -> bool {
    matches!(event, mce_relay::Event::Outside { kind: FailureKind::ActionOptional, .. })
}

/// What a follower is sent for `next`: a line of JSON with its line feed, or `None` at the end.
#[must_use]
pub fn line_of(next: &Next) -> Option<String> {
    match next {
        Next::Event(entry) => Some(match &entry.what {
            What::Memory(event) => line(entry.time, "memory", event),
            What::Vm(event) => line(entry.time, "vm", event),
        }),
        // Nobody's event: the follower itself is told that it was too slow.
        Next::Missed { events, time } => {
            let missed = json!({ "event": "missed", "properties": { "events": events } });
            Some(line(*time, "monitor", &missed))
        }
        Next::End => None,
    }
}

/// One event as a line of JSON, with its line feed.
fn line(time: Duration, source: &str, event: &impl Serialize) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Undeliverable;

    #[test]
    fn a_line_has_the_four_fields() {
        let place = mce_relay::Place::Ghes { record: 1 };
        let event = mce_relay::Event::Acknowledged {
            gpa: 0x1000,
            place,
            after_micros: None,
            forged: false,
        };
        let line = line(Duration::new(2, 5), "memory", &event);
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["timestamp"]["secs"], 2);
        assert_eq!(value["event"], "acknowledged");
        assert_eq!(value["properties"]["gpa"], "0x1000");
        assert!(line.ends_with('\n'));
    }

    #[test]
    fn the_file_holds_everything_when_the_monitor_is_gone() {
        let path = tempfile::tempdir().unwrap().keep().join("events");
        for runs in 1..3 {
            let monitor = Monitor::start(&Filters::default()).unwrap();
            for event in 0..100 {
                monitor.emit(VmEvent::Resumed {});
                if event == 50 {
                    monitor.write_to(&path.clone().into()).unwrap();
                }
            }
            drop(monitor);
            let lines = std::fs::read_to_string(&path).unwrap().lines().count();
            assert_eq!(lines, runs * 100, "those before and those of the runs before");
        }
    }

    #[test]
    fn a_pause_names_its_reason_and_the_way_on() {
        let why = "CR4.MCE is clear".into();
        let what = Undeliverable { vcpu: 1, gpa: 0x5000, why, rip: Some(0xff) };
        let event = VmEvent::Paused {
            reason: PauseReason::Undeliverable(what),
            way_on: "resume it".into(),
        };
        assert_eq!(event.level(), Level::Warn, "seen without -v");
        let words = "paused: vCPU 1 touched the bad page at 0x5000 (RIP 0xff) and cannot be told: \
                     CR4.MCE is clear; resume it";
        assert_eq!(event.to_string(), words);
        let value: Value = serde_json::from_str(&line(Duration::ZERO, "vm", &event)).unwrap();
        assert_eq!(value["event"], "paused");
        let properties = json!({
            "reason": "undeliverable", "vcpu": 1, "gpa": "0x5000", "why": "CR4.MCE is clear",
            "rip": "0xff"
        });
        assert_eq!(value["properties"], properties);
    }

    #[test]
    fn a_path_that_cannot_be_written_is_named() {
        let monitor = Monitor::start(&Filters::default()).unwrap();
        let error = monitor.write_to(&"/nowhere/events".into()).unwrap_err();
        assert!(error.to_string().contains("/nowhere/events"));
    }
}
