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

/// What a relay is made of, by [`Relay::builder`](crate::Relay::builder). The defaults: no vCPU, no machine checks, no
/// error source, early kill, the default pace, the relay's own SIGBUS handler, an empty ledger, no observer.
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

    /// The largest number of vCPUs there will be, numbered from 0; the thread of each [attaches](crate::Handle::attach)
    /// it. With 0, pages enter the ledger and only the observer is told.
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

    /// Which way AOs are told where the guest has an error source; without one, always by machine check.
    pub fn ao_channel(mut self, channel: AoChannel) -> Self {
        self.ao_channel = channel;
        self
    }

    /// Whether errors are taken as soon as the kernel knows of them (early: AO), or only when a vCPU touches the page
    /// (late: AR). [`KillPolicy::Default`] means early here.
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

    /// The pages that are known from before: [`Handle::ledger`](crate::Handle::ledger) of the relay of the last boot,
    /// after [`Ledger::heal`] for every page that has good memory again and [`Ledger::forget_predictions`].
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

    /// Called with every event, in order, one call at a time, and without any lock of the relay's: it may use a
    /// [`Handle`](crate::Handle). It should not keep one beyond the VM's end, as a handle keeps the relay's memory.
    ///
    /// It runs on the thread that caused the event: the relay's own, a vCPU's in
    /// [`VcpuPort::before_run`](crate::VcpuPort::before_run), or one that changes something by a handle; never on a
    /// thread that only reads. While it runs, that thread waits, and events of other threads are queued for it. All
    /// events have been delivered before `before_run` keeps a vCPU out of the guest, before the process is ended for an
    /// error that is not the guest's, and when the relay has been dropped. The caller must not hold a lock that the
    /// observer takes around a call that may cause an event. Work that takes long belongs on a thread of the host's.
    pub fn observer(mut self, observer: impl Fn(&Event) + Send + Sync + 'static) -> Self {
        self.observer = Box::new(observer);
        self
    }
}
