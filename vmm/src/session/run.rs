//! `mce-relay run`: boots the guest with the relay, and starts it again when it resets itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use log::{error, warn};
use mce_relay::{KillPolicy, Ledger};

use crate::api::current::Current;
use crate::api::server::{Api, ApiError};
use crate::api::types::vm_event::VmEvent;
use crate::config::SerialMode;
use crate::events::monitor::{self, Monitor, MonitorError};
use crate::host::memory_failure;
use crate::machine::lifecycle::reasons::{ExitReason, StopCause};
use crate::machine::memory::error::MemoryError;
use crate::machine::memory::guest_ram::GuestRam;
use crate::machine::vm::error::VmError;
use crate::outlets::files::{self, Appended, LogFile};
use crate::outlets::sockets::BindError;
use crate::sandbox::allocator;
use crate::sandbox::hangup;
use crate::sandbox::role::Role;
use crate::sandbox::seccomp::{Filters, SeccompError};
use crate::sandbox::start_up;
use crate::session::boots::Machine;
use crate::session::config::RunConfig;
use crate::session::names::{self, NameError, VmName};
use crate::session::outlets::Outlets;
use crate::session::record;
use crate::words;

/// Why a guest could not be run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The event monitor.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// The API.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// Its name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The VM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A file that is to be written to.
    #[error("cannot write to {}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The filters of system calls.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// The memory-failure policy.
    #[error("cannot set the memory-failure policy (prctl PR_MCE_KILL)")]
    Policy(#[source] std::io::Error),
    /// SIGHUP cannot be held back.
    #[error("cannot have SIGHUP wait until there is a VM")]
    Signal(#[source] std::io::Error),
}

/// Boots the guest, and again after each reset; returns the exit status that says how it ended.
///
/// # Errors
/// The guest could not be started.
pub fn run(config: &RunConfig) -> Result<u8, RunError> {
    hangup::hold().map_err(RunError::Signal)?;
    // This and what follows is done before any thread is started.
    allocator::keep_small();
    // The threads inherit late kill, and only the relay's own thread takes AOs.
    KillPolicy::Late.set().map_err(RunError::Policy)?;
    let filters = Filters::new(config.seccomp)?;
    filters.apply(Role::Main)?;
    start_up::give_back();
    files::survive_limits();
    check_files(config)?;
    let monitor_file = open_pipe(config)?;
    let ram = Arc::new(GuestRam::new(&config.memory)?);
    let monitor = Monitor::start(&filters)?;
    let current = Current::new(config.name.as_ref().map(VmName::as_str));
    let socket = match (&config.api_socket, &config.name) {
        (Some(path), _) => Some(path.clone()),
        (None, Some(name)) => Some(names::claim(name)?),
        (None, None) => None,
    };
    // Dropped after the API, which removes the socket.
    let mut leaving = socket.as_deref().and_then(names::Leaving::of);
    let api = socket
        .as_ref()
        .map(|path| Api::start(path, current.clone(), monitor.hub().clone(), &filters));
    let _api = api.transpose().map_err(|error| api_error(error, config))?;
    if !Path::new(memory_failure::EARLY_KILL_SYSCTL).exists() {
        warn!(
            "this host's kernel has no memory failure handling (CONFIG_MEMORY_FAILURE): \
             there will be nothing to relay; `mce-relay check` says more"
        );
    }
    // Ends the events before the API goes, so that its followers are told.
    let _end = EndOfEvents(&monitor);
    let (outlets, ledger) = (Outlets { monitor_file, ..Outlets::default() }, Ledger::default());
    let mut machine = Machine { config, filters, socket, ram, monitor: &monitor, outlets, ledger };
    let ended = machine.run_to_its_end(&current);
    // The guest's last output comes before the messages about its end.
    machine.outlets = Outlets::default();
    let (status, how) = match &ended {
        Ok(reason) => (exit_status(reason), reason.to_string()),
        Err(error) => (1, words::with_causes(error)),
    };
    record::end(status, &how);
    monitor.emit(VmEvent::Ended { how, status });
    let reason = ended?;
    if matches!(reason, ExitReason::Stopped(StopCause::Console)) {
        // The cursor may be anywhere in a line, and the shell's prompt comes next.
        eprint!("\r\nmce-relay: {reason}\r\n");
    }
    if !matches!(reason, ExitReason::PowerOff | ExitReason::Stopped(_)) {
        error!("{reason}");
        if let Some(name) = config.name.as_ref().filter(|_| record::are_kept()) {
            eprintln!("mce-relay: {}", record::where_to_look(name.as_str()));
        }
    } else if let (Some(leaving), Some(name)) = (leaving.as_mut(), &config.name)
        && record::are_kept()
    {
        leaving.forget(name);
    }
    Ok(status)
}

/// Checks early whether the output files can be made; they are touched only when nothing else can fail.
fn check_files(config: &RunConfig) -> Result<(), RunError> {
    let of = |serial: &SerialMode| match serial {
        SerialMode::File(to) => Some(to.clone()),
        _ => None,
    };
    let lines = config.vm.lines().filter_map(of);
    for LogFile { path, max_size } in lines.chain(config.event_monitor.clone()) {
        let to = LogFile { path: path.clone(), max_size };
        to.check().map_err(|source| RunError::File { path, source })?;
    }
    Ok(())
}

/// Opens the event monitor's file now if it is a FIFO or a device, which does no harm. Opening a FIFO waits for a
/// reader; a signal still ends this process meanwhile.
fn open_pipe(config: &RunConfig) -> Result<Option<Appended>, MonitorError> {
    let Some(to) = &config.event_monitor else { return Ok(None) };
    match to.path.metadata() {
        Ok(found) if !found.is_file() => monitor::open(to).map(Some),
        _ => Ok(None),
    }
}

/// If a process answers at the API socket of a named VM, the name is taken.
fn api_error(error: ApiError, config: &RunConfig) -> RunError {
    match (&error, &config.name) {
        (ApiError::Bind { source: BindError::Answers, .. }, Some(name)) => {
            NameError::Taken(name.as_str().to_owned()).into()
        }
        (ApiError::Bind { source: BindError::Silent(peer), .. }, Some(name)) => {
            NameError::Silent { name: name.as_str().to_owned(), peer: peer.clone() }.into()
        }
        _ => error.into(),
    }
}

/// Ends the events when dropped.
struct EndOfEvents<'a>(&'a Monitor);

impl Drop for EndOfEvents<'_> {
    fn drop(&mut self) {
        self.0.hub().end();
    }
}

/// The exit status of `mce-relay run` for `reason`; the help of the command lists them.
fn exit_status(reason: &ExitReason) -> u8 {
    match reason {
        ExitReason::PowerOff | ExitReason::Stopped(StopCause::Console | StopCause::Request(_)) => 0,
        ExitReason::Fatal(_) => 1,
        ExitReason::Reset | ExitReason::ResetBy(_) => 3,
        ExitReason::TripleFault { .. } => 4,
        ExitReason::KvmError { .. } => 5,
        ExitReason::Undeliverable(_) => 6,
        // As a shell reports it; signals are 1 to 64.
        ExitReason::Stopped(StopCause::Signal(signal)) => {
            128 + u8::try_from(*signal).unwrap_or_default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::pause::Undeliverable;

    fn untold() -> ExitReason {
        ExitReason::Undeliverable(Undeliverable {
            vcpu: 0,
            gpa: 0x1000,
            why: "test".into(),
            rip: None,
        })
    }

    #[test]
    fn every_end_has_its_status() {
        let why = String::new;
        let ends = [
            (ExitReason::PowerOff, 0),
            (ExitReason::Stopped(StopCause::Request(why())), 0),
            (ExitReason::Fatal(why()), 1),
            (ExitReason::Reset, 3),
            (ExitReason::ResetBy(StopCause::Request(why())), 3),
            (ExitReason::TripleFault { vcpu: 0 }, 4),
            (ExitReason::KvmError { vcpu: 0, what: why() }, 5),
            (untold(), 6),
            (ExitReason::Stopped(StopCause::Signal(15)), 143),
        ];
        for (reason, status) in ends {
            assert_eq!(exit_status(&reason), status, "{reason:?}");
        }
    }
}
