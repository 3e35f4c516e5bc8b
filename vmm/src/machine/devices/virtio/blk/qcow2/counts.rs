//! What of an image's file is used, and how often; and whether it is counted so.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use super::fault::{Fault, unsound};
use super::header::Header;

/// Clusters that are noted together: few, as an image may have them anywhere.
const TOGETHER: usize = 64;
/// Of a note: a table has it.
const TABLE: u16 = 1 << 15;
/// Of a note: somebody relies on being the only one.
const OWN: u16 = 1 << 14;
/// Of a note: how often it is used, at least.
const COUNT: u16 = OWN - 1;

/// What has a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A table, which nothing else may have.
    Table,
    /// The same, of which nobody else has a copy by reference (a snapshot, say).
    OwnTable,
    /// The guest.
    Data,
    /// The same, as for a table.
    OwnData,
}

/// Clusters of the file, and how they are used.
#[derive(Debug, Default)]
pub(super) struct Counts(HashMap<u64, [u16; TOGETHER]>);

impl Counts {
    /// Notes a use of `cluster`; an error if a table has it and something else, too.
    pub(super) fn add(&mut self, cluster: u64, kind: Kind) -> Result<(), ()> {
        let notes = self.0.entry(cluster / TOGETHER as u64).or_insert([0; TOGETHER]);
        // A remainder of 64.
        let note = &mut notes[usize::try_from(cluster % TOGETHER as u64).unwrap_or(0)];
        let is_table = matches!(kind, Kind::Table | Kind::OwnTable);
        if *note & TABLE != 0 || is_table && *note != 0 {
            return Err(());
        }
        if *note & COUNT < COUNT {
            *note += 1;
        }
        if is_table {
            *note |= TABLE;
        }
        if matches!(kind, Kind::OwnTable | Kind::OwnData) {
            *note |= OWN;
        }
        Ok(())
    }

    /// Compares them with the reference counts of the image; its blocks of them are at `blocks`.
    pub(super) fn compare(
        &self,
        file: &File,
        header: &Header,
        blocks: &[u64],
    ) -> Result<(), Fault> {
        let mut groups: Vec<_> = self.0.iter().collect();
        groups.sort_unstable_by_key(|(group, _)| **group);
        let mut block = Block::new(file, header, blocks);
        for (group, notes) in groups {
            for (cluster, note) in
                (group * TOGETHER as u64..).zip(notes).filter(|(_, note)| **note != 0)
            {
                let (count, used) = (block.count(cluster)?, u64::from(note & COUNT));
                let field = || format!("reference count of cluster {cluster:#x}");
                if count < used {
                    return Err(unsound(field(), count, format!("{used} at least")));
                }
                if note & OWN != 0 && (count, used) != (1, 1) {
                    let expected = format!("1, as an entry for it has bit 63; {used} have it");
                    return Err(unsound(field(), count, expected));
                }
            }
        }
        Ok(())
    }
}

/// The block of reference counts that was looked at last.
struct Block<'a> {
    file: &'a File,
    blocks: &'a [u64],
    order: u32,
    /// Counts in a block.
    counts: u64,
    index: Option<u64>,
    bytes: Vec<u8>,
}

impl<'a> Block<'a> {
    fn new(file: &'a File, header: &Header, blocks: &'a [u64]) -> Self {
        let order = header.refcount_order;
        let bytes = vec![0; 1 << header.cluster_bits];
        Self { file, blocks, order, counts: (header.cluster() * 8) >> order, index: None, bytes }
    }

    /// The reference count of `cluster`; 0 if there is no block for it.
    fn count(&mut self, cluster: u64) -> Result<u64, Fault> {
        let index = cluster / self.counts;
        if self.index != Some(index) {
            let named = usize::try_from(index).ok().and_then(|index| self.blocks.get(index));
            match named.copied().unwrap_or(0) {
                0 => self.bytes.fill(0),
                at => {
                    let read = self.file.read_exact_at(&mut self.bytes, at);
                    let what = "reference counts";
                    read.map_err(|source| Fault::Read { what, at, source })?;
                }
            }
            self.index = Some(index);
        }
        Ok(nth(&self.bytes, self.order, cluster % self.counts))
    }
}

/// Count number `at` of a block, of 2 to the power of `order` bits each.
fn nth(block: &[u8], order: u32, at: u64) -> u64 {
    let bit = at << order;
    let first = usize::try_from(bit / 8).unwrap_or(usize::MAX);
    let byte = |at: usize| u64::from(block.get(at).copied().unwrap_or(0));
    match order {
        0..=2 => byte(first) >> (bit % 8) & ((1 << (1 << order)) - 1),
        _ => (first..first + (1 << order) / 8).fold(0, |count, at| count << 8 | byte(at)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_are_read() {
        let block = [0b1010_0110, 0x21, 0xff, 0x01, 0, 0, 0, 7];
        assert_eq!([0, 1, 2, 5].map(|at| nth(&block, 0, at)), [0, 1, 1, 1]);
        assert_eq!([0, 1, 2, 3].map(|at| nth(&block, 1, at)), [2, 1, 2, 2]);
        assert_eq!([0, 1, 2, 3].map(|at| nth(&block, 2, at)), [6, 10, 1, 2]);
        assert_eq!(nth(&block, 3, 2), 0xff);
        assert_eq!(nth(&block, 4, 1), 0xff01);
        assert_eq!(nth(&block, 5, 1), 7);
        assert_eq!(nth(&block, 6, 0), 0xa621_ff01_0000_0007);
    }

    #[test]
    fn a_table_shares_with_nothing() {
        let mut counts = Counts::default();
        counts.add(5, Kind::Table).unwrap_or_else(|()| panic!("it is free"));
        assert!(counts.add(5, Kind::Data).is_err() && counts.add(5, Kind::Table).is_err());
        assert!(counts.add(6, Kind::Data).is_ok() && counts.add(6, Kind::OwnData).is_ok());
        assert!(counts.add(6, Kind::OwnTable).is_err());
    }
}
