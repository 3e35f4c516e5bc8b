//! The relay of one virtual machine: its start, its vCPUs, its end.

use std::io;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::warn;

use super::config::Config;
use super::error::{AttachError, StartError};
use super::error_source::Source;
use super::handle::Handle;
use super::search::Search;
use super::thread::{EndOfThread, Own, relay_thread};
use super::vcpu_port::{TAKE_BACK_ATTEMPTS, VcpuPort};
use crate::core::forgery::Forgery;
use crate::core::inner::{Attached, Inner, RETRY_FIRST};
use crate::core::registry::relays;
use crate::core::shared::Shared;
use crate::decide::machine_check::Delivery;
use crate::ledger::Page;
use crate::memory::scan::Mapped;
use crate::signal::{self, ExitByte, KillPolicy, ThreadSlot, Wake};
use crate::types::PAGE_SIZE;

/// The relay of one virtual machine. Dropping it ends its thread.
pub struct Relay {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Installs the SIGBUS handler (unless `config` says that the host has one), unblocks SIGBUS and sets late kill on
    /// the calling thread, and starts the relay's own thread, with early kill unless `config` says late.
    ///
    /// Call it before other threads are started: they inherit the policy and the signal mask, and the kernel tells
    /// one thread only.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start(config: Config) -> Result<Self, StartError> {
        if config.vcpus == 0 {
            return Err(StartError::NoVcpu);
        }
        Self::without_vcpus(config)
    }

    /// The same, and there may be nobody to tell but the observer.
    pub(crate) fn without_vcpus(config: Config) -> Result<Self, StartError> {
        signal::set_up(config.signals).map_err(StartError::Handler)?;
        signal::unblock().map_err(StartError::Handler)?;
        KillPolicy::Late.set().map_err(StartError::Policy)?;
        let wake = Wake::new().map_err(StartError::Thread)?;
        let mut delivery = Delivery::new(config.caps, config.vcpus, config.pace);
        (0..config.vcpus).for_each(|vcpu| drop(delivery.absent(vcpu, Duration::ZERO)));
        let (mut source, mut source_page) = (None, None);
        if let Some(ghes) = config.ghes {
            let page = ghes.page;
            source_page = Some(page);
            let whole = page.is_multiple_of(PAGE_SIZE);
            let hva = config.ram.hva(page).filter(|_| whole);
            let hva = hva.ok_or(StartError::SourcePage { page })?;
            delivery.offer_source(config.ao_channel, ghes.patience);
            source = Some(Source::new(ghes, hva).map_err(StartError::SourceWrite)?);
        }
        if config.vcpus > 0 {
            // Bad pages of a guest that goes on elsewhere, of which it has not been told.
            config.ledger.untold().for_each(|page| delivery.push_ao(page.gpa));
        }
        let shared = Arc::new(Shared {
            inner: Mutex::new(Inner {
                delivery,
                ledger: config.ledger,
                vcpus: (0..config.vcpus).map(|_| None).collect(),
                gathering: None,
                gatherings: 0,
                retry: RETRY_FIRST,
                news: false,
                firmware_news: false,
                forgery: Forgery::default(),
                strays: Vec::new(),
                gone: Vec::new(),
                to_call: Vec::new(),
                kicks: Vec::new(),
            }),
            gathered: Condvar::new(),
            ram: RwLock::new(Arc::new(config.ram)),
            start: Instant::now(),
            observer: config.observer,
            stop: AtomicBool::new(false),
            wake,
            scans: AtomicU64::new(0),
            hinted: AtomicBool::new(false),
            pid: std::process::id(),
            source_page,
            alive: AtomicBool::new(true),
            mapped: Mapped::new(),
        });
        let (ready, started) = std::sync::mpsc::sync_channel(1);
        let for_thread = Arc::clone(&shared);
        let own = Own {
            policy: config.policy,
            source,
            // With late kill the user wants to hear of a page when it is touched, not before.
            search: if config.policy == KillPolicy::Late { None } else { Search::new() },
            set_up: config.on_thread,
        };
        let thread = std::thread::Builder::new()
            .name("mce-relay-ao".into())
            .spawn(move || {
                let _end = EndOfThread(&for_thread);
                relay_thread(&for_thread, own, &ready);
            })
            .map_err(StartError::Thread)?;
        let relay = Self { shared, thread: Some(thread) };
        started
            .recv()
            .map_err(|_| StartError::Thread(io::Error::other("it ended before it was ready")))??;
        relays().push(Arc::downgrade(&relay.shared));
        Ok(relay)
    }

    /// Attaches the calling thread as the one that runs `vcpu`, whose `kvm_run.immediate_exit` is `exit`, and
    /// unblocks SIGBUS on it, without which KVM_RUN would try a bad page again for ever.
    ///
    /// `kick` makes that vCPU leave KVM_RUN. It is called on the relay's thread, and on a vCPU's thread that is in
    /// [`VcpuPort::before_run`]; without a lock of the relay's, by one at a time, and not any more once the port has
    /// been dropped. So a lock that `kick` takes must not be held where [`VcpuPort::before_run`] is called or a port
    /// is dropped. A signal whose handler calls [`signal::request_exit`] does it without a race.
    ///
    /// A vCPU whose port is dropped is unplugged as far as the relay is concerned, after 200 ms, if others are
    /// attached: what it was to be told, and what lies untaken in its banks, is told on another one. One that is
    /// attached again is a new one as well: nobody knows what is left in its banks, so what lay there is told once more.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn attach(
        &self,
        vcpu: usize,
        exit: ExitByte,
        kick: Box<dyn Fn() + Send>,
    ) -> Result<VcpuPort, AttachError> {
        let mut inner = self.shared.lock();
        match inner.vcpus.get(vcpu) {
            None => return Err(AttachError::NoVcpu { vcpu, vcpus: inner.vcpus.len() }),
            Some(Some(_)) => return Err(AttachError::Attached { vcpu }),
            Some(None) => {}
        }
        let slot = ThreadSlot::attach(exit).map_err(|source| AttachError::Slot { vcpu, source })?;
        signal::unblock().map_err(|source| AttachError::Blocked { vcpu, source })?;
        // It was unplugged, and is plugged in again before that was seen to.
        self.shared.unplug(&mut inner, &[vcpu]);
        inner.gone.retain(|(gone, _)| *gone != vcpu);
        inner.delivery.attached(vcpu);
        // Errors may have arrived before the thread did.
        slot.shared().ask_attention();
        let kick = Arc::new(Mutex::new(Some(kick)));
        let attached = Attached {
            slot: slot.shared(),
            kick,
            parked: false,
            late: false,
            called: Instant::now(),
        };
        inner.vcpus[vcpu] = Some(attached);
        drop(inner);
        Ok(VcpuPort {
            vcpu,
            slot,
            shared: Arc::clone(&self.shared),
            nameless: 0,
            nameless_since: None,
            take_back_attempts: TAKE_BACK_ATTEMPTS,
            not_send: PhantomData,
        })
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
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the relay's thread had panicked");
        }
    }
}
