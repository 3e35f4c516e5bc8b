//! The ledger's pages in little memory: some 60 bytes each, where a [`Page`] has 200. A million pages may go bad in a
//! large guest.
//! What a page has in common with its neighbours is kept once a [`Block`], and a time is kept only where
//! some page of the block has come to that state.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::{Duration, SystemTime};

use super::page::{Page, Times};
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
    /// Host address minus guest-physical address, by wrapping subtraction; each value once. There is one for each
    /// region that pages of the block are or were in.
    offsets: Vec<u64>,
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

/// How many fields [`Times`] has.
const STATES: usize = 7;

/// Nanoseconds since 1970; 64 bits reach to the year 2554.
type Nanos = u64;
const NEVER: Nanos = u64::MAX;

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
        let hva = gpa.wrapping_add(self.offsets[usize::from(offset)]);
        let nanos = self.times.each_ref().map(|column| column.get(at).copied().unwrap_or(NEVER));
        Page { gpa, hva, lsb, kind, found_by, signals, state, times: times(nanos) }
    }

    /// Returns true when the page was not there.
    fn put(&mut self, it: &Page) -> bool {
        let Page { gpa, hva, lsb, kind, found_by, signals, state, times } = *it;
        let offset = self.offset(hva.wrapping_sub(gpa));
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

    /// The index of `offset` in the list, to which it is added if it is new.
    #[allow(clippy::cast_possible_truncation, reason = "a u16 numbers them all")]
    fn offset(&mut self, offset: u64) -> u16 {
        // The last one first: pages come in runs.
        if let Some(at) = self.offsets.iter().rposition(|known| *known == offset) {
            return at as u16;
        }
        if self.offsets.len() > usize::from(u16::MAX) {
            self.forget_offsets();
        }
        self.offsets.push(offset);
        (self.offsets.len() - 1) as u16
    }

    /// Drops the offsets that no page uses any more. The rest fits u16, as there are fewer pages than that.
    #[allow(clippy::cast_possible_truncation, reason = "a u16 numbers them all")]
    fn forget_offsets(&mut self) {
        let used: BTreeSet<u16> = self.entries.iter().map(|entry| entry.offset).collect();
        let kept: Vec<u16> = used.into_iter().collect();
        for entry in &mut self.entries {
            entry.offset = kept.partition_point(|at| *at < entry.offset) as u16;
        }
        self.offsets = kept.iter().map(|at| self.offsets[usize::from(*at)]).collect();
    }
}

/// Inserts; the list grows by a thirty-second, where `Vec` itself doubles.
fn insert<T>(list: &mut Vec<T>, at: usize, value: T) {
    if list.len() == list.capacity() {
        list.reserve_exact(list.len() / 32 + 1);
    }
    list.insert(at, value);
}

fn nanos(times: &Times) -> [Nanos; STATES] {
    let Times { seen, waiting, injected, acknowledged, undeliverable, healed, removed } = *times;
    [Some(seen), waiting, injected, acknowledged, undeliverable, healed, removed].map(|time| {
        time.map_or(NEVER, |time| {
            let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
            u64::try_from(since.as_nanos()).unwrap_or(NEVER).min(NEVER - 1)
        })
    })
}

fn times(nanos: [Nanos; STATES]) -> Times {
    let time =
        |nanos| (nanos != NEVER).then(|| SystemTime::UNIX_EPOCH + Duration::from_nanos(nanos));
    let [seen, waiting, injected, acknowledged, undeliverable, healed, removed] = nanos.map(time);
    // Each page has been seen.
    let seen = seen.unwrap_or(SystemTime::UNIX_EPOCH);
    Times { seen, waiting, injected, acknowledged, undeliverable, healed, removed }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::{Place, WaitReason};

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

    fn any_page(gpa: u64, seed: u64, signals: u32) -> Page {
        let at = |bit: u64| {
            let nanos = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> bit;
            (seed >> bit & 1 != 0).then(|| SystemTime::UNIX_EPOCH + Duration::from_nanos(nanos))
        };
        Page {
            gpa,
            hva: gpa.wrapping_add((seed % 3) << 30),
            lsb: 12 + (seed % 2) as u8 * 9,
            kind: if seed.is_multiple_of(5) {
                FailureKind::ActionRequired
            } else {
                FailureKind::ActionOptional
            },
            found_by: if seed.is_multiple_of(7) { FoundBy::Scan } else { FoundBy::Signal },
            signals,
            state: match seed % 3 {
                0 => State::Seen,
                1 => State::Waiting { wait: WaitReason::Mcip { vcpu: 3 } },
                _ => State::Acknowledged { place: Place::Ghes { record: signals } },
            },
            times: Times {
                waiting: at(1),
                injected: at(2),
                acknowledged: at(3),
                undeliverable: at(4),
                healed: at(5),
                removed: at(6),
                ..Times::new(SystemTime::UNIX_EPOCH + Duration::from_nanos(seed))
            },
        }
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
