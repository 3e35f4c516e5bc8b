//! A vCPU's registers in the form that the API has.

use kvm_bindings::{kvm_regs, kvm_sregs};

use crate::api::types::pages::Gpa;
use crate::api::types::registers::Registers;

/// A vCPU's registers as KVM returns them, in that form.
#[must_use]
pub fn registers(vcpu: u8, regs: &kvm_regs, sregs: &kvm_sregs) -> Registers {
    let kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, rip, rflags, .. } = *regs;
    let kvm_regs { r8, r9, r10, r11, r12, r13, r14, r15, .. } = *regs;
    let kvm_sregs { cs, ds, es, fs, gs, ss, cr0, cr2, cr3, cr4, efer, .. } = *sregs;
    let selector = |segment: kvm_bindings::kvm_segment| u64::from(segment.selector);
    let values = [
        ("rax", rax),
        ("rbx", rbx),
        ("rcx", rcx),
        ("rdx", rdx),
        ("rsi", rsi),
        ("rdi", rdi),
        ("rsp", rsp),
        ("rbp", rbp),
        ("r8", r8),
        ("r9", r9),
        ("r10", r10),
        ("r11", r11),
        ("r12", r12),
        ("r13", r13),
        ("r14", r14),
        ("r15", r15),
        ("rip", rip),
        ("rflags", rflags),
        ("cs", selector(cs)),
        ("ds", selector(ds)),
        ("es", selector(es)),
        ("fs", selector(fs)),
        ("gs", selector(gs)),
        ("ss", selector(ss)),
        ("fs_base", fs.base),
        ("gs_base", gs.base),
        ("cr0", cr0),
        ("cr2", cr2),
        ("cr3", cr3),
        ("cr4", cr4),
        ("efer", efer),
    ];
    let values = values.into_iter().map(|(name, value)| (name.to_owned(), Gpa(value)));
    Registers { vcpu, values: values.collect() }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Registers of a vCPU with this RIP.
    pub(crate) fn at(vcpu: u8, rip: u64) -> Registers {
        registers(vcpu, &kvm_regs { rip, r15: 15, ..Default::default() }, &kvm_sregs::default())
    }
}
