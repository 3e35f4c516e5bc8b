//! Whether a qcow2 image is sound (QEMU: docs/interop/qcow2.txt), before anything relies on it.
//!
//! Every table is read once: each has to lie within the file, in clusters that nothing else has, and what is used has to
//! be counted as used. Otherwise a write would be put where something else is, a read behind the end would give zeros,
//! and imago would look for room without end.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use super::counts::{Counts, Kind};
use super::fault::{Fault, unsound};
use super::header::Header;

/// Bits of an L1 or L2 entry that are an offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Of an L1 or L2 entry: nobody else has what it names.
const COPIED: u64 = 1 << 63;
/// Of an L2 entry: what it names is compressed.
const COMPRESSED: u64 = 1 << 62;
/// Of an L2 entry: it stands for zeros.
const ZERO: u64 = 1;

/// Looks at all of the image in `file`; of one that is only read nothing is counted.
pub(super) fn check(mut file: &File, readonly: bool) -> Result<(), Fault> {
    let end = file.seek(SeekFrom::End(0));
    let len = end.map_err(|source| Fault::Read { what: "length", at: 0, source })?;
    let header = Header::read(file, len)?;
    let mut walk = Walk { file, len, header, counts: Counts::default() };
    let blocks = walk.tables_of_counts()?;
    let l2_tables = walk.l1_table()?;
    for table in &l2_tables {
        walk.l2_table(table)?;
    }
    if readonly { Ok(()) } else { walk.counts.compare(file, &walk.header, &blocks) }
}

/// A table of guest clusters.
struct L2Table {
    /// Of the entry that names it.
    index: u64,
    at: u64,
}

struct Walk<'a> {
    file: &'a File,
    len: u64,
    header: Header,
    counts: Counts,
}

impl Walk<'_> {
    /// The header, the refcount table and its blocks; where the blocks are, 0 for none.
    fn tables_of_counts(&mut self) -> Result<Vec<u64>, Fault> {
        let Header { refcount_table, refcount_table_len, snapshots, .. } = self.header;
        let cluster = self.header.cluster();
        // Nothing is before it.
        self.counts.add(0, Kind::Table).map_err(|()| self.shared("header".into(), 0))?;
        let field = || "refcount_table_offset".into();
        self.take(&field, refcount_table, refcount_table_len, Kind::Table)?;
        if snapshots != 0 {
            self.take(&|| "snapshots_offset".into(), snapshots, 1, Kind::Table)?;
        }
        let blocks = self.table("refcount table", refcount_table, refcount_table_len)?;
        for (index, at) in blocks.iter().enumerate().filter(|(_, at)| **at != 0) {
            let field = || format!("refcount table's entry {index}");
            self.take(&field, *at, cluster, Kind::Table)?;
        }
        Ok(blocks)
    }

    fn l1_table(&mut self) -> Result<Vec<L2Table>, Fault> {
        let Header { l1_table, l1_len, .. } = self.header;
        if l1_len == 0 {
            return Ok(Vec::new());
        }
        self.take(&|| "l1_table_offset".into(), l1_table, l1_len, Kind::Table)?;
        let mut tables = Vec::new();
        for (index, entry) in (0..).zip(self.table("L1 table", l1_table, l1_len)?) {
            let field = || format!("L1 table's entry {index}");
            if entry & !(OFFSET | COPIED) != 0 {
                return Err(unsound(field(), entry, "one without the bits 0 to 8 and 56 to 62"));
            }
            let at = entry & OFFSET;
            if at == 0 {
                continue;
            }
            let kind = if entry & COPIED == 0 { Kind::Table } else { Kind::OwnTable };
            self.take(&field, at, self.header.cluster(), kind)?;
            tables.push(L2Table { index, at });
        }
        Ok(tables)
    }

    fn l2_table(&mut self, table: &L2Table) -> Result<(), Fault> {
        let cluster = self.header.cluster();
        let first = table.index * (cluster / 8);
        for (nth, entry) in (first..).zip(self.table("L2 table", table.at, cluster)?) {
            if entry == 0 {
                continue;
            }
            let field = || format!("L2 entry of guest cluster {nth}");
            if entry & COMPRESSED != 0 {
                self.compressed(&field, entry)?;
                continue;
            }
            if entry & !(OFFSET | COPIED | ZERO) != 0 {
                return Err(unsound(field(), entry, "one without the bits 1 to 8 and 56 to 61"));
            }
            let at = entry & OFFSET;
            if at == 0 {
                continue;
            }
            // Of the last cluster the guest has a part only, and zeros are not read from the file.
            let seen = self.header.size.saturating_sub(nth * cluster).clamp(1, cluster);
            let needed = if entry & ZERO == 0 { seen } else { 1 };
            let kind = if entry & COPIED == 0 { Kind::Data } else { Kind::OwnData };
            self.take(&field, at, needed, kind)?;
        }
        Ok(())
    }

    fn compressed(&mut self, field: &dyn Fn() -> String, entry: u64) -> Result<(), Fault> {
        // "Compressed Clusters Descriptor": the offset has x bits, the rest counts sectors after the first one.
        let x = 62 - (self.header.cluster_bits - 8);
        let descriptor = entry & (COMPRESSED - 1);
        let (at, sectors) = (descriptor & ((1 << x) - 1), descriptor >> x);
        let end = (at & !511) + (sectors + 1) * 512;
        if entry & COPIED != 0 {
            return Err(unsound(field(), entry, "one without bit 63, as it is compressed"));
        }
        if at == 0 || end > self.len.next_multiple_of(512) {
            let expected = format!("compressed data within the file's {:#x} bytes", self.len);
            return Err(unsound(field(), entry, expected));
        }
        for cluster in at >> self.header.cluster_bits..=(end - 1) >> self.header.cluster_bits {
            self.counts.add(cluster, Kind::Data).map_err(|()| self.shared(field(), at))?;
        }
        Ok(())
    }

    /// Notes that `len` bytes at `at` are used, by what `field` says.
    fn take(
        &mut self,
        field: &dyn Fn() -> String,
        at: u64,
        len: u64,
        kind: Kind,
    ) -> Result<(), Fault> {
        let cluster = self.header.cluster();
        let is_place = at != 0 && at.is_multiple_of(cluster);
        let end = at.checked_add(len).filter(|end| is_place && *end <= self.len);
        let Some(end) = end else {
            let expected = format!(
                "the offset of {len:#x} bytes within the file's {:#x}, a multiple of {cluster:#x}",
                self.len
            );
            return Err(unsound(field(), at, expected));
        };
        for cluster in at >> self.header.cluster_bits..end.div_ceil(cluster) {
            self.counts.add(cluster, kind).map_err(|()| self.shared(field(), at))?;
        }
        Ok(())
    }

    fn shared(&self, field: String, at: u64) -> Fault {
        unsound(field, at, "the offset of clusters that no table of the image has")
    }

    /// The entries of a table that is within the file.
    fn table(&self, what: &'static str, at: u64, len: u64) -> Result<Vec<u64>, Fault> {
        let error = |source| Fault::Read { what, at, source };
        let len = usize::try_from(len).map_err(|_| error(io::ErrorKind::OutOfMemory.into()))?;
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, at).map_err(error)?;
        let (entries, _) = bytes.as_chunks();
        Ok(entries.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
    }
}
