//! A relay as any thread may use it: what is known, guest memory without SIGBUS, and changes of guest RAM.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, SystemTime};

use crate::core::inner::Inner;
use crate::core::shared::Shared;
use crate::event::Event;
use crate::ledger::{Ledger, Page, Predicted, Untold};
use crate::memory::access::{self, AccessError};
use crate::memory::map::{RamError, RamMap, RamRegion};
use crate::types::{Caught, FailureKind, FoundBy, PAGE_SHIFT, PAGE_SIZE, State};

/// Why a guest is not asked to stop using a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RetireError {
    /// There is no way to say it.
    #[error("the guest was given no ACPI error source, and there is no other way to say it")]
    NoSource,
    /// It is not the guest's.
    #[error("GPA {gpa:#x} is not guest RAM")]
    NotRam {
        /// Guest-physical address.
        gpa: u64,
    },
    /// There is nothing left to be saved, or the guest is being asked already.
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

    /// The pages that were bad in earlier boots, or in memory that was unplugged, and are so no longer.
    pub fn past(&self) -> Vec<Page> {
        self.0.lock().ledger.past().cloned().collect()
    }

    /// What `look` makes of all that is known, without a copy of it. It is called under the relay's
    /// lock: it must be quick, must not block and must not use the relay.
    pub fn inspect<R>(&self, look: impl FnOnce(&Ledger) -> R) -> R {
        look(&self.0.lock().ledger)
    }

    /// How often guest RAM was looked through for bad pages that no signal named, since the start of
    /// this relay.
    pub fn scans(&self) -> u64 {
        self.0.scans.load(Ordering::Relaxed)
    }

    /// All that is known, for the relay of the next boot.
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
        // Held while the kernel copies: `remove_ram` waits for that.
        let done = access::read_ram(&self.0.ram(), gpa, to);
        match done {
            // Perhaps only a part of the huge page that it is in.
            Err(error) if self.met(&error) => access::read_ram(&self.0.ram(), gpa, to),
            done => done,
        }
    }

    /// Writes `from` to guest memory at `gpa`, in the manner of [`Self::read`].
    ///
    /// # Errors
    /// Not even the first byte could be written: see [`AccessError`].
    pub fn write(&self, gpa: u64, from: &[u8]) -> Result<usize, AccessError> {
        match access::write_ram(&self.0.ram(), gpa, from) {
            Err(error) if self.met(&error) => access::write_ram(&self.0.ram(), gpa, from),
            done => done,
        }
    }

    /// The VMM itself has touched a bad page. True where it was part of a huge page that has been rescued since.
    fn met(&self, error: &AccessError) -> bool {
        let AccessError::Poisoned { gpa } = *error else { return false };
        let gpa = gpa & !(PAGE_SIZE - 1);
        let Some(hva) = self.0.ram().hva(gpa) else { return false };
        let caught = Caught { kind: FailureKind::ActionOptional, hva, lsb: PAGE_SHIFT };
        let mut inner = self.0.lock();
        if !inner.ledger.contains(gpa) {
            self.0.enter_pages(&mut inner, caught, FoundBy::Access, None);
            drop(inner);
            self.0.wake();
            // Who does the rescue does not wait for it.
            return !self.0.is_worker() && self.0.wait_for_rescue(hva, RESCUE);
        }
        false
    }

    /// `vcpu` has left the guest for an MMIO access at `gpa`: as [`VcpuPort::mmio_hit`](crate::VcpuPort::mmio_hit), for a
    /// layer below the run loop that takes MMIO exits itself and has no port. Where it is true the access was to a bad page:
    /// what the layer was going to complete a load with must not reach the guest, and the run loop has to come round before
    /// the next KVM_RUN that runs the guest.
    ///
    /// An address that is not guest RAM costs a search among the regions, some nanoseconds.
    pub fn mmio_hit(&self, vcpu: usize, gpa: u64) -> bool {
        self.0.touches(vcpu, gpa, 1, false)
    }

    /// The parts of `gpas`, guest-physical addresses, that hold no page which is known to be bad, ascending. For a snapshot
    /// that writes guest memory to a file by write(2), which ends at a bad page. Nothing keeps a page from going bad
    /// between this and the write: one that does shows as EFAULT or as a short write there, and here the next time.
    pub fn whole_parts(&self, gpas: Range<u64>) -> Vec<Range<u64>> {
        let inner = self.0.lock();
        let mut from = gpas.start;
        let mut parts = Vec::new();
        let is_bad = |page: &Page| !matches!(page.state, State::Healed | State::Removed);
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

    /// Whether the relay's thread is there. It ends by itself only by a defect of its own, which it says in the log;
    /// then nobody takes AOs any more. For a VMM's health check.
    pub fn is_alive(&self) -> bool {
        self.0.is_alive()
    }

    /// Guest RAM has one region more. Call it before the guest can use the memory. What the ledger
    /// says of pages that were there before, and unplugged, becomes past, but for what the guest was never told of. The region is looked through: pages of it
    /// may have gone bad between its mapping and this call.
    ///
    /// # Errors
    /// See [`RamError`].
    pub fn add_ram(&self, region: RamRegion) -> Result<(), RamError> {
        let mut inner = self.0.lock();
        self.0.change_ram(|ram| ram.with(region))?;
        let now = SystemTime::now();
        for gpa in Self::known_within(&inner, region) {
            // What the guest was never told waits: other memory in its place would be a loss without a word.
            let _: Result<bool, Untold> = inner.ledger.replace(gpa, now);
        }
        drop(inner);
        self.0.hint();
        Ok(())
    }

    /// The region that begins at guest-physical `gpa` is no longer guest RAM; the region. Call it
    /// when the guest has given the memory up, and before it is unmapped: it waits for reads and writes by
    /// [`Self::read`] and [`Self::write`] that are under way. Nobody is told of its bad pages any more.
    ///
    /// # Errors
    /// There is no such region, or the error source's page is in it.
    pub fn remove_ram(&self, gpa: u64) -> Result<RamRegion, RamError> {
        let (region, before) = self.take_ram(gpa)?;
        // Whoever looks into the old map does so for a moment; who copies with it may take longer, and nobody else
        // has to wait for that.
        while Arc::strong_count(&before) > 1 {
            std::thread::park_timeout(COPYING);
        }
        // What was done with the old map is over, and seen to be.
        fence(Ordering::Acquire);
        Ok(region)
    }

    /// The region at `gpa`, which is no longer guest RAM, and the map that had it.
    fn take_ram(&self, gpa: u64) -> Result<(RamRegion, Arc<RamMap>), RamError> {
        let mut inner = self.0.lock();
        let before = self.0.ram();
        if let Some(page) = self.0.source_page
            && before.region(page).is_some_and(|region| region.gpa() == gpa)
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
        let (start, len) = (region.gpa(), region.len());
        inner.delivery.gone(&|gpa| gpa >= start && gpa - start < len);
        for gpa in Self::known_within(&inner, region) {
            self.0.set(&mut inner, gpa, State::Removed);
        }
        inner.ledger.unpredict(start..start + len);
        inner.emit(Event::Removed { gpa, len });
        Ok((region, before))
    }

    /// There is good memory again in the pages of `len` bytes at guest-physical `gpa`.
    pub(crate) fn replaced(&self, gpa: u64, len: u64) {
        let mut inner = self.0.lock();
        let now = SystemTime::now();
        let known: Vec<u64> =
            inner.ledger.within(gpa..gpa.saturating_add(len)).map(|page| page.gpa).collect();
        for gpa in known {
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
        self.0.lock().ledger.predicted().cloned().collect()
    }

    /// Has the guest told that the 4 KiB page at `gpa`, which is whole, is predicted to fail. Linux
    /// moves its contents and stops using it. Returns at once; [`Self::predicted`] shows what comes of
    /// it.
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
