//! One bit for each page of a stretch of memory, set by handlers and threads at once.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bits in a word.
const WORD: usize = 64;

/// A fixed number of bits, none of them set at first. Of many bits the kernel gives memory for those that are used.
#[derive(Debug)]
pub(super) struct Bits {
    words: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: the words are atomics that this owns.
unsafe impl Send for Bits {}
// SAFETY: as above; they are reached by shared references only.
unsafe impl Sync for Bits {}

impl Bits {
    /// `len` bits; `None` where there is no memory for them.
    pub(super) fn new(len: usize) -> Option<Self> {
        let layout = Self::layout(len)?;
        // SAFETY: the layout has a size above 0.
        let words = NonNull::new(unsafe { alloc_zeroed(layout) })?.cast();
        Some(Self { words, len })
    }

    fn layout(len: usize) -> Option<Layout> {
        Layout::array::<AtomicU64>(len.div_ceil(WORD).max(1)).ok()
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: so many words were allocated, and all zeros is a value of each; they live as long as this.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.len.div_ceil(WORD)) }
    }

    /// The words that have bits of `range`, and which bits of each. Async-signal-safe.
    fn masks(&self, range: Range<usize>) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let (start, end) = (range.start.min(self.len), range.end.min(self.len));
        let first = start / WORD;
        let words = self.words().iter().enumerate().skip(first);
        words.take(end.div_ceil(WORD).saturating_sub(first)).map(move |(index, word)| {
            let base = index * WORD;
            let low = start.saturating_sub(base);
            let high = (end - base).min(WORD);
            (word, ones(high) & !ones(low))
        })
    }

    /// Whether any bit of `range` is set.
    pub(super) fn any(&self, range: Range<usize>) -> bool {
        self.masks(range).any(|(word, mask)| word.load(Ordering::Relaxed) & mask != 0)
    }

    /// Sets all bits of `range`; how many were not set before. Async-signal-safe.
    pub(super) fn set(&self, range: Range<usize>) -> u64 {
        let set = |(word, mask): (&AtomicU64, u64)| {
            u64::from((mask & !word.fetch_or(mask, Ordering::AcqRel)).count_ones())
        };
        self.masks(range).filter(|(_, mask)| *mask != 0).map(set).sum()
    }

    /// Clears all bits of `range`; how many were set.
    pub(super) fn clear(&self, range: Range<usize>) -> u64 {
        let clear = |(word, mask): (&AtomicU64, u64)| {
            u64::from((mask & word.fetch_and(!mask, Ordering::AcqRel)).count_ones())
        };
        self.masks(range).filter(|(_, mask)| *mask != 0).map(clear).sum()
    }

    /// The stretches of bits that are set within `range`, ascending.
    pub(super) fn runs(&self, range: Range<usize>) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for (index, (word, mask)) in self.masks(range.clone()).enumerate() {
            let base = (range.start / WORD + index) * WORD;
            let mut left = word.load(Ordering::Relaxed) & mask;
            while left != 0 {
                let bit = base + left.trailing_zeros() as usize;
                left &= left - 1;
                match runs.last_mut() {
                    Some(last) if last.end == bit => last.end = bit + 1,
                    _ => runs.push(bit..bit + 1),
                }
            }
        }
        runs
    }
}

/// The lowest `count` bits, 0 to 64.
fn ones(count: usize) -> u64 {
    match count {
        WORD.. => u64::MAX,
        count => (1 << count) - 1,
    }
}

impl Drop for Bits {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.len) {
            // SAFETY: allocated with this very layout.
            unsafe { dealloc(self.words.as_ptr().cast(), layout) };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn as_a_list_of_bools(
            len in 1_usize..300,
            steps in prop::collection::vec((0_usize..310, 0_usize..310, any::<bool>()), 1..20),
        ) {
            let (bits, mut model) = (Bits::new(len).unwrap(), vec![false; len]);
            for (from, to, set) in steps {
                let range = from.min(to)..from.max(to);
                let inside = range.start.min(len)..range.end.min(len);
                let changed = model[inside.clone()].iter().filter(|bit| **bit != set).count();
                prop_assert_eq!(bits.any(range.clone()), model[inside.clone()].contains(&true));
                let done = if set { bits.set(range) } else { bits.clear(range) };
                prop_assert_eq!(done, changed as u64);
                model[inside].fill(set);
                let runs = bits.runs(0..len);
                prop_assert!(runs.windows(2).all(|two| two[0].end < two[1].start));
                let all: Vec<usize> = runs.into_iter().flatten().collect();
                let expected: Vec<usize> = (0..len).filter(|bit| model[*bit]).collect();
                prop_assert_eq!(all, expected);
            }
        }
    }
}
