//! Stretches of guest-physical memory.

use mce_relay_vmm::api::types::vm::{Extent, MemoryBlock};

/// The length of all of them together, in bytes.
pub(super) fn len_of(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.len).sum()
}

/// Adds the stretch to the list, or extends its last entry if that ends there.
pub(super) fn add(list: &mut Vec<Extent>, gpa: u64, len: u64) {
    match list.last_mut() {
        Some(last) if last.gpa + last.len == gpa => last.len += len,
        _ => list.push(Extent { gpa, len }),
    }
}

/// The parts of `all` that are not in `less`; both ascend.
pub(super) fn subtract(all: &[Extent], less: impl IntoIterator<Item = Extent>) -> Vec<Extent> {
    let mut rest = Vec::with_capacity(all.len());
    let mut less = less.into_iter().peekable();
    for extent in all {
        let (mut at, end) = (extent.gpa, extent.gpa + extent.len);
        while let Some(hole) = less.next_if(|hole| hole.gpa < end) {
            if hole.gpa > at {
                rest.push(Extent { gpa: at, len: hole.gpa - at });
            }
            at = at.max(hole.gpa + hole.len);
        }
        if at < end {
            rest.push(Extent { gpa: at, len: end - at });
        }
    }
    rest
}

/// Guest RAM as one row, without the gaps between its blocks.
#[derive(Debug)]
pub(super) struct Ram {
    /// Ascending, without adjacent ones.
    pub(super) runs: Vec<Extent>,
}

impl Ram {
    pub(super) fn of(blocks: &[MemoryBlock]) -> Self {
        let mut runs = Vec::new();
        blocks.iter().for_each(|block| add(&mut runs, block.gpa, block.len));
        Self { runs }
    }

    pub(super) fn len(&self) -> u64 {
        len_of(&self.runs)
    }

    /// The address behind its last byte.
    pub(super) fn end(&self) -> u64 {
        self.runs.last().map_or(0, |run| run.gpa + run.len)
    }

    /// How many bytes of RAM are below `gpa`.
    pub(super) fn below(&self, gpa: u64) -> u64 {
        let within = |run: &Extent| gpa.saturating_sub(run.gpa).min(run.len);
        self.runs.iter().map(within).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents(list: &[(u64, u64)]) -> Vec<Extent> {
        list.iter().map(|&(gpa, len)| Extent { gpa, len }).collect()
    }

    #[test]
    fn bad_pages_in_a_row_are_one_entry() {
        let mut list = Vec::new();
        for gpa in [0x1000, 0x2000, 0x4000] {
            add(&mut list, gpa, 0x1000);
        }
        assert_eq!(list, extents(&[(0x1000, 0x2000), (0x4000, 0x1000)]));
    }

    #[test]
    fn what_is_left_is_exact() {
        let all = extents(&[(0, 10), (20, 10), (40, 10)]);
        for (less, left) in [
            (&[][..], &[(0, 10), (20, 10), (40, 10)][..]),
            (&[(0, 1), (5, 1), (9, 1)], &[(1, 4), (6, 3), (20, 10), (40, 10)]),
            (&[(0, 10), (25, 2)], &[(20, 5), (27, 3), (40, 10)]),
            (&[(20, 5), (25, 5)], &[(0, 10), (40, 10)]),
            (&[(0, 10), (20, 10), (40, 10)], &[]),
        ] {
            assert_eq!(subtract(&all, extents(less)), extents(left), "without {less:?}");
        }
    }

    #[test]
    fn what_is_below_is_counted_without_the_gaps() {
        let ram = Ram { runs: extents(&[(0, 10), (20, 10)]) };
        assert_eq!((ram.len(), ram.end()), (20, 30));
        let below = [0, 5, 10, 15, 20, 25, 29].map(|gpa| ram.below(gpa));
        assert_eq!(below, [0, 5, 10, 10, 10, 15, 19]);
    }
}
