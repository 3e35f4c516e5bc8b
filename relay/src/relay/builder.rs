//! What a relay is made of.

use std::io;

use super::error_source::ErrorSource;
use super::rescue::Rescue;
use crate::decide::firmware::AoChannel;
use crate::decide::pace::Pace;
use crate::event::Event;
use crate::ledger::Ledger;
use crate::memory::map::RamMap;
use crate::signal::{KillPolicy, Signals};
use crate::x86::mca::Caps;

/// What a relay is made of, by [`Relay::builder`](crate::Relay::builder). What is not said is: no vCPU, no machine checks, no error source, early
/// kill, the default pace, a SIGBUS handler of the relay's own, an empty ledger, nobody who is told of events.
#[must_use = "nothing is relayed before `start`"]
pub struct RelayBuilder {
    pub(super) vcpus: usize,
    pub(super) caps: Option<Caps>,
    pub(super) ram: RamMap,
    pub(super) policy: KillPolicy,
    pub(super) pace: Pace,
    pub(super) ao_channel: AoChannel,
    pub(super) source: Option<ErrorSource>,
    pub(super) rescue: Option<Rescue>,
    pub(super) signals: Signals,
    pub(super) ledger: Ledger,
    pub(super) on_thread: Box<dyn FnOnce() -> io::Result<()> + Send>,
    pub(super) observer: Box<dyn Fn(&Event) + Send + Sync>,
}

impl RelayBuilder {
    pub(super) fn new(ram: RamMap) -> Self {
        Self {
            vcpus: 0,
            caps: None,
            ram,
            policy: KillPolicy::Early,
            pace: Pace::default(),
            ao_channel: AoChannel::default(),
            source: None,
            rescue: None,
            signals: Signals::default(),
            ledger: Ledger::default(),
            on_thread: Box::new(|| Ok(())),
            observer: Box::new(|_| ()),
        }
    }

    /// The most vCPUs that there will be; each is [attached](crate::Handle::attach) by its thread. Without any, pages enter
    /// the ledger and nobody but the observer is told.
    pub fn vcpus(mut self, vcpus: usize) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// The guest was shown `caps` of x86's machine-check architecture. Without this, no error is told by machine check:
    /// an AO goes by the error source, if there is one, and an AR is undeliverable.
    pub fn machine_checks(mut self, caps: Caps) -> Self {
        self.caps = Some(caps);
        self
    }

    /// The guest was given this ACPI error source.
    pub fn error_source(mut self, source: ErrorSource) -> Self {
        self.source = Some(source);
        self
    }

    /// Which way AOs go where the guest has an error source; without one it is the machine check for all.
    pub fn ao_channel(mut self, channel: AoChannel) -> Self {
        self.ao_channel = channel;
        self
    }

    /// Whether errors are taken as soon as the kernel knows of them (AO), or only when a vCPU touches them.
    /// [`KillPolicy::Default`] is taken as early.
    pub fn policy(mut self, policy: KillPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// How fast the guest is told of AOs.
    pub fn pace(mut self, pace: Pace) -> Self {
        self.pace = pace;
        self
    }

    /// Huge pages of hugetlb of which a part goes bad are not lost as a whole: what the host can still read of them is
    /// put into ordinary memory at the same addresses, and the guest is told of the pages of 4 KiB that are gone. vCPUs
    /// that touch such a page meanwhile stand still and go on. It costs as much memory as the huge page has, in small
    /// pages, from then on; where it cannot be done all of it is lost, as without this
    /// ([`Event::NotRescued`]).
    ///
    /// The kernel reads what is left by its own mapping. A second failure within the same huge page that is not known
    /// yet is the end of the host then, where the guest's own touch would have been an AR.
    pub fn rescue(mut self, rescue: Rescue) -> Self {
        self.rescue = Some(rescue);
        self
    }

    /// Who has the process's SIGBUS handler.
    pub fn signals(mut self, signals: Signals) -> Self {
        self.signals = signals;
        self
    }

    /// What is known from before: [`Handle::ledger`](crate::Handle::ledger) of the relay of the last boot, after
    /// [`Ledger::heal`] for every page that has good memory again and [`Ledger::forget_predictions`].
    pub fn ledger(mut self, ledger: Ledger) -> Self {
        self.ledger = ledger;
        self
    }

    /// Called on the thread that does the relay's work once that is set up: to restrict its system calls
    /// ([`syscalls::RELAY`](crate::syscalls::RELAY)), say, or to place it on a processor. If it fails there is no relay.
    pub fn on_thread(mut self, set_up: impl FnOnce() -> io::Result<()> + Send + 'static) -> Self {
        self.on_thread = Box::new(set_up);
        self
    }

    /// Called with every event, in order, one at a time, and without a lock of the relay's: so it may use a
    /// [`Handle`](crate::Handle), which it should not keep beyond the VM's end, as that keeps the relay's memory. It runs on
    /// whichever thread has just done something: the relay's own, a vCPU's in
    /// [`VcpuPort::before_run`](crate::VcpuPort::before_run), one that changes something by a handle; not on one that only
    /// looks. That thread waits for it, and the events of others meanwhile wait in its queue; all have been told before
    /// a vCPU is kept out of the guest, the process is ended for an error that is not the guest's, and when the relay has been
    /// dropped. A lock that the observer takes must not be held around a call that may make an event. What takes long belongs
    /// on a thread of the host's.
    pub fn observer(mut self, observer: impl Fn(&Event) + Send + Sync + 'static) -> Self {
        self.observer = Box::new(observer);
        self
    }
}
