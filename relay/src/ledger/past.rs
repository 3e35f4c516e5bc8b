//! Pages that are no longer bad, in little memory: some 64 bytes each, where a [`Page`] has 200.
//! As in [`Table`](super::table::Table) a time is kept only where some page has come to that state. All pages of
//! a boot are healed at once, so that time is kept once for all of them.

use std::collections::VecDeque;

use super::columns::{HEALED, NEVER, Nanos, Offsets, STATES, nanos, times};
use super::page::Page;
use crate::types::{FailureKind, FoundBy, State};

/// Pages in the order in which they ceased to be bad, the latest of them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Past {
    entries: VecDeque<Entry>,
    /// For each entry when it came to a state; a column is empty while no page has come to its state. That of
    /// [`HEALED`] stays so.
    times: [VecDeque<Nanos>; STATES],
    /// When pages were healed, for stretches of entries.
    healed: VecDeque<Stretch>,
    offsets: Offsets,
    dropped: u64,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    gpa: u64,
    state: State,
    signals: u32,
    /// Index of [`Past::offsets`].
    offset: u16,
    lsb: u8,
    kind: FailureKind,
    found_by: FoundBy,
}

/// Entries behind those of the stretch before.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    healed: Nanos,
    /// How many entries there were in all, with those that were dropped, when the last one of it had come.
    end: u64,
}

impl Past {
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// How many were dropped.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped
    }

    /// One more. Where there are `most` already (65,536 at most), the first is dropped.
    pub(crate) fn push(&mut self, page: &Page, most: usize) {
        // Before there is an offset for this one: there is room for it then.
        if self.entries.len() >= most {
            self.drop_first();
        }
        let Page { gpa, hva, lsb, kind, found_by, signals, state, times } = *page;
        let used = self.entries.iter_mut().map(|entry| &mut entry.offset);
        let offset = self.offsets.index(hva.wrapping_sub(gpa), used);
        push(&mut self.entries, Entry { gpa, state, signals, offset, lsb, kind, found_by }, most);
        let mut nanos = nanos(&times);
        let healed = std::mem::replace(&mut nanos[HEALED], NEVER);
        let end = self.dropped + self.entries.len() as u64;
        match self.healed.back_mut() {
            Some(last) if last.healed == healed => last.end = end,
            _ => self.healed.push_back(Stretch { healed, end }),
        }
        for (column, time) in self.times.iter_mut().zip(nanos) {
            if !column.is_empty() {
                push(column, time, most);
            } else if time != NEVER {
                column.reserve_exact(self.entries.capacity());
                column.resize(self.entries.len() - 1, NEVER);
                column.push_back(time);
            }
        }
    }

    fn drop_first(&mut self) {
        if self.entries.pop_front().is_none() {
            return;
        }
        self.dropped += 1;
        for column in &mut self.times {
            column.pop_front();
        }
        while self.healed.front().is_some_and(|first| first.end <= self.dropped) {
            self.healed.pop_front();
        }
    }

    /// All but the first `skipped`.
    pub(crate) fn iter(&self, skipped: usize) -> impl ExactSizeIterator<Item = Page> {
        self.entries.range(skipped.min(self.len())..).enumerate().map(move |(at, entry)| {
            let at = skipped + at;
            let Entry { gpa, state, signals, offset, lsb, kind, found_by } = *entry;
            let hva = gpa.wrapping_add(self.offsets.get(offset));
            let mut nanos =
                self.times.each_ref().map(|column| column.get(at).copied().unwrap_or(NEVER));
            let number = self.dropped + at as u64;
            let stretch = self.healed.partition_point(|stretch| stretch.end <= number);
            nanos[HEALED] = self.healed.get(stretch).map_or(NEVER, |stretch| stretch.healed);
            Page { gpa, hva, lsb, kind, found_by, signals, state, times: times(nanos) }
        })
    }
}

/// Appends to a list of `most` at most. It grows by a thirty-second, where `VecDeque` itself doubles.
fn push<T>(list: &mut VecDeque<T>, value: T, most: usize) {
    if list.len() == list.capacity() {
        list.reserve_exact((list.len() / 32 + 1).min(most.saturating_sub(list.len())));
    }
    list.push_back(value);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::columns::testing::any_page;
    use super::*;

    /// Pages that waited, were told and healed.
    #[test]
    fn a_page_is_small() {
        let most = 10_000;
        let (mut past, mut sizes) = (Past::default(), Vec::new());
        for number in 0..20_000 {
            let mut page = any_page(number << 12, 0b1110, 1);
            page.times.healed = Some(page.times.seen);
            past.push(&page, most);
            let times: usize = past.times.iter().map(VecDeque::capacity).sum();
            let bytes = past.entries.capacity() * size_of::<Entry>() + times * size_of::<Nanos>();
            sizes.push(bytes as f64 / past.len() as f64);
        }
        assert!(sizes[1000..].iter().all(|size| *size <= 66.1), "{:?}", sizes[1000]);
        assert!(sizes[most..].iter().all(|size| *size <= 64.0), "{:?}", sizes[most]);
        assert!(past.healed.len() == 1 && past.offsets.len() == 1);
    }

    proptest! {
        /// Against the obvious way: a list of whole pages.
        #[test]
        fn it_holds_what_a_list_holds(
            pages in prop::collection::vec((0u64..1 << 40, any::<u64>(), 0u32..9), 0..200),
            most in 1_usize..100, skipped in 0_usize..120,
        ) {
            let (mut past, mut list) = (Past::default(), VecDeque::new());
            let mut dropped = 0;
            for (number, seed, signals) in pages {
                let page = any_page(number << 12, seed >> 1, signals);
                past.push(&page, most);
                list.push_back(page);
                if list.len() > most {
                    list.pop_front();
                    dropped += 1;
                }
                prop_assert_eq!((past.len(), past.dropped()), (list.len(), dropped));
            }
            prop_assert_eq!(past.iter(0).collect::<VecDeque<_>>(), list.clone());
            let rest: Vec<Page> = list.into_iter().skip(skipped).collect();
            let iter = past.iter(skipped);
            prop_assert_eq!(iter.len(), rest.len());
            prop_assert_eq!(iter.collect::<Vec<_>>(), rest);
        }
    }
}
