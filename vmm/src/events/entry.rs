//! The entries of the ring of events.

use std::sync::Arc;
use std::time::Duration;

use crate::api::types::vm_event::VmEvent;

/// What happened.
#[derive(Debug, Clone)]
pub enum What {
    /// To the guest's memory.
    Memory(mce_relay::Event),
    /// To the virtual machine.
    Vm(VmEvent),
}

/// What happened, and when.
#[derive(Debug)]
pub struct Entry {
    /// Since the start of the VMM.
    pub time: Duration,
    /// What.
    pub what: What,
}

/// What a follower reads.
#[derive(Debug)]
pub enum Next {
    /// The next event.
    Event(Arc<Entry>),
    /// Events were dropped from the ring before this follower read them.
    Missed {
        /// How many.
        events: u64,
        /// When the follower noticed, since the start of the VMM.
        time: Duration,
    },
    /// There will be no more events.
    End,
}
