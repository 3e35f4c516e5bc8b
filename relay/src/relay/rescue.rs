//! The good part of a huge page that went bad: how it is had back, and who is asked.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use super::error::StartError;
use crate::core::host::call_host;
use crate::core::shared::Shared;
use crate::memory::headroom::Headroom;
use crate::memory::stand_in::{Filled, Sharing, StandIn, plug};
use crate::memory::uffd::Uffd;
use crate::types::{PAGE_SIZE, RescueRefusal, RescueStep, Rescued};

/// A huge page of guest memory of which a part has gone bad, and which the host has lost as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HugePage {
    /// Host virtual address of its first byte.
    pub hva: u64,
    /// Its length in bytes: 2 MiB or 1 GiB.
    pub len: u64,
}

/// Who has made guest memory, and knows who else uses it. Called on the thread that does the relay's work, without a lock
/// of the relay's.
pub trait MemoryOwner: Send {
    /// The memory of `page` is about to be replaced. What guest memory is mapped from there, a file of hugetlbfs or a
    /// memfd, open for reading, and the offset of the page in it; the mapping is MAP_SHARED, so that the file has what the
    /// guest wrote.
    ///
    /// Whoever uses the page by another way than its host virtual address has to let it go first, or it must not be
    /// replaced: a device that has it pinned (VFIO), another process that maps the file (vhost-user). KVM's slots follow by
    /// themselves.
    ///
    /// It must not call [`Handle::remove_ram`](crate::Handle::remove_ram), which waits until the rescue is over. If
    /// that fails later on, [`Self::kept`] is called.
    ///
    /// # Errors
    /// It must stay: it is lost as a whole then.
    fn release(&mut self, page: HugePage) -> Result<(BorrowedFd<'_>, u64), RescueRefusal>;

    /// Private anonymous memory in small pages lies in the page's place, marked as bad where it is, and the
    /// next relay's regions have to say so ([`RamRegion::in_pages_of`](crate::RamRegion::in_pages_of) 12) until there is
    /// a huge page again. What was asked for the old mapping by madvise(2), mlock(2), mbind(2) or userfaultfd is to be
    /// asked for again; devices may have the memory.
    fn replaced(&mut self, rescued: &Rescued) {
        let _ = rescued;
    }

    /// `page`, which was released, is not replaced, because of `why`: all of it is lost, and whoever let it go may have it
    /// back as it is. Where `why` is a refused [`RescueStep::Move`](crate::RescueStep::Move) its mapping may be another,
    /// of which each page is marked as bad.
    fn kept(&mut self, page: HugePage, why: &RescueRefusal) {
        let _ = (page, why);
    }
}

/// That huge pages are rescued: see [`RelayBuilder::rescue`](crate::RelayBuilder::rescue).
pub struct Rescue {
    owner: Box<dyn MemoryOwner>,
    reserve: u64,
}

impl Rescue {
    /// For memory of `owner`'s. The memory for what is left of a huge page is taken when it is needed, if the host and the
    /// memory cgroups of this process have it to spare.
    pub fn new(owner: impl MemoryOwner + 'static) -> Self {
        Self { owner: Box::new(owner), reserve: 0 }
    }

    /// `bytes` are taken at the start and kept for it, rounded up to 2 MiB: a huge page of 1 GiB takes 1 GiB. More is taken
    /// when it is needed.
    #[must_use]
    pub fn reserve(self, bytes: u64) -> Self {
        Self { reserve: bytes, ..self }
    }

    /// Takes what is needed before a thread may open nothing.
    pub(super) fn prepare(self, sharing: Sharing) -> Result<Rescuer, StartError> {
        let headroom = Headroom::new();
        let reserve = match self.reserve {
            0 => None,
            bytes => {
                let rounded = bytes.checked_next_multiple_of(2 << 20);
                let stand_in = match rounded.filter(|rounded| *rounded <= headroom.bytes()) {
                    Some(rounded) => StandIn::new(rounded, sharing),
                    None => Err(io::ErrorKind::OutOfMemory.into()),
                };
                Some(stand_in.map_err(|source| StartError::Reserve { bytes, source })?)
            }
        };
        let marker = Uffd::open();
        if let Err(error) = &marker {
            log::warn!(
                "huge pages that go bad are lost as a whole: the bad part could not be marked (userfaultfd, \
                 UFFDIO_POISON of Linux 6.6): {error}"
            );
        }
        let mut store = Store { reserve, spare: None, headroom, sharing };
        if marker.is_ok() {
            store.prepare_spare();
        }
        Ok(Rescuer { owner: self.owner, store, marker })
    }
}

impl std::fmt::Debug for Rescue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rescue").field("reserve", &self.reserve).finish_non_exhaustive()
    }
}

/// What rescues are done with, on the thread that does the relay's work.
pub(crate) struct Rescuer {
    owner: Box<dyn MemoryOwner>,
    store: Store,
    marker: io::Result<Uffd>,
}

/// Where the memory for what is left comes from.
struct Store {
    /// What the host's VMM asked to be set aside.
    reserve: Option<StandIn>,
    /// For the next page of 2 MiB, so that no vCPU waits until there is memory.
    spare: Option<StandIn>,
    headroom: Headroom,
    sharing: Sharing,
}

impl Store {
    /// Has memory for one more, if there is enough of it.
    fn prepare_spare(&mut self) {
        if self.spare.is_none() && self.headroom.bytes() > 2 * SPARE {
            self.spare = StandIn::new(SPARE, self.sharing).ok();
        }
    }

    /// Takes memory back that was not used.
    fn give_back(&mut self, unused: StandIn) {
        let unused = match &mut self.reserve {
            Some(reserve) => reserve.rejoin(unused),
            None => Err(unused),
        };
        // What is not of the reserve is the next spare, or goes back to the host.
        if let Err(unused) = unused
            && unused.len() == SPARE
        {
            self.spare.get_or_insert(unused);
        }
    }

    /// Memory for what is left of `len` bytes.
    fn memory(&mut self, len: u64) -> Result<StandIn, RescueRefusal> {
        if let Some(spare) = self.spare.take_if(|_| len == SPARE) {
            return Ok(spare);
        }
        if let Some(reserved) = self.reserve.as_mut().and_then(|reserve| reserve.take(len)) {
            return Ok(reserved);
        }
        let free = self.headroom.bytes();
        // The page tables take a five-hundredth.
        let needed = len + len / 256;
        if free < needed {
            return Err(RescueRefusal::NoMemory { needed, free });
        }
        StandIn::new(len, self.sharing).map_err(at(RescueStep::Allocate))
    }
}

impl Rescuer {
    /// Rescues what there is to be. True when there was anything.
    pub(super) fn look(&mut self, shared: &Shared) -> bool {
        let mut any = false;
        loop {
            let next = shared.lock().rescues.next();
            let Some(hvas) = next else {
                if any {
                    self.store.prepare_spare();
                }
                return any;
            };
            any = true;
            // Held until it is done: `remove_ram` waits, so that the addresses are guest memory's meanwhile.
            let ram = shared.ram();
            let rescue = || match ram.covers(&hvas) && !shared.is_any_present(&hvas) {
                true => self.rescue(shared, &hvas),
                false => Err(RescueRefusal::Mapped),
            };
            let done = call_host("owner of guest memory", rescue);
            match done.unwrap_or(Err(RescueRefusal::Forbidden)) {
                Ok(gone) => {
                    if let Some(rescued) = shared.rescued(&hvas, &gone) {
                        call_host("owner of guest memory", || self.owner.replaced(&rescued));
                    }
                }
                Err(why) => shared.not_rescued(&mut shared.lock(), &hvas, why),
            }
        }
    }

    /// Puts good memory at `hvas`; the host addresses of the pages that are gone.
    fn rescue(&mut self, shared: &Shared, hvas: &Range<u64>) -> Result<Vec<u64>, RescueRefusal> {
        let (hva, len) = (hvas.start, hvas.end - hvas.start);
        let marker = self.marker.as_ref().map_err(|error| RescueRefusal::NoMarker {
            errno: error.raw_os_error().unwrap_or(0),
        })?;
        let page = HugePage { hva, len };
        let (file, offset) = self.owner.release(page)?;
        let replaced = match self.store.memory(len) {
            Ok(mut stand_in) => {
                let replaced = replace(shared, hvas, &mut stand_in, (&file, offset), marker);
                if replaced.is_err() && stand_in.len() > 0 {
                    self.store.give_back(stand_in);
                }
                replaced
            }
            Err(why) => Err(why),
        };
        if let Err(why) = &replaced {
            self.owner.kept(page, why);
        }
        replaced
    }
}

/// Puts what `file` has from `offset` on in the place of the huge page at `hvas`; the host addresses of the pages that are
/// gone. After an error `stand_in` can be used again, if it has a length.
fn replace(
    shared: &Shared,
    hvas: &Range<u64>,
    stand_in: &mut StandIn,
    (file, offset): (&BorrowedFd<'_>, u64),
    marker: &Uffd,
) -> Result<Vec<u64>, RescueRefusal> {
    let (hva, len) = (hvas.start, hvas.end - hvas.start);
    let Filled { gone } = stand_in.fill(file, offset).map_err(at(RescueStep::Read))?;
    match gone.len() as u64 {
        0 => return Err(RescueRefusal::NoneBad),
        all if all == len / PAGE_SIZE => return Err(RescueRefusal::NothingLeft),
        _ => {}
    }
    let marked = stand_in.mark(marker, &gone).map_err(at(RescueStep::Mark));
    let done = marked.and_then(|()| match shared.is_any_present(hvas) {
        true => Err(RescueRefusal::Mapped),
        false => stand_in.move_to(hva).map_err(at(RescueStep::Move)),
    });
    match done {
        Ok(()) => Ok(gone.iter().map(|at| hva + at).collect()),
        Err(why) => {
            if matches!(why, RescueRefusal::System { step: RescueStep::Move, .. }) {
                fill_hole(hvas, marker);
            }
            if let Err(error) = stand_in.unmark(&gone) {
                log::debug!("memory for a rescue has lost some pages: {error}");
                stand_in.give_up();
            }
            Err(why)
        }
    }
}

/// What the kernel unmaps before it finds that it cannot move memory there.
fn fill_hole(hvas: &Range<u64>, marker: &Uffd) {
    match plug(hvas.start, hvas.end - hvas.start, marker) {
        Ok(true) => log::warn!("nothing was mapped any more at HVA {:#x}", hvas.start),
        Ok(false) => {}
        Err(error) => log::error!("nothing can be mapped at HVA {:#x}: {error}", hvas.start),
    }
}

/// Bytes of the memory that is kept for the next rescue.
const SPARE: u64 = 2 << 20;

fn at(step: RescueStep) -> impl Fn(io::Error) -> RescueRefusal {
    move |error| RescueRefusal::System { step, errno: error.raw_os_error().unwrap_or(0) }
}
