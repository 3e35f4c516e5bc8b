//! The header of a qcow2 image.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::fault::{Fault, unsound};

/// What a qcow2 image begins with.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// The most bytes of an L1 table, and of a refcount table (QEMU has the first, and imago both).
const TABLE_MAX: u64 = 32 << 20;
/// Length of a header of version 2.
const LEN_2: usize = 72;
/// Length of one of version 3, at least.
const LEN_3: usize = 104;

/// What the rest of the check needs of it. Offsets and lengths are in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub(super) cluster_bits: u32,
    /// What the guest sees.
    pub(super) size: u64,
    pub(super) l1_table: u64,
    pub(super) l1_len: u64,
    pub(super) refcount_table: u64,
    pub(super) refcount_table_len: u64,
    /// A count is 2 to the power of this wide, in bits.
    pub(super) refcount_order: u32,
    /// 0 if there are none.
    pub(super) snapshots: u64,
}

impl Header {
    /// The header of the image in `file`, which has `file_len` bytes.
    pub(super) fn read(file: &File, file_len: u64) -> Result<Self, Fault> {
        let len = if file_len < LEN_3 as u64 { LEN_2 } else { LEN_3 };
        let mut bytes = [0; LEN_3];
        let read = file.read_exact_at(&mut bytes[..len], 0);
        read.map_err(|source| Fault::Read { what: "header", at: 0, source })?;
        let fields = Fields(bytes);
        let version = fields.version()?;
        fields.has_only_what_is_known(version)?;
        fields.into_header(version)
    }

    /// Bytes of a cluster.
    pub(super) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }
}

struct Fields([u8; LEN_3]);

impl Fields {
    fn u32(&self, at: usize) -> u32 {
        self.u64(at).to_be_bytes().first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes))
    }

    /// The eight bytes at `at`, of which those behind the end are 0.
    fn u64(&self, at: usize) -> u64 {
        let mut value = [0; 8];
        value.iter_mut().zip(&self.0[at..]).for_each(|(to, from)| *to = *from);
        u64::from_be_bytes(value)
    }

    fn version(&self) -> Result<u32, Fault> {
        if self.0[..4] != MAGIC {
            return Err(unsound("magic", self.u32(0).into(), "0x514649fb (\"QFI\\xfb\")"));
        }
        match self.u32(4) {
            version @ (2 | 3) => Ok(version),
            version => Err(unsound("version", version.into(), "2 or 3")),
        }
    }

    fn has_only_what_is_known(&self, version: u32) -> Result<(), Fault> {
        let without = |field, value: u64, what| match value {
            0 => Ok(()),
            value => Err(Fault::Unsupported { field, value, what }),
        };
        without("backing_file_offset", self.u64(8), "a backing file")?;
        without("crypt_method", self.u32(32).into(), "encryption")?;
        if version == 2 {
            return Ok(());
        }
        let features = self.u64(72);
        if features & 3 != 0 {
            // The dirty bit and the corrupt bit.
            let expected = "one without the bits 0 (it was not closed) and 1 (it is damaged)";
            return Err(unsound("incompatible_features", features, expected));
        }
        let what = "an external data file, another compression, or subclusters";
        without("incompatible_features", features, what)
    }

    fn into_header(self, version: u32) -> Result<Header, Fault> {
        let cluster_bits = self.u32(20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(unsound("cluster_bits", cluster_bits.into(), "9 to 21"));
        }
        let cluster = 1_u64 << cluster_bits;
        let refcount_order = if version == 2 { 4 } else { self.u32(96) };
        if refcount_order > 6 {
            return Err(unsound("refcount_order", refcount_order.into(), "0 to 6"));
        }
        let len = if version == 2 { LEN_2 as u64 } else { self.u32(100).into() };
        if version == 3 && !((LEN_3 as u64..=cluster).contains(&len) && len.is_multiple_of(8)) {
            let expected = format!("a multiple of 8 from {LEN_3:#x} to {cluster:#x}");
            return Err(unsound("header_length", len, expected));
        }
        let header = Header {
            cluster_bits,
            size: self.u64(24),
            l1_table: self.u64(40),
            l1_len: u64::from(self.u32(36)) * 8,
            refcount_table: self.u64(48),
            refcount_table_len: u64::from(self.u32(56)) << cluster_bits,
            refcount_order,
            snapshots: if self.u32(60) == 0 { 0 } else { self.u64(64) },
        };
        header.check_sizes()?;
        Ok(header)
    }
}

impl Header {
    fn check_sizes(&self) -> Result<(), Fault> {
        let entries = self.l1_len / 8;
        if self.l1_len > TABLE_MAX {
            return Err(unsound("l1_size", entries, format!("{:#x} at most", TABLE_MAX / 8)));
        }
        // Each entry names a table of as many clusters as a cluster has entries of eight bytes.
        let covered = u128::from(entries) << (self.cluster_bits + self.cluster_bits - 3);
        if u128::from(self.size) > covered {
            let expected = format!("{covered:#x} at most, as l1_size is {entries:#x}");
            return Err(unsound("size", self.size, expected));
        }
        let clusters = self.refcount_table_len >> self.cluster_bits;
        if !(1..=TABLE_MAX).contains(&self.refcount_table_len) {
            let expected = format!("1 to {:#x}", TABLE_MAX >> self.cluster_bits);
            return Err(unsound("refcount_table_clusters", clusters, expected));
        }
        Ok(())
    }
}
