//! Where things lie in guest-physical memory before the kernel runs, and the map that tells it.

use crate::memory::{HOLE_END, RamBlock};

/// The GDT that the entry state uses.
pub const GDT: u64 = 0x500;
/// The PVH start info and the tables it points to; one page.
pub const PVH_INFO: u64 = 0x6000;
/// boot_params, "zero page"; one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Page tables of the 64-bit entry: PML4, PDPT and four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// The command line.
pub const CMDLINE: u64 = 0x2_0000;
/// End of conventional memory; firmware data would begin here.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables; the RSDP comes first, where a scan for it looks too.
pub const ACPI_START: u64 = 0xe_0000;
/// End of the ACPI tables (exclusive).
pub const ACPI_END: u64 = 0xf_0000;
/// Reserved like the tables: the page that the firmware-first records lie in comes first (see
/// [`crate::ghes`]), the rest is empty.
pub const FIRMWARE_START: u64 = ACPI_END;
/// End of [`FIRMWARE_START`] (exclusive).
pub const FIRMWARE_END: u64 = 0xf_f000;
/// Where a processor in real mode enters a PC's firmware (F000:FFF0).
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where RAM for the kernel begins.
pub const HIGH_RAM: u64 = 0x10_0000;
/// I/O APIC registers.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APIC registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// The page that KVM on Intel needs for real mode without paging.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// The three pages that KVM on Intel needs for a task state segment.
pub const KVM_TSS: usize = 0xfffb_d000;

/// The kind of a piece of the memory map; the numbers are those of e820 and of PVH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MapKind {
    /// The kernel may use it.
    Ram = 1,
    /// The kernel leaves it alone.
    Reserved = 2,
}

/// A piece of the memory map, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// First guest-physical address.
    pub addr: u64,
    /// Length.
    pub size: u64,
    /// What it is.
    pub kind: MapKind,
}

/// The memory map of a guest with this RAM, in rising order and without overlaps.
#[must_use]
pub fn memory_map(blocks: &[RamBlock]) -> Vec<MapEntry> {
    let mut map = vec![
        MapEntry { addr: 0, size: LOW_RAM_END, kind: MapKind::Ram },
        MapEntry { addr: ACPI_START, size: HIGH_RAM - ACPI_START, kind: MapKind::Reserved },
    ];
    for block in blocks {
        let start = block.gpa.max(HIGH_RAM);
        let end = block.gpa + block.len;
        if end > start {
            map.push(MapEntry { addr: start, size: end - start, kind: MapKind::Ram });
        }
        debug_assert!(block.gpa == 0 || block.gpa >= HOLE_END);
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{HOLE_START, split};

    fn blocks(bytes: u64) -> Vec<RamBlock> {
        let piece = |(gpa, len)| RamBlock { gpa, len, hva: 0, fd_offset: 0 };
        split(bytes).into_iter().map(piece).collect()
    }

    #[test]
    fn map_is_sorted_and_disjoint_and_holds_all_of_high_ram() {
        for bytes in [32 << 20, HOLE_START, HOLE_START + (1 << 30)] {
            let map = memory_map(&blocks(bytes));
            for pair in map.windows(2) {
                assert!(pair[0].addr + pair[0].size <= pair[1].addr, "{pair:x?}");
            }
            let ram: u64 =
                map.iter().filter(|entry| entry.kind == MapKind::Ram).map(|entry| entry.size).sum();
            assert_eq!(ram, bytes - (HIGH_RAM - LOW_RAM_END));
        }
    }

    #[test]
    fn four_gibibytes_end_at_five() {
        let map = memory_map(&blocks(4 << 30));
        let last = map.last().unwrap();
        assert_eq!((last.addr, last.size), (HOLE_END, 1 << 30));
    }

    #[test]
    fn boot_data_does_not_overlap() {
        let pieces = [
            (GDT, 0x100),
            (PVH_INFO, 0x1000),
            (ZERO_PAGE, 0x1000),
            (PAGE_TABLES, 6 * 0x1000),
            (CMDLINE, 0x1000),
            (LOW_RAM_END, 0),
        ];
        for pair in pieces.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }
}
