//! Chooses pages: by addresses and ranges, or at random.

use std::collections::HashSet;
use std::path::Path;

use mce_relay_vmm::api::types::means::Means;
use mce_relay_vmm::api::types::vm::{Extent, MemoryBlock, Status, VmInfo};
use mce_relay_vmm::host::pagemap::{Entry, Pagemap};

use super::error::PoisonError;
use super::frame::Frames;
use crate::client::requests;
use crate::poison::target::PAGE_SHIFT;
use crate::poison::target::{PageRange, Target};

/// `count` different pages, chosen by `seed` among the pages of the VM behind `socket` that are whole and have memory
/// of the VM's own. The same seed gives the same pages for the same guest in the same state, for the same user. At most
/// one page of each huge page is chosen.
///
/// Pages that [`judge`](crate::poison::frame::judge) would refuse, such as the host's zero page, are left out as far as this user is
/// shown which they are.
///
/// # Errors
/// The VM does not answer, it has not that many, or `via` poisons page frames and this user is not shown them.
pub fn random(
    socket: &Path,
    via: Means,
    count: usize,
    seed: u64,
) -> Result<Vec<PageRange>, PoisonError> {
    let status: Status = requests::get_of_process(socket, "relay.status")?;
    let extents: Vec<Extent> = requests::get(socket, "vm.extents?in_use=true")?;
    let bad: HashSet<u64> = status.pages.iter().map(|page| page.gpa).collect();
    let visible = Visible::open(status.vm.pid, via)?;
    let vm = &status.vm;
    let fits = |gpa| vm.block(gpa).is_some_and(|block| visible.fits(&target_in(block, gpa)));
    let page_size = |gpa| vm.block(gpa).map_or(1 << PAGE_SHIFT, |block| block.page_size);
    choose(&extents, &bad, &fits, &page_size, count, seed)
}

/// The data on candidate pages that this user can see.
enum Visible {
    Frames(Frames),
    Entries(Pagemap),
    Nothing,
}

impl Visible {
    fn open(pid: u32, via: Means) -> Result<Self, PoisonError> {
        match (Frames::open(pid), Pagemap::open(pid)) {
            (Ok(frames), _) => Ok(Self::Frames(frames)),
            (Err(error), _) if via.is_of_frames() => Err(error.into()),
            (Err(_), Ok(pagemap)) => Ok(Self::Entries(pagemap)),
            (Err(_), Err(_)) => Ok(Self::Nothing),
        }
    }

    fn fits(&self, target: &Target) -> bool {
        match self {
            Self::Frames(frames) => frames.fit(target).is_ok(),
            Self::Entries(pagemap) => {
                pagemap.entry(target.hva).is_ok_and(|entry| may_be_own(entry, target))
            }
            Self::Nothing => true,
        }
    }
}

/// Whether `entry`, that of `target` in the VMM's page table, may be of the VM's own memory. If memory without a file
/// is mapped elsewhere, too, it is the zero page, or KSM's.
fn may_be_own(entry: Entry, target: &Target) -> bool {
    let of_file = target.fd.is_some() || target.is_private_file;
    matches!(entry, Entry::Present { exclusive, .. } if exclusive || of_file)
}

fn choose(
    extents: &[Extent],
    bad: &HashSet<u64>,
    fits: &dyn Fn(u64) -> bool,
    page_size: &dyn Fn(u64) -> u64,
    count: usize,
    seed: u64,
) -> Result<Vec<PageRange>, PoisonError> {
    let pages = |extent: &Extent| {
        let Extent { gpa, len } = *extent;
        (gpa >> PAGE_SHIFT)..((gpa + len) >> PAGE_SHIFT)
    };
    let whole = extents.iter().flat_map(pages).map(|page| page << PAGE_SHIFT);
    let mut whole: Vec<u64> = whole.filter(|gpa| !bad.contains(gpa)).collect();
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut chosen, mut huge) = (Vec::new(), HashSet::new());
    // Drawn one by one: to look up every page of a large guest would take long.
    while chosen.len() < count && !whole.is_empty() {
        let gpa = whole.swap_remove(random.usize(..whole.len()));
        let start = gpa - gpa % page_size(gpa).max(1 << PAGE_SHIFT);
        if fits(gpa) && huge.insert(start) {
            chosen.push(PageRange::page(gpa));
        }
    }
    match chosen.len() {
        there if there < count => Err(PoisonError::TooFew { wanted: count, there }),
        _ => Ok(chosen),
    }
}

/// The pages of `ranges` in the order given, each once. All of them are guest RAM, so there are at most as many as the
/// guest has pages, however long a range is.
pub(crate) fn targets(vm: &VmInfo, ranges: &[PageRange]) -> Result<Vec<Target>, PoisonError> {
    for range in ranges {
        let mut page = range.first;
        while page < range.end {
            let gpa = page << PAGE_SHIFT;
            page = match vm.block(gpa) {
                Some(block) => (block.gpa + block.len) >> PAGE_SHIFT,
                None => return Err(PoisonError::OutsideRam { gpa, ram: vm.ram_in_words() }),
            };
        }
    }
    let mut known = HashSet::new();
    let pages = ranges.iter().flat_map(|range| range.first..range.end);
    let new = pages.map(|page| page << PAGE_SHIFT).filter(|gpa| known.insert(*gpa));
    let target = |gpa| vm.block(gpa).map(|block| target_in(block, gpa));
    Ok(new.filter_map(target).collect())
}

/// The page at `gpa`, which is in `block`.
pub(crate) fn target_in(block: &MemoryBlock, gpa: u64) -> Target {
    let inside = gpa - block.gpa;
    Target {
        gpa,
        hva: block.hva + inside,
        fd: block.fd.filter(|_| block.shared),
        offset: block.fd_offset + inside,
        page_size: block.page_size,
        is_private_file: block.fd.is_some() && !block.shared,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mce_relay_vmm::api::types::vm::{MemoryBlock, VmInfo};

    fn block(gpa: u64, hva: u64, fd_offset: u64) -> MemoryBlock {
        let (fd, shared, page_size) = (Some(3), true, 4096);
        MemoryBlock { gpa, len: 0x10000, hva, fd, fd_offset, shared, page_size }
    }

    /// Two blocks of 16 pages, with a hole of as many between.
    fn vm() -> VmInfo {
        VmInfo {
            memory: vec![block(0, 0x7000_0000, 0), block(0x20000, 0x8000_0000, 0x10000)],
            ..crate::testing::an_info()
        }
    }

    fn gpas(ranges: &[PageRange]) -> Vec<u64> {
        targets(&vm(), ranges).unwrap().iter().map(|target| target.gpa).collect()
    }

    #[test]
    fn ranges_are_whole_pages_without_their_end() {
        let range = |start, end| PageRange::new(start, end).unwrap();
        assert_eq!(gpas(&[range(0x3000, 0x5000)]), [0x3000, 0x4000]);
        assert_eq!(gpas(&[range(0x3fff, 0x4001)]), [0x3000, 0x4000], "whatever they touch");
        assert_eq!(gpas(&[PageRange::page(0x5fff)]), [0x5000]);
        assert_eq!(PageRange::new(0x3000, 0x3000), None);
        assert_eq!(PageRange::new(0x3000, 0x2000), None);
        assert_eq!(PageRange::new(0x3000, 0), None);
    }

    #[test]
    fn each_page_once_in_the_order_given() {
        let range = |start, end| PageRange::new(start, end).unwrap();
        let list = [
            PageRange::page(0x5123),
            range(0x20000, 0x22000),
            range(0x4000, 0x7000),
            PageRange::page(0x5000),
        ];
        assert_eq!(gpas(&list), [0x5000, 0x20000, 0x21000, 0x4000, 0x6000]);
        let (hva, fd, page_size) = (0x8000_1000, Some(3), 4096);
        let (offset, is_private_file) = (0x11000, false);
        let target = Target { gpa: 0x21000, hva, fd, offset, page_size, is_private_file };
        assert_eq!(targets(&vm(), &[PageRange::page(0x21000)]).unwrap(), [target]);
    }

    #[test]
    fn one_address_outside_ram_is_named_and_refuses_all() {
        let good = PageRange::page(0x1000);
        for (range, bad) in [
            (PageRange::page(0x10000), "0x10000"),
            (PageRange::new(0xf000, 0x21000).unwrap(), "0x10000"),
            (PageRange::new(0x2f000, 0x31000).unwrap(), "0x30000"),
            (PageRange::page(u64::MAX), "0xfffffffffffff000"),
            // Not one by one: this would take for ever.
            (PageRange::new(0x20000, u64::MAX).unwrap(), "0x30000"),
        ] {
            let error = targets(&vm(), &[good, range]).unwrap_err().to_string();
            let expected = format!("GPA {bad} is not guest RAM; this guest has 0x0 to 0xffff, ");
            assert!(error.starts_with(&expected), "{range:?}: {error}");
        }
    }

    #[test]
    fn a_seed_chooses_whole_pages_that_have_memory() {
        let extents =
            [Extent { gpa: 0x1000, len: 0x4000 }, Extent { gpa: 0x100_0000, len: 0x8000 }];
        let bad = HashSet::from([0x2000, 0x100_7000]);
        let chosen = |count, seed| choose(&extents, &bad, &|_| true, &|_| 4096, count, seed);
        let all = chosen(10, 1).unwrap();
        let different: HashSet<u64> = all.iter().map(|range| range.first << PAGE_SHIFT).collect();
        assert_eq!(different.len(), 10);
        assert!(different.is_disjoint(&bad));
        assert_eq!(chosen(3, 7).unwrap(), chosen(3, 7).unwrap());
        assert!((0..20).any(|seed| chosen(3, seed).unwrap() != chosen(3, 7).unwrap()));
        let error = chosen(11, 1).unwrap_err().to_string();
        assert!(error.contains("11") && error.contains("10"), "{error}");
    }

    #[test]
    fn what_does_not_fit_is_not_drawn() {
        let extents = [Extent { gpa: 0, len: 0x20_0000 }];
        // Every second page is the zero page, say.
        let fits = |gpa: u64| (gpa >> PAGE_SHIFT).is_multiple_of(2);
        let chosen = |count| choose(&extents, &HashSet::new(), &fits, &|_| 4096, count, 5);
        let all = chosen(256).unwrap();
        assert!(all.iter().all(|range| range.first.is_multiple_of(2)), "{all:?}");
        let error = chosen(257).unwrap_err().to_string();
        assert!(error.contains("257 pages asked for at random, and this guest has 256"), "{error}");
    }

    #[test]
    fn a_huge_page_is_drawn_once() {
        const HUGE: u64 = 2 << 20;
        let extents = [Extent { gpa: 0, len: 4 * HUGE }, Extent { gpa: 4 * HUGE, len: 0x2000 }];
        let page_size = |gpa: u64| if gpa < 4 * HUGE { HUGE } else { 4096 };
        let chosen = |count| choose(&extents, &HashSet::new(), &|_| true, &page_size, count, 3);
        let all = chosen(6).unwrap();
        let numbers = all.iter().map(|range| (range.first << PAGE_SHIFT) / HUGE);
        assert_eq!(numbers.collect::<HashSet<u64>>(), (0..5).collect());
        assert!(chosen(7).is_err());
    }

    #[test]
    fn what_an_unprivileged_user_can_tell_of_a_page() {
        let anonymous =
            target_in(&MemoryBlock { fd: None, shared: false, ..block(0, 0, 0) }, 0x1000);
        let (memfd, file) = (
            target_in(&block(0, 0, 0), 0x1000),
            target_in(&MemoryBlock { shared: false, ..block(0, 0, 0) }, 0x1000),
        );
        let present = |exclusive| Entry::Present { pfn: None, exclusive };
        for (entry, target, expected) in [
            (present(true), &anonymous, true),
            // The zero page.
            (present(false), &anonymous, false),
            (present(false), &memfd, true),
            (present(false), &file, true),
            (Entry::Empty, &memfd, false),
            (Entry::Elsewhere { offset: None }, &anonymous, false),
        ] {
            assert_eq!(may_be_own(entry, target), expected, "{entry:?} {target:?}");
        }
    }
}
