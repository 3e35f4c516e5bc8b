//! What is behind the relay's lock.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::forgery::Forgery;
use super::gathering::Gathering;
use super::locked::{Collects, Kick};
use super::rescue::Rescues;
use crate::decide::machine_check::Delivery;
use crate::event::Event;
use crate::ledger::Ledger;
use crate::signal::Slot;
use crate::types::{Caught, Form};

/// First pause before a vCPU that could not be told is looked at again.
pub(crate) const RETRY_FIRST: Duration = Duration::from_millis(5);

pub(crate) struct Attached {
    pub(crate) slot: Arc<Slot>,
    pub(crate) kick: Kick,
    /// Held by a pause of the virtual machine.
    pub(crate) parked: bool,
    /// Its thread did not stop for the last gathering, and has not called `before_run` since.
    pub(crate) late: bool,
    /// When it was last called for being late.
    pub(crate) called: Instant,
}

/// How long after its port was dropped a vCPU counts as unplugged. At the end of the virtual machine all ports are
/// dropped, one after the other, and then no guest is left to be told.
const UNPLUGGED: Duration = Duration::from_millis(200);

pub(crate) struct Inner {
    pub(crate) delivery: Delivery,
    pub(crate) ledger: Ledger,
    pub(crate) vcpus: Vec<Option<Attached>>,
    pub(crate) gathering: Option<Gathering>,
    /// Gatherings called so far.
    pub(crate) gatherings: u64,
    /// The pause before the vCPUs for which something waits are called again.
    pub(crate) retry: Duration,
    /// By when the relay's thread looks at all this again, whoever wakes it or not.
    pub(crate) looks_by: Option<Instant>,
    /// Something new waits: call at once.
    pub(crate) news: bool,
    /// Something new waits on the firmware-first channel.
    pub(crate) firmware_news: bool,
    /// Huge pages that have gone bad and are being rescued.
    pub(crate) rescues: Rescues,
    /// Failures that are not real.
    pub(crate) forgery: Forgery,
    /// AOs that are not of this relay's memory.
    pub(crate) strays: Vec<Caught>,
    /// vCPUs whose ports were dropped, and when each counts as unplugged.
    pub(crate) gone: Vec<(usize, Instant)>,
    /// vCPUs that the relay's thread is to call.
    pub(crate) to_call: Vec<usize>,
    /// vCPUs that are to leave the guest, when the lock is given back.
    pub(crate) kicks: Vec<Kick>,
    /// What the observer is told, when the lock is given back.
    pub(crate) events: Vec<Event>,
    /// The relay's thread is to be woken, when the lock is given back.
    pub(crate) wakes: bool,
    /// On which vCPUs, and in which of their banks, a record of which form was found where it had been put (none: a
    /// bystander's).
    pub(crate) proven: HashSet<(usize, u8, Option<Form>)>,
}

impl Collects for Inner {
    fn kicks(&mut self) -> &mut Vec<Kick> {
        &mut self.kicks
    }

    fn events(&mut self) -> &mut Vec<Event> {
        &mut self.events
    }

    fn wakes(&mut self) -> &mut bool {
        &mut self.wakes
    }
}

impl Inner {
    /// The observer is told `event` when the lock is given back.
    pub(crate) fn emit(&mut self, event: Event) {
        self.events.push(event);
    }

    /// The relay's thread is woken when the lock is given back.
    pub(crate) fn wake_relay(&mut self) {
        self.wakes = true;
    }

    /// The relay's thread is to look for an acknowledgement soon: it is woken unless it does so anyway. For one that told of an
    /// AO it has set itself a time when it called the vCPU.
    pub(crate) fn wake_relay_soon(&mut self) {
        self.retry = RETRY_FIRST;
        let soon = Instant::now() + RETRY_FIRST;
        if self.looks_by.is_none_or(|by| by > soon) {
            self.wake_relay();
        }
    }

    /// An AO for the page at `gpa`, which is new.
    pub(crate) fn push_ao(&mut self, gpa: u64) {
        if self.vcpus.is_empty() {
            return;
        }
        self.delivery.push_ao(gpa);
        self.news = true;
        self.firmware_news = true;
    }

    /// `vcpu` goes on without its touches: see [`Delivery::goes_on`].
    pub(crate) fn goes_on(&mut self, vcpu: usize) {
        if self.delivery.goes_on(vcpu) {
            self.aos_wait();
        }
    }

    /// AOs have come to wait.
    pub(crate) fn aos_wait(&mut self) {
        self.news = true;
        self.firmware_news = true;
        self.retry = RETRY_FIRST;
    }

    /// Whether a pause of the virtual machine holds a vCPU.
    pub(crate) fn is_paused(&self) -> bool {
        self.vcpus.iter().flatten().any(|vcpu| vcpu.parked)
    }

    /// Makes `vcpu`'s thread look at the relay's state before its next KVM_RUN.
    pub(crate) fn ask(&self, vcpu: usize) {
        if let Some(attached) = self.vcpus.get(vcpu).and_then(Option::as_ref) {
            attached.slot.ask_attention();
        }
    }

    /// Asks for `vcpu`'s attention and makes it leave the guest.
    pub(crate) fn call(&mut self, vcpu: usize) {
        self.ask(vcpu);
        if let Some(attached) = self.vcpus.get(vcpu).and_then(Option::as_ref) {
            self.kicks.push(Arc::clone(&attached.kick));
        }
    }

    /// The port of `vcpu` will go, or has gone, at `now`.
    pub(crate) fn leaves(&mut self, vcpu: usize) -> Option<Kick> {
        self.gone.push((vcpu, Instant::now() + UNPLUGGED));
        self.vcpus.get_mut(vcpu).and_then(Option::take).map(|attached| attached.kick)
    }
}
