//! A relay as any thread may use it: what is known, guest memory without SIGBUS, and changes of guest RAM.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, SystemTime};

use crate::core::inner::Inner;
use crate::core::shared::Shared;
use crate::event::Event;
use crate::guard;
use crate::ledger::{Ledger, Page, Predicted, Untold};
use crate::memory::access::{self, AccessError};
use crate::memory::map::{RamError, RamRegion};
use crate::types::{Caught, FailureKind, FoundBy, PAGE_SHIFT, PAGE_SIZE, State};

/// Why a guest is not asked to stop using a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RetireError {
    /// The guest was given no ACPI error source, and nothing else can tell it of a prediction.
    #[error("the guest was given no ACPI error source, and there is no other way to say it")]
    NoSource,
    /// The address is not guest RAM.
    #[error("GPA {gpa:#x} is not guest RAM")]
    NotRam {
        /// Guest-physical address.
        gpa: u64,
    },
    /// The page is bad already, or the guest is being asked already.
    #[error("GPA {gpa:#x} is in the ledger already; its status says what becomes of it")]
    Known {
        /// Guest-physical address.
        gpa: u64,
    },
}

/// How long a rescue is waited for.
const RESCUE: Duration = Duration::from_secs(5);
/// How often a copy that is under way is looked at.
const COPYING: Duration = Duration::from_millis(1);

/// A relay as any thread may use it.
#[derive(Clone)]
pub struct Handle(pub(crate) Arc<Shared>);

impl Handle {
    /// The pages of the ledger, by guest-physical address.
    pub fn pages(&self) -> Vec<Page> {
        self.0.lock().ledger.pages().collect()
    }

    /// The pages that were bad in earlier boots, or in memory that was unplugged, and no longer are: the last 65,536,
    /// in the order in which that ended.
    pub fn past(&self) -> Vec<Page> {
        self.0.lock().ledger.past().collect()
    }

    /// Returns what `look` makes of the ledger, without copying it. `look` is called under the relay's lock: it must be
    /// quick, and must neither block nor use the relay.
    pub fn inspect<R>(&self, look: impl FnOnce(&Ledger) -> R) -> R {
        look(&self.0.lock().ledger)
    }

    /// How often guest RAM was looked through for bad pages that no signal named, since the start of
    /// this relay.
    pub fn scans(&self) -> u64 {
        self.0.scans.load(Ordering::Relaxed)
    }

    /// A copy of the ledger, for the relay of the next boot.
    pub fn ledger(&self) -> Ledger {
        self.0.lock().ledger.clone()
    }

    /// Reads guest memory at `gpa` into `to`, up to the first byte that cannot be reached, and
    /// returns how many bytes that were. It never raises SIGBUS: a page that turns out to be bad
    /// enters the ledger, and the guest is told of it.
    ///
    /// # Errors
    /// Not even the first byte could be read: see [`AccessError`].
    pub fn read(&self, gpa: u64, to: &mut [u8]) -> Result<usize, AccessError> {
        // The map is held while the kernel copies: `remove_ram` waits for that.
        let done = access::read_ram(&self.0.ram(), gpa, to);
        match done {
            Err(error) if self.is_stand_in_after(&error) => {
                access::read_ram(&self.0.ram(), gpa, to)
            }
            done => done,
        }
    }

    /// Writes `from` to guest memory at `gpa`, up to the first byte that cannot be reached, and returns how many bytes
    /// were written. As [`Self::read`], it never raises SIGBUS, and a bad page enters the ledger.
    ///
    /// # Errors
    /// Not even the first byte could be written: see [`AccessError`].
    pub fn write(&self, gpa: u64, from: &[u8]) -> Result<usize, AccessError> {
        // The map is not held while somebody waits.
        let done = access::write_ram(&self.0.ram(), gpa, from);
        match done {
            Err(error) if self.is_stand_in_after(&error) => {
                access::write_ram(&self.0.ram(), gpa, from)
            }
            done => done,
        }
    }

    /// The VMM could not read or write: a bad page is entered. True where ordinary memory lies in the place of a huge page
    /// there, by now at the latest, so that it is worth another try.
    fn is_stand_in_after(&self, error: &AccessError) -> bool {
        let (AccessError::Poisoned { gpa } | AccessError::NoMemory { gpa, .. }) = *error else {
            return false;
        };
        let gpa = gpa & !(PAGE_SIZE - 1);
        let Some(hva) = self.0.ram().hva(gpa) else { return false };
        if matches!(error, AccessError::Poisoned { .. }) {
            let caught = Caught { kind: FailureKind::ActionOptional, hva, lsb: PAGE_SHIFT };
            let mut inner = self.0.lock();
            // One that was forged has really gone bad.
            if inner.ledger.get(gpa).is_none_or(|page| page.is_forged()) {
                self.0.enter_pages(&mut inner, caught, FoundBy::Access, None);
                drop(inner);
                self.0.wake();
            }
        }
        // Who does the rescue does not wait for it.
        if !self.0.is_worker() {
            self.0.wait_for_rescue(hva, RESCUE);
        }
        self.0.ram().is_stand_in(hva)
    }

    /// `vcpu` has left the guest for an MMIO access at `gpa`. As [`VcpuPort::mmio_hit`](crate::VcpuPort::mmio_hit), for
    /// a hypervisor layer that handles MMIO exits itself, below the run loop, and has no port. When it returns true,
    /// the access was to a bad page: the layer must not complete a load with made-up data, and the run loop has to call
    /// [`VcpuPort::before_run`](crate::VcpuPort::before_run) before the guest runs on.
    ///
    /// An address that is not guest RAM costs a search among the regions, some nanoseconds.
    pub fn mmio_hit(&self, vcpu: usize, gpa: u64) -> bool {
        self.0.touches(vcpu, gpa, 1, false)
    }

    /// The parts of `gpas` (guest-physical addresses) without a page that is known to be bad, ascending. For a snapshot
    /// that writes guest memory to a file by write(2), which stops at a bad page. A page may still go bad between this
    /// call and the write: the write then fails with EFAULT or is short, and the next call leaves the page out. While a
    /// huge page is being rescued it waits: nothing of it can be read until then.
    pub fn whole_parts(&self, gpas: Range<u64>) -> Vec<Range<u64>> {
        if !self.0.is_worker() {
            self.0.wait_for_rescues(RESCUE);
        }
        let inner = self.0.lock();
        let mut from = gpas.start;
        let mut parts = Vec::new();
        // The page of a forged failure is whole.
        let is_bad = |page: &Page| {
            !page.is_forged() && !matches!(page.state, State::Healed | State::Removed)
        };
        let around = gpas.start & !(PAGE_SIZE - 1)..gpas.end;
        for page in inner.ledger.within(around).filter(is_bad) {
            if from < page.gpa {
                parts.push(from..page.gpa);
            }
            from = page.gpa.saturating_add(PAGE_SIZE);
        }
        if from < gpas.end {
            parts.push(from..gpas.end);
        }
        parts
    }

    /// Whether a page of `gpas` (guest-physical addresses) is known to be bad. While no page of any guest of this process is,
    /// that is one relaxed load. For devices; [`guard::is_bad`](crate::guard::is_bad) is the same by host addresses, without
    /// a look at the map of guest RAM.
    pub fn is_bad(&self, gpas: Range<u64>) -> bool {
        if !guard::is_any_marked() {
            return false;
        }
        let ram = self.0.ram();
        let mut at = gpas.start;
        while at < gpas.end {
            let Some(region) = ram.region(at) else {
                // What is no RAM is not bad.
                let next = ram.regions().iter().map(RamRegion::gpa).find(|gpa| *gpa > at);
                let Some(next) = next else { return false };
                at = next;
                continue;
            };
            let end = gpas.end.min(region.gpa() + region.len());
            if guard::is_bad(region.hva() + (at - region.gpa()), end - at) {
                return true;
            }
            at = end;
        }
        false
    }

    /// The guest is done with the bad page at guest-physical `gpa` of which it was told: the next one may be told. For a VMM
    /// that can see it, such as by the line "Memory failure: 0x2928: recovery action for" that Linux writes on its
    /// console (the page frame number, of 4 KiB pages). Without such calls each page counts for a fixed time
    /// ([`Pace`](crate::Pace)). What is said of other pages has no effect, so whatever in the guest may write to its
    /// console may be the source: a guest that lies is told faster than it can bear, and loses pages of its own.
    ///
    /// It takes no lock that is held for long, and makes at most one system call, a write(2) to an eventfd.
    pub fn guest_finished(&self, gpa: u64) {
        self.0.finish(gpa & !(PAGE_SIZE - 1));
    }

    /// Whether the relay's thread runs. Before the relay is dropped it ends only by a defect of its own, which it logs;
    /// AOs are no longer taken then. For a VMM's health check.
    pub fn is_alive(&self) -> bool {
        self.0.is_alive()
    }

    /// Adds a region to guest RAM. Call it before the guest can use the memory. Pages of the ledger in the region, from
    /// memory that was there before and was unplugged, count as no longer bad, unless the guest was never told of them.
    /// The relay then searches the region: pages may have gone bad between its mapping and this call.
    ///
    /// # Errors
    /// See [`RamError`].
    pub fn add_ram(&self, region: RamRegion) -> Result<(), RamError> {
        let mut inner = self.0.lock();
        self.0.change_ram(|ram| ram.with(region))?;
        let now = SystemTime::now();
        for gpa in Self::known_within(&inner, region) {
            // A page that the guest was never told of stays bad: new memory in its place would be a silent loss.
            let _: Result<bool, Untold> = inner.ledger.replace(gpa, now);
        }
        self.0.enter_areas(&inner, Some(region.hva()..region.hva() + region.len()));
        drop(inner);
        self.0.hint();
        Ok(())
    }

    /// Removes the region that begins at guest-physical `gpa` from guest RAM, and returns it. Call it when the guest
    /// has given the memory up, and before it is unmapped: it waits for reads and writes by [`Self::read`] and
    /// [`Self::write`] that are under way. The guest is not told of its bad pages any more.
    ///
    /// # Errors
    /// There is no such region, or the error source's page is in it.
    pub fn remove_ram(&self, gpa: u64) -> Result<RamRegion, RamError> {
        let region = self.take_ram(gpa)?;
        let older = self.0.older_maps();
        // Lookups in maps that had it are over in a moment. Copies by them may take longer, and so may a rescue; only
        // this call waits for them.
        while older.iter().any(|map| map.strong_count() > 0) {
            std::thread::park_timeout(COPYING);
        }
        // What other threads did with the old map happens before the return.
        fence(Ordering::Acquire);
        Ok(region)
    }

    /// Removes the region at `gpa`, and returns it.
    fn take_ram(&self, gpa: u64) -> Result<RamRegion, RamError> {
        let mut inner = self.0.lock();
        if let Some(page) = self.0.source_page
            && self.0.ram().region(page).is_some_and(|region| region.gpa() == gpa)
        {
            return Err(RamError::Source { gpa, page });
        }
        let mut gone = None;
        self.0.change_ram(|ram| {
            let (less, region) = ram.without(gpa)?;
            gone = Some(region);
            Ok(less)
        })?;
        let region = gone.ok_or(RamError::NoRegion { gpa })?;
        inner.rescues.forget(&(region.hva()..region.hva() + region.len()));
        self.0.enter_areas(&inner, None);
        let (start, len) = (region.gpa(), region.len());
        inner.delivery.gone(&|gpa| gpa >= start && gpa - start < len);
        for gpa in Self::known_within(&inner, region) {
            self.0.set(&mut inner, gpa, State::Removed);
        }
        inner.ledger.unpredict(start..start + len);
        inner.emit(Event::Removed { gpa, len });
        Ok(region)
    }

    /// The `len` bytes at guest-physical `gpa` are good memory again.
    pub(crate) fn replaced(&self, gpa: u64, len: u64) {
        let mut inner = self.0.lock();
        let now = SystemTime::now();
        let known: Vec<u64> =
            inner.ledger.within(gpa..gpa.saturating_add(len)).map(|page| page.gpa).collect();
        for gpa in known {
            if let Some(hva) = self.0.ram().hva(gpa) {
                guard::clear(&(hva..hva + PAGE_SIZE));
            }
            let forged = inner.ledger.get(gpa).is_some_and(|page| page.is_forged());
            if inner.ledger.heal(gpa, now) {
                inner.emit(Event::Healed { gpa, forged });
            }
        }
    }

    fn known_within(inner: &Inner, region: RamRegion) -> Vec<u64> {
        let (gpa, len) = (region.gpa(), region.len());
        inner.ledger.within(gpa..gpa + len).map(|page| page.gpa).collect()
    }

    /// The pages that were predicted to fail, by guest-physical address.
    pub fn predicted(&self) -> Vec<Predicted> {
        self.0.lock().ledger.predicted().collect()
    }

    /// Tells the guest that the 4 KiB page at guest-physical `gpa`, which is whole, is predicted to fail. Linux moves
    /// its contents and stops using it. Returns at once; [`Self::predicted`] shows what becomes of it.
    ///
    /// # Errors
    /// See [`RetireError`].
    pub fn retire(&self, gpa: u64) -> Result<(), RetireError> {
        let gpa = gpa & !(PAGE_SIZE - 1);
        if self.0.ram().hva(gpa).is_none() {
            return Err(RetireError::NotRam { gpa });
        }
        let mut inner = self.0.lock();
        if !inner.delivery.has_source() {
            return Err(RetireError::NoSource);
        }
        if !inner.ledger.predict(gpa, SystemTime::now()) {
            return Err(RetireError::Known { gpa });
        }
        inner.delivery.push_predicted(gpa);
        inner.firmware_news = true;
        inner.emit(Event::Predicted { gpa, state: State::Seen });
        drop(inner);
        self.0.wake();
        Ok(())
    }
}
