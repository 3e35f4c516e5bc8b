//! Why a VM stops, and what the observer is told.

use std::fmt;

use crate::api::types::pause::{Panic, PauseReason, Undeliverable};

/// What stopped a VM from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopCause {
    /// This signal was sent to the process.
    Signal(i32),
    /// The user typed the escape on the terminal.
    Console,
    /// A request, with words for the log.
    Request(String),
}

impl fmt::Display for StopCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal(number) => match signal_hook::low_level::signal_name(*number) {
                Some(name) => f.write_str(name),
                None => write!(f, "signal {number}"),
            },
            Self::Console => f.write_str("Ctrl-A x on the terminal"),
            Self::Request(why) => f.write_str(why),
        }
    }
}

/// What an observer is told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// The VM is paused, or the reason of its pause has changed.
    Paused(&'a PauseReason),
    /// The vCPUs run again.
    Resumed,
    /// The guest reports that its kernel has panicked.
    Panicked(Panic),
}

/// How far a pause has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parked {
    /// No vCPU is in the guest, and none will enter it; and no device uses guest memory.
    All,
    /// How many vCPUs and devices have not parked yet.
    Not(usize),
    /// The VM is not paused (any more): it was resumed, or it ends.
    Unpaused,
}

/// Why a VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked to be started over.
    Reset,
    /// A reset was asked for from outside.
    ResetBy(StopCause),
    /// This vCPU had a triple fault.
    TripleFault {
        /// Its index.
        vcpu: u8,
    },
    /// KVM could not run this vCPU any further.
    KvmError {
        /// Its index.
        vcpu: u8,
        /// What happened.
        what: String,
    },
    /// The guest cannot be told of a bad page that a vCPU touched.
    Undeliverable(Undeliverable),
    /// Stopped from outside.
    Stopped(StopCause),
    /// The VMM could not go on.
    Fatal(String),
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest reset itself"),
            Self::ResetBy(cause) => write!(f, "reset by {cause}"),
            Self::TripleFault { vcpu } => write!(f, "triple fault on vCPU {vcpu}"),
            Self::KvmError { vcpu, what } => write!(f, "KVM error on vCPU {vcpu}: {what}"),
            Self::Undeliverable(what) => what.fmt(f),
            Self::Stopped(cause) => write!(f, "stopped by {cause}"),
            Self::Fatal(what) => write!(f, "fatal: {what}"),
        }
    }
}
