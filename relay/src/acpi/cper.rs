//! The firmware-first record: an ACPI generic error status block with UEFI memory-error sections, as
//! bytes.
//!
//! Layout: ACPI 6.5, 18.3.2.7.1 (generic error status block, table 18.11; generic error data entry,
//! table 18.12) and UEFI 2.10, N.2.5 (memory error section). All numbers are little-endian.

use crate::types::PAGE_SIZE;

/// Pages that one record names at most. With 15 the whole block status fits into its lowest byte, so
/// that the last thing written is a single byte and no guest sees half of it; and it is less than the
/// 16 pages that Linux queues per processor (`MEMORY_FAILURE_FIFO_ORDER`, `mm/memory-failure.c`).
pub const MAX_PAGES: usize = 15;

/// Length of the generic error status block without its entries, in bytes.
const BLOCK_HEADER: usize = 20;
/// Length of a generic error data entry without its section: revision 3, which has a timestamp.
const ENTRY_HEADER: usize = 72;
/// Length of a memory error section.
const SECTION: usize = 80;
/// Length of the longest record, in bytes.
pub const MAX_LEN: usize = BLOCK_HEADER + MAX_PAGES * (ENTRY_HEADER + SECTION);
/// Length of the block status, which comes first and is written last, in bytes.
pub const STATUS_LEN: usize = 4;

/// Block status (ACPI 6.5, table 18.11).
mod status {
    pub(super) const UNCORRECTABLE: u32 = 1 << 0;
    pub(super) const CORRECTABLE: u32 = 1 << 1;
    pub(super) const MULTIPLE_UNCORRECTABLE: u32 = 1 << 2;
    pub(super) const MULTIPLE_CORRECTABLE: u32 = 1 << 3;
    /// The number of entries begins at this bit, ten bits wide.
    pub(super) const COUNT_SHIFT: u32 = 4;
}

/// Error severity, of a block and of an entry (ACPI 6.5, tables 18.11 and 18.12).
mod severity {
    pub(super) const RECOVERABLE: u32 = 0;
    pub(super) const CORRECTED: u32 = 2;
}

/// Revision of a generic error data entry with a timestamp.
const ENTRY_REVISION: u16 = 0x0300;
/// Entry flags: the error exceeded a threshold (UEFI 2.10, N.2.2, section flags).
const THRESHOLD_EXCEEDED: u8 = 1 << 3;
/// Section type "platform memory", a5bc1114-6f64-4ede-b863-3e83ed7c83b1 (UEFI 2.10, N.2.5), as it
/// lies in memory.
const PLATFORM_MEMORY: [u8; 16] = [
    0x14, 0x11, 0xbc, 0xa5, 0x64, 0x6f, 0xde, 0x4e, 0xb8, 0x63, 0x3e, 0x83, 0xed, 0x7c, 0x83, 0xb1,
];
/// Memory error section: the physical address and its mask are valid (UEFI 2.10, table N.31).
const ADDRESS_VALID: u64 = 1 << 1 | 1 << 2;

/// What a record says of its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// Their contents are lost (AO). Linux takes each out of use (`memory_failure`).
    Lost,
    /// They are whole, but are predicted to fail: a corrected error past its threshold. Linux moves
    /// what is in each and takes it out of use (`soft_offline_page`).
    Predicted,
}

/// The record that tells `notice` of the 4 KiB pages at `gpas` (guest-physical), one entry each, in that order.
///
/// At most [`MAX_PAGES`] of them are taken; the caller puts the rest into the next record.
#[allow(clippy::cast_possible_truncation, reason = "a record is MAX_LEN bytes at most")]
pub fn record(notice: Notice, gpas: &[u64]) -> Vec<u8> {
    let gpas = &gpas[..gpas.len().min(MAX_PAGES)];
    let (kind, several, severity, flags) = match notice {
        Notice::Lost => {
            (status::UNCORRECTABLE, status::MULTIPLE_UNCORRECTABLE, severity::RECOVERABLE, 0)
        }
        Notice::Predicted => (
            status::CORRECTABLE,
            status::MULTIPLE_CORRECTABLE,
            severity::CORRECTED,
            THRESHOLD_EXCEEDED,
        ),
    };
    let count = gpas.len() as u32;
    let data_len = count * (ENTRY_HEADER + SECTION) as u32;
    let several = if count > 1 { several } else { 0 };

    let mut bytes = Vec::with_capacity(MAX_LEN);
    let mut u32 = |value: u32| bytes.extend_from_slice(&value.to_le_bytes());
    u32(kind | several | count << status::COUNT_SHIFT);
    // There is no raw data behind the entries.
    u32(0);
    u32(0);
    u32(data_len);
    u32(severity);
    for gpa in gpas {
        entry(&mut bytes, severity, flags);
        section(&mut bytes, *gpa);
    }
    bytes
}

/// The head of one generic error data entry.
#[allow(clippy::cast_possible_truncation, reason = "a section is 80 bytes long")]
fn entry(bytes: &mut Vec<u8>, severity: u32, flags: u8) {
    let end = bytes.len() + ENTRY_HEADER;
    bytes.extend_from_slice(&PLATFORM_MEMORY);
    bytes.extend_from_slice(&severity.to_le_bytes());
    bytes.extend_from_slice(&ENTRY_REVISION.to_le_bytes());
    // Validation bits: neither FRU nor timestamp, which stay zero.
    bytes.extend_from_slice(&[0, flags]);
    bytes.extend_from_slice(&(SECTION as u32).to_le_bytes());
    bytes.resize(end, 0);
}

/// One memory error section.
fn section(bytes: &mut Vec<u8>, gpa: u64) {
    let end = bytes.len() + SECTION;
    // Validation bits, error status, address, mask.
    for value in [ADDRESS_VALID, 0, gpa, !(PAGE_SIZE - 1)] {
        bytes.extend_from_slice(&value.to_le_bytes());
    }
    bytes.resize(end, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The block as the specifications' tables give it, field by field: offsets are the tables' own,
    /// not those that the code above adds up to.
    fn check(notice: Notice, gpas: &[u64], status: u32, severity: u32, flags: u8) {
        let bytes = record(notice, gpas);
        assert_eq!(u32_at(&bytes, 0), status, "block status");
        assert_eq!(u32_at(&bytes, 4), 0, "raw data offset");
        assert_eq!(u32_at(&bytes, 8), 0, "raw data length");
        assert_eq!(u32_at(&bytes, 12) as usize, bytes.len() - 20, "data length");
        assert_eq!(u32_at(&bytes, 16), severity, "error severity");
        let entries: Vec<_> = bytes[20..].chunks(152).collect();
        assert_eq!(entries.len(), gpas.len());
        for (entry, gpa) in entries.iter().zip(gpas) {
            // Section type: the first three fields of a GUID are little-endian, the rest is as is.
            assert_eq!(u32_at(entry, 0), 0xa5bc_1114);
            assert_eq!(u32_at(entry, 4), 0x4ede_6f64);
            assert_eq!(entry[8..16], [0xb8, 0x63, 0x3e, 0x83, 0xed, 0x7c, 0x83, 0xb1]);
            assert_eq!(u32_at(entry, 16), severity, "entry severity");
            assert_eq!(entry[20..22], [0x00, 0x03], "revision");
            assert_eq!((entry[22], entry[23]), (0, flags), "validation bits, flags");
            assert_eq!(u32_at(entry, 24), 80, "error data length");
            assert!(entry[28..72].iter().all(|byte| *byte == 0), "FRU id, FRU text, timestamp");
            assert_eq!(u64_at(entry, 72), 0b110, "validation bits");
            assert_eq!(u64_at(entry, 80), 0, "error status");
            assert_eq!(u64_at(entry, 88), *gpa, "physical address");
            assert_eq!(u64_at(entry, 96), 0xffff_ffff_ffff_f000, "physical address mask");
            assert!(entry[104..152].iter().all(|byte| *byte == 0), "node to module handle");
        }
    }

    #[test]
    fn every_field_is_where_the_specifications_have_it() {
        check(Notice::Lost, &[0x1234_5000], 0x11, 0, 0);
        check(Notice::Lost, &[0x1000, 0x1_0000_2000, 0xf_ffff_f000], 0x35, 0, 0);
        check(Notice::Predicted, &[0x1000], 0x12, 2, 8);
        check(Notice::Predicted, &[0x1000, 0x2000], 0x2a, 2, 8);
    }

    #[test]
    fn the_status_is_one_byte_and_the_longest_record_is_as_long_as_stated() {
        let gpas: Vec<u64> = (0..40).map(|page| page << 12).collect();
        for notice in [Notice::Lost, Notice::Predicted] {
            let bytes = record(notice, &gpas);
            assert_eq!(bytes.len(), MAX_LEN);
            assert_eq!(bytes[1..4], [0, 0, 0]);
            assert_eq!(bytes[0] >> 4, 15, "entries");
            assert_eq!(bytes, record(notice, &gpas[..MAX_PAGES]), "the rest is left out");
        }
    }
}
