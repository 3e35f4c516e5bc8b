//! Guest RAM as any list of regions, held against a list that is looked through from end to end.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use mce_relay::{RamMap, RamRegion};

/// A stretch of addresses where nothing is mapped, or where there is memory that is this program's for this alone.
fn region(hva: u64, gpa: u64, len: u64) -> RamRegion {
    // SAFETY: no reference of Rust's leads there.
    unsafe { RamRegion::new(hva, gpa, len) }
}

#[derive(Debug, Arbitrary)]
struct Input {
    regions: Vec<Region>,
    plugged: Region,
    unplugged: u8,
    lookups: Vec<(u16, u16, u8)>,
}

/// Small numbers meet each other.
#[derive(Debug, Clone, Copy, Arbitrary)]
struct Region {
    hva: u8,
    gpa: u16,
    pages: u8,
    shift: u8,
    raw: Option<(u64, u64, u64)>,
}

impl Region {
    fn region(self) -> RamRegion {
        let page_shift =
            *[12, 12, 12, 21, 30, self.shift].get(usize::from(self.shift)).unwrap_or(&12);
        match self.raw {
            Some((hva, gpa, len)) => region(hva, gpa, len).in_pages_of(page_shift),
            None => {
                let bytes = |pages| u64::from(pages) * 4096;
                let gpa = u64::from(self.gpa) * 4096;
                let (hva, len) = (bytes(self.hva), bytes(self.pages));
                region(hva, gpa, len).in_pages_of(page_shift)
            }
        }
    }
}

/// What is asked of a map, without an index.
struct Plain<'a>(&'a [RamRegion]);

impl Plain<'_> {
    fn gpas(&self, hva: u64) -> Vec<u64> {
        let shows = |r: &&RamRegion| hva >= r.hva() && hva - r.hva() < r.len();
        let mut gpas: Vec<u64> =
            self.0.iter().filter(shows).map(|r| r.gpa() + (hva - r.hva())).collect();
        gpas.sort_unstable();
        gpas
    }

    fn hva(&self, gpa: u64) -> Option<u64> {
        let holds = |r: &&RamRegion| gpa >= r.gpa() && gpa - r.gpa() < r.len();
        self.0.iter().find(holds).map(|r| r.hva() + (gpa - r.gpa()))
    }
}

fn same(map: &RamMap, regions: &[RamRegion], lookups: &[(u16, u16, u8)]) {
    let plain = Plain(regions);
    assert_eq!(map.regions().len(), regions.len());
    for &(page, offset, lsb) in lookups {
        let at = u64::from(page) * 4096 + u64::from(offset);
        // Where regions lie, too, if they lie far away.
        let near = regions.iter().map(|r| r.hva().wrapping_add(at));
        for hva in near.take(4).chain([at]) {
            assert_eq!(map.gpas(hva).collect::<Vec<_>>(), plain.gpas(hva), "HVA {hva:#x}");
            let extent = map.extent(hva, lsb);
            // An extent of more is as long a list as guest RAM is.
            let pages = if extent < 30 { map.pages(hva, lsb) } else { Vec::new() };
            let mask = if extent < 64 { !((1u64 << extent) - 1) } else { panic!("{extent}") };
            for (page, gpa) in pages.iter().copied() {
                assert_eq!((page & mask, page % 4096), (hva & mask, 0));
                assert!(plain.gpas(page).contains(&gpa));
            }
            let mut once = pages.clone();
            once.sort_unstable();
            once.dedup();
            assert_eq!(once.len(), pages.len(), "a page twice");
            if extent < 30 && !plain.gpas(hva).is_empty() {
                assert!(pages.iter().any(|(page, _)| *page == hva & !4095));
            }
        }
        assert_eq!(map.hva(at), plain.hva(at), "GPA {at:#x}");
    }
    let mut last = 0;
    for range in map.hvas() {
        assert!(range.start >= last && range.start < range.end);
        assert!(!plain.gpas(range.start).is_empty() && !plain.gpas(range.end - 1).is_empty());
        last = range.end;
    }
}

fuzz_target!(|input: Input| {
    let regions: Vec<RamRegion> = input.regions.iter().take(64).map(|r| r.region()).collect();
    let Ok(map) = RamMap::new(&regions) else { return };
    same(&map, &regions, &input.lookups);
    if let Ok(more) = map.with(input.plugged.region()) {
        let mut all = regions.clone();
        all.push(input.plugged.region());
        same(&more, &all, &input.lookups);
    }
    if !regions.is_empty() {
        let gone = regions[usize::from(input.unplugged) % regions.len()];
        let (less, region) = map.without(gone.gpa()).unwrap();
        assert_eq!(region, gone);
        let rest: Vec<RamRegion> = regions.iter().copied().filter(|r| *r != gone).collect();
        same(&less, &rest, &input.lookups);
    }
});
