//! What the relay's thread, the vCPUs' threads and the handles of one relay share.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use super::changed::Changed;
use super::inner::Inner;
use super::locked::Locked;
use super::outbox::Outbox;
use crate::guard::{self, Registered};
use crate::ledger::Page;
use crate::memory::map::{RamError, RamMap};
use crate::memory::scan::Mapped;
use crate::signal::Wake;
use crate::types::{PAGE_SHIFT, PAGE_SIZE, State};

/// How often the relay's thread looks for AOs that reached a thread outside the relay.
pub(crate) const IDLE_TICK: Duration = Duration::from_secs(1);

/// So many pages are kept that the relay's thread has not looked at: with more it makes no difference.
const MOST_FINISHED: usize = 4096;

pub(crate) struct Shared {
    pub(crate) inner: Mutex<Inner>,
    /// Woken at every step of a [`Gathering`].
    pub(crate) gathered: Changed,
    /// Looked up by threads, never by the handler.
    pub(crate) ram: RwLock<Arc<RamMap>>,
    /// What [`Delivery`] counts its times from.
    pub(crate) start: Instant,
    pub(crate) outbox: Outbox,
    pub(crate) stop: AtomicBool,
    pub(crate) wake: Wake,
    /// How often guest RAM was looked through.
    pub(crate) scans: AtomicU64,
    /// There may be a failure here that nobody was signalled: another relay has heard of one, or memory has come
    /// that may have been bad before.
    pub(crate) hinted: AtomicBool,
    /// The pages with which the guest is done, as far as somebody has said so.
    pub(crate) finished: Mutex<Vec<u64>>,
    /// The process that made it.
    pub(crate) pid: u32,
    /// Guest-physical address of the error source's page.
    pub(crate) source_page: Option<u64>,
    /// The relay's thread runs.
    pub(crate) alive: AtomicBool,
    pub(crate) mapped: Mapped,
    /// Earlier maps, as long as somebody has them.
    pub(crate) older: Mutex<Vec<Weak<RamMap>>>,
    /// Guest RAM in the table that devices and the handler read.
    pub(crate) areas: Mutex<Vec<Registered>>,
    /// The thread that does the relay's work.
    pub(crate) worker: OnceLock<ThreadId>,
}

impl Shared {
    pub(crate) fn lock(&self) -> Locked<'_, Inner> {
        Locked::new(&self.inner, &self.outbox, &self.wake)
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

    /// Puts another map in place; whoever looks something up has the old one or the new one, whole.
    pub(crate) fn change_ram(
        &self,
        change: impl FnOnce(&RamMap) -> Result<RamMap, RamError>,
    ) -> Result<(), RamError> {
        let mut ram = self.ram.write().unwrap_or_else(PoisonError::into_inner);
        let new = Arc::new(change(&ram)?);
        let old = std::mem::replace(&mut *ram, new);
        drop(ram);
        let mut older = self.older.lock().unwrap_or_else(PoisonError::into_inner);
        older.retain(|map| map.strong_count() > 0);
        older.push(Arc::downgrade(&old));
        Ok(())
    }

    /// Has guest RAM as it is now in the table that devices and the handler read. Of the memory at `new` nothing but what
    /// the ledger has is bad.
    pub(crate) fn enter_areas(&self, inner: &Inner, new: impl IntoIterator<Item = Range<u64>>) {
        if self.stop.load(Ordering::Acquire) {
            return;
        }
        let ram = self.ram();
        let mut hvas: Vec<Range<u64>> = Vec::new();
        for next in ram.hvas() {
            match hvas.last_mut() {
                Some(last) if last.end == next.start => last.end = next.end,
                _ => hvas.push(next),
            }
        }
        let mut areas = self.areas.lock().unwrap_or_else(PoisonError::into_inner);
        let mut before = std::mem::take(&mut *areas);
        for hvas in &hvas {
            if let Some(at) = before.iter().position(|area| area.hvas() == hvas) {
                areas.push(before.swap_remove(at));
                continue;
            }
            match guard::register(hvas, PAGE_SHIFT) {
                Ok(area) => areas.push(area),
                Err(error) => log::warn!("guest memory is not guarded: {error}"),
            }
        }
        // The new ones have taken their marks over.
        drop(before);
        drop(areas);
        let bad = |page: &Page| {
            !page.is_forged() && !matches!(page.state, State::Healed | State::Removed)
        };
        let pages = inner.ledger.pages().filter(bad).filter_map(|page| ram.hva(page.gpa));
        let bad: Vec<Range<u64>> = pages.map(|hva| hva..hva + PAGE_SIZE).collect();
        for hvas in new {
            // A region may have pages of several sizes.
            let within = |part: Range<u64>| part.start.max(hvas.start)..part.end.min(hvas.end);
            for part in ram.hvas().map(within).filter(|part| !part.is_empty()) {
                guard::all_new(&part, ram.page_shift(part.start), &bad);
            }
        }
    }

    /// Takes them out again: the memory may go.
    pub(crate) fn forget_areas(&self) {
        self.areas.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The maps before the present one that somebody still looks at, or copies by.
    pub(crate) fn older_maps(&self) -> Vec<Weak<RamMap>> {
        self.older.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the calling thread is the one that does the relay's work.
    pub(crate) fn is_worker(&self) -> bool {
        self.worker.get() == Some(&std::thread::current().id())
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

    /// Somebody says that the guest is done with the page at `gpa`. The relay's thread takes it from here: the caller may
    /// be on a thread of a device, which kicks no vCPU.
    pub(crate) fn finish(&self, gpa: u64) {
        let mut finished = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
        let is_first = finished.is_empty();
        if finished.len() < MOST_FINISHED {
            finished.push(gpa);
        }
        drop(finished);
        if is_first {
            self.wake();
        }
    }

    /// What somebody has said to be finished: there may be room for more.
    pub(crate) fn take_finished(&self, inner: &mut Inner) {
        let finished = {
            let mut finished = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *finished)
        };
        let now = self.now();
        for gpa in finished {
            let is_room = inner.delivery.finished(gpa, now);
            inner.news |= is_room;
            inner.firmware_news |= is_room;
        }
    }

    /// Whether the relay's thread is there.
    pub(crate) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire)
    }

    /// Whether the relay's work is still done.
    pub(crate) fn is_working(&self) -> bool {
        self.is_alive() && !self.stop.load(Ordering::Acquire)
    }

    /// The time since the relay was started, as [`Delivery`] wants it.
    pub(crate) fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// The lock again, after [`Locked::give_back_quietly`].
    pub(crate) fn lock_again(&self) -> Locked<'_, Inner> {
        Locked::again(&self.inner, &self.outbox, &self.wake)
    }
}
