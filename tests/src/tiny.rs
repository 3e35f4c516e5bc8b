//! A guest kernel of a few instructions, for a VM that has to run but not to boot anything.

// The VMM's unit tests have the same, and it is nothing for the program itself.
#[path = "../../vmm/src/machine/boot/tiny.rs"]
mod kernel;
pub use kernel::{ENTRY, elf};

/// mov dx, 0x600; mov al, S5 and SLP_EN; out dx, al; hlt: the guest powers itself off.
pub const POWER_OFF: [u8; 8] = [0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4];

/// A guest that says its crash kernel takes over, then twice that it has panicked, and stands still.
pub fn panics() -> Vec<u8> {
    // mov dx, 0x505; mov al, 2; out dx, al; mov al, 1; out dx, al; out dx, al; 1: hlt; jmp 1b.
    vec![0x66, 0xba, 0x05, 0x05, 0xb0, 2, 0xee, 0xb0, 1, 0xee, 0xee, 0xf4, 0xeb, 0xfd]
}

// A guest that is asleep until its power button is pressed, and powers itself off then. In 32-bit mode at 1 MiB,
// as `elf` puts it.
std::arch::global_asm!(
    ".pushsection .rodata.takes_the_power_button, \"a\"",
    ".global takes_the_power_button_start",
    ".global takes_the_power_button_end",
    ".code32",
    "takes_the_power_button_start:",
    "lgdt [0x100080]",
    "lidt [0x100088]",
    // The local APIC takes interrupts (its spurious interrupt vector register).
    "mov ebx, 0xfee00000",
    "mov dword ptr [ebx + 0xf0], 0x1ff",
    // The I/O APIC lets line 10, an edge, through to processor 0, as vector 48.
    "mov ebx, 0xfec00000",
    "mov dword ptr [ebx], 0x25",
    "mov dword ptr [ebx + 0x10], 0",
    "mov dword ptr [ebx], 0x24",
    "mov dword ptr [ebx + 0x10], 48",
    "mov esp, 0x80000",
    "sti",
    "2: hlt",
    "jmp 2b",
    // +0x60: the button was pressed: S5 and SLP_EN into the sleep control register
    ".org takes_the_power_button_start + 0x60",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
    "hlt",
    // +0x80: where the tables below are, and their last bytes
    ".org takes_the_power_button_start + 0x80",
    ".word 23",
    ".long 0x100090",
    ".org takes_the_power_button_start + 0x88",
    ".word 49 * 8 - 1",
    ".long 0x1000b0",
    // +0x90: a flat code segment (selector 8) and a flat data segment
    ".org takes_the_power_button_start + 0x90",
    ".quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff",
    // +0xb0: 49 interrupt gates, of which only the last, 48, leads somewhere
    ".org takes_the_power_button_start + 0xb0",
    ".fill 48, 8, 0",
    ".word 0x60, 8, 0x8e00, 0x10",
    "takes_the_power_button_end:",
    ".code64",
    ".popsection",
);

unsafe extern "C" {
    static takes_the_power_button_start: u8;
    static takes_the_power_button_end: u8;
}

/// The code of a guest that powers itself off when its power button is pressed, for [`elf`].
pub fn takes_the_power_button() -> &'static [u8] {
    let start = &raw const takes_the_power_button_start;
    let end = &raw const takes_the_power_button_end;
    // SAFETY: both symbols bound one stretch of constant bytes, above.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

// A guest that takes machine checks and does nothing else. In 32-bit mode at 1 MiB, as `elf` puts it; the
// handler empties all banks, clears MCG_STATUS (MSR 0x17a) and goes back to sleep, without IRET, which not
// every KVM emulates in this mode.
std::arch::global_asm!(
    ".pushsection .rodata.takes_machine_checks, \"a\"",
    ".global takes_machine_checks_start",
    ".global takes_machine_checks_end",
    ".code32",
    "takes_machine_checks_start:",
    "lgdt [0x100080]",
    "lidt [0x100088]",
    // Nobody interrupts: the interrupt controllers (8259) are masked.
    "mov al, 0xff",
    "out 0x21, al",
    "out 0xa1, al",
    // CR4.MCE.
    "mov eax, cr4",
    "or eax, 0x40",
    "mov cr4, eax",
    "1: mov esp, 0x80000",
    "sti",
    "2: hlt",
    "jmp 2b",
    // +0x40: #MC
    ".org takes_machine_checks_start + 0x40",
    "mov ecx, 0x401",
    "xor eax, eax",
    "xor edx, edx",
    "4: wrmsr",
    "add ecx, 4",
    "cmp ecx, 0x401 + 4 * 10",
    "jb 4b",
    "mov ecx, 0x17a",
    "wrmsr",
    "jmp 1b",
    // +0x80: where the tables below are, and their last bytes
    ".org takes_machine_checks_start + 0x80",
    ".word 23",
    ".long 0x100090",
    ".org takes_machine_checks_start + 0x88",
    ".word 19 * 8 - 1",
    ".long 0x1000b0",
    // +0x90: a flat code segment (selector 8) and a flat data segment
    ".org takes_machine_checks_start + 0x90",
    ".quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff",
    // +0xb0: 19 interrupt gates, of which only the last, 18, leads somewhere
    ".org takes_machine_checks_start + 0xb0",
    ".fill 18, 8, 0",
    ".word 0x40, 8, 0x8e00, 0x10",
    "takes_machine_checks_end:",
    ".code64",
    ".popsection",
);

unsafe extern "C" {
    static takes_machine_checks_start: u8;
    static takes_machine_checks_end: u8;
}

/// The code of a guest that takes every machine check at once and is asleep otherwise, for [`elf`].
pub fn takes_machine_checks() -> &'static [u8] {
    let (start, end) = (&raw const takes_machine_checks_start, &raw const takes_machine_checks_end);
    // SAFETY: both symbols bound one stretch of constant bytes, above.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}
