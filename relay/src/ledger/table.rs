//! The ledger's pages in little memory: some 60 bytes each, where a [`Page`] has 200. A million pages may go bad in a
//! large guest.
//! What a page has in common with its neighbours is kept once a [`Block`], and a time is kept only where
//! some page of the block has come to that state.

use std::collections::BTreeMap;
use std::ops::Range;

use super::columns::{NEVER, Nanos, Offsets, STATES, nanos, times};
use super::page::Page;
use crate::types::{FailureKind, FoundBy, PAGE_SHIFT, State};

/// `log2` of the bytes of guest memory that one block covers, 64 MiB: few enough pages that one more is inserted within
/// microseconds, and so many that what a block stores once weighs little.
const BLOCK_SHIFT: u8 = 26;
const PAGE_BITS: u64 = (1 << (BLOCK_SHIFT - PAGE_SHIFT)) - 1;

/// Pages by guest-physical address.
#[derive(Debug, Clone, Default)]
pub(crate) struct Table {
    /// By the upper bits of the address. There is none without pages.
    blocks: BTreeMap<u64, Block>,
    len: usize,
}

/// The pages of one stretch of guest memory.
#[derive(Debug, Clone, Default)]
struct Block {
    /// By [`Entry::page`].
    entries: Vec<Entry>,
    /// For each entry when it came to a state; a column is empty while no page has come to its state.
    times: [Vec<Nanos>; STATES],
    offsets: Offsets,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    state: State,
    signals: u32,
    /// Which page of the block.
    page: u16,
    /// Index of [`Block::offsets`].
    offset: u16,
    lsb: u8,
    kind: FailureKind,
    found_by: FoundBy,
}

impl Table {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn contains(&self, gpa: u64) -> bool {
        self.blocks.get(&block(gpa)).is_some_and(|block| block.find(page(gpa)).is_ok())
    }

    pub(crate) fn get(&self, gpa: u64) -> Option<Page> {
        let block = self.blocks.get(&block(gpa))?;
        block.find(page(gpa)).ok().map(|at| block.page(gpa, at))
    }

    /// Puts `page` in place of what was stored at its address.
    pub(crate) fn put(&mut self, page: &Page) {
        if self.blocks.entry(block(page.gpa)).or_default().put(page) {
            self.len += 1;
        }
    }

    pub(crate) fn remove(&mut self, gpa: u64) -> Option<Page> {
        let of = self.blocks.get_mut(&block(gpa))?;
        let at = of.find(page(gpa)).ok()?;
        let page = of.page(gpa, at);
        of.remove(at);
        if of.entries.is_empty() {
            self.blocks.remove(&block(gpa));
        }
        self.len -= 1;
        Some(page)
    }

    /// The pages whose address is in `gpas`, by address.
    pub(crate) fn range(&self, gpas: Range<u64>) -> impl Iterator<Item = Page> {
        let blocks = block(gpas.start)..=block(gpas.end.max(gpas.start));
        self.blocks.range(blocks).flat_map(move |(number, block)| {
            let gpa =
                move |entry: &Entry| number << BLOCK_SHIFT | u64::from(entry.page) << PAGE_SHIFT;
            let first = block.entries.partition_point(|entry| gpa(entry) < gpas.start);
            let last = block.entries.partition_point(|entry| gpa(entry) < gpas.end).max(first);
            (first..last).map(move |at| block.page(gpa(&block.entries[at]), at))
        })
    }
}

/// Which block the page at `gpa` is in.
fn block(gpa: u64) -> u64 {
    gpa >> BLOCK_SHIFT
}

/// Which page of its block it is.
fn page(gpa: u64) -> u16 {
    // PAGE_BITS has 14 of them.
    (gpa >> PAGE_SHIFT & PAGE_BITS) as u16
}

impl Block {
    /// Where the entry of `page` is, or would be.
    fn find(&self, page: u16) -> Result<usize, usize> {
        self.entries.binary_search_by_key(&page, |entry| entry.page)
    }

    fn page(&self, gpa: u64, at: usize) -> Page {
        let Entry { state, signals, offset, lsb, kind, found_by, page: _ } = self.entries[at];
        let hva = gpa.wrapping_add(self.offsets.get(offset));
        let nanos = self.times.each_ref().map(|column| column.get(at).copied().unwrap_or(NEVER));
        Page { gpa, hva, lsb, kind, found_by, signals, state, times: times(nanos) }
    }

    /// Returns true when the page was not there.
    fn put(&mut self, it: &Page) -> bool {
        let Page { gpa, hva, lsb, kind, found_by, signals, state, times } = *it;
        let used = self.entries.iter_mut().map(|entry| &mut entry.offset);
        let offset = self.offsets.index(hva.wrapping_sub(gpa), used);
        let entry = Entry { state, signals, page: page(gpa), offset, lsb, kind, found_by };
        let found = self.find(entry.page);
        match found {
            Ok(at) => self.entries[at] = entry,
            Err(at) => {
                insert(&mut self.entries, at, entry);
                for column in self.times.iter_mut().filter(|column| !column.is_empty()) {
                    insert(column, at, NEVER);
                }
            }
        }
        let at = found.unwrap_or_else(|at| at);
        for (column, time) in self.times.iter_mut().zip(nanos(&times)) {
            if column.is_empty() && time != NEVER {
                column.reserve_exact(self.entries.capacity());
                column.resize(self.entries.len(), NEVER);
            }
            if let Some(there) = column.get_mut(at) {
                *there = time;
            }
        }
        found.is_err()
    }

    fn remove(&mut self, at: usize) {
        self.entries.remove(at);
        for column in self.times.iter_mut().filter(|column| !column.is_empty()) {
            column.remove(at);
        }
    }
}

/// Inserts; the list grows by a thirty-second, where `Vec` itself doubles.
fn insert<T>(list: &mut Vec<T>, at: usize, value: T) {
    if list.len() == list.capacity() {
        list.reserve_exact(list.len() / 32 + 1);
    }
    list.insert(at, value);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::columns::testing::any_page;
    use super::*;

    #[test]
    fn an_entry_is_small() {
        assert_eq!(size_of::<State>(), 12);
        assert_eq!(size_of::<Entry>(), 24);
    }

    #[test]
    fn offsets_that_nobody_has_any_more_make_room() {
        let mut table = Table::default();
        let mut page = any_page(0x1000, 7, 1);
        for offset in 0..70_000 {
            page.hva = page.gpa + (offset << PAGE_SHIFT);
            table.put(&page);
            assert_eq!(table.get(page.gpa), Some(page.clone()));
        }
        assert!(table.blocks[&0].offsets.len() <= 1 << 16);
    }

    proptest! {
        /// Against the obvious way: a map of whole pages.
        #[test]
        fn it_holds_what_a_map_holds(
            ops in prop::collection::vec((0u64..200, 0u64..4, any::<u64>(), 0u32..9, 0u8..5), 0..300),
            from in 0u64..200, to in 0u64..200,
        ) {
            let (mut table, mut map) = (Table::default(), BTreeMap::new());
            for (number, far, seed, signals, what) in ops {
                let gpa = (number << PAGE_SHIFT) + (far << BLOCK_SHIFT);
                if what == 0 {
                    prop_assert_eq!(table.remove(gpa), map.remove(&gpa));
                } else {
                    let page = any_page(gpa, seed >> 1, signals);
                    table.put(&page);
                    map.insert(gpa, page);
                }
                prop_assert_eq!(table.contains(gpa), map.contains_key(&gpa));
                prop_assert_eq!(table.get(gpa), map.get(&gpa).cloned());
                prop_assert_eq!(table.len(), map.len());
            }
            let all: Vec<Page> = map.values().cloned().collect();
            prop_assert_eq!(table.range(0..u64::MAX).collect::<Vec<_>>(), all);
            let (from, to) = (from << PAGE_SHIFT, (to << PAGE_SHIFT) + (2 << BLOCK_SHIFT));
            for gpas in [from..to, to..from, from..from + 0x3000] {
                let within: Vec<Page> =
                    map.values().filter(|page| gpas.contains(&page.gpa)).cloned().collect();
                prop_assert_eq!(table.range(gpas).collect::<Vec<_>>(), within);
            }
        }
    }
}
