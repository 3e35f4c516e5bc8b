//! Writes events to the log and to a file.

use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

use log::{info, log, warn};
use mce_relay::FailureKind;

use crate::api::types::vm_event::VmEvent;
use crate::events::entry::{Next, What};
use crate::events::hub::{Follower, Hub};
use crate::events::written;
use crate::outlets::files::{Appended, LogFile};
use crate::sandbox::role::Role;
use crate::sandbox::seccomp::Filters;
use crate::words::counted;

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
    /// The thread that writes could not be started.
    #[error("cannot start a thread that writes events down")]
    Thread(#[source] io::Error),
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

    /// Starts a thread that follows the events, from the first one that is kept. Each destination has a thread of its
    /// own, so that a blocked terminal does not hold up a file.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn spawn(
        &self,
        what: &str,
        body: impl FnOnce(Follower) + Send + 'static,
    ) -> io::Result<()> {
        let follower = self.hub.follow();
        let thread =
            self.filters.spawn(Role::Events, format!("events-{what}"), move || body(follower))?;
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    /// Appends all events to a file, those that are kept already included.
    ///
    /// # Errors
    /// See [`MonitorError`].
    pub fn write_to(&self, to: &LogFile) -> Result<(), MonitorError> {
        self.write_on("file", open(to)?).map_err(MonitorError::Thread)
    }

    /// The same to a file that is open, on a thread with this name.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn write_on(&self, what: &str, file: Appended) -> io::Result<()> {
        self.spawn(what, move |follower| written::write(follower, file))
    }

    /// The ring of events.
    #[must_use]
    pub fn hub(&self) -> &Hub {
        &self.hub
    }

    /// An observer for the relay: quick, does not block.
    pub fn for_relay(&self) -> Box<dyn Fn(&mce_relay::Event) + Send + Sync> {
        let hub = self.hub.clone();
        Box::new(move |event| hub.emit(What::Memory(event.clone())))
    }

    /// A sink for other threads' reports of the VM: quick, does not block.
    pub fn for_vm(&self) -> impl Fn(VmEvent) + Send + Sync + 'static {
        let hub = self.hub.clone();
        move |event| hub.emit(What::Vm(event))
    }

    /// Reports an event of the VM.
    pub fn emit(&self, event: VmEvent) {
        self.hub.emit(What::Vm(event));
    }

    /// Ends the events; returns when all are written down.
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

/// Whether it is about the VMM's own memory. (An AO: an AR of it ends the process, with a line of its own.)
fn is_of_the_vmm(event: &mce_relay::Event) -> bool {
    matches!(event, mce_relay::Event::Outside { kind: FailureKind::ActionOptional, .. })
}

#[cfg(test)]
mod tests {
    use log::Level;

    use super::*;
    use crate::api::types::pause::PauseReason;
    use crate::api::types::pause::Undeliverable;
    use crate::events::lines::line;
    use serde_json::{Value, json};
    use std::time::Duration;

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
