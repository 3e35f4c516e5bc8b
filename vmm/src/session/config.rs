//! What to boot, and how.

use std::path::PathBuf;

use mce_relay::{AoChannel, KillPolicy, Pace};

use crate::api::types::policy::{Notify, OnUndeliverable};
use crate::config::{MemoryZone, RescuePolicy, VmConfig};
use crate::outlets::files::LogFile;
use crate::sandbox::seccomp::Mode;
use crate::session::names::VmName;

/// What to boot, and how; the command line's options as this process needs them.
#[derive(Debug, Clone)]
pub struct RunConfig {
    /// The machine and what it boots.
    pub vm: VmConfig,
    /// The zones of guest RAM.
    pub memory: Vec<MemoryZone>,
    /// The VM's name.
    pub name: Option<VmName>,
    /// Where its API socket is to be, if it has no name.
    pub api_socket: Option<PathBuf>,
    /// The file that every event is appended to.
    pub event_monitor: Option<LogFile>,
    /// Whether an Intel-style guest is offered local machine checks.
    pub lmce: bool,
    /// When errors are taken: early (AO) or at a touch only (AR).
    pub mce_kill: KillPolicy,
    /// What is done about huge pages of which a part goes bad.
    pub rescue: RescuePolicy,
    /// What is done about an AR that the guest cannot be told of.
    pub on_undeliverable: OnUndeliverable,
    /// By which channel AOs are told.
    pub ao_channel: AoChannel,
    /// How the guest is notified by its error source; `None` when it is given none.
    pub ghes: Option<Notify>,
    /// How fast the guest is told of AOs.
    pub ao_pace: Pace,
    /// Which system calls the VMM may make.
    pub seccomp: Mode,
    /// Whether the VM ends where the guest would start over.
    pub no_reboot: bool,
}
