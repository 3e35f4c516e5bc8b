//! The relay of one virtual machine: its start, its vCPUs, its end.

use std::collections::HashSet;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::warn;

use super::builder::RelayBuilder;
use super::error::{AttachError, StartError};
use super::error_source::Source;
use super::handle::Handle;
use super::polled::Polled;
use super::search::Search;
use super::thread::{EndOfThread, Own, Work, relay_thread};
use super::vcpu_port::VcpuPort;
use crate::core::changed::Changed;
use crate::core::forgery::Forgery;
use crate::core::inner::{Inner, RETRY_FIRST};
use crate::core::outbox::Outbox;
use crate::core::registry::{relays, wake_all};
use crate::core::rescue::Rescues;
use crate::core::shared::Shared;
use crate::decide::machine_check::Delivery;
use crate::guard;
use crate::ledger::Page;
use crate::memory::map::RamMap;
use crate::memory::scan::Mapped;
use crate::memory::stand_in::Sharing;
use crate::signal::{self, ExitByte, KillPolicy, Poll, Wake};
use crate::types::PAGE_SIZE;

/// The relay of one virtual machine. Dropping it ends its thread, or what its [`Polled`] does.
pub struct Relay {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// What a relay of `ram` is made of.
    pub fn builder(ram: RamMap) -> RelayBuilder {
        RelayBuilder::new(ram)
    }

    /// What both ways to start have in common: the relay without anybody who does its work, and what that is done
    /// with.
    fn prepare(config: RelayBuilder) -> Result<(Self, Own), StartError> {
        signal::set_up(config.signals).map_err(StartError::Handler)?;
        // A thread that does another relay's work, or runs a vCPU, stays as it is.
        if !signal::is_attached() {
            signal::unblock().map_err(StartError::Handler)?;
            KillPolicy::Late.set().map_err(StartError::Policy)?;
        }
        let wake = Wake::new().map_err(StartError::Thread)?;
        let mut delivery = Delivery::new(config.caps, config.vcpus, config.pace);
        (0..config.vcpus).for_each(|vcpu| drop(delivery.absent(vcpu, Duration::ZERO)));
        let (mut source, mut source_page) = (None, None);
        if let Some(of) = config.source {
            let page = of.page();
            source_page = Some(page);
            let whole = page.is_multiple_of(PAGE_SIZE);
            let hva = config.ram.hva(page).filter(|_| whole);
            let hva = hva.ok_or(StartError::SourcePage { page })?;
            delivery.offer_source(config.ao_channel, of.how_patient());
            source = Some(Source::new(of, hva).map_err(StartError::SourceWrite)?);
        }
        if config.vcpus > 0 {
            // Pages that the guest has not been told of, as of a guest that is restored or continues after migration.
            config.ledger.untold().for_each(|page| delivery.push_ao(page.gpa));
        }
        let sharing = match config.ram.hvas().any(|hvas| guard::has_view(&hvas)) {
            true => Sharing::Views,
            false => Sharing::Private,
        };
        let rescuer = config.rescue.map(|rescue| rescue.prepare(sharing)).transpose()?;
        let shared = Arc::new(Shared {
            inner: Mutex::new(Inner {
                delivery,
                ledger: config.ledger,
                vcpus: (0..config.vcpus).map(|_| None).collect(),
                gathering: None,
                gatherings: 0,
                retry: RETRY_FIRST,
                looks_by: None,
                news: false,
                firmware_news: false,
                rescues: Rescues::new(rescuer.is_some()),
                forgery: Forgery::default(),
                strays: Vec::new(),
                gone: Vec::new(),
                to_call: Vec::new(),
                kicks: Vec::new(),
                events: Vec::new(),
                wakes: false,
                proven: HashSet::new(),
            }),
            gathered: Changed::default(),
            ram: RwLock::new(Arc::new(config.ram)),
            start: Instant::now(),
            outbox: Outbox::new(config.observer),
            stop: AtomicBool::new(false),
            wake,
            scans: AtomicU64::new(0),
            hinted: AtomicBool::new(false),
            finished: Mutex::default(),
            pid: std::process::id(),
            source_page,
            alive: AtomicBool::new(true),
            mapped: Mapped::new(),
            older: Mutex::default(),
            areas: Mutex::default(),
            worker: OnceLock::new(),
        });
        guard::set_wake(wake_all);
        shared.enter_areas(&shared.lock(), shared.ram().hvas());
        let own = Own {
            policy: config.policy,
            source,
            // With late kill the user wants to hear of a page when it is touched, not before.
            search: if config.policy == KillPolicy::Late { None } else { Search::new() },
            rescuer,
            set_up: config.on_thread,
        };
        Ok((Self { shared, thread: None }, own))
    }

    /// See [`RelayBuilder::start`].
    fn start(config: RelayBuilder) -> Result<Self, StartError> {
        let (mut relay, own) = Self::prepare(config)?;
        let (ready, started) = std::sync::mpsc::sync_channel(1);
        let shared = Arc::clone(&relay.shared);
        let thread = std::thread::Builder::new()
            .name("mce-relay-ao".into())
            .spawn(move || {
                let _end = EndOfThread(&shared);
                relay_thread(&shared, own, &ready);
            })
            .map_err(StartError::Thread)?;
        relay.thread = Some(thread);
        started
            .recv()
            .map_err(|_| StartError::Thread(io::Error::other("it ended before it was ready")))??;
        relays().push(Arc::downgrade(&relay.shared));
        Ok(relay)
    }

    /// See [`RelayBuilder::start_polled`].
    fn start_polled(config: RelayBuilder) -> Result<(Self, Polled), StartError> {
        let was_blocked = signal::is_blocked();
        let (relay, own) = Self::prepare(config)?;
        let poll = Poll::new(&relay.shared.wake, was_blocked).map_err(StartError::Thread)?;
        let work = Work::set_up(own).inspect_err(|_| {
            // As it is for all threads that do not do the relay's work; of the two errors the first is the cause.
            let _ = KillPolicy::Late.set();
        })?;
        let polled = Polled::new(Arc::clone(&relay.shared), work, poll);
        relays().push(Arc::downgrade(&relay.shared));
        Ok((relay, polled))
    }

    /// See [`Handle::attach`].
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn attach(
        &self,
        vcpu: usize,
        exit: ExitByte,
        kick: impl Fn() + Send + 'static,
    ) -> Result<VcpuPort, AttachError> {
        self.handle().attach(vcpu, exit, kick)
    }

    /// The pages of the ledger, by guest-physical address.
    pub fn pages(&self) -> Vec<Page> {
        self.shared.lock().ledger.pages().collect()
    }

    /// A handle for other threads.
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.shared))
    }
}

impl RelayBuilder {
    /// Starts the relay.
    ///
    /// Installs the SIGBUS handler (unless the host has one), unblocks SIGBUS and sets late kill on the calling thread,
    /// and starts the relay's own thread, with early kill unless the policy is late.
    ///
    /// Of a process's threads that ask for early kill the kernel signals an AO to one. A new thread inherits from the one
    /// that starts it; threads that are there already keep what they have, which is late kill unless the process asked
    /// for something else (PR_MCE_KILL) or the host's vm.memory_failure_early_kill is set. An AO that such an older
    /// thread takes is not lost: the relay's thread finds it within a second instead of at once. One that has blocked
    /// SIGBUS and runs a vCPU is unblocked when it is attached.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start(self) -> Result<Relay, StartError> {
        Relay::start(self)
    }

    /// Starts the relay without a thread of its own: the calling thread does its work, by [`Polled::process`] whenever
    /// [`Polled`]'s descriptor is readable.
    ///
    /// The calling thread is given early kill (unless the policy is late), which the threads that it starts from here on
    /// inherit, and SIGBUS is blocked on it outside [`Polled::process`], which they inherit, too: a vCPU's thread is
    /// unblocked when it is attached. An AO that such a thread takes is found within a second. So start what can be
    /// started before. [`Self::on_thread`] is called on this thread.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start_polled(self) -> Result<(Relay, Polled), StartError> {
        Relay::start_polled(self)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if self.shared.is_of_parent() {
            // After a fork: the thread is not there to be waited for.
            std::mem::forget(self.thread.take());
            return;
        }
        let own = Arc::as_ptr(&self.shared);
        relays().retain(|one| one.strong_count() > 0 && !std::ptr::eq(one.as_ptr(), own));
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake();
        // The observer may be the last to have it, on that very thread.
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            warn!("the relay's thread had panicked");
        }
        // A handle may stay, and the memory go.
        self.shared.forget_areas();
        // All events are delivered before the return: the caller may destroy what the observer uses.
        self.shared.outbox.flush();
    }
}
