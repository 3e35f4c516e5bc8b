//! The relay's own thread: takes AOs, and calls again the vCPUs for which something waits.

use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::error::StartError;
use super::error_source::Source;
use super::search::Search;
use crate::core::inner::RETRY_FIRST;
use crate::core::registry::others;
use crate::core::shared::{IDLE_TICK, Shared};
use crate::event::{Event, SignalledThread};
use crate::signal::{self, ExitByte, KillPolicy, ThreadSlot};
use crate::types::Caught;

/// Longest pause before a vCPU that could not be told is called again. A guest may take minutes (an AMD guest polls its
/// banks every five).
const RETRY_LAST: Duration = Duration::from_millis(500);

/// What the relay's thread alone uses. It is made before the thread, which therefore opens no file.
pub(crate) struct Own {
    pub(crate) policy: KillPolicy,
    pub(crate) source: Option<Source>,
    pub(crate) search: Option<Search>,
    /// [`RelayBuilder::on_thread`](crate::RelayBuilder::on_thread).
    pub(crate) set_up: Box<dyn FnOnce() -> io::Result<()> + Send>,
}

/// The relay's thread: takes AOs, and calls again the vCPUs for which something waits.
pub(crate) fn relay_thread(
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
            // The starter waits for exactly this message; if it has gone, the message is not needed.
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
            // Before the vCPUs are called: pages that cannot be told on this channel are told by them.
            let firmware = source.as_mut().map_or(IDLE_TICK, |source| source.look(shared));
            call_those_who_wait(shared, &mut call_at).min(firmware)
        };
        let mut pause = tell();
        // After known errors have been passed on, as a search of much memory takes its time.
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
    }
    let strays = std::mem::take(&mut inner.strays);
    drop(inner);
    if any || !strays.is_empty() {
        shared.hand_over(&strays);
        others(shared).iter().for_each(|other| other.hint());
    }
    any
}

/// Calls every vCPU for which something waits, at once for a new error and otherwise at `call_at`. Returns how long the
/// thread may sleep before the next call is due.
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

impl Shared {
    /// Passes AOs on memory of other relays of this process to them. Without the lock: at the same time another relay
    /// may pass one to this.
    fn hand_over(&self, strays: &[Caught]) {
        let others = others(self);
        for &caught in strays {
            let Caught { kind, hva, lsb } = caught;
            let theirs: Vec<_> =
                others.iter().filter(|other| other.ram().gpas(hva).len() > 0).collect();
            for other in &theirs {
                other.enter(&mut other.lock(), caught, SignalledThread::Other);
            }
            if theirs.is_empty() {
                self.lock().emit(Event::Outside { kind, hva, lsb });
            }
        }
    }
}
