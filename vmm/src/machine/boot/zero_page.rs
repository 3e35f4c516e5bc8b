//! Boot information of the 64-bit Linux boot protocol: boot_params, the "zero page".

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

use super::error::BootError;
use super::layout::{CMDLINE, MapEntry, ZERO_PAGE};
use super::place::Initramfs;
use crate::machine::memory::guest_ram::GuestRam;

/// "This boot loader has no number assigned".
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// What a vmlinux, which has no header to copy, is aligned to.
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

/// Writes boot_params at [`ZERO_PAGE`]; `header` is the kernel's own, where the file has one.
///
/// # Errors
/// Guest memory that cannot be written.
pub fn write(
    ram: &GuestRam,
    map: &[MapEntry],
    initramfs: Option<Initramfs>,
    header: Option<setup_header>,
    cmdline_len: usize,
    rsdp: u64,
) -> Result<(), BootError> {
    let mut params = boot_params {
        hdr: header.unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            kernel_alignment: KERNEL_ALIGNMENT,
            ..Default::default()
        }),
        acpi_rsdp_addr: rsdp,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = low32(CMDLINE);
    params.hdr.cmdline_size = u32::try_from(cmdline_len).unwrap_or(u32::MAX);
    if let Some(Initramfs { addr, size }) = initramfs {
        params.hdr.ramdisk_image = low32(addr);
        params.hdr.ramdisk_size = low32(size);
    }
    let mut table = params.e820_table;
    let mut count = 0_u8;
    for (slot, entry) in table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr: entry.addr, size: entry.size, r#type: entry.kind as u32 };
        count += 1;
    }
    params.e820_table = table;
    params.e820_entries = count;
    crate::machine::boot::place::write(ram, params.as_slice(), ZERO_PAGE, "zero page")
}

/// All of these lie below the hole, so 32 bits hold them.
fn low32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::config::MemoryZone;
    use crate::machine::boot::layout::{self, memory_map};
    use crate::machine::memory::guest_ram::GuestRam;

    #[test]
    fn kernel_header_is_kept_and_completed() {
        let ram = GuestRam::new(&[MemoryZone::new(32 << 20)]).unwrap();
        let map = memory_map(ram.blocks(), &[]);
        let header = setup_header { init_size: 4711, ..Default::default() };
        let initramfs = Initramfs { addr: 0x180_0000, size: 99 };
        write(&ram, &map, Some(initramfs), Some(header), 7, layout::ACPI_START).unwrap();
        let params: boot_params = ram.memory().read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        assert_eq!({ params.hdr.init_size }, 4711);
        assert_eq!({ params.hdr.ramdisk_image }, 0x180_0000);
        assert_eq!({ params.hdr.cmd_line_ptr }, 0x2_0000);
        assert_eq!({ params.acpi_rsdp_addr }, layout::ACPI_START);
        assert_eq!(usize::from(params.e820_entries), map.len());
        let reserved = params.e820_table[1];
        assert_eq!(({ reserved.addr }, { reserved.r#type }), (layout::ACPI_START, 2));
    }
}
