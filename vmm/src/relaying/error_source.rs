//! The ACPI error source that the guest is given, for firmware-first records: its table (HEST), and
//! the interrupt that says there is a record.
//!
//! The source is a generic hardware error source (ACPI 6.5, 18.3.2.7) whose status block lies in the
//! page that [`crate::machine::boot::layout`] keeps for firmware.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use acpi_tables::Aml;
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::hest::{
    EnabledStatus, GenericHardwareSource, HEST, NotificationStructure, NotificationType,
};
use kvm_ioctls::VmFd;
use mce_relay::{Bell, ErrorSource};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::api::types::policy::Notify;
use crate::machine::acpi::{AcpiError, OEM_ID, OEM_REVISION, OEM_TABLE_ID, Table};
use crate::machine::boot::layout::FIRMWARE_START;
use crate::machine::devices::interrupts::{ERROR_SOURCE_GSI, is_unmasked};

/// Number of the source; there is no other.
const SOURCE_ID: u16 = 0;

/// The table that describes the source.
///
/// # Errors
/// The table is malformed, which cannot happen: it is checked like any other.
pub fn table(notify: Notify) -> Result<Table, AcpiError> {
    let notification = match notify {
        Notify::Interrupt => {
            NotificationStructure::new(NotificationType::ExternalIrq).vector(ERROR_SOURCE_GSI)
        }
        Notify::Poll { millis } => {
            NotificationStructure::new(NotificationType::Polled).poll_interval_ms(millis)
        }
    };
    let register = GAS::new(
        AddressSpace::SystemMemory,
        64,
        0,
        AccessSize::QwordAccess,
        FIRMWARE_START + ErrorSource::ADDRESS_OFFSET,
    );
    let mut hest = HEST::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    hest.add_structure(
        GenericHardwareSource::new(SOURCE_ID, EnabledStatus::Enabled)
            .num_records(1)
            .max_sections(ErrorSource::MAX_SECTIONS)
            .max_raw_length(ErrorSource::BLOCK_LEN)
            .error_status_address(register)
            .notification(notification)
            .error_status_block_len(ErrorSource::BLOCK_LEN),
    );
    let mut bytes = Vec::new();
    hest.to_aml_bytes(&mut bytes);
    Table::from_bytes(bytes)
}

/// The source in the form that the relay takes.
///
/// # Errors
/// No eventfd can be made, or KVM does not accept it for an interrupt.
pub fn source(vm: &Arc<VmFd>, notify: Notify) -> io::Result<ErrorSource> {
    let (bell, patience): (Box<dyn Bell>, Duration) = match notify {
        Notify::Interrupt => {
            let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
            vm.register_irqfd(&event, ERROR_SOURCE_GSI).map_err(io::Error::from)?;
            (Box::new(Interrupt { event, vm: Arc::clone(vm) }), ErrorSource::PATIENCE)
        }
        Notify::Poll { millis } => {
            // Linux may round the interval up; one more second in case the guest is busy.
            let interval = Duration::from_millis(u64::from(millis)) + Duration::from_secs(1);
            (Box::new(Polled), ErrorSource::PATIENCE + 2 * interval)
        }
    };
    Ok(ErrorSource::new(FIRMWARE_START, bell).patience(patience))
}

/// The bell of a guest that polls.
struct Polled;

impl Bell for Polled {
    fn ring(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The bell of a guest that is interrupted.
pub(crate) struct Interrupt {
    event: EventFd,
    vm: Arc<VmFd>,
}

impl Bell for Interrupt {
    fn ring(&mut self) -> io::Result<()> {
        self.event.write(1)
    }

    /// An operating system unmasks the interrupt when its driver takes the source.
    fn is_heard(&mut self) -> Option<bool> {
        is_unmasked(&self.vm, ERROR_SOURCE_GSI)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field by field as ACPI 6.5 has it: table 18.3 (HEST), 18.10 (source), 18.14 (notification).
    fn check(notify: Notify, kind: u8, interval: u32, vector: u32) {
        let table = table(notify).unwrap();
        let bytes = table.as_bytes();
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((&bytes[..4], bytes.len()), (&b"HEST"[..], 36 + 4 + 64));
        assert_eq!(u32_at(36), 1, "error source count");
        let source = &bytes[40..];
        assert_eq!(source[0..2], [9, 0], "type");
        assert_eq!(source[2..4], [0, 0], "source id");
        assert_eq!(source[4..6], [0xff, 0xff], "related source id");
        assert_eq!(source[6..8], [0, 1], "flags, enabled");
        assert_eq!((u32_at(48), u32_at(52), u32_at(56)), (1, 15, 4032), "what is preallocated");
        assert_eq!(source[20..24], [0, 64, 0, 4], "system memory, 64 bits, quad words");
        let address = u64::from_le_bytes(source[24..32].try_into().unwrap());
        assert_eq!(address, 0xf_0000, "error status address");
        assert_eq!(source[32..34], [kind, 28], "notification type, length");
        assert_eq!((u32_at(40 + 36), u32_at(40 + 40)), (interval, vector), "interval, vector");
        assert_eq!(u32_at(40 + 60), 4032, "error status block length");
    }

    #[test]
    fn the_table_is_as_acpi_has_it() {
        check(Notify::Interrupt, 1, 0, 9);
        check(Notify::Poll { millis: 250 }, 0, 250, 0);
    }
}
