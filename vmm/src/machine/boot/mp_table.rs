//! The table of Intel's MultiProcessor Specification 1.4: processors and interrupts, for kernels without ACPI.
//!
//! With ACPI, Linux does not read it, but looks for it first: at the end of conventional memory, and if it is
//! not there through 64 KiB of the firmware's area, which it maps anew for each 16 bytes
//! (`smp_scan_config` in arch/x86/kernel/mpparse.c). An emulated processor takes seconds for that.

use zerocopy::{Immutable, IntoBytes};

use super::layout::{IO_APIC, LOCAL_APIC, LOW_RAM_END, MP_TABLE, MP_TABLE_END};
use crate::machine::memory::guest_ram::GuestRam;

/// The version of the specification: 1.4.
const SPEC: u8 = 4;
/// Of the local APICs, and of the I/O APIC, as KVM's are.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;
/// Pins of the I/O APIC that are ISA's.
const PINS: u8 = 16;

/// MP floating pointer structure (4.1).
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct Pointer {
    signature: [u8; 4],
    table: u32,
    /// In units of 16 bytes.
    length: u8,
    spec: u8,
    checksum: u8,
    features: [u8; 5],
}

/// MP configuration table header (4.2).
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct Header {
    signature: [u8; 4],
    length: u16,
    spec: u8,
    checksum: u8,
    oem: [u8; 8],
    product: [u8; 12],
    oem_table: u32,
    oem_size: u16,
    entries: u16,
    local_apic: u32,
    extended_length: u16,
    extended_checksum: u8,
    reserved: u8,
}

/// Processor entry (4.3.1).
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct Processor {
    kind: u8,
    apic_id: u8,
    apic_version: u8,
    flags: u8,
    signature: u32,
    features: u32,
    reserved: [u32; 2],
}

/// Enabled, and the one that boots (table 4-4).
const ENABLED: u8 = 1;
const BOOTS: u8 = 2;
/// CPUID 1 EDX bits 0 and 9: FPU, APIC.
const FPU_AND_APIC: u32 = 1 | 1 << 9;

/// Interrupt types of entries 3 and 4 (table 4-9).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
/// A local interrupt of all processors.
const ALL: u8 = 0xff;

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The configuration table of a machine with `cpus` processors.
fn table(cpus: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut count = 0;
    let mut add = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for apic_id in 0..cpus {
        let flags = if apic_id == 0 { ENABLED | BOOTS } else { ENABLED };
        let processor = Processor {
            kind: 0,
            apic_id,
            apic_version: LOCAL_APIC_VERSION,
            flags,
            signature: 0,
            features: FPU_AND_APIC,
            reserved: [0; 2],
        };
        add(processor.as_bytes());
    }
    // Bus 0 (4.3.2), the I/O APIC, whose id follows the processors' (4.3.3), and its pins (4.3.4): edge-triggered,
    // active high, as ISA has it.
    add(&[&[1, 0][..], b"ISA   "].concat());
    let io_apic = cpus;
    add(&[&[2, io_apic, IO_APIC_VERSION, ENABLED][..], &IO_APIC.to_le_bytes()].concat());
    for irq in 0..PINS {
        add(&[3, INT, 0, 0, 0, irq, io_apic, irq]);
    }
    // LINT0 and LINT1 (4.3.5).
    add(&[4, EXT_INT, 0, 0, 0, 0, 0, 0]);
    add(&[4, NMI, 0, 0, 0, 0, ALL, 1]);

    let mut header = Header {
        signature: *b"PCMP",
        // 5,284 bytes with 254 processors.
        length: u16::try_from(size_of::<Header>() + entries.len()).unwrap_or(u16::MAX),
        spec: SPEC,
        checksum: 0,
        oem: *b"MCERELAY",
        product: *b"MCE-RELAY VM",
        oem_table: 0,
        oem_size: 0,
        entries: count,
        local_apic: LOCAL_APIC,
        extended_length: 0,
        extended_checksum: 0,
        reserved: 0,
    };
    header.checksum = sum(header.as_bytes()).wrapping_add(sum(&entries)).wrapping_neg();
    [header.as_bytes(), &entries].concat()
}

/// The floating pointer to it.
fn pointer() -> Pointer {
    let mut pointer = Pointer {
        signature: *b"_MP_",
        #[allow(clippy::cast_possible_truncation, reason = "below 1 MiB")]
        table: MP_TABLE as u32,
        length: 1,
        spec: SPEC,
        checksum: 0,
        features: [0; 5],
    };
    pointer.checksum = sum(pointer.as_bytes()).wrapping_neg();
    pointer
}

/// Writes the table, and its floating pointer at the end of conventional memory.
///
/// # Errors
/// Guest memory cannot be written.
pub fn write(ram: &GuestRam, cpus: u8) -> Result<(), mce_relay::AccessError> {
    ram.write(MP_TABLE, &table(cpus))?;
    ram.write(LOW_RAM_END, pointer().as_bytes())
}

const LONGEST: usize = size_of::<Header>()
    + crate::config::MAX_CPUS as usize * size_of::<Processor>()
    + (2 + PINS as usize + 2) * 8;
const _: () = assert!(MP_TABLE_END - MP_TABLE >= LONGEST as u64, "there is room for it");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_as_the_specification_has_it() {
        for cpus in [1, 2, 254] {
            let bytes = table(cpus);
            assert_eq!((&bytes[..4], sum(&bytes)), (&b"PCMP"[..], 0));
            let length = usize::from(u16::from_le_bytes([bytes[4], bytes[5]]));
            assert_eq!((length, bytes.len()), (bytes.len(), 44 + 20 * usize::from(cpus) + 20 * 8));
            assert_eq!(u16::from_le_bytes([bytes[34], bytes[35]]), u16::from(cpus) + 20);
            // Entries in the order of their types, each as long as its type says (table 4-3).
            let (mut at, mut kinds) = (44, Vec::new());
            while at < bytes.len() {
                kinds.push(bytes[at]);
                at += if bytes[at] == 0 { 20 } else { 8 };
            }
            assert!(at == bytes.len() && kinds.is_sorted(), "{kinds:?}");
            assert_eq!(bytes[44..48], [0, 0, 0x14, 3], "the processor that boots");
        }
    }

    #[test]
    fn the_pointer_leads_to_it() {
        let pointer = pointer();
        let bytes = pointer.as_bytes();
        assert_eq!((bytes.len(), &bytes[..4], sum(bytes)), (16, &b"_MP_"[..], 0));
        assert_eq!(u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]), 0xe_e000);
    }
}
