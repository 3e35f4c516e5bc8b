//! Boot information of the PVH entry: the start info, the module list and the memory map.

use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::ByteValued;

use super::error::BootError;
use super::layout::{CMDLINE, MapEntry, PVH_INFO};
use super::place::Initramfs;
use crate::machine::memory::guest_ram::GuestRam;

/// "xEn3" with bit 7 of the first letter set (Xen's public/arch-x86/hvm/start_info.h).
const MAGIC: u32 = 0x336e_c578;
/// The version that has a memory map.
const VERSION: u32 = 1;
/// The module list, in the page of the start info.
const MODULES: u64 = PVH_INFO + 0x40;
/// The memory map, in the page of the start info.
const MEMORY_MAP: u64 = PVH_INFO + 0x80;

/// Writes all of it; the start info is at [`PVH_INFO`].
///
/// # Errors
/// Guest memory that cannot be written.
pub fn write(
    ram: &GuestRam,
    map: &[MapEntry],
    initramfs: Option<Initramfs>,
    rsdp: u64,
) -> Result<(), BootError> {
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..Default::default()
    };
    if let Some(Initramfs { addr, size }) = initramfs {
        info.nr_modules = 1;
        info.modlist_paddr = MODULES;
        let module = hvm_modlist_entry { paddr: addr, size, ..Default::default() };
        crate::machine::boot::place::write(ram, module.as_slice(), MODULES, "PVH module list")?;
    }
    let mut table = Vec::new();
    for entry in map {
        let entry = hvm_memmap_table_entry {
            addr: entry.addr,
            size: entry.size,
            type_: entry.kind as u32,
            reserved: 0,
        };
        table.extend_from_slice(entry.as_slice());
    }
    crate::machine::boot::place::write(ram, &table, MEMORY_MAP, "PVH memory map")?;
    crate::machine::boot::place::write(ram, info.as_slice(), PVH_INFO, "PVH start info")
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::config::MemoryZone;
    use crate::machine::boot::layout::{self, memory_map};
    use crate::machine::memory::guest_ram::GuestRam;

    #[test]
    fn start_info_leads_to_map_and_module() {
        let ram = GuestRam::new(&[MemoryZone::new(32 << 20)]).unwrap();
        let map = memory_map(ram.blocks(), &[]);
        let module = Initramfs { addr: 0x100_0000, size: 77 };
        write(&ram, &map, Some(module), layout::ACPI_START).unwrap();
        let info: hvm_start_info = ram.memory().read_obj(GuestAddress(PVH_INFO)).unwrap();
        assert_eq!((info.magic, info.nr_modules), (MAGIC, 1));
        assert_eq!(info.memmap_entries as usize, map.len());
        let entry: hvm_memmap_table_entry =
            ram.memory().read_obj(GuestAddress(info.memmap_paddr + 2 * 24)).unwrap();
        assert_eq!((entry.addr, entry.type_), (layout::HIGH_RAM, 1));
        let entry: hvm_modlist_entry =
            ram.memory().read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((entry.paddr, entry.size), (module.addr, module.size));
    }
}
