//! What a relay is made of.

use std::io;

use super::error_source::Ghes;
use crate::decide::firmware::AoChannel;
use crate::decide::pace::Pace;
use crate::event::Event;
use crate::ledger::Ledger;
use crate::memory::map::RamMap;
use crate::signal::{KillPolicy, Signals};
use crate::x86::mca::Caps;

/// What a relay is made of.
pub struct Config {
    /// Number of vCPUs, at least 1.
    pub vcpus: usize,
    /// What the guest was shown.
    pub caps: Caps,
    /// Guest RAM.
    pub ram: RamMap,
    /// Take errors as soon as the kernel knows of them (AO), or only when a vCPU touches them.
    /// [`KillPolicy::Default`] is taken as early.
    pub policy: KillPolicy,
    /// How fast the guest is told of AOs.
    pub pace: Pace,
    /// Which way AOs go; without `ghes` it is the machine check for all.
    pub ao_channel: AoChannel,
    /// The ACPI error source that the guest was given, if it was given one.
    pub ghes: Option<Ghes>,
    /// Who has the process's SIGBUS handler.
    pub signals: Signals,
    /// What is known from before: empty, or [`Handle::ledger`] of the relay of the last boot, after
    /// [`Ledger::heal`] for every page that has good memory again and [`Ledger::forget_predictions`].
    pub ledger: Ledger,
    /// Called on the relay's own thread once that is set up: to restrict its system calls
    /// ([`syscalls::RELAY`](crate::syscalls::RELAY)), say, or to place it on a processor. If it fails there is
    /// no relay.
    pub on_thread: Box<dyn FnOnce() -> io::Result<()> + Send>,
    /// Called with every event, in order, under the relay's lock: it must be quick, must not block
    /// and must not call the relay.
    pub observer: Box<dyn Fn(&Event) + Send + Sync>,
}

impl Config {
    /// For a guest with `vcpus` processors that was shown `caps` and has `ram`, with defaults for the rest:
    /// early kill, the default pace, AOs by machine check, a handler of the relay's own, an empty ledger,
    /// nothing to do on the relay's thread. `observer` is called with every event: see [`Self::observer`].
    #[must_use]
    pub fn new(
        vcpus: usize,
        caps: Caps,
        ram: RamMap,
        observer: impl Fn(&Event) + Send + Sync + 'static,
    ) -> Self {
        Self {
            vcpus,
            caps,
            ram,
            policy: KillPolicy::Early,
            pace: Pace::default(),
            ao_channel: AoChannel::default(),
            ghes: None,
            signals: Signals::default(),
            ledger: Ledger::default(),
            on_thread: Box::new(|| Ok(())),
            observer: Box::new(observer),
        }
    }
}
