//! Guest RAM as intervals: host virtual address to every guest-physical address that shows it,
//! and back.
//!
//! One host page may appear in the guest at several guest-physical addresses (aliases). A guest that loses the page
//! loses it at each of them, and has to be told of each, so a lookup returns a list.

use std::ops::Range;

use crate::types::{PAGE_SHIFT, PAGE_SIZE};

/// [`PAGE_SIZE`] as the standard library's iterators want it; 4096 fits any usize.
const PAGE_STEP: usize = 1 << PAGE_SHIFT;

/// One stretch of guest RAM: `len` bytes at guest-physical `gpa`, mapped by this process at `hva`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRegion {
    hva: u64,
    gpa: u64,
    len: u64,
    page_shift: u8,
}

impl RamRegion {
    /// `len` bytes of this process's memory at host address `hva`, which the guest has at guest-physical `gpa`, in
    /// pages of 4 KiB, which the host loses one at a time. All three are multiples of 4 KiB, and `len` is not 0;
    /// [`RamMap::new`] returns an error if they are not.
    ///
    /// # Safety
    /// The owner of the region, or of a map or relay that was made with it, may write to this memory by safe calls
    /// ([`Handle::write`](crate::Handle::write)), and the relay writes the error source's page. So as long as one of
    /// them exists, and until [`Handle::remove_ram`](crate::Handle::remove_ram) has returned, `hva..hva + len` maps
    /// guest memory, which the guest may change at any time, or nothing at all; and no Rust reference leads there.
    #[must_use]
    #[allow(unsafe_code, reason = "a promise about memory")]
    pub const unsafe fn new(hva: u64, gpa: u64, len: u64) -> Self {
        Self::unwritten(hva, gpa, len)
    }

    /// As [`Self::new`], for memory that is never written by way of the region.
    pub(crate) const fn unwritten(hva: u64, gpa: u64, len: u64) -> Self {
        Self { hva, gpa, len, page_shift: PAGE_SHIFT }
    }

    /// The same region in pages of `1 << page_shift` bytes, which the host loses as a whole: 12 (4 KiB), or for hugetlb
    /// 21 (2 MiB) or 30 (1 GiB). Memory in transparent huge pages has 12: the host splits those.
    #[must_use]
    pub const fn in_pages_of(self, page_shift: u8) -> Self {
        Self { page_shift, ..self }
    }

    /// Host virtual address of its first byte.
    #[must_use]
    pub const fn hva(&self) -> u64 {
        self.hva
    }

    /// Guest-physical address of its first byte.
    #[must_use]
    pub const fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Length in bytes.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "none is empty")]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// `log2` of the size in bytes of the pages that the host loses as a whole: 12, 21 or 30.
    #[must_use]
    pub const fn page_shift(&self) -> u8 {
        self.page_shift
    }

    fn hvas(&self) -> Range<u64> {
        self.hva..self.hva + self.len
    }
}

/// `log2` of x86's usual huge page.
#[cfg(feature = "vm-memory")]
const HUGETLB_SHIFT: u8 = 21;

#[cfg(feature = "vm-memory")]
impl RamRegion {
    /// The regions of `memory`, in the page sizes of the files behind them. The page size of anonymous hugetlb memory
    /// cannot be found out: it is taken for 2 MiB, and the caller corrects it by [`Self::in_pages_of`]. Memory that the
    /// VMM gives the guest beside `memory` (in a memory slot of its own) has to be added by [`Self::new`].
    ///
    /// # Errors
    /// A region is not mapped by this process.
    ///
    /// # Safety
    /// As for [`Self::new`]: the memory stays mapped, or nothing takes its place, as long as one of the regions is in
    /// use.
    #[allow(unsafe_code, reason = "a promise about memory")]
    pub unsafe fn all_of(
        memory: &impl vm_memory::GuestMemoryBackend,
    ) -> Result<Vec<Self>, vm_memory::GuestMemoryError> {
        use vm_memory::{Address, GuestMemoryRegion, MemoryRegionAddress};
        let one = |region: &_| {
            let hva = GuestMemoryRegion::get_host_address(region, MemoryRegionAddress(0))?;
            let gpa = GuestMemoryRegion::start_addr(region).raw_value();
            let hva = hva.expose_provenance() as u64;
            let page_shift = match GuestMemoryRegion::file_offset(region) {
                Some(of) => super::page_size::page_shift(of.file()),
                None if GuestMemoryRegion::is_hugetlbfs(region) == Some(true) => HUGETLB_SHIFT,
                None => PAGE_SHIFT,
            };
            let region = Self::unwritten(hva, gpa, GuestMemoryRegion::len(region));
            Ok(region.in_pages_of(page_shift))
        };
        memory.iter().map(one).collect()
    }
}

/// Why a list of regions is not a description of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RamError {
    /// An address or length is not a multiple of the page size.
    #[error("guest RAM region at GPA {gpa:#x} (HVA {hva:#x}, {len:#x} bytes): expected multiples of 4 KiB", gpa = .0.gpa, hva = .0.hva, len = .0.len)]
    Misaligned(RamRegion),
    /// The region is empty, or runs past the end of an address space.
    #[error("guest RAM region at GPA {gpa:#x} (HVA {hva:#x}) has an impossible length of {len:#x} bytes", gpa = .0.gpa, hva = .0.hva, len = .0.len)]
    BadLength(RamRegion),
    /// The pages that the region is said to be made of are none that x86 has.
    #[error("guest RAM region at GPA {gpa:#x}: pages of 2^{shift} bytes; expected 12, 21 or 30", gpa = .0.gpa, shift = .0.page_shift)]
    PageSize(RamRegion),
    /// Two regions claim the same guest-physical address.
    #[error("guest RAM regions at GPA {:#x} and GPA {:#x} overlap", .0.gpa, .1.gpa)]
    Overlap(RamRegion, RamRegion),
    /// The region holds the ACPI error source's page, which the relay writes as long as it runs.
    #[error("the region at GPA {gpa:#x} holds the error source's page, GPA {page:#x}, and stays")]
    Source {
        /// Guest-physical address of the region.
        gpa: u64,
        /// Guest-physical address of the page.
        page: u64,
    },
    /// No region begins at this address, so none can be removed.
    #[error("there is no region of guest RAM that begins at GPA {gpa:#x}")]
    NoRegion {
        /// Guest-physical address as it was given.
        gpa: u64,
    },
}

/// A range of host addresses that the same regions show throughout.
#[derive(Debug)]
struct Segment {
    hva: Range<u64>,
    /// The lowest guest-physical address of its first byte.
    gpa: u64,
    /// Where in [`RamMap::aliases`] the other ones are, ascending. Most have none.
    aliases: Range<usize>,
    /// The largest of its regions, or 12 where it is a stand-in.
    page_shift: u8,
    /// Ordinary memory has taken the place of a huge page there.
    is_stand_in: bool,
}

/// The guest-physical addresses that show a byte, ascending: see [`RamMap::gpas`].
#[derive(Debug, Clone)]
struct Gpas<'a> {
    /// The next one, kept apart from the others because it is nearly always the only one.
    next: Option<u64>,
    /// Those after it, less `offset`.
    aliases: &'a [u64],
    offset: u64,
}

impl Iterator for Gpas<'_> {
    type Item = u64;

    #[inline]
    fn next(&mut self) -> Option<u64> {
        let gpa = self.next?;
        self.next = self.aliases.split_off_first().map(|alias| alias + self.offset);
        Some(gpa)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.aliases.len() + usize::from(self.next.is_some());
        (left, Some(left))
    }
}

impl ExactSizeIterator for Gpas<'_> {}

/// Guest RAM, indexed both ways. Lookups are binary searches; one by host address takes some 25 ns among
/// 10,000 regions.
#[derive(Debug)]
pub struct RamMap {
    segments: Vec<Segment>,
    /// Where each segment ends: a list of its own, so that a search touches no other memory.
    ends: Vec<u64>,
    aliases: Vec<u64>,
    by_gpa: Vec<RamRegion>,
    /// Host addresses where ordinary memory has taken the place of huge pages.
    stand_ins: Vec<Range<u64>>,
}

impl RamMap {
    /// Indexes `regions`, in any order. Host addresses may overlap (aliases), guest ones may not.
    ///
    /// # Errors
    /// See [`RamError`].
    pub fn new(regions: &[RamRegion]) -> Result<Self, RamError> {
        for region in regions {
            if (region.hva | region.gpa | region.len) % PAGE_SIZE != 0 {
                return Err(RamError::Misaligned(*region));
            }
            let fits = |start: u64| start.checked_add(region.len).is_some();
            if region.len == 0 || !fits(region.hva) || !fits(region.gpa) {
                return Err(RamError::BadLength(*region));
            }
            if ![12, 21, 30].contains(&region.page_shift) {
                return Err(RamError::PageSize(*region));
            }
        }
        let mut by_gpa = regions.to_vec();
        by_gpa.sort_unstable_by_key(|region| region.gpa);
        for pair in by_gpa.windows(2) {
            if pair[0].gpa + pair[0].len > pair[1].gpa {
                return Err(RamError::Overlap(pair[0], pair[1]));
            }
        }
        Ok(Self::index(by_gpa, Vec::new()))
    }

    /// Cuts the host addresses at every start and end of a region, and of a stand-in.
    fn index(by_gpa: Vec<RamRegion>, stand_ins: Vec<Range<u64>>) -> Self {
        let mut by_hva = by_gpa.clone();
        by_hva.sort_by_key(|region| region.hva);
        let mut cuts: Vec<u64> =
            by_hva.iter().flat_map(|region| [region.hva, region.hva + region.len]).collect();
        cuts.extend(stand_ins.iter().flat_map(|range| [range.start, range.end]));
        cuts.sort_unstable();
        cuts.dedup();

        let mut segments = Vec::with_capacity(cuts.len());
        let mut aliases = Vec::new();
        let mut starting = by_hva.iter().peekable();
        let mut open: Vec<&RamRegion> = Vec::new();
        for cut in cuts.windows(2) {
            let hva = cut[0]..cut[1];
            open.retain(|region| region.hvas().end > hva.start);
            while let Some(region) = starting.next_if(|region| region.hva <= hva.start) {
                open.push(region);
            }
            let gpa = |region: &&RamRegion| region.gpa + (hva.start - region.hva);
            let mut gpas: Vec<u64> = open.iter().map(gpa).collect();
            gpas.sort_unstable();
            let Some((first, others)) = gpas.split_first() else { continue };
            let at = aliases.len();
            aliases.extend_from_slice(others);
            let is_stand_in = stand_ins.iter().any(|range| range.contains(&hva.start));
            let mapped = open.iter().map(|region| region.page_shift).max();
            let page_shift = mapped.filter(|_| !is_stand_in).unwrap_or(PAGE_SHIFT);
            let aliases = at..aliases.len();
            segments.push(Segment { hva, gpa: *first, aliases, page_shift, is_stand_in });
        }
        let ends = segments.iter().map(|segment| segment.hva.end).collect();
        Self { segments, ends, aliases, by_gpa, stand_ins }
    }

    /// The same with one region more, as after plugging memory in.
    ///
    /// # Errors
    /// See [`RamError`].
    pub fn with(&self, region: RamRegion) -> Result<Self, RamError> {
        let mut regions = self.by_gpa.clone();
        regions.push(region);
        Ok(Self::index(Self::new(&regions)?.by_gpa, self.stand_ins.clone()))
    }

    /// The same where ordinary memory has taken the place of the huge page at `hvas`.
    pub(crate) fn with_stand_in(&self, hvas: Range<u64>) -> Self {
        let mut stand_ins = self.stand_ins.clone();
        stand_ins.push(hvas);
        Self::index(self.by_gpa.clone(), stand_ins)
    }

    /// Whether all of `hvas` is guest RAM.
    pub(crate) fn covers(&self, hvas: &Range<u64>) -> bool {
        let mut at = hvas.start;
        while at < hvas.end {
            let Some(segment) = self.segment(at) else { return false };
            at = segment.hva.end;
        }
        true
    }

    /// Whether ordinary memory has taken the place of a huge page at `hva`.
    pub(crate) fn is_stand_in(&self, hva: u64) -> bool {
        self.segment(hva).is_some_and(|segment| segment.is_stand_in)
    }

    /// The same without the region that begins at guest-physical `gpa`; returns the new map and that region.
    ///
    /// # Errors
    /// There is none.
    pub fn without(&self, gpa: u64) -> Result<(Self, RamRegion), RamError> {
        let mut regions = self.by_gpa.clone();
        let at = regions.iter().position(|region| region.gpa == gpa);
        let gone = regions.remove(at.ok_or(RamError::NoRegion { gpa })?);
        let mut stand_ins = self.stand_ins.clone();
        // It is there as long as a region shows it.
        stand_ins.retain(|range| regions.iter().any(|region| region.hvas().contains(&range.start)));
        Ok((Self::index(Self::new(&regions)?.by_gpa, stand_ins), gone))
    }

    #[inline]
    fn segment(&self, hva: u64) -> Option<&Segment> {
        let at = self.ends.partition_point(|end| *end <= hva);
        self.segments.get(at).filter(|segment| segment.hva.start <= hva)
    }

    /// The guest-physical addresses of the byte `offset` bytes behind the start of `segment`.
    #[inline]
    fn gpas_of(&self, segment: &Segment, offset: u64) -> Gpas<'_> {
        let aliases = &self.aliases[segment.aliases.clone()];
        Gpas { next: Some(segment.gpa + offset), aliases, offset }
    }

    /// Every guest-physical address that shows the byte at host address `hva`, ascending; empty
    /// when it is not guest RAM.
    #[inline]
    pub fn gpas(&self, hva: u64) -> impl ExactSizeIterator<Item = u64> + use<'_> {
        match self.segment(hva) {
            Some(segment) => self.gpas_of(segment, hva - segment.hva.start),
            None => Gpas { next: None, aliases: &[], offset: 0 },
        }
    }

    /// `log2` of the bytes that are lost when `hva` is and its signal says `lsb`. The mapping's page size counts as
    /// well as the signal's: signals from KVM_RUN always say 12, even if a huge page is lost as a whole.
    pub fn extent(&self, hva: u64, lsb: u8) -> u8 {
        let mapped = self.page_shift(hva);
        if self.is_stand_in(hva) {
            // A signal that is late speaks of the huge page.
            return mapped;
        }
        // More than an address has is nonsense.
        if lsb < 64 { lsb.max(mapped) } else { mapped }
    }

    /// [`RamRegion::page_shift`] of the region at `hva`.
    pub(crate) fn page_shift(&self, hva: u64) -> u8 {
        self.segment(hva).map_or(PAGE_SHIFT, |segment| segment.page_shift)
    }

    /// The host address of the byte at guest-physical `gpa`, or `None` when it is not guest RAM.
    pub fn hva(&self, gpa: u64) -> Option<u64> {
        self.region(gpa).map(|region| region.hva + (gpa - region.gpa))
    }

    /// The region that holds guest-physical `gpa`.
    pub fn region(&self, gpa: u64) -> Option<&RamRegion> {
        let at = self.by_gpa.partition_point(|region| region.gpa + region.len <= gpa);
        self.by_gpa.get(at).filter(|region| region.gpa <= gpa)
    }

    /// The (HVA, GPA) of every 4 KiB page of guest RAM in the extent that is lost when `hva` is and its signal says
    /// `lsb` (see [`Self::extent`]); the extent is clipped to guest RAM.
    pub fn pages(&self, hva: u64, lsb: u8) -> Vec<(u64, u64)> {
        let size = 1u64 << self.extent(hva, lsb);
        let start = hva & !(size - 1);
        let end = start.saturating_add(size);
        let first = self.ends.partition_point(|end| *end <= start);
        let mut pages = Vec::new();
        for segment in self.segments[first..].iter().take_while(|s| s.hva.start < end) {
            let clipped = segment.hva.start.max(start)..segment.hva.end.min(end);
            for page in clipped.step_by(PAGE_STEP) {
                let offset = page - segment.hva.start;
                pages.extend(self.gpas_of(segment, offset).map(|gpa| (page, gpa)));
            }
        }
        pages
    }

    /// The host addresses of guest RAM: ranges that do not overlap, ascending.
    pub fn hvas(&self) -> impl Iterator<Item = Range<u64>> {
        self.segments.iter().map(|segment| segment.hva.clone())
    }

    /// The regions, by guest-physical address.
    pub fn regions(&self) -> &[RamRegion] {
        &self.by_gpa
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[cfg(feature = "vm-memory")]
    #[test]
    fn a_map_of_vm_memorys_regions() {
        use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
        let regions = [(GuestAddress(0), 0x1000), (GuestAddress(0x10_0000), 0x3000)];
        let memory = GuestMemoryMmap::<()>::from_ranges(&regions).unwrap();
        #[allow(unsafe_code, reason = "as in the item")]
        // SAFETY: `memory` outlives the regions and their map.
        let regions = unsafe { RamRegion::all_of(&memory) };
        let map = RamMap::new(&regions.unwrap()).unwrap();
        let hva = memory.get_host_address(GuestAddress(0x10_1000)).unwrap().addr() as u64;
        assert!(map.gpas(hva).eq([0x10_1000]));
        assert_eq!(map.regions().len(), 2);
    }

    const G: u64 = 1 << 30;

    fn region(hva: u64, gpa: u64, len: u64) -> RamRegion {
        RamRegion::unwritten(hva, gpa, len)
    }

    #[test]
    fn a_huge_page_is_lost_as_a_whole_whatever_the_signal_says() {
        let huge = RamRegion { page_shift: 21, ..region(0x4000_0000, 0x1000_0000, 4 << 20) };
        let map = RamMap::new(&[region(0x2000_0000, 0, 4 << 20), huge]).unwrap();
        let pages = map.pages(0x4020_3456, 12);
        assert_eq!(pages.len(), 512);
        assert_eq!(pages[0], (0x4020_0000, 0x1020_0000));
        assert_eq!(pages[511], (0x403f_f000, 0x103f_f000));
        assert_eq!(map.pages(0x2020_3456, 12).len(), 1, "a page of its neighbour");
        assert_eq!((map.extent(0x4020_3456, 12), map.extent(0x2020_3456, 200)), (21, 12));
        let odd = RamRegion { page_shift: 13, ..huge };
        assert!(RamMap::new(&[odd]).unwrap_err().to_string().contains("2^13"));
    }

    #[test]
    fn what_has_taken_the_place_of_a_huge_page_is_lost_page_by_page() {
        let huge = RamRegion { page_shift: 21, ..region(0x4000_0000, 0x1000_0000, 6 << 20) };
        let map = RamMap::new(&[huge]).unwrap().with_stand_in(0x4020_0000..0x4040_0000);
        assert_eq!(map.pages(0x4020_3456, 21), [(0x4020_3000, 0x1020_3000)]);
        assert_eq!(map.pages(0x401f_f000, 12).len(), 512);
        assert_eq!(map.pages(0x4040_0000, 12).len(), 512);
        assert_eq!(map.pages(0x4040_0000, 12)[0], (0x4040_0000, 0x1040_0000));
        assert!(map.is_stand_in(0x403f_ffff) && !map.is_stand_in(0x4040_0000));
        let more = map.with(region(0x9000_0000, 0, 0x1000)).unwrap();
        assert!(more.is_stand_in(0x4020_0000));
        let (less, _) = more.without(0x1000_0000).unwrap();
        let again = less.with(huge).unwrap();
        assert!(!again.is_stand_in(0x4020_0000), "it went with its region");
    }

    #[test]
    fn regions_come_and_go() {
        let map = RamMap::new(&[region(0x10_0000, 0, 0x4000)]).unwrap();
        let more = map.with(region(0x20_0000, 0x8000, 0x2000)).unwrap();
        assert!(more.gpas(0x20_1000).eq([0x9000]));
        assert!(matches!(map.with(region(0x20_0000, 0x3000, 0x2000)), Err(RamError::Overlap(..))));
        let (less, gone) = more.without(0).unwrap();
        assert_eq!(gone, region(0x10_0000, 0, 0x4000));
        assert!(less.gpas(0x10_0000).len() == 0 && less.hva(0).is_none());
        assert_eq!(less.hva(0x8000), Some(0x20_0000));
        assert!(matches!(less.without(0x1000), Err(RamError::NoRegion { gpa: 0x1000 })));
        assert!(less.without(0x8000).unwrap().0.regions().is_empty());
    }

    #[test]
    fn ram_on_both_sides_of_the_hole() {
        let map = RamMap::new(&[
            region(0x7000_0000_0000, 0, 3 * G),
            region(0x7000_c000_0000, 4 * G, 2 * G),
        ])
        .unwrap();
        assert!(map.gpas(0x7000_0000_1234).eq([0x1234]));
        assert!(map.gpas(0x7000_c000_1000).eq([4 * G + 0x1000]));
        assert_eq!(map.hva(4 * G + 0x1000), Some(0x7000_c000_1000));
        assert_eq!(map.hva(3 * G), None, "the hole");
        assert_eq!(map.hva(6 * G), None);
        assert_eq!(map.gpas(0x6fff_ffff_ffff).len(), 0);
        assert_eq!(map.gpas(0x7001_4000_0000).len(), 0);
    }

    #[test]
    fn an_alias_is_found_at_each_of_its_addresses() {
        let map = RamMap::new(&[region(0x10_0000, 0, 0x4000), region(0x10_2000, 0x8000, 0x2000)])
            .unwrap();
        assert!(map.gpas(0x10_1000).eq([0x1000]));
        assert!(map.gpas(0x10_2010).eq([0x2010, 0x8010]));
        assert_eq!(map.pages(0x10_3000, 12), [(0x10_3000, 0x3000), (0x10_3000, 0x9000)]);
    }

    #[test]
    fn an_extent_is_told_page_by_page_and_clipped() {
        let map = RamMap::new(&[region(0x20_0000, 0x40_0000, 0x3000)]).unwrap();
        assert_eq!(
            map.pages(0x20_1000, 21),
            [(0x20_0000, 0x40_0000), (0x20_1000, 0x40_1000), (0x20_2000, 0x40_2000)]
        );
        assert_eq!(map.pages(0x20_1fff, 0), [(0x20_1000, 0x40_1000)]);
        assert!(map.pages(0x90_0000, 21).is_empty());
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(matches!(RamMap::new(&[region(1, 0, 4096)]), Err(RamError::Misaligned(_))));
        assert!(matches!(RamMap::new(&[region(0, 0, 0)]), Err(RamError::BadLength(_))));
        assert!(matches!(
            RamMap::new(&[region(u64::MAX - 4095, 0, 4096 * 2)]),
            Err(RamError::BadLength(_))
        ));
        assert!(matches!(
            RamMap::new(&[region(0, 0, 0x2000), region(0x10000, 0x1000, 0x1000)]),
            Err(RamError::Overlap(..))
        ));
    }

    proptest! {
        /// Against the obvious way: look at every region.
        #[test]
        fn lookup_agrees_with_a_linear_search(
            raw in prop::collection::vec((0u64..64, 1u64..8), 0..12),
            probe in 0u64..80 * 4096,
        ) {
            let mut gpa = 0;
            let mut regions = Vec::new();
            for (hva, pages) in raw {
                regions.push(region(hva * 4096, gpa, pages * 4096));
                gpa += (pages + 1) * 4096;
            }
            let map = RamMap::new(&regions).unwrap();
            let expect: Vec<u64> = regions
                .iter()
                .filter(|r| r.hvas().contains(&probe))
                .map(|r| r.gpa + (probe - r.hva))
                .collect();
            prop_assert_eq!(map.gpas(probe).collect::<Vec<_>>(), expect.clone());
            for gpa in expect {
                prop_assert_eq!(map.hva(gpa), Some(probe));
            }
        }
    }
}
