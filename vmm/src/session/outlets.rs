//! The outputs of this process (serial lines, events, API), from the first boot to the end.

use std::sync::Arc;

use log::warn;
use mce_relay::Handle;

use crate::api::current::Current;
use crate::config::VmConfig;
use crate::events::monitor::Monitor;
use crate::machine::devices::serial::finished::Finished;
use crate::machine::devices::serial::{self, HostSides};
use crate::machine::devices::virtio::blk::open_disks;
use crate::machine::vcpu::hooks::HookError;
use crate::outlets::files::Appended;
use crate::sandbox::seccomp::Filters;
use crate::session::config::RunConfig;
use crate::session::{names, record};

/// What is the same in every boot.
pub(super) struct Session<'a> {
    pub(super) config: &'a RunConfig,
    pub(super) filters: &'a Filters,
    pub(super) monitor: &'a Monitor,
    pub(super) current: &'a Current,
}

impl Session<'_> {
    /// Starts the record that a named VM leaves. If that fails the VM runs without one.
    fn keep_a_record(&self) {
        let Some(name) = &self.config.name else { return };
        let dir = names::record_dir(name);
        if let Err(error) = record::begin(&dir, name.as_str(), self.monitor, self.current) {
            warn!(
                "cannot keep the events and the ledger in {}: {error}; they go with the VM",
                dir.display()
            );
        }
    }
}

/// The outputs of this process: opened when the first VM is almost built, and then kept.
#[derive(Default)]
pub(crate) struct Outlets {
    pub(super) lines: Option<HostSides>,
    /// The event monitor's file, if it had to be opened before.
    pub(super) monitor_file: Option<Appended>,
    pub(super) boot: u32,
}

impl Outlets {
    /// Opens what is not open yet, and notes the boot.
    pub(super) fn open(
        &mut self,
        config: &VmConfig,
        session: &Session<'_>,
    ) -> Result<HostSides, HookError> {
        let lines = match &self.lines {
            Some(lines) => lines.clone(),
            None => {
                let mut lines = serial::open_lines(config, session.filters)?;
                lines.disks = open_disks(&config.devices)?;
                match (self.monitor_file.take(), &session.config.event_monitor) {
                    (Some(file), _) => session.monitor.write_on("file", file)?,
                    (None, Some(path)) => session.monitor.write_to(path)?,
                    (None, None) => {}
                }
                session.keep_a_record();
                self.lines.insert(lines).clone()
            }
        };
        lines.iter().for_each(|line| line.note_boot(self.boot));
        Ok(lines)
    }

    /// Has `relay`, if there is one, told with which pages the guest is done by what it puts out.
    pub fn watch(&self, relay: Option<&Handle>) {
        for line in self.lines.iter().flat_map(HostSides::iter) {
            let relay = relay.cloned();
            line.watch(
                relay.map(|relay| -> Finished { Arc::new(move |gpa| relay.guest_finished(gpa)) }),
            );
        }
    }
}
