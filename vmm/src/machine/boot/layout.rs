//! Where boot data lies in guest-physical memory before the kernel runs, and the memory map.

use crate::machine::memory::block::RamBlock;

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
pub const ACPI_END: u64 = MP_TABLE;
/// The MP table; its floating pointer lies at [`LOW_RAM_END`].
pub const MP_TABLE: u64 = 0xe_e000;
/// End of the MP table (exclusive).
pub const MP_TABLE_END: u64 = 0xf_0000;
/// Reserved like the tables. The first page holds the firmware-first records (see
/// [`crate::relaying::error_source`]), the rest is empty.
pub const FIRMWARE_START: u64 = MP_TABLE_END;
/// End of [`FIRMWARE_START`] (exclusive).
pub const FIRMWARE_END: u64 = 0xf_f000;
/// Where a processor in real mode enters a PC's firmware (F000:FFF0).
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where RAM for the kernel begins.
pub const HIGH_RAM: u64 = 0x10_0000;
/// The window of the first virtio device, in the hole below 4 GiB; the others follow.
pub const VIRTIO_START: u64 = 0xd000_0000;
/// The length of each of them.
pub const VIRTIO_WINDOW: u64 = 0x1000;
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

/// The most entries that a memory map has: those of the zero page (E820_MAX_ENTRIES_ZEROPAGE).
pub const MAX_MAP: usize = 128;

/// The memory map of a guest with this RAM, ascending and without overlaps. `removed` are stretches (address and
/// length) of it that are not to be used. If there are more of them than a map can hold, the closest ones are merged,
/// and the RAM between them is not used either.
#[must_use]
pub fn memory_map(blocks: &[RamBlock], removed: &[(u64, u64)]) -> Vec<MapEntry> {
    let mut gaps: Vec<(u64, u64)> = Vec::new();
    for &(start, len) in removed {
        match gaps.last_mut() {
            Some((_, end)) if *end >= start => *end = start + len,
            _ => gaps.push((start, start + len)),
        }
    }
    loop {
        let map = cut(&whole_map(blocks), &gaps);
        if map.len() <= MAX_MAP || gaps.len() < 2 {
            return map;
        }
        let between = |at: &usize| gaps[at + 1].0 - gaps[*at].1;
        // There are at least two gaps, so a nearest pair exists.
        let nearest = (0..gaps.len() - 1).min_by_key(between).unwrap_or(0);
        gaps[nearest].1 = gaps[nearest + 1].1;
        gaps.remove(nearest + 1);
    }
}

/// `map` with the stretches `gaps` (start and end, ascending) of its RAM reserved.
fn cut(map: &[MapEntry], gaps: &[(u64, u64)]) -> Vec<MapEntry> {
    let mut all = Vec::new();
    for entry in map {
        let end = entry.addr + entry.size;
        let mut at = entry.addr;
        for &(start, stop) in gaps.iter().filter(|_| entry.kind == MapKind::Ram) {
            let (start, stop) = (start.max(at), stop.min(end));
            if start < stop {
                if start > at {
                    all.push(MapEntry { addr: at, size: start - at, kind: MapKind::Ram });
                }
                all.push(MapEntry { addr: start, size: stop - start, kind: MapKind::Reserved });
                at = stop;
            }
        }
        if at < end {
            all.push(MapEntry { addr: at, size: end - at, kind: entry.kind });
        }
    }
    all
}

fn whole_map(blocks: &[RamBlock]) -> Vec<MapEntry> {
    let mut map = vec![
        MapEntry { addr: 0, size: LOW_RAM_END, kind: MapKind::Ram },
        MapEntry { addr: ACPI_START, size: HIGH_RAM - ACPI_START, kind: MapKind::Reserved },
    ];
    for block in blocks {
        let start = block.gpa.max(HIGH_RAM);
        let end = block.gpa + block.len;
        match map.last_mut() {
            _ if end <= start => {}
            Some(last) if last.kind == MapKind::Ram && last.addr + last.size == start => {
                last.size += end - start;
            }
            _ => map.push(MapEntry { addr: start, size: end - start, kind: MapKind::Ram }),
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::memory::block::{HOLE_END, HOLE_START, PAGE_SIZE, split};

    fn blocks(bytes: u64) -> Vec<RamBlock> {
        let pieces = split(&[(bytes, PAGE_SIZE)]).into_iter();
        pieces.map(|piece| RamBlock::new(piece.gpa, piece.len, 0)).collect()
    }

    #[test]
    fn map_is_sorted_and_disjoint_and_holds_all_of_high_ram() {
        for bytes in [32 << 20, HOLE_START, HOLE_START + (1 << 30)] {
            let map = memory_map(&blocks(bytes), &[]);
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
        let map = memory_map(&blocks(4 << 30), &[]);
        let last = map.last().unwrap();
        assert_eq!((last.addr, last.size), (HOLE_END, 1 << 30));
    }

    fn ram_of(map: &[MapEntry]) -> Vec<(u64, u64)> {
        let ram = map.iter().filter(|entry| entry.kind == MapKind::Ram);
        ram.map(|entry| (entry.addr, entry.addr + entry.size)).collect()
    }

    #[test]
    fn zones_that_touch_are_one_stretch() {
        let zones = split(&[(256 << 20, PAGE_SIZE), (256 << 20, 2 << 20)]);
        let blocks: Vec<RamBlock> =
            zones.iter().map(|piece| RamBlock::new(piece.gpa, piece.len, 0)).collect();
        assert_eq!(blocks.len(), 2);
        assert_eq!(ram_of(&memory_map(&blocks, &[]))[1], (HIGH_RAM, 512 << 20));
    }

    #[test]
    fn what_is_removed_is_reserved() {
        let gone = [(0x20_0000, 0x20_0000), (0x40_0000, 0x20_0000), (0x4000_0000, 0x1000)];
        let map = memory_map(&blocks(2 << 30), &gone);
        let expected = [
            (0, LOW_RAM_END),
            (HIGH_RAM, 0x20_0000),
            (0x60_0000, 0x4000_0000),
            (0x4000_1000, 2 << 30),
        ];
        assert_eq!(ram_of(&map), expected);
        let reserved = MapEntry { addr: 0x20_0000, size: 0x40_0000, kind: MapKind::Reserved };
        assert!(map.contains(&reserved), "{map:x?}");
    }

    #[test]
    fn more_stretches_than_a_map_holds_are_joined_and_none_is_told_as_ram() {
        let gone: Vec<(u64, u64)> =
            (0..1000).map(|n| (0x100_0000 + n * n * 0x2000, 0x1000)).collect();
        let map = memory_map(&blocks(16 << 30), &gone);
        assert!(map.len() <= MAX_MAP && map.len() > MAX_MAP - 4, "{}", map.len());
        for (start, len) in gone {
            let told = ram_of(&map).into_iter().any(|(from, to)| start < to && start + len > from);
            assert!(!told, "{start:#x}");
        }
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
