//! Stretches of this process's memory that are guest RAM, and which of their pages are bad, in a table that the SIGBUS
//! handler and devices read.
//!
//! Whoever reads counts itself among an area's readers first, and whoever takes an area out of the table waits until there
//! are none: no lock, and nothing that a handler could wait for. Areas may overlap: a region of vm-memory and the relay's
//! own region of the same memory are two.

use std::io;
use std::ops::Range;
#[cfg(feature = "vm-memory")]
use std::os::fd::RawFd;
use std::ptr::null_mut;
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering,
};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::attempt;
use super::bits::Bits;
use super::doubt;
use super::view::{self, View};
use crate::types::{PAGE_SHIFT, PAGE_SIZE};

/// How many areas a process may have.
const AREAS: usize = 512;
/// Nobody has it.
const FREE: u8 = 0;
/// It is in the table.
const USED: u8 = 1;
/// It is coming or going.
const CHANGING: u8 = 2;

/// `log2` of the largest page of a host, 1 GiB.
const MAX_SHIFT: u8 = 30;

static TABLE: [Area; AREAS] = [const { Area::new() }; AREAS];
/// Areas behind this one have never been used.
static END: AtomicUsize = AtomicUsize::new(0);
/// How many pages of all areas are marked.
static MARKED: AtomicU64 = AtomicU64::new(0);
/// One at a time changes the table, or the marks from outside a handler.
static CHANGE: Mutex<()> = Mutex::new(());

fn change() -> MutexGuard<'static, ()> {
    // It protects no data that could be half changed.
    CHANGE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One stretch. Its fields change while nobody reads it.
pub(super) struct Area {
    state: AtomicU8,
    readers: AtomicU32,
    hva: AtomicU64,
    len: AtomicU64,
    /// `log2` of the size of the pages that the host loses as a whole.
    shift: AtomicU8,
    /// Host address of the view; 0 where there is none.
    view: AtomicU64,
    /// What the view is a mapping of.
    fd: AtomicI32,
    offset: AtomicU64,
    /// Somebody makes pages good: no handler puts a scratch page in place meanwhile.
    clearing: AtomicBool,
    /// How many pages are marked.
    marked: AtomicU64,
    bad: AtomicPtr<Bits>,
    /// Which of the marked ones a relay has looked at: a handler marks whole pages of the host, of which some may be good.
    known: AtomicPtr<Bits>,
    /// Where the guest has other memory than the file: a stand-in for a huge page.
    elsewhere: AtomicPtr<Bits>,
}

/// A part of an area by page numbers, from the area's first.
type Pages = Range<usize>;

impl Area {
    const fn new() -> Self {
        Self {
            state: AtomicU8::new(FREE),
            readers: AtomicU32::new(0),
            hva: AtomicU64::new(0),
            len: AtomicU64::new(0),
            shift: AtomicU8::new(PAGE_SHIFT),
            view: AtomicU64::new(0),
            fd: AtomicI32::new(-1),
            offset: AtomicU64::new(0),
            clearing: AtomicBool::new(false),
            marked: AtomicU64::new(0),
            bad: AtomicPtr::new(null_mut()),
            known: AtomicPtr::new(null_mut()),
            elsewhere: AtomicPtr::new(null_mut()),
        }
    }

    /// The area, if it is in use; it stays so until what is returned is dropped. Async-signal-safe.
    fn read(&'static self) -> Option<Reading> {
        // A look first, as most places of the table are free. Then the count, then the state again: an area that goes
        // changes its state before it looks at the count.
        if self.state.load(Ordering::Relaxed) == FREE {
            return None;
        }
        self.readers.fetch_add(1, Ordering::SeqCst);
        let reading = Reading(self);
        (self.state.load(Ordering::SeqCst) == USED).then_some(reading)
    }

    /// Whether any page of `len` bytes at `offset` is marked. The caller has the area registered, or reads it.
    #[cfg(any(test, feature = "vm-memory"))]
    #[inline]
    pub(super) fn is_bad(&self, offset: u64, len: u64) -> bool {
        self.marked.load(Ordering::Relaxed) != 0 && len > 0 && self.any_marked(offset, len)
    }

    #[cfg(any(test, feature = "vm-memory"))]
    #[cold]
    fn any_marked(&self, offset: u64, len: u64) -> bool {
        let end = offset.saturating_add(len);
        self.bits().is_some_and(|bits| {
            bits.any(number(offset)..number(end.div_ceil(PAGE_SIZE) << PAGE_SHIFT))
        })
    }

    fn bits(&self) -> Option<&Bits> {
        // SAFETY: set while the area is registered, from a box that the registration keeps; it waits for all readers
        // before it lets that go.
        unsafe { self.bad.load(Ordering::Acquire).as_ref() }
    }

    fn known(&self) -> Option<&Bits> {
        // SAFETY: as in `bits`.
        unsafe { self.known.load(Ordering::Acquire).as_ref() }
    }

    fn elsewhere(&self) -> Option<&Bits> {
        // SAFETY: as in `bits`.
        unsafe { self.elsewhere.load(Ordering::Acquire).as_ref() }
    }

    /// Async-signal-safe.
    fn mark(&self, pages: Pages) {
        let new = self.bits().map_or(0, |bits| bits.set(pages));
        self.marked.fetch_add(new, Ordering::AcqRel);
        MARKED.fetch_add(new, Ordering::AcqRel);
    }

    /// A relay has looked at them, and they are bad.
    fn mark_known(&self, pages: Pages) {
        if let Some(known) = self.known() {
            known.set(pages.clone());
        }
        self.mark(pages);
    }

    /// Whether some of `pages` are marked, and none of those is known to be bad.
    fn is_in_doubt(&self, pages: Pages) -> bool {
        self.bits().is_some_and(|bits| bits.any(pages.clone()))
            && !self.known().is_some_and(|known| known.any(pages))
    }

    /// As [`Self::is_bad`], but where it is in doubt that is waited for.
    #[cfg(feature = "vm-memory")]
    #[inline]
    pub(super) fn refuses(&self, offset: u64, len: u64) -> bool {
        self.is_bad(offset, len) && self.is_bad_for_sure(offset, len)
    }

    #[cfg(feature = "vm-memory")]
    #[cold]
    fn is_bad_for_sure(&self, offset: u64, len: u64) -> bool {
        let end = number(offset.saturating_add(len).div_ceil(PAGE_SIZE) << PAGE_SHIFT);
        let pages = number(offset)..end;
        doubt::wait_while(|| self.is_in_doubt(pages.clone()));
        self.bits().is_some_and(|bits| bits.any(pages))
    }

    fn unmark(&self, pages: Pages) {
        if let Some(known) = self.known() {
            known.clear(pages.clone());
        }
        let gone = self.bits().map_or(0, |bits| bits.clear(pages));
        self.marked.fetch_sub(gone, Ordering::AcqRel);
        MARKED.fetch_sub(gone, Ordering::AcqRel);
    }

    /// The pages of the area within `hvas`; `None` where there are none.
    fn pages_of(&self, hvas: &Range<u64>) -> Option<Pages> {
        let (start, len) = (self.hva.load(Ordering::Relaxed), self.len.load(Ordering::Relaxed));
        let from = hvas.start.max(start);
        let to = hvas.end.min(start.saturating_add(len));
        (from < to).then(|| number(from - start)..number((to - start).next_multiple_of(PAGE_SIZE)))
    }

    /// The pages of the view within `range`.
    fn pages_of_view(&self, range: &Range<u64>) -> Option<Pages> {
        let (view, start) = (self.view.load(Ordering::Relaxed), self.hva.load(Ordering::Relaxed));
        if view == 0 {
            return None;
        }
        let as_guests = |at: u64| at.saturating_sub(view).saturating_add(start);
        let len = self.len.load(Ordering::Relaxed);
        (range.start < view.saturating_add(len) && range.end > view)
            .then(|| self.pages_of(&(as_guests(range.start)..as_guests(range.end))))
            .flatten()
    }

    /// The pages that are at `range`, in the guest's mapping or in the view.
    fn pages_at(&self, range: &Range<u64>) -> [Option<Pages>; 2] {
        [self.pages_of(range), self.pages_of_view(range)]
    }

    /// Does `work`, which makes pages good, while no handler marks one or puts a scratch page in place: such a page would
    /// lose its mark and stay. The caller has the lock, and does not read the area.
    fn while_no_handler_is_at_work(&self, work: impl FnOnce()) {
        // A handler counts itself in before it looks at this.
        self.clearing.store(true, Ordering::SeqCst);
        wait_for_readers(self);
        work();
        self.clearing.store(false, Ordering::SeqCst);
    }

    /// The view has guest memory at `pages` again. False, after a word about it, where the kernel does not do it: then all
    /// of `pages` are marked, those that devices have used until now included, and no device uses them. Nothing of the
    /// guest's is lost, who has its own mapping.
    fn restore(&self, pages: Pages) -> bool {
        let at = (pages.start as u64) << PAGE_SHIFT;
        let len = ((pages.end - pages.start) as u64) << PAGE_SHIFT;
        let [hva, view, offset] =
            [&self.hva, &self.view, &self.offset].map(|of| of.load(Ordering::Relaxed) + at);
        // Only of huge pages of hugetlb the file has to do, which cannot be mapped again by their address: and it is what
        // the guest has there only if nothing has taken its place.
        let is_file = self.shift.load(Ordering::Relaxed) > PAGE_SHIFT
            && !self.elsewhere().is_some_and(|bits| bits.any(pages.clone()));
        let file = is_file.then(|| (self.fd.load(Ordering::Relaxed), offset));
        let Err(error) = view::restore(hva, view, len, file) else { return true };
        log::warn!("devices cannot use guest memory at HVA {hva:#x} again: {error}");
        self.mark_known(pages);
        attempt::trip();
        // What was mapped there may be gone, and a device may be in the middle of it.
        if !view::scratch(view, len) {
            log::error!("nothing can be mapped where devices have guest memory at HVA {hva:#x}");
        }
        false
    }

    /// Makes the pages of `pages` that are marked good: the view has guest memory there again.
    fn clear(&self, pages: Pages) {
        let view = self.view.load(Ordering::Relaxed);
        let runs = self.bits().map_or_else(Vec::new, |bits| bits.runs(pages));
        for run in runs {
            if view == 0 {
                self.unmark(run);
                continue;
            }
            // One page of the host's after the other: two of them may be of different mappings.
            let mut at = run.start;
            while at < run.end {
                let whole = self.host_page(at);
                let end = whole.end.min(run.end);
                if self.restore(whole) {
                    self.unmark(at..end);
                }
                at = end;
            }
        }
    }

    /// The pages that the host loses together with page `at`.
    fn host_page(&self, at: usize) -> Pages {
        let is_small = self.elsewhere().is_some_and(|bits| bits.any(at..at + 1));
        let shift = if is_small { PAGE_SHIFT } else { self.shift.load(Ordering::Relaxed) };
        let count = 1 << (shift - PAGE_SHIFT);
        let end = number(self.len.load(Ordering::Relaxed).next_multiple_of(PAGE_SIZE));
        let first = at / count * count;
        first..(first + count).min(end)
    }
}

/// The page that `offset` is in, from the area's first.
fn number(offset: u64) -> usize {
    usize::try_from(offset >> PAGE_SHIFT).unwrap_or(usize::MAX)
}

/// An area that stays in the table meanwhile.
struct Reading(&'static Area);

impl std::ops::Deref for Reading {
    type Target = Area;

    fn deref(&self) -> &Area {
        self.0
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.readers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// All areas, for whoever has the lock, so that none comes or goes.
fn areas_under_lock() -> impl Iterator<Item = &'static Area> {
    let is_used = |area: &&Area| area.state.load(Ordering::Relaxed) == USED;
    TABLE.iter().take(END.load(Ordering::Acquire)).filter(is_used)
}

/// All areas, each as long as it is looked at. Async-signal-safe.
fn areas() -> impl Iterator<Item = Reading> {
    TABLE.iter().take(END.load(Ordering::Acquire)).filter_map(Area::read)
}

/// An area of the caller's. It goes when this is dropped.
pub(crate) struct Registered {
    area: &'static Area,
    /// The area points to it.
    _bits: [Box<Bits>; 3],
    view: Option<View>,
    /// The process that made it: in a child there are no readers to be waited for.
    pid: u32,
    hvas: Range<u64>,
}

impl std::fmt::Debug for Registered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registered")
            .field("hvas", &self.hvas)
            .field("view", &self.view)
            .finish_non_exhaustive()
    }
}

impl Registered {
    /// The memory.
    pub(crate) fn hvas(&self) -> &Range<u64> {
        &self.hvas
    }

    #[cfg(any(test, feature = "vm-memory"))]
    pub(super) fn area(&self) -> &'static Area {
        self.area
    }

    /// Host address of the view.
    #[cfg(feature = "vm-memory")]
    pub(super) fn view(&self) -> Option<u64> {
        self.view.as_ref().map(|view| view.hva)
    }
}

/// Puts the memory at `hvas` into the table, in pages of `1 << shift` bytes.
///
/// # Errors
/// There are as many areas as there can be, or there is no memory.
pub(crate) fn register(hvas: &Range<u64>, shift: u8) -> io::Result<Registered> {
    enter(hvas, shift, None)
}

/// As [`register`], with a view: `fd` is the file that is mapped at `hvas`, from `offset` on, and stays open as long.
#[cfg(feature = "vm-memory")]
pub(super) fn register_with_view(
    hvas: &Range<u64>,
    shift: u8,
    fd: RawFd,
    offset: u64,
) -> io::Result<Registered> {
    enter(hvas, shift, Some(View::new(fd, offset, hvas.end - hvas.start)?))
}

fn enter(hvas: &Range<u64>, shift: u8, view: Option<View>) -> io::Result<Registered> {
    let len = hvas.end - hvas.start;
    let count = number(len.next_multiple_of(PAGE_SIZE));
    let bits = || Bits::new(count).map(Box::new).ok_or(io::ErrorKind::OutOfMemory);
    let (bits, known, elsewhere) = (bits()?, bits()?, bits()?);
    let _change = change();
    let is_free = |area: &&Area| area.state.load(Ordering::Acquire) == FREE;
    let index = TABLE.iter().position(|area| is_free(&area)).ok_or_else(|| {
        io::Error::other(format!("a process may have {AREAS} stretches of guest memory"))
    })?;
    let area = &TABLE[index];
    area.state.store(CHANGING, Ordering::SeqCst);
    wait_for_readers(area);
    area.hva.store(hvas.start, Ordering::Relaxed);
    area.len.store(len, Ordering::Relaxed);
    area.shift.store(shift.max(PAGE_SHIFT), Ordering::Relaxed);
    let of_view = view.as_ref().map_or((0, -1, 0), |view| (view.hva, view.fd, view.offset));
    area.view.store(of_view.0, Ordering::Relaxed);
    area.fd.store(of_view.1, Ordering::Relaxed);
    area.offset.store(of_view.2, Ordering::Relaxed);
    area.marked.store(0, Ordering::Relaxed);
    area.bad.store((&raw const *bits).cast_mut(), Ordering::Release);
    area.known.store((&raw const *known).cast_mut(), Ordering::Release);
    area.elsewhere.store((&raw const *elsewhere).cast_mut(), Ordering::Release);
    // What is known of the same memory by another name.
    for other in areas() {
        let Some(theirs) = other.pages_of(hvas) else { continue };
        let start = other.hva.load(Ordering::Relaxed);
        let at = |page: usize| start + ((page as u64) << PAGE_SHIFT);
        let runs = |of: Option<&Bits>| of.map_or_else(Vec::new, |of| of.runs(theirs.clone()));
        let own = |run: Pages| area.pages_of(&(at(run.start)..at(run.end)));
        runs(other.bits()).into_iter().filter_map(own).for_each(|own| area.mark(own));
        runs(other.known()).into_iter().filter_map(own).for_each(|own| area.mark_known(own));
    }
    END.fetch_max(index + 1, Ordering::AcqRel);
    area.state.store(USED, Ordering::SeqCst);
    let (pid, hvas) = (std::process::id(), hvas.clone());
    Ok(Registered { area, _bits: [bits, known, elsewhere], view, pid, hvas })
}

fn wait_for_readers(area: &Area) {
    // A reader does a few loads and stores.
    while area.readers.load(Ordering::SeqCst) != 0 {
        std::thread::yield_now();
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if self.pid != std::process::id() {
            // The lock may be held, and readers be counted, by threads that are not here.
            return;
        }
        let _change = change();
        self.area.state.store(CHANGING, Ordering::SeqCst);
        wait_for_readers(self.area);
        MARKED.fetch_sub(self.area.marked.load(Ordering::Relaxed), Ordering::AcqRel);
        self.area.bad.store(null_mut(), Ordering::Release);
        self.area.known.store(null_mut(), Ordering::Release);
        self.area.elsewhere.store(null_mut(), Ordering::Release);
        self.area.state.store(FREE, Ordering::SeqCst);
    }
}

/// The memory at each of `all`, guest RAM as the guest has it, is bad.
pub(crate) fn mark(all: impl IntoIterator<Item = Range<u64>>) {
    let _change = change();
    for hvas in all {
        for area in areas() {
            if let Some(pages) = area.pages_of(&hvas) {
                area.mark_known(pages);
            }
        }
    }
    doubt::settled();
}

/// The marked stretches of the memory at `hvas`, some of them perhaps more than once.
pub(crate) fn marked(hvas: &Range<u64>) -> Vec<Range<u64>> {
    let _change = change();
    let mut all = Vec::new();
    for area in areas_under_lock() {
        let (Some(pages), Some(bits)) = (area.pages_of(hvas), area.bits()) else { continue };
        let at = |page: usize| area.hva.load(Ordering::Relaxed) + ((page as u64) << PAGE_SHIFT);
        all.extend(bits.runs(pages).into_iter().map(|run| at(run.start)..at(run.end)));
    }
    all
}

/// Whether devices have a view of any of the memory at `hvas`.
pub(crate) fn has_view(hvas: &Range<u64>) -> bool {
    areas().any(|area| area.view.load(Ordering::Relaxed) != 0 && area.pages_of(hvas).is_some())
}

/// The memory at `hvas` is good, whatever was known of it.
pub(crate) fn clear(hvas: &Range<u64>) {
    if MARKED.load(Ordering::Relaxed) == 0 {
        return;
    }
    let _change = change();
    for area in areas_under_lock() {
        if let Some(pages) = area.pages_of(hvas) {
            area.while_no_handler_is_at_work(|| area.clear(pages));
        }
    }
    doubt::settled();
}

/// Of the memory at `hvas` only the pages at `bad`, ascending, are bad.
pub(crate) fn mark_only(hvas: &Range<u64>, bad: &[Range<u64>]) {
    gaps(hvas, bad).iter().for_each(clear);
}

/// What is between the stretches of `bad`, ascending, within `hvas`.
fn gaps(hvas: &Range<u64>, bad: &[Range<u64>]) -> Vec<Range<u64>> {
    let (mut at, mut gaps) = (hvas.start, Vec::new());
    for next in bad.iter().chain([&(hvas.end..hvas.end)]) {
        if at < next.start {
            gaps.push(at..next.start);
        }
        at = next.end;
    }
    gaps
}

/// Other memory than the file lies at `hvas`, in small pages; all of it is good but the pages at `bad`, ascending.
pub(crate) fn replaced(hvas: &Range<u64>, bad: &[Range<u64>]) {
    let _change = change();
    for area in areas_under_lock() {
        let Some(pages) = area.pages_of(hvas) else { continue };
        area.while_no_handler_is_at_work(|| {
            if let Some(elsewhere) = area.elsewhere() {
                elsewhere.set(pages.clone());
            }
            // What is bad is never unmarked: in the view it would be a page of zeros. What is good is waited for.
            area.mark(pages.clone());
            bad.iter().filter_map(|bad| area.pages_of(bad)).for_each(|bad| area.mark_known(bad));
            if area.view.load(Ordering::Relaxed) == 0 || area.restore(pages) {
                for good in gaps(hvas, bad) {
                    area.pages_of(&good).into_iter().for_each(|pages| area.unmark(pages));
                }
            }
        });
    }
    doubt::settled();
}

/// The memory at `hvas` is good but for the pages at `bad`, and may be other memory than before: that of a guest that
/// starts over. It comes in pages of `1 << shift` bytes: a stand-in of an earlier boot in smaller ones than the file's.
pub(crate) fn all_new(hvas: &Range<u64>, shift: u8, bad: &[Range<u64>]) {
    let _change = change();
    for area in areas_under_lock() {
        let Some(pages) = area.pages_of(hvas) else { continue };
        area.while_no_handler_is_at_work(|| {
            if let Some(elsewhere) = area.elsewhere() {
                match shift < area.shift.load(Ordering::Relaxed) {
                    true => elsewhere.set(pages.clone()),
                    false => elsewhere.clear(pages.clone()),
                };
            }
            area.clear(pages);
        });
        // A page that nobody knew of was exchanged, too, and the view's page tables still call it bad.
        let view = area.view.load(Ordering::Relaxed);
        let start = area.hva.load(Ordering::Relaxed);
        if view != 0 {
            let from = hvas.start.max(start) - start;
            let to = hvas.end.min(start + area.len.load(Ordering::Relaxed)) - start;
            view::forget(view + from, to - from);
        }
        for pages in bad.iter().filter_map(|bad| area.pages_of(bad)) {
            area.mark_known(pages);
        }
    }
    doubt::settled();
}

/// Whether any page of this process's guest RAM is known to be bad.
#[inline]
pub(crate) fn is_any_marked() -> bool {
    MARKED.load(Ordering::Relaxed) != 0
}

/// Whether a page of the `len` bytes of guest RAM at host address `hva` is known to be bad. While none is in this process,
/// that is one relaxed load; it takes no lock.
#[must_use]
#[inline]
pub fn is_bad(hva: u64, len: u64) -> bool {
    MARKED.load(Ordering::Relaxed) != 0 && len > 0 && is_any_bad(hva, len)
}

#[cold]
fn is_any_bad(hva: u64, len: u64) -> bool {
    let hvas = hva & !(PAGE_SIZE - 1)..hva.saturating_add(len);
    areas().any(|area| {
        let is_marked = |pages| area.bits().is_some_and(|bits| bits.any(pages));
        area.pages_at(&hvas).into_iter().flatten().any(is_marked)
    })
}

/// As [`is_bad`], but what a handler has marked and no relay has looked at yet is waited for.
#[inline]
pub(super) fn refuses(hva: u64, len: u64) -> bool {
    is_bad(hva, len) && is_bad_for_sure(hva, len)
}

#[cold]
fn is_bad_for_sure(hva: u64, len: u64) -> bool {
    let hvas = hva & !(PAGE_SIZE - 1)..hva.saturating_add(len);
    let in_doubt = |area: Reading| {
        area.pages_at(&hvas).into_iter().flatten().any(|pages| area.is_in_doubt(pages))
    };
    doubt::wait_while(|| areas().any(in_doubt));
    is_any_bad(hva, len)
}

/// An address of guest RAM.
pub(super) struct Found {
    area: Reading,
    /// Bytes from the area's first.
    at: u64,
    /// It is the view's address, and not the guest's.
    pub(super) in_view: bool,
}

/// As [`find`], when nobody makes pages of that area good. Async-signal-safe: whoever does waits for no handler that waits
/// here, and touches no view.
pub(super) fn find_at_rest(addr: u64) -> Option<Found> {
    loop {
        let found = find(addr)?;
        if !found.area.clearing.load(Ordering::SeqCst) {
            return Some(found);
        }
        drop(found);
        std::hint::spin_loop();
    }
}

/// Whose memory `addr` is in; of several areas of the same memory one that has a view. Async-signal-safe.
pub(super) fn find(addr: u64) -> Option<Found> {
    let within = |start: u64, area: &Reading| {
        let at = addr.checked_sub(start)?;
        (start != 0 && at < area.len.load(Ordering::Relaxed)).then_some(at)
    };
    let mut without_view = None;
    for area in areas() {
        let view = area.view.load(Ordering::Relaxed);
        let by_view = within(view, &area).map(|at| (at, true));
        let found = by_view
            .or_else(|| within(area.hva.load(Ordering::Relaxed), &area).map(|at| (at, false)));
        let Some((at, in_view)) = found else { continue };
        let found = Found { area, at, in_view };
        if view != 0 {
            return Some(found);
        }
        without_view.get_or_insert(found);
    }
    without_view
}

/// Where the guest has the memory that devices have at `hva`; `hva` itself where that is no view.
pub(crate) fn as_the_guest_has_it(hva: u64) -> u64 {
    find(hva).filter(|found| found.in_view).map_or(hva, |found| found.hva())
}

impl Found {
    /// The host address at which the guest has it. Async-signal-safe.
    pub(super) fn hva(&self) -> u64 {
        self.area.hva.load(Ordering::Relaxed) + self.at
    }

    /// The other address of the same memory, where there is a view. Async-signal-safe.
    pub(super) fn other_name(&self) -> Option<u64> {
        match self.area.view.load(Ordering::Relaxed) {
            0 => None,
            _ if self.in_view => Some(self.hva()),
            view => Some(view + self.at),
        }
    }

    /// Whether the page of 4 KiB is marked, and whether a relay has looked at it and knows it to be bad. Async-signal-safe.
    pub(super) fn is_marked(&self) -> (bool, bool) {
        let page = number(self.at);
        let any = |bits: Option<&Bits>| bits.is_some_and(|bits| bits.any(page..page + 1));
        (any(self.area.bits()), any(self.area.known()))
    }

    /// Marks the page of 4 KiB. Async-signal-safe.
    pub(super) fn mark(&self) {
        let page = number(self.at);
        self.area.mark(page..page + 1);
    }

    /// Puts zeros in the place of the host's page, for devices: `1 << lsb` bytes at least. False where the kernel does not
    /// do it. Async-signal-safe.
    pub(super) fn scratch(&self, lsb: u8) -> bool {
        let page = number(self.at);
        let is_small = self.area.elsewhere().is_some_and(|bits| bits.any(page..page + 1));
        let least = if is_small { PAGE_SHIFT } else { self.area.shift.load(Ordering::Relaxed) };
        let shift = least.max(lsb).min(MAX_SHIFT);
        let size = 1_u64 << shift;
        // As the guest's mapping is aligned, which the relay goes by.
        let hva = self.area.hva.load(Ordering::Relaxed);
        let first = (hva + self.at) & !(size - 1);
        let start = first.saturating_sub(hva);
        let end = (first.saturating_add(size) - hva).min(self.area.len.load(Ordering::Relaxed));
        // First the mark, then the number, then the page: see `Attempt`.
        self.area.mark(number(start)..number(end.next_multiple_of(PAGE_SIZE)));
        attempt::trip();
        view::scratch(self.area.view.load(Ordering::Relaxed) + start, end - start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Addresses at which nothing is mapped.
    const HVA: u64 = 0x1000_0000_0000;
    const PAGE: u64 = PAGE_SIZE;

    #[test]
    fn a_page_is_bad_by_all_its_names_until_it_is_good() {
        let (hva, len) = (HVA, 300 * PAGE);
        let area = register(&(hva..hva + len), 12).unwrap();
        mark(Some(hva + 5 * PAGE..hva + 6 * PAGE));
        // Half of it again, and more.
        let half = register(&(hva + 5 * PAGE..hva + 2 * len), 12).unwrap();
        assert!(!is_bad(hva + 5 * PAGE, 0) && !area.area().is_bad(5 * PAGE, 0));
        assert!(is_bad(hva + 5 * PAGE + 4095, 1) && is_bad(hva, len) && !is_bad(hva, 5 * PAGE));
        assert!(half.area().is_bad(0, 1) && !half.area().is_bad(PAGE, len));
        mark(Some(hva + 299 * PAGE..hva + 301 * PAGE));
        assert!(area.area().is_bad(299 * PAGE, 1) && half.area().is_bad(295 * PAGE, 1));
        drop(area);
        assert!(is_bad(hva + 300 * PAGE, 1), "of the other");
        clear(&(hva..hva + 300 * PAGE));
        assert!(!is_bad(hva, 300 * PAGE) && is_bad(hva + 300 * PAGE, PAGE));
        all_new(&(hva..hva + 2 * len), 12, std::slice::from_ref(&(hva + 7 * PAGE..hva + 8 * PAGE)));
        assert!(is_bad(hva + 7 * PAGE, 1) && !is_bad(hva + 8 * PAGE, len));
        drop(half);
        assert!(!is_bad(hva, 2 * len));
    }

    /// The kernel unmaps what is in the way before it maps: what devices have beside the page that is to be good again is
    /// gone, too.
    #[test]
    #[cfg(feature = "vm-memory")]
    fn where_a_huge_page_cannot_be_restored_devices_have_zeros_and_none_of_it() {
        use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
        const HUGE: u64 = 2 << 20;
        // SAFETY: takes a string, and gives a new descriptor, which nobody else owns.
        let file = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"ram".as_ptr(), 0)) };
        // SAFETY: takes numbers only.
        assert_eq!(unsafe { libc::ftruncate(file.as_raw_fd(), 4 << 20) }, 0);
        let hva = HVA << 3;
        let area = register_with_view(&(hva..hva + 2 * HUGE), 21, file.as_raw_fd(), 0).unwrap();
        let view = usize::try_from(area.view().unwrap()).unwrap();
        let at = |offset: usize| std::ptr::with_exposed_provenance_mut::<u8>(view + offset);
        for offset in [0, 0x5000, 2 << 20] {
            // SAFETY: of the view, which this test has alone.
            unsafe { at(offset).write_volatile(7) };
        }
        mark(Some(hva + 5 * PAGE..hva + 6 * PAGE));
        let attempt = attempt::Attempt::begin();
        // As it is in the middle of a mapping that fails; and it does, as there is no file.
        // SAFETY: the first half of the view, to which no reference leads.
        assert_eq!(unsafe { libc::munmap(at(0).cast(), 2 << 20) }, 0);
        area.area().fd.store(-1, Ordering::Relaxed);
        clear(&(hva..hva + 2 * HUGE));
        assert!(is_bad(hva, 1) && is_bad(hva + HUGE - 1, 1) && !is_bad(hva + HUGE, HUGE));
        assert!(!attempt.is_clean(), "a device that is at work there learns of it");
        for (offset, byte) in [(0, 0), (0x5000, 0), (2 << 20, 7)] {
            // SAFETY: as above; it is mapped.
            assert_eq!(unsafe { at(offset).read_volatile() }, byte, "{offset:#x}");
        }
    }

    /// A relay has an area of its own for the memory, and may come to stand before that of the devices.
    #[test]
    #[cfg(feature = "vm-memory")]
    fn an_address_is_found_where_there_is_a_view() {
        use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
        // SAFETY: takes a string, and gives a new descriptor, which nobody else owns.
        let file = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"ram".as_ptr(), 0)) };
        // SAFETY: takes numbers only.
        assert_eq!(unsafe { libc::ftruncate(file.as_raw_fd(), 8192) }, 0);
        let hvas = HVA << 4..(HVA << 4) + 2 * PAGE;
        let before = register(&hvas, 12).unwrap();
        let viewed = register_with_view(&hvas, 12, file.as_raw_fd(), 0).unwrap();
        let behind = register(&hvas, 12).unwrap();
        let other = || find(hvas.start + 5000).unwrap().other_name();
        assert_eq!(other(), viewed.view().map(|view| view + 5000));
        drop(before);
        assert!(other().is_some());
        drop(viewed);
        assert_eq!(other(), None);
        drop(behind);
    }

    #[test]
    fn an_address_is_found_in_one_area_alone() {
        let hva = HVA << 1;
        let area = register(&(hva..hva + 2 * PAGE), 12).unwrap();
        for (addr, found) in
            [(hva - 1, false), (hva, true), (hva + 8191, true), (hva + 8192, false)]
        {
            assert_eq!(find(addr).is_some(), found, "{addr:#x}");
        }
        let found = find(hva + 5000).unwrap();
        assert_eq!((found.hva(), found.in_view), (hva + 5000, false));
        found.mark();
        drop(found);
        assert!(area.area().is_bad(4096, 1) && !area.area().is_bad(0, 4096));
    }

    #[test]
    fn readers_meet_no_area_that_has_gone() {
        let hva = HVA << 2;
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        is_any_bad(hva, 64 * PAGE);
                        if let Some(found) = find(hva + 3 * PAGE) {
                            assert_eq!(found.hva(), hva + 3 * PAGE);
                            found.mark();
                        }
                    }
                });
            }
            for round in 0..2000 {
                let area = register(&(hva..hva + (4 + round % 64) * PAGE), 12).unwrap();
                mark(Some(hva..hva + PAGE));
                assert!(area.area().is_bad(0, 1));
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(!is_bad(hva, 1 << 20));
    }
}
