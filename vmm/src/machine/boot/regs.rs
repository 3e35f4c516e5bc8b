//! The state in which vCPU 0 enters the kernel. The other vCPUs wait for the guest's SIPI.

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use thiserror::Error;

use super::error::BootError;
use super::layout::{GDT, PAGE_TABLES, PVH_INFO, ZERO_PAGE};
use super::place::Entry;
use crate::machine::memory::guest_ram::GuestRam;

/// CR0.PE: protected mode.
const CR0_PE: u64 = 1;
/// CR0.ET: always set on processors of this century.
const CR0_ET: u64 = 1 << 4;
/// CR0.PG: paging.
const CR0_PG: u64 = 1 << 31;
/// CR4.PAE: needed by long mode.
const CR4_PAE: u64 = 1 << 5;
/// EFER.LME and EFER.LMA: long mode enabled and active.
const EFER_LONG: u64 = 1 << 8 | 1 << 10;
/// The bit of RFLAGS that is always set.
const RFLAGS_FIXED: u64 = 2;
/// Page table entry: present and writable.
const PTE_TABLE: u64 = 3;
/// Page table entry: present, writable, 2 MiB page.
const PTE_LARGE: u64 = 0x83;
/// Page directories: four, so that everything below 4 GiB is mapped.
const DIRECTORIES: u64 = 4;
/// x87 control word after FNINIT.
const FCW: u16 = 0x37f;
/// MXCSR after reset.
const MXCSR: u32 = 0x1f80;

/// Selectors: the Linux boot protocol wants code at 0x10 and data at 0x18.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// Why the entry state could not be set.
#[derive(Debug, Error)]
pub enum RegsError {
    /// The special registers could not be read.
    #[error("cannot read the special registers")]
    GetSregs(#[source] kvm_ioctls::Error),
    /// The special registers were refused.
    #[error("KVM refused the special registers")]
    SetSregs(#[source] kvm_ioctls::Error),
    /// The general registers were refused.
    #[error("KVM refused the general registers")]
    SetRegs(#[source] kvm_ioctls::Error),
    /// The floating-point state was refused.
    #[error("KVM refused the floating-point state")]
    SetFpu(#[source] kvm_ioctls::Error),
}

fn flat(selector: u16, type_: u8, long: bool) -> kvm_segment {
    let system = type_ == 0xb && selector == TASK;
    kvm_segment {
        base: 0,
        limit: if system { 0xffff } else { 0xffff_ffff },
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long && !system),
        s: u8::from(!system),
        l: u8::from(long),
        g: u8::from(!system),
        ..Default::default()
    }
}

fn segments(entry: Entry) -> (kvm_segment, kvm_segment, kvm_segment) {
    let long = matches!(entry, Entry::Linux64 { .. });
    // Types: 0xb code, read, accessed; 0x3 data, write, accessed; 0xb for a system segment: busy TSS.
    (flat(CODE, 0xb, long), flat(DATA, 0x3, false), flat(TASK, 0xb, false))
}

/// A segment in the form that the GDT holds it.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = if segment.g == 1 { segment.limit >> 12 } else { segment.limit };
    let flag = |bit: u8, at: u32| u64::from(bit) << at;
    u64::from(limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | flag(segment.type_, 40)
        | flag(segment.s, 44)
        | flag(segment.dpl, 45)
        | flag(segment.present, 47)
        | u64::from(limit >> 16 & 0xf) << 48
        | flag(segment.avl, 52)
        | flag(segment.l, 53)
        | flag(segment.db, 54)
        | flag(segment.g, 55)
        | (segment.base >> 24 & 0xff) << 56
}

fn gdt(entry: Entry) -> [u64; 5] {
    let (code, data, task) = segments(entry);
    [0, 0, descriptor(&code), descriptor(&data), descriptor(&task)]
}

/// Writes the GDT and, for the 64-bit entry, page tables that map the first 4 GiB to itself.
///
/// # Errors
/// Guest memory that cannot be written.
pub fn write_tables(ram: &GuestRam, entry: Entry) -> Result<(), BootError> {
    let bytes: Vec<u8> = gdt(entry).iter().flat_map(|entry| entry.to_le_bytes()).collect();
    crate::machine::boot::place::write(ram, &bytes, GDT, "GDT")?;
    if let Entry::Linux64 { .. } = entry {
        crate::machine::boot::place::write(ram, &page_tables(), PAGE_TABLES, "page tables")?;
    }
    Ok(())
}

fn page_tables() -> Vec<u8> {
    const ENTRIES: u64 = 512;
    const TABLE: u64 = 4096;
    let mut tables = Vec::new();
    let mut table = |entry: &dyn Fn(u64) -> u64| {
        for index in 0..ENTRIES {
            tables.extend_from_slice(&entry(index).to_le_bytes());
        }
    };
    table(&|index| if index == 0 { (PAGE_TABLES + TABLE) | PTE_TABLE } else { 0 });
    table(&|index| {
        if index < DIRECTORIES { (PAGE_TABLES + (2 + index) * TABLE) | PTE_TABLE } else { 0 }
    });
    for directory in 0..DIRECTORIES {
        table(&|index| (directory * ENTRIES + index) << 21 | PTE_LARGE);
    }
    tables
}

/// Sets the registers of vCPU 0.
///
/// # Errors
/// What KVM refused.
pub fn set(vcpu: &VcpuFd, entry: Entry) -> Result<(), RegsError> {
    let mut sregs = vcpu.get_sregs().map_err(RegsError::GetSregs)?;
    let (code, data, task) = segments(entry);
    sregs.cs = code;
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data;
    }
    sregs.tr = task;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = u16::try_from(size_of_val(&gdt(entry)) - 1).unwrap_or(u16::MAX);
    // No interrupt may come before the kernel has its own table.
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    let mut regs = kvm_regs { rflags: RFLAGS_FIXED, ..Default::default() };
    match entry {
        Entry::Pvh { rip } => {
            regs.rip = rip;
            regs.rbx = PVH_INFO;
        }
        Entry::Linux64 { rip } => {
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer |= EFER_LONG;
            regs.rip = rip;
            regs.rsi = ZERO_PAGE;
        }
    }
    vcpu.set_sregs(&sregs).map_err(RegsError::SetSregs)?;
    vcpu.set_regs(&regs).map_err(RegsError::SetRegs)?;
    let fpu = kvm_fpu { fcw: FCW, mxcsr: MXCSR, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(RegsError::SetFpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_have_the_textbook_values() {
        let long = gdt(Entry::Linux64 { rip: 0 });
        assert_eq!(long[2..4], [0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]);
        let protected = gdt(Entry::Pvh { rip: 0 });
        assert_eq!(protected[2..4], [0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff]);
        assert_eq!(protected[4], 0x0000_8b00_0000_ffff);
    }

    #[test]
    fn tables_map_every_address_to_itself() {
        let bytes = page_tables();
        let entry = |table: usize, index: usize| {
            let at = table * 4096 + index * 8;
            u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
        };
        assert_eq!(bytes.len(), 6 * 4096);
        for gpa in [0_u64, 0x20_0000, 0x4000_0000, 0xbfff_ffff, 0xffff_ffff] {
            assert_eq!(entry(0, 0), 0xa003);
            let directory = entry(1, (gpa >> 30) as usize) & !0xfff;
            let table = ((directory - PAGE_TABLES) / 4096) as usize;
            assert_eq!(entry(table, (gpa >> 21 & 511) as usize), gpa >> 21 << 21 | 0x83);
        }
    }
}
