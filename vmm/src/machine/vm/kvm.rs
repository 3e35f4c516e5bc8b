//! The calls of KVM that build a VM.

use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY, kvm_cpuid_entry2,
    kvm_irqchip, kvm_lapic_state, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::machine::boot::place::Entry;
use crate::machine::boot::{layout, regs};
use crate::machine::cpu::{cpuid, msr};
use crate::machine::devices::serial::link::IrqLine;
use crate::machine::vcpu::hooks::VcpuSetup;
use crate::machine::vm::error::{KVM_API, VmError, kvm_error};

/// Local APIC register offsets (SDM vol. 3, 11.4.1).
pub(crate) const LAPIC_LVT_LINT0: usize = 0x350;
pub(crate) const LAPIC_LVT_LINT1: usize = 0x360;
/// Delivery modes of a local vector table entry.
pub(crate) const LVT_EXTINT: u32 = 7 << 8;
pub(crate) const LVT_NMI: u32 = 4 << 8;

pub(crate) fn open_kvm() -> Result<Kvm, VmError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => VmError::NoKvm,
        libc::EACCES | libc::EPERM => VmError::KvmPermission,
        _ => VmError::OpenKvm(error),
    })?;
    let found = kvm.get_api_version();
    if found != KVM_API {
        return Err(VmError::KvmVersion { found });
    }
    let needed = [
        (Cap::Irqchip, "an in-kernel interrupt controller (KVM_CAP_IRQCHIP)"),
        (Cap::Pit2, "an in-kernel timer (KVM_CAP_PIT2)"),
        (Cap::ImmediateExit, "immediate exits (KVM_CAP_IMMEDIATE_EXIT)"),
    ];
    match needed.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(VmError::MissingCap(name)),
        None => Ok(kvm),
    }
}

pub(crate) fn create_vm(kvm: &Kvm) -> Result<VmFd, VmError> {
    let vm = loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            other => break other.map_err(kvm_error("create a VM"))?,
        }
    };
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(kvm_error("set the identity map address"))?;
    vm.set_tss_address(layout::KVM_TSS).map_err(kvm_error("set the TSS address"))?;
    vm.create_irq_chip().map_err(kvm_error("create the interrupt controllers"))?;
    mask_pics(&vm).map_err(kvm_error("mask the legacy interrupt controllers"))?;
    // Guests read the speaker's port in delay loops; KVM answers it itself.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(kvm_error("create the timer"))?;
    Ok(vm)
}

/// A line of the interrupt controllers, raised as an edge by the thread that calls.
pub(crate) fn irq_line(vm: &Arc<VmFd>, gsi: u32) -> IrqLine {
    let vm = Arc::clone(vm);
    Arc::new(move || {
        let edge = vm.set_irq_line(gsi, true).and_then(|()| vm.set_irq_line(gsi, false));
        if let Err(error) = edge {
            log::warn!("cannot raise interrupt {gsi}: {error}");
        }
    })
}

/// Masks every line of the two 8259s, as firmware does. KVM starts them unmasked and with vector base 0, and every ISA
/// interrupt reaches them as well as the I/O APIC. A guest with hardware-reduced ACPI never sets them up, and would
/// take their interrupts for exceptions.
fn mask_pics(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip)?;
        chip.chip.pic.imr = 0xff;
        vm.set_irqchip(&chip)?;
    }
    Ok(())
}

pub(crate) fn prepare_vcpu(
    vcpu: &VcpuFd,
    index: u8,
    leaves: &[kvm_cpuid_entry2],
    setup: &mut dyn VcpuSetup,
    entry: Entry,
) -> Result<(), VmError> {
    let error = |what| move |source| VmError::Vcpu { vcpu: index, what, source };
    let own = cpuid::for_vcpu(leaves, index);
    let list = CpuId::from_entries(&own).map_err(|_| VmError::CpuidList(own.len()))?;
    vcpu.set_cpuid2(&list).map_err(error("set its CPUID"))?;
    setup.setup(vcpu).map_err(VmError::Hook)?;
    msr::set_boot_msrs(vcpu).map_err(|source| VmError::Msr { vcpu: index, source })?;
    let mut lapic = vcpu.get_lapic().map_err(error("read its local APIC"))?;
    set_delivery_mode(&mut lapic, LAPIC_LVT_LINT0, LVT_EXTINT);
    set_delivery_mode(&mut lapic, LAPIC_LVT_LINT1, LVT_NMI);
    vcpu.set_lapic(&lapic).map_err(error("set its local APIC"))?;
    if index == 0 {
        regs::set(vcpu, entry)?;
    }
    Ok(())
}

/// Virtual wire mode, as firmware leaves it: a kernel without ACPI gets its interrupts this way.
pub(crate) fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    const LVT_DELIVERY_MODE: u32 = 7 << 8;
    const LVT_MASKED: u32 = 1 << 16;
    let Some(bytes) = lapic.regs.get_mut(register..register + 4) else {
        return;
    };
    let mut value = 0_u32;
    for byte in bytes.iter().rev() {
        value = value << 8 | u32::from(byte.to_le_bytes()[0]);
    }
    value = value & !(LVT_DELIVERY_MODE | LVT_MASKED) | mode;
    for (to, from) in bytes.iter_mut().zip(value.to_le_bytes()) {
        *to = i8::from_le_bytes([from]);
    }
}
