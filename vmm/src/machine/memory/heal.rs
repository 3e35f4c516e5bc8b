//! Makes guest RAM whole again when the guest starts over.
//!
//! Ordinary memory is given back as a whole, and with it whatever went bad in it, known or not; the
//! guest begins with fresh pages. Huge pages of hugetlb come from a pool that may have no other, so
//! each is checked and only the bad ones are replaced. A stretch for which there is no good memory is taken out of the
//! guest's memory.

use std::ops::Range;
use std::{io, iter};

use log::{debug, warn};

use super::backing::Backing;
use super::block::{PAGE_SIZE, RamBlock};
use super::guest_ram::GuestRam;
use crate::host::pagemap::{Entries, Entry};

/// [`PAGE_SIZE`] as the standard library's iterators want it; 4096 fits any usize.
const PAGE_STEP: usize = 4096;

/// What has become of guest RAM.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Healing {
    /// Guest-physical addresses of the huge pages that were found bad and were not known to be, ascending.
    pub found: Vec<u64>,
    /// Guest-physical addresses of the pages of 4 KiB that were bad and are good now, ascending; all those
    /// of huge pages that were found bad among them.
    pub healed: Vec<u64>,
    /// Stretches (guest-physical address and length in bytes) for which there is no good memory. They
    /// are no longer part of the guest's memory.
    pub removed: Vec<(u64, u64)>,
}

impl GuestRam {
    /// Makes all of it good, and fresh where it is not hugetlb. `bad` are the guest-physical addresses
    /// of the pages of 4 KiB that are known to be bad. No vCPU may be running.
    pub fn heal(&self, bad: &[u64]) -> Healing {
        let mut healing = Healing::default();
        for (block, backing) in self.blocks.iter().zip(&self.backings) {
            let inside = |gpa: &&u64| block.contains_gpa(**gpa);
            let mut pages: Vec<u64> =
                bad.iter().filter(inside).map(|gpa| gpa - block.gpa).collect();
            pages.sort_unstable();
            // What was taken out before stays out.
            let gone = self.removed();
            let is_gone = |start: u64| {
                gone.iter().any(|(gpa, len)| (*gpa..gpa + len).contains(&(block.gpa + start)))
            };
            pages.retain(|start| !is_gone(*start));
            if backing.is_guest_memfd() {
                // The next VM brings another one.
                healing.healed.extend(pages.iter().map(|start| block.gpa + start));
                continue;
            }
            let page_size = backing.page_size();
            let small = self.heal_stand_ins(block, backing);
            let is_small = |start: u64| small.iter().any(|range| range.contains(&start));
            // What was bad there is good by now, in the one form or the other.
            healing.healed.extend(pages.iter().filter(|s| is_small(**s)).map(|s| block.gpa + s));
            pages.retain(|start| !is_small(*start));
            if page_size == PAGE_SIZE {
                discard(backing);
            } else {
                let is_known = |page: u64| is_gone(page) || is_small(page);
                for page in unknown_huge_pages(backing, &pages, is_known) {
                    healing.found.push(block.gpa + page);
                    pages.extend((page..page + page_size).step_by(PAGE_STEP));
                }
                pages.sort_unstable();
            }
            let mut suspects: Vec<u64> =
                pages.iter().map(|start| start / page_size * page_size).collect();
            suspects.dedup();
            let mut lost: Vec<Range<u64>> = Vec::new();
            for page in suspects {
                let bad =
                    pages.iter().copied().filter(|bad| (page..page + page_size).contains(bad));
                if let Err(error) = self.replace(backing, page, bad) {
                    warn!(
                        "no good memory for GPA {:#x} ({} KiB): {error}; it is taken out of the guest's memory",
                        block.gpa + page,
                        page_size >> 10
                    );
                    if let Err(error) = backing.plug(page, page_size) {
                        // Nothing of ours touches it, and the guest is not told that it is there.
                        debug!("cannot plug the gap: {error}");
                    }
                    lost.push(page..page + page_size);
                }
            }
            let is_lost = |start: &u64| lost.iter().any(|range| range.contains(start));
            healing.healed.extend(pages.iter().filter(|s| !is_lost(s)).map(|s| block.gpa + s));
            let stretches = lost.iter().map(|r| (block.gpa + r.start, r.end - r.start));
            healing.removed.extend(stretches);
        }
        healing.healed.sort_unstable();
        let mut removed = self.lock_removed();
        removed.extend(&healing.removed);
        removed.sort_unstable();
        drop(removed);
        if let Err(error) = self.prefault() {
            warn!("{error}; the guest gets its memory as it uses it");
        }
        healing
    }
}

impl GuestRam {
    /// Where ordinary memory lies in the place of a huge page there is a huge page again, where the pool has one, and else
    /// fresh ordinary memory. The stretches where that has worked, from the mapping's beginning.
    fn heal_stand_ins(&self, block: &RamBlock, backing: &Backing) -> Vec<Range<u64>> {
        let mut stand_ins = self.lock_stand_ins();
        let within = block.hva..block.hva + block.len;
        let here: Vec<u64> = stand_ins.range(within).copied().collect();
        let len = backing.page_size();
        let mut all = Vec::new();
        for hva in here {
            let start = hva - block.hva;
            // The huge page that went bad.
            if let Err(error) = backing.punch(start, len) {
                debug!("cannot empty a page of the file of guest memory: {error}");
            }
            match backing.exchange_for_good(start) {
                Ok(()) => {
                    stand_ins.remove(&hva);
                }
                Err(error) => {
                    debug!("GPA {:#x} stays in small pages: {error}", block.gpa + start);
                    if let Err(error) = backing.advise(start, len, libc::MADV_DONTNEED) {
                        // As it is it is not good; it goes the way of all others.
                        debug!("cannot give guest memory back: {error}");
                        continue;
                    }
                }
            }
            all.push(start..start + len);
        }
        all
    }

    /// Puts good memory at the page that begins at `start`, of which the 4 KiB at `bad` were bad.
    fn replace(
        &self,
        backing: &Backing,
        start: u64,
        bad: impl Iterator<Item = u64> + Clone,
    ) -> io::Result<()> {
        let again = || {
            let mut pages = iter::once(start).chain(bad.clone());
            pages.find_map(|page| self.bad_frame_at(backing.hva() + page))
        };
        replace(backing, start)?;
        if again().is_none() {
            return Ok(());
        }
        // It was not let go.
        backing.exchange(start)?;
        backing.advise(start, backing.page_size(), libc::MADV_POPULATE_WRITE)?;
        match again() {
            None => Ok(()),
            Some(pfn) => Err(io::Error::other(format!(
                "the host gives page frame {pfn:#x} again, which it has marked as poisoned"
            ))),
        }
    }

    /// The page frame at `hva`, if the host has marked it as poisoned; `None` as well where it does not say.
    fn bad_frame_at(&self, hva: u64) -> Option<u64> {
        let (flags, pagemap) = (self.flags.as_ref()?, self.pagemap().ok()?);
        match Entries::of(pagemap).at(hva) {
            Ok(Entry::Present { pfn: Some(pfn), .. }) => {
                flags.is_poisoned(pfn).is_ok_and(|poisoned| poisoned).then_some(pfn)
            }
            _ => None,
        }
    }
}

/// Gives ordinary memory back as a whole. Where that does not work the known bad pages are exchanged
/// one by one all the same.
fn discard(backing: &Backing) {
    if let Err(error) = backing.punch(0, backing.len())
        && let Err(again) = backing.empty()
    {
        debug!("cannot empty the file of guest memory: {error}; {again}");
    }
    if let Err(error) = backing.advise(0, backing.len(), libc::MADV_DONTNEED) {
        debug!("cannot give guest memory back: {error}");
    }
}

/// The huge pages that are not among those `known` to be bad, and of which the kernel says now that they are,
/// ascending. The page tables do not say it before Linux 6.7.
fn unknown_huge_pages(backing: &Backing, known: &[u64], is_gone: impl Fn(u64) -> bool) -> Vec<u64> {
    let page_size = backing.page_size();
    let pages = (0..backing.len() / page_size).map(|index| index * page_size);
    pages
        .filter(|page| !is_gone(*page))
        .filter(|page| !known.iter().any(|start| start / page_size * page_size == *page))
        .filter(|page| {
            backing
                .advise(*page, page_size, libc::MADV_POPULATE_READ)
                .is_err_and(|error| error.raw_os_error() == Some(libc::EHWPOISON))
        })
        .collect()
}

/// Puts good memory at the page that begins at `start`.
fn replace(backing: &Backing, start: u64) -> io::Result<()> {
    let len = backing.page_size();
    // First the page, then the entry in our page tables, which says that it is bad: either alone is
    // not enough for a shared file.
    if let Err(error) = backing.punch(start, len) {
        debug!("cannot empty a page of the file of guest memory: {error}");
    }
    let tried = backing
        .advise(start, len, libc::MADV_DONTNEED)
        .and_then(|()| backing.advise(start, len, libc::MADV_POPULATE_WRITE));
    if tried.is_ok() {
        return Ok(());
    }
    // A userfaultfd that is registered there, or a kernel that does not take MADV_DONTNEED for it.
    backing.exchange(start)?;
    backing.advise(start, len, libc::MADV_POPULATE_WRITE)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::config::{MemoryZone, PageSize};
    use crate::machine::memory::error::MemoryError;
    use crate::relaying::uffd::Uffd;

    #[test]
    fn ordinary_memory_is_fresh_and_at_its_place() {
        for shared in [false, true] {
            let zone = MemoryZone { shared, ..MemoryZone::new(32 << 20) };
            let ram = GuestRam::new(&[zone]).unwrap();
            let before = ram.blocks().to_vec();
            ram.write(0x5000, b"old").unwrap();
            let healing = ram.heal(&[0x5000, 0x7000]);
            assert_eq!(healing.healed, [0x5000, 0x7000]);
            assert!(healing.removed.is_empty() && ram.removed().is_empty());
            let mut back = [1; 3];
            ram.memory().read_slice(&mut back, GuestAddress(0x5000)).unwrap();
            assert_eq!(back, [0; 3]);
            assert_eq!(ram.blocks(), before);
        }
    }

    /// As before Linux 6.7, where only the try to populate it says that a huge page is bad.
    #[test]
    fn a_huge_page_that_nobody_knew_of_is_found_and_healed() {
        let uffd = match Uffd::open() {
            Ok(uffd) => uffd,
            Err(error) => return println!("SKIPPED: needs UFFDIO_POISON (Linux 6.6): {error}"),
        };
        let huge = PageSize::Size2M.bytes();
        let zone = MemoryZone { page_size: PageSize::Size2M, ..MemoryZone::new(32 << 20) };
        let ram = match GuestRam::new(&[zone]) {
            Err(error @ (MemoryError::EmptyPool { .. } | MemoryError::NoPool { .. })) => {
                return println!("SKIPPED: needs 16 huge pages of 2 MiB: {error}");
            }
            other => other.unwrap(),
        };
        for unknown in [3 * huge, 5 * huge] {
            uffd.poison(ram.blocks()[0].hva + unknown, huge).unwrap();
        }
        // One page of the fifth is known, and so that one is exchanged, too.
        let healing = ram.heal(&[5 * huge + 0x3000]);
        let all = (3 * huge..4 * huge).step_by(PAGE_STEP);
        let expected: Vec<u64> = all.chain([5 * huge + 0x3000]).collect();
        assert_eq!((healing.found, healing.removed), (vec![3 * huge], vec![]));
        assert_eq!(healing.healed, expected);
        ram.write(3 * huge, b"x").unwrap();
        ram.write(5 * huge, b"x").unwrap();
        assert_eq!(ram.heal(&[]), Healing::default(), "once");
    }

    #[test]
    fn what_cannot_be_had_is_taken_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        std::fs::write(&path, vec![0_u8; 32 << 20]).unwrap();
        let zone = MemoryZone {
            file: Some(path.clone()),
            shared: true,
            lossy: true,
            ..MemoryZone::new(32 << 20)
        };
        let ram = GuestRam::new(&[zone]).unwrap();
        // Somebody cuts the file: there is nothing behind its end to be had.
        std::fs::File::options().write(true).open(&path).unwrap().set_len(31 << 20).unwrap();
        let gone = 31 << 20;
        let healing = ram.heal(&[0x5000, gone, gone + 0x3000]);
        assert_eq!(healing.healed, [0x5000]);
        assert_eq!(healing.removed, [(gone, 0x1000), (gone + 0x3000, 0x1000)]);
        assert_eq!(ram.removed(), healing.removed);
        assert!(ram.write(gone, b"x").is_err(), "an error, no signal");
        let again = ram.heal(&[0x5000, gone]);
        assert_eq!((again.healed, again.removed), (vec![0x5000], vec![]), "once");
    }
}
