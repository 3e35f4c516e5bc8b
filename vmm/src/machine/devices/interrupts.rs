//! The interrupt numbers of the devices, and whether the guest has unmasked one.

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip};
use kvm_ioctls::VmFd;
use log::debug;

/// The interrupt of the error source: the one that a PC has for ACPI, which is free here. An edge.
pub const ERROR_SOURCE_GSI: u32 = ERROR_SOURCE_IRQ as u32;
/// The same as an ISA interrupt number, 0 to 15.
pub const ERROR_SOURCE_IRQ: u8 = 9;
/// In an entry of an I/O APIC's redirection table: the interrupt is masked (82093AA data sheet, 3.2.4).
const REDIRECTION_MASKED: u64 = 1 << 16;

/// Whether the guest has unmasked the interrupt `gsi`; `None` where KVM does not say.
pub(crate) fn is_unmasked(vm: &VmFd, gsi: u32) -> Option<bool> {
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    if let Err(error) = vm.get_irqchip(&mut chip) {
        debug!("cannot read the I/O APIC: {error}");
        return None;
    }
    // SAFETY: KVM has filled in the member that belongs to KVM_IRQCHIP_IOAPIC, and an entry is
    // plain bits in every view of it.
    let entry = unsafe { chip.chip.ioapic.redirtbl.get(gsi as usize)?.bits };
    Some(entry & REDIRECTION_MASKED == 0)
}

/// The interrupt of ACPI's events: a line that no standard PC device uses. Edge-triggered.
pub const POWER_BUTTON_GSI: u32 = 10;

/// The interrupt of the first virtio device; the others follow. Edge-triggered. The I/O APIC has 24 lines, and those from
/// here on are no ISA interrupts.
pub const VIRTIO_GSI: u32 = 16;
