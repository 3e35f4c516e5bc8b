//! The relay's own thread: takes AOs, and calls again the vCPUs for which something waits.

use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::error::StartError;
use super::error_source::Source;
use super::rescue::Rescuer;
use super::search::Search;
use crate::core::inner::RETRY_FIRST;
use crate::core::registry::others;
use crate::core::shared::{IDLE_TICK, Shared};
use crate::event::{Event, SignalledThread};
use crate::guard;
use crate::memory::scan::is_poisoned;
use crate::signal::{self, ExitByte, KillPolicy, ThreadSlot};
use crate::types::{Caught, FailureKind, PAGE_SHIFT, PAGE_SIZE};

/// Longest pause before a vCPU that could not be told is called again. A guest may take minutes (an AMD guest polls its
/// banks every five).
const RETRY_LAST: Duration = Duration::from_millis(500);

/// What the relay's work is done with; made before, so that a thread of the relay's own opens nothing.
pub(crate) struct Own {
    pub(crate) policy: KillPolicy,
    pub(crate) source: Option<Source>,
    pub(crate) search: Option<Search>,
    pub(crate) rescuer: Option<Rescuer>,
    /// [`RelayBuilder::on_thread`](crate::RelayBuilder::on_thread).
    pub(crate) set_up: Box<dyn FnOnce() -> io::Result<()> + Send>,
}

/// The relay's work, on the thread that it was set up on.
pub(crate) struct Work {
    pub(crate) slot: ThreadSlot,
    source: Option<Source>,
    search: Option<Search>,
    rescuer: Option<Rescuer>,
    call_at: Option<Instant>,
}

impl Work {
    /// Has the calling thread signalled of AOs.
    ///
    /// # Errors
    /// See [`StartError`].
    pub(crate) fn set_up(own: Own) -> Result<Self, StartError> {
        let slot = ThreadSlot::attach(ExitByte::NONE).map_err(StartError::Thread)?;
        let late = own.policy == KillPolicy::Late;
        let policy = if late { own.policy } else { KillPolicy::Early };
        policy.set().map_err(StartError::Policy)?;
        let Own { source, search, rescuer, set_up, .. } = own;
        set_up().map_err(StartError::Thread)?;
        Ok(Self { slot, source, search, rescuer, call_at: None })
    }

    /// Takes what was signalled, tells those who have to know, and looks for what nobody was signalled; how long it may
    /// be until the next time.
    pub(crate) fn turn(&mut self, shared: &Shared) -> Duration {
        let hint = take_signals(shared, &self.slot) | shared.hinted.swap(false, Ordering::Relaxed);
        let mut next = self.tell(shared);
        // After what is known has been told, as a look through much memory takes its time.
        if let Some(search) = self.search.as_mut() {
            if hint {
                search.hint();
            }
            let found = search.look(shared);
            let search = Instant::now() + search.pause();
            if found {
                next = self.tell(shared);
            }
            next = next.min(search);
        }
        // Not a moment later than was promised (`looks_by`), however long the observer and the look took.
        next.saturating_duration_since(Instant::now())
    }

    /// By when it has to be called again.
    fn tell(&mut self, shared: &Shared) -> Instant {
        // First what stops vCPUs until it is done, and says which pages there are to be told of.
        if let Some(rescuer) = self.rescuer.as_mut() {
            rescuer.look(shared);
        }
        {
            let mut inner = shared.lock();
            shared.unplug_gone_vcpus(&mut inner);
            shared.take_finished(&mut inner);
        }
        // Before the vCPUs are called: what does not go this way is theirs.
        let firmware = self.source.as_mut().map_or(IDLE_TICK, |source| source.look(shared));
        let firmware = Instant::now() + firmware;
        call_waiting_vcpus(shared, &mut self.call_at).min(firmware)
    }
}

/// The relay's own thread.
pub(crate) fn relay_thread(
    shared: &Shared,
    own: Own,
    ready: &std::sync::mpsc::SyncSender<Result<(), StartError>>,
) {
    let mut work = match Work::set_up(own) {
        Ok(work) => work,
        Err(error) => {
            // The starter waits for exactly this message; if it has gone, the message is not needed.
            let _ = ready.send(Err(error));
            return;
        }
    };
    // Nobody has set it before.
    let _ = shared.worker.set(std::thread::current().id());
    let _ = ready.send(Ok(()));
    while !shared.stop.load(Ordering::Acquire) {
        let pause = work.turn(shared);
        shared.wake.sleep(&work.slot, pause);
    }
}

/// Runs when the relay's thread ends, however it ends.
pub(crate) struct EndOfThread<'a>(pub(crate) &'a Shared);

impl Drop for EndOfThread<'_> {
    fn drop(&mut self) {
        self.0.alive.store(false, Ordering::Release);
        if std::thread::panicking() {
            log::error!("the relay's thread panicked: memory errors are no longer relayed");
        }
    }
}

/// Enters the signals that the handler has stored for this thread and for threads outside the relay, and passes on to
/// the process's other relays those of their memory. Returns true when there were any: there may be pages whose own
/// signals were swallowed.
fn take_signals(shared: &Shared, slot: &ThreadSlot) -> bool {
    let mut any = false;
    let mut inner = shared.lock();
    slot.clear_attention();
    any |= !slot.is_empty();
    shared.take(&mut inner, slot, SignalledThread::Relay);
    while let Some(caught) = signal::take_orphan() {
        any = true;
        shared.enter(&mut inner, caught, SignalledThread::Other);
    }
    let signals = slot.take_overrun().saturating_add(signal::take_orphan_overrun());
    if signals > 0 {
        any = true;
        inner.emit(Event::Overrun { signals });
        shared.look_at_marks(&mut inner);
    }
    let strays = std::mem::take(&mut inner.strays);
    drop(inner);
    if any || !strays.is_empty() {
        shared.pass_to_other_relays(&strays);
        others(shared).iter().for_each(|other| other.hint());
    }
    any
}

/// Calls every vCPU for which something waits, at once for a new error and otherwise at `call_at`. Returns when the
/// next call is due.
fn call_waiting_vcpus(shared: &Shared, call_at: &mut Option<Instant>) -> Instant {
    let mut inner = shared.lock();
    for vcpu in std::mem::take(&mut inner.to_call) {
        inner.call(vcpu);
    }
    let news = std::mem::take(&mut inner.news);
    if inner.delivery.is_idle() {
        *call_at = None;
        let at = Instant::now() + IDLE_TICK;
        inner.looks_by = Some(at);
        return at;
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
    inner.looks_by = Some(at);
    at
}

impl Shared {
    /// Passes AOs on memory of other relays of this process to them. Without the lock: at the same time another relay
    /// may pass one to this.
    fn pass_to_other_relays(&self, strays: &[Caught]) {
        let others = others(self);
        for &caught in strays {
            let Caught { kind, hva, lsb } = caught;
            let theirs: Vec<_> =
                others.iter().filter(|other| other.ram().gpas(hva).len() > 0).collect();
            for other in &theirs {
                other.enter(&mut other.lock(), caught, SignalledThread::Other);
            }
            if theirs.is_empty() {
                // What the handler has marked is nobody's; if it is good it is not to stay so.
                let page = hva & !(PAGE_SIZE - 1);
                if kind == FailureKind::ActionRequired && !is_poisoned(page) {
                    let size = 1_u64 << lsb.clamp(PAGE_SHIFT, 30);
                    let start = page & !(size - 1);
                    guard::clear(&(start..start.saturating_add(size)));
                }
                self.lock().emit(Event::Outside { kind, hva, lsb });
            }
        }
    }
}
