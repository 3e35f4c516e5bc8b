//! A vCPU's registers as a core file has them.

use mce_relay_vmm::api::types::registers::Registers;

/// Bytes of a struct elf_prstatus for x86-64 (include/linux/elfcore.h).
pub(crate) const PRSTATUS: usize = 336;
/// Offsets of the process id and the registers in it.
const PR_PID: usize = 32;
const PR_REG: usize = 112;
/// The registers in it, in order (struct user_regs_struct, arch/x86/include/asm/user_64.h). A vCPU has no orig_rax,
/// which belongs to a system call.
const IN_PRSTATUS: [&str; 27] = [
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi",
    "rdi", "orig_rax", "rip", "cs", "rflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs",
    "gs",
];

/// The registers as a struct elf_prstatus. Processes are counted from 1, so the first vCPU is 1, as in QEMU's dumps.
pub(crate) fn prstatus(registers: &Registers) -> Vec<u8> {
    let mut bytes = vec![0; PRSTATUS];
    bytes[PR_PID..PR_PID + 4].copy_from_slice(&(u32::from(registers.vcpu) + 1).to_le_bytes());
    for (place, name) in bytes[PR_REG..].chunks_exact_mut(8).zip(IN_PRSTATUS) {
        let value = registers.values.get(name).map_or(0, |value| value.0);
        place.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use kvm_bindings::{kvm_regs, kvm_sregs};

    use mce_relay_vmm::machine::cpu::registers::registers;

    /// Registers of a vCPU with this RIP.
    pub(crate) fn at(vcpu: u8, rip: u64) -> Registers {
        registers(vcpu, &kvm_regs { rip, r15: 15, ..Default::default() }, &kvm_sregs::default())
    }

    #[test]
    fn each_has_its_place() {
        let bytes = prstatus(&at(1, 0xffff_ffff_8123_4567));
        assert_eq!(bytes.len(), PRSTATUS);
        assert_eq!(bytes[PR_PID], 2);
        assert_eq!(bytes[PR_REG], 15);
        // libc has the same structure: rip is its 17th member.
        let rip = PR_REG + std::mem::offset_of!(libc::user_regs_struct, rip);
        assert_eq!(bytes[rip..rip + 8], 0xffff_ffff_8123_4567_u64.to_le_bytes());
        assert_eq!(IN_PRSTATUS.len() * 8, size_of::<libc::user_regs_struct>());
    }

    #[test]
    fn every_register_of_a_core_is_known() {
        let known = at(0, 0).values;
        let unknown: Vec<&str> =
            IN_PRSTATUS.into_iter().filter(|name| !known.contains_key(*name)).collect();
        assert_eq!(unknown, ["orig_rax"]);
    }
}
