//! The relay of one virtual machine: takes signals, keeps the ledger, and brings every error to
//! the vCPU that has to be told, on that vCPU's own thread.
//!
//! Two parties meet under one lock. The relay's thread takes AOs and wakes whoever has to act. A
//! vCPU thread comes round before each KVM_RUN ([`VcpuPort::before_run`]); while nothing is wrong
//! that costs one relaxed load.

use std::io;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use log::warn;

use crate::delivery::{Cannot, Delivery, Pending, Taken, Wait, index};
use crate::event::{Event, Thread};
use crate::failure::{Kind, PAGE_SHIFT, PAGE_SIZE};
use crate::firmware::AoChannel;
use crate::forge::Forgery;
use crate::ghes::{Ghes, Source};
use crate::handle::Handle;
use crate::ledger::{FoundBy, Ledger, Page, Place, State};
use crate::locked::{Collects, Kick, Locked, call_host};
use crate::mca::Caps;
use crate::pace::Pace;
use crate::port::{Round, TAKE_BACK_ATTEMPTS, VcpuPort};
use crate::ram::RamMap;
use crate::scan::{Mapped, can_be_mapped};
use crate::search::Search;
use crate::signal::{self, Caught, ExitByte, KillPolicy, Signals, Slot, ThreadSlot, Wake};

/// First pause before a vCPU that could not be told is looked at again.
pub(crate) const RETRY_FIRST: Duration = Duration::from_millis(5);
/// Longest such pause. A guest may take minutes (an AMD guest polls its banks every five).
const RETRY_LAST: Duration = Duration::from_millis(500);
/// How often the relay's thread looks for AOs that reached a thread outside the relay.
pub(crate) const IDLE_TICK: Duration = Duration::from_secs(1);

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

pub(crate) struct Attached {
    slot: Arc<Slot>,
    pub(crate) kick: Kick,
    /// Held by a pause of the virtual machine.
    pub(crate) parked: bool,
    /// It did not come round for the last gathering, and has not since.
    pub(crate) late: bool,
    /// When it was last called for being late.
    pub(crate) called: Instant,
}

/// How long a vCPU's port has been gone before it counts as unplugged. All of them go at the end of the virtual
/// machine, one after the other, and then there is nobody to be told.
const UNPLUGGED: Duration = Duration::from_millis(200);

pub(crate) struct Inner {
    pub(crate) delivery: Delivery,
    pub(crate) ledger: Ledger,
    pub(crate) vcpus: Vec<Option<Attached>>,
    pub(crate) round: Option<Round>,
    /// Rounds called so far.
    pub(crate) rounds: u64,
    /// The pause before whoever something waits for is called again.
    pub(crate) retry: Duration,
    /// Something new waits: call at once.
    pub(crate) news: bool,
    /// Something new waits on the firmware-first channel.
    pub(crate) firmware_news: bool,
    /// Failures that are not real.
    pub(crate) forgery: Forgery,
    /// AOs that are not of this relay's memory.
    strays: Vec<Caught>,
    /// vCPUs whose ports have gone, and when that counts.
    pub(crate) gone: Vec<(usize, Instant)>,
    /// vCPUs that the relay's thread is to call.
    pub(crate) to_call: Vec<usize>,
    /// vCPUs that are to leave the guest, when the lock is given back.
    pub(crate) kicks: Vec<Kick>,
}

impl Collects for Inner {
    fn kicks(&mut self) -> &mut Vec<Kick> {
        &mut self.kicks
    }
}

impl Inner {
    /// An AO for the page at `gpa`, which nobody has heard of.
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

    /// Asks for `vcpu`'s attention, the next time that it comes round.
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

pub(crate) struct Shared {
    inner: Mutex<Inner>,
    /// Woken at every step of a [`Round`].
    pub(crate) gathered: Condvar,
    /// Looked up by threads, never by the handler.
    pub(crate) ram: RwLock<Arc<RamMap>>,
    /// What [`Delivery`] counts its times from.
    start: Instant,
    observer: Box<dyn Fn(&Event) + Send + Sync>,
    stop: AtomicBool,
    wake: Wake,
    /// How often guest RAM was looked through.
    pub(crate) scans: AtomicU64,
    /// There may be a failure here that nobody was signalled: another relay has heard of one, or memory has come
    /// that may have been bad before.
    hinted: AtomicBool,
    /// The process that made it.
    pid: u32,
    /// Guest-physical address of the error source's page.
    pub(crate) source_page: Option<u64>,
    /// The relay's thread runs.
    alive: AtomicBool,
    pub(crate) mapped: Mapped,
}

/// The relays of this process.
static RELAYS: Mutex<Vec<Weak<Shared>>> = Mutex::new(Vec::new());

fn relays() -> MutexGuard<'static, Vec<Weak<Shared>>> {
    // Whole entries are put in and taken out.
    RELAYS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The relays of this process but `own`.
fn others(own: &Shared) -> Vec<Arc<Shared>> {
    let all = relays().iter().filter_map(Weak::upgrade).collect::<Vec<_>>();
    all.into_iter().filter(|other| !std::ptr::eq(&raw const **other, own)).collect()
}

/// What it means that something became of a page.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Change {
    /// It was not so before.
    pub(crate) news: bool,
    /// The page is whole.
    pub(crate) forged: bool,
    /// How long after the page became known, where it is the first time.
    pub(crate) after_micros: Option<u64>,
}

impl Shared {
    pub(crate) fn lock(&self) -> Locked<'_, Inner> {
        Locked::new(&self.inner)
    }

    /// Whether this is a child of the process that made the relay. Its threads are not there, and its locks may be
    /// held by one of them.
    pub(crate) fn is_of_parent(&self) -> bool {
        std::process::id() != self.pid
    }

    /// Guest RAM as it is now.
    pub(crate) fn ram(&self) -> Arc<RamMap> {
        // Only whole maps are put in, so there is no half-changed one.
        Arc::clone(&self.ram.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Wakes the relay's thread.
    pub(crate) fn wake(&self) {
        self.wake.wake();
    }

    /// Has the relay's thread look through guest RAM.
    pub(crate) fn hint(&self) {
        self.hinted.store(true, Ordering::Relaxed);
        self.wake();
    }

    /// Whether the relay's thread is there.
    pub(crate) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire)
    }

    /// The time since the relay was started, as [`Delivery`] wants it.
    pub(crate) fn now(&self) -> Duration {
        self.start.elapsed()
    }

    pub(crate) fn emit(&self, event: &Event) {
        call_host("observer", || (self.observer)(event));
    }

    /// One signal: translation, ledger, and the queue of the vCPU concerned. False when the address
    /// is not guest RAM.
    pub(crate) fn enter(&self, inner: &mut Inner, caught: Caught, thread: Thread) -> bool {
        let Caught { kind, hva, lsb } = caught;
        let forged = inner.forgery.knows(caught);
        self.emit(&Event::Caught { kind, hva, lsb, thread, forged });
        let (vcpu, kind) = match thread {
            Thread::Vcpu(vcpu) => (Some(vcpu), kind),
            Thread::Relay | Thread::Other => (None, kind),
            Thread::Caller => (None, Kind::ActionOptional),
        };
        let found_by = if forged { FoundBy::Forged } else { FoundBy::Signal };
        let known = self.enter_pages(inner, Caught { kind, hva, lsb }, found_by, vcpu);
        if !known && kind == Kind::ActionOptional {
            // The kernel tells one thread of a process; with two VMs in it that may be the other's.
            inner.strays.push(caught);
        } else if !known {
            self.emit(&Event::Outside { kind, hva, lsb });
        }
        inner.retry = RETRY_FIRST;
        if (inner.news || !known) && thread != Thread::Relay {
            self.wake();
        }
        known
    }

    /// Gives AOs that are not of this relay's memory to those of this process whose they are. Without the
    /// lock, as they may have something for this one.
    fn hand_over(&self, strays: &[Caught]) {
        let others = others(self);
        for &caught in strays {
            let Caught { kind, hva, lsb } = caught;
            let theirs: Vec<_> =
                others.iter().filter(|other| other.ram().gpas(hva).len() > 0).collect();
            for other in &theirs {
                other.enter(&mut other.lock(), caught, Thread::Other);
            }
            if theirs.is_empty() {
                self.emit(&Event::Outside { kind, hva, lsb });
            }
        }
    }

    /// All pages that are lost with the one at `caught.hva`, of which `vcpu` has touched that one if
    /// it is an AR. False when the address is not guest RAM.
    pub(crate) fn enter_pages(
        &self,
        inner: &mut Inner,
        caught: Caught,
        found_by: FoundBy,
        vcpu: Option<usize>,
    ) -> bool {
        let Caught { kind, hva, lsb } = caught;
        let ram = self.ram();
        let (pages, lsb) = self.lost(&ram, hva, lsb, found_by);
        let now = SystemTime::now();
        // The guest has the page that was touched at each of these addresses, and touched one of them.
        let touched = vcpu.filter(|_| kind == Kind::ActionRequired).and_then(|_| {
            let gpas: Vec<u64> = ram.gpas(hva & !(PAGE_SIZE - 1)).collect();
            inner.delivery.next_alias(&gpas)
        });
        // One event for an extent: a page of 1 GiB has 262,144 pages.
        let (mut news, mut first) = (0, None);
        for &(page_hva, gpa) in &pages {
            // Of a larger extent only the page that was named stops anybody.
            let named = page_hva <= hva && hva - page_hva < PAGE_SIZE;
            let alias = touched.is_some_and(|touched| named && gpa != touched);
            let kind = if named && !alias { kind } else { Kind::ActionOptional };
            let before = inner.ledger.state_of(gpa);
            let known = before.is_some();
            if known && (!named || alias) {
                continue;
            }
            let new = inner.ledger.enter(gpa, page_hva, lsb, kind, found_by, now);
            if new {
                news += 1;
                if named || first.is_none() {
                    first = Some((gpa, page_hva, kind));
                }
            } else {
                let forged = found_by == FoundBy::Forged;
                self.emit(&Event::Again { gpa, kind, forged });
            }
            match (kind, vcpu) {
                // A vCPU that touches a page cannot go on, however often it was told.
                (Kind::ActionRequired, Some(vcpu)) => {
                    let untold = before.is_none_or(|state| state.is_untold());
                    inner.delivery.push_ar(vcpu, gpa, untold, self.now());
                }
                _ if new => inner.push_ao(gpa),
                _ => {}
            }
        }
        if let Some((gpa, hva, kind)) = first {
            let (extent, pages) = (1 << lsb, news);
            self.emit(&Event::Seen { gpa, hva, kind, found_by, extent, pages });
        }
        !pages.is_empty()
    }

    /// The (HVA, GPA) of the pages that are lost when `hva` is and a signal says `lsb`, and `log2` of the extent. Of a
    /// huge page whose other pages are still mapped, or can be mapped again, only the one that was named is: the
    /// kernel could not split it, or keeps it. (Trying to split a file's page takes it out of the page tables.)
    fn lost(&self, ram: &RamMap, hva: u64, lsb: u8, found_by: FoundBy) -> (Vec<(u64, u64)>, u8) {
        let (mut pages, lsb) = (ram.pages(hva, lsb), ram.extent(hva, lsb));
        // A forged failure pretends that the kernel has unmapped it all.
        if lsb == PAGE_SHIFT || found_by == FoundBy::Forged {
            return (pages, lsb);
        }
        let named = hva & !(PAGE_SIZE - 1);
        let before = pages.len();
        let mut present = self.mapped.are_present(pages.iter().map(|(page, _)| *page)).into_iter();
        // Of hugetlbfs the page tables have all or nothing, and asking of each of 262,144 pages would take long.
        let goes_whole = |page| ram.page_shift(page) > PAGE_SHIFT;
        pages.retain(|&(page, _)| {
            let is_whole =
                present.next().unwrap_or(false) || (!goes_whole(page) && can_be_mapped(page));
            !is_whole || page == named
        });
        let alone = pages.len() < before && pages.iter().all(|(page, _)| *page == named);
        (pages, if alone { PAGE_SHIFT } else { lsb })
    }

    pub(crate) fn set(&self, inner: &mut Inner, gpa: u64, state: State) -> Change {
        let now = SystemTime::now();
        let Some((before, news)) = inner.ledger.change(gpa, state, now) else {
            return Change::default();
        };
        let times = &before.times;
        let is_first = news
            && match state {
                State::Injected { .. } => times.injected.is_none(),
                State::Acknowledged { .. } => times.acknowledged.is_none(),
                _ => false,
            };
        // The clock may have been set back.
        let since = now.duration_since(times.seen).unwrap_or(Duration::ZERO);
        let micros = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
        Change { news, forged: before.is_forged(), after_micros: is_first.then_some(micros) }
    }

    pub(crate) fn waiting(&self, inner: &mut Inner, error: Pending, wait: Wait) {
        let Pending { gpa, kind } = error;
        // What a touch waits for does not change that the guest knows of the page.
        if kind == Kind::ActionRequired
            && inner.ledger.state_of(gpa).is_some_and(|state| !state.is_untold())
        {
            return;
        }
        let Change { news, forged, .. } = self.set(inner, gpa, State::Waiting { wait });
        if news {
            self.emit(&Event::Waiting { gpa, kind, wait, forged });
            // It may be asleep, and it is the one who has the vCPU look again.
            self.wake();
        }
    }

    /// What has become of records that lay in `vcpu`'s banks.
    pub(crate) fn taken(&self, inner: &mut Inner, vcpu: usize, taken: &[Taken]) {
        for taken in taken {
            inner.retry = RETRY_FIRST;
            match *taken {
                Taken::Acknowledged { gpa, bank, form } => {
                    self.acknowledged(inner, gpa, Place::Mce { vcpu: index(vcpu), bank, form });
                }
                Taken::Lost { gpa } => {
                    let error = Pending { gpa, kind: Kind::ActionOptional };
                    self.waiting(inner, error, Wait::Restarted { vcpu: index(vcpu) });
                }
            }
        }
    }

    /// vCPUs whose ports have been gone for some time are unplugged, as long as there are others.
    pub(crate) fn see_to_the_unplugged(&self, inner: &mut Inner) {
        let now = Instant::now();
        let due: Vec<usize> =
            inner.gone.iter().filter(|(_, at)| *at <= now).map(|(vcpu, _)| *vcpu).collect();
        if !due.is_empty() && inner.vcpus.iter().any(Option::is_some) {
            inner.gone.retain(|(vcpu, _)| !due.contains(vcpu));
            self.unplug(inner, &due);
        }
    }

    /// The ports of `vcpus` have gone: what they were to be told, or had in their banks, is told elsewhere.
    fn unplug(&self, inner: &mut Inner, vcpus: &[usize]) {
        for &vcpu in vcpus {
            let again = inner.delivery.absent(vcpu, self.now());
            self.told_elsewhere(inner, &again, Wait::Unplugged { vcpu: index(vcpu) });
        }
    }

    /// The records of these pages were not read by anybody, for the reason in `wait`, and wait to be told again.
    pub(crate) fn told_elsewhere(&self, inner: &mut Inner, gpas: &[u64], wait: Wait) {
        for &gpa in gpas {
            self.waiting(inner, Pending { gpa, kind: Kind::ActionOptional }, wait);
        }
        inner.news = true;
        inner.retry = RETRY_FIRST;
        self.wake();
    }

    pub(crate) fn acknowledged(&self, inner: &mut Inner, gpa: u64, place: Place) {
        let Change { news, forged, after_micros } =
            self.set(inner, gpa, State::Acknowledged { place });
        if news {
            self.emit(&Event::Acknowledged { gpa, place, after_micros, forged });
        }
    }

    pub(crate) fn undeliverable(
        &self,
        inner: &mut Inner,
        vcpu: usize,
        error: Pending,
        why: Cannot,
        rip: Option<u64>,
    ) {
        inner.delivery.forget(vcpu, &error);
        let Pending { gpa, kind } = error;
        if kind == Kind::ActionRequired {
            inner.goes_on(vcpu);
            self.wake();
        }
        let Change { forged, .. } = self.set(inner, gpa, State::Undeliverable { why });
        self.emit(&Event::Undeliverable { gpa, kind, vcpu, why, rip, forged });
    }
}

/// The relay of one virtual machine. Dropping it ends its thread.
pub struct Relay {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Why a relay could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// There is nobody to tell.
    #[error("a relay needs at least one vCPU")]
    NoVcpu,
    /// The SIGBUS handler could not be installed.
    #[error("cannot install the SIGBUS handler")]
    Handler(#[source] io::Error),
    /// The memory-failure policy could not be set.
    #[error("cannot set the memory-failure policy (prctl PR_MCE_KILL)")]
    Policy(#[source] io::Error),
    /// The relay's thread could not be set up.
    #[error("cannot start the relay's thread")]
    Thread(#[source] io::Error),
    /// The error source's page is not a page of guest RAM.
    #[error("the error source's page, GPA {page:#x}, is not a 4 KiB page of guest RAM")]
    SourcePage {
        /// Guest-physical address as it was given.
        page: u64,
    },
    /// The error source's page could not be written.
    #[error("cannot write the error source's page")]
    SourceWrite(#[source] io::Error),
}

/// Why a thread could not be attached as a vCPU's.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The relay was made for fewer.
    #[error("there is no vCPU {vcpu}: the relay was started for {vcpus}")]
    NoVcpu {
        /// The vCPU.
        vcpu: usize,
        /// How many there are.
        vcpus: usize,
    },
    /// Another thread runs it.
    #[error("vCPU {vcpu} is attached already; drop its port first")]
    Attached {
        /// The vCPU.
        vcpu: usize,
    },
    /// SIGBUS is blocked on this thread, and cannot be unblocked.
    #[error(
        "SIGBUS is blocked on the thread of vCPU {vcpu}: KVM_RUN would try a bad page again for ever"
    )]
    Blocked {
        /// The vCPU.
        vcpu: usize,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The thread could not be given a place for its signals.
    #[error("the thread of vCPU {vcpu} cannot take memory failures")]
    Slot {
        /// The vCPU.
        vcpu: usize,
        /// The cause.
        #[source]
        source: io::Error,
    },
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
                round: None,
                rounds: 0,
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

/// What the relay's thread has for itself; it is made before, so that the thread opens nothing.
struct Own {
    policy: KillPolicy,
    source: Option<Source>,
    search: Option<Search>,
    /// [`Config::on_thread`].
    set_up: Box<dyn FnOnce() -> io::Result<()> + Send>,
}

/// The relay's thread: takes AOs, and sees to it that whatever waits is looked at again.
fn relay_thread(
    shared: &Shared,
    own: Own,
    ready: &std::sync::mpsc::SyncSender<Result<(), StartError>>,
) {
    let Own { policy, mut source, mut search, set_up } = own;
    let policy = if policy == KillPolicy::Late { policy } else { KillPolicy::Early };
    let set_up = || {
        let slot = ThreadSlot::attach(ExitByte::NONE).map_err(StartError::Thread)?;
        policy.set().map_err(StartError::Policy)?;
        set_up().map_err(StartError::Thread)?;
        Ok(slot)
    };
    let slot = match set_up() {
        Ok(slot) => slot,
        Err(error) => {
            // The starter waits for exactly this message; if it is gone there is nobody to tell.
            let _ = ready.send(Err(error));
            return;
        }
    };
    let _ = ready.send(Ok(()));
    let mut call_at = None;
    while !shared.stop.load(Ordering::Acquire) {
        let hint = take_signals(shared, &slot) | shared.hinted.swap(false, Ordering::Relaxed);
        let mut tell = || {
            shared.see_to_the_unplugged(&mut shared.lock());
            // Before the vCPUs are called: what does not go this way is theirs.
            let firmware = source.as_mut().map_or(IDLE_TICK, |source| source.look(shared));
            call_those_who_wait(shared, &mut call_at).min(firmware)
        };
        let mut pause = tell();
        // After what is known has been told, as a look through much memory takes its time.
        if let Some(search) = search.as_mut() {
            if hint {
                search.hint();
            }
            if search.look(shared) {
                pause = tell();
            }
            pause = pause.min(search.pause());
        }
        shared.wake.sleep(&slot, pause);
    }
}

/// What the relay's thread leaves behind, however it ends.
struct EndOfThread<'a>(&'a Shared);

impl Drop for EndOfThread<'_> {
    fn drop(&mut self) {
        self.0.alive.store(false, Ordering::Release);
        if std::thread::panicking() {
            log::error!("the relay's thread panicked: memory errors are no longer relayed");
        }
    }
}

/// Enters what the handler has stored for this thread and for threads outside the relay, and sees to it that
/// other relays get what is theirs. True when there was anything: there may be pages whose signals were
/// swallowed.
fn take_signals(shared: &Shared, slot: &ThreadSlot) -> bool {
    let mut any = false;
    let mut inner = shared.lock();
    slot.clear_attention();
    any |= !slot.is_empty();
    shared.take(&mut inner, slot, Thread::Relay);
    while let Some(caught) = signal::take_orphan() {
        any = true;
        shared.enter(&mut inner, caught, Thread::Other);
    }
    let signals = slot.take_overrun().saturating_add(signal::take_orphan_overrun());
    if signals > 0 {
        any = true;
        shared.emit(&Event::Overrun { signals });
    }
    let strays = std::mem::take(&mut inner.strays);
    drop(inner);
    if any || !strays.is_empty() {
        shared.hand_over(&strays);
        others(shared).iter().for_each(|other| other.hint());
    }
    any
}

/// Has every vCPU that something waits for come round, at once for what is new and else when its time
/// (`call_at`) has come; how long it may be until the next time.
fn call_those_who_wait(shared: &Shared, call_at: &mut Option<Instant>) -> Duration {
    let mut inner = shared.lock();
    for vcpu in std::mem::take(&mut inner.to_call) {
        inner.call(vcpu);
    }
    let news = std::mem::take(&mut inner.news);
    if inner.delivery.is_idle() {
        *call_at = None;
        return IDLE_TICK;
    }
    let (clock, now) = (Instant::now(), shared.now());
    if news || call_at.is_some_and(|at| at <= clock) {
        for vcpu in inner.delivery.waiting_vcpus(now) {
            inner.call(vcpu);
        }
        if !news {
            inner.retry = (inner.retry * 2).min(RETRY_LAST);
        }
        *call_at = None;
    }
    // Sooner than planned when something has happened since, or when the pace lets one more go.
    let room = inner.delivery.room_at().filter(|at| *at > now).map(|at| at - now);
    let next = room.map_or(inner.retry, |room| room.clamp(RETRY_FIRST, inner.retry));
    let at = call_at.map_or(clock + next, |at| at.min(clock + next));
    *call_at = Some(at);
    at - clock
}
