//! Describes the machine to the guest: a hardware-reduced ACPI platform.
//!
//! Tables lie one after another from [`ACPI_START`], the RSDP first. Further tables (an error source table, say) are
//! added as plain bytes, see [`Table`].

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use thiserror::Error;
use zerocopy::{Immutable, IntoBytes};

use crate::machine::boot::layout::{
    ACPI_END, ACPI_START, IO_APIC, LOCAL_APIC, VIRTIO_START, VIRTIO_WINDOW,
};
use crate::machine::devices::interrupts;
use crate::machine::devices::ports::{
    PVPANIC_PORT, RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, SLEEP_TYPE_S5,
    UART_PORTS, UARTS,
};
use crate::machine::memory::guest_ram::GuestRam;

/// OEM id in every table.
pub const OEM_ID: [u8; 6] = *b"MCERLY";
/// OEM table id in every table.
pub const OEM_TABLE_ID: [u8; 8] = *b"MCERELAY";
/// OEM revision in every table.
pub const OEM_REVISION: u32 = 1;
/// Length of the header that every table begins with.
const HEADER_LEN: u32 = 36;
/// FADT, IA-PC boot architecture flags (ACPI 6.5, 5.2.9.3): no VGA, no CMOS clock. The bits for
/// legacy devices and for an i8042 stay clear, so that no driver looks for them.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;
/// Notification value of a button: it was pressed (ACPI 6.5, 4.8.3.2.2).
const PRESSED: u8 = 0x80;
/// Tables start aligned to this; the RSDP has to.
const ALIGNMENT: usize = 16;

/// Why there are no ACPI tables.
#[derive(Debug, Error)]
pub enum AcpiError {
    /// They are larger than the space kept for them.
    #[error("the ACPI tables need {needed} bytes, there is room for {room} bytes")]
    TooLarge {
        /// Their length.
        needed: u64,
        /// The room.
        room: u64,
    },
    /// A table that was passed in is malformed.
    #[error("the ACPI table {signature:?} is malformed: {why}")]
    Malformed {
        /// Its first bytes.
        signature: String,
        /// What is wrong.
        why: &'static str,
    },
    /// Guest memory could not be written.
    #[error("cannot write the ACPI tables to guest memory")]
    Write(#[source] mce_relay::AccessError),
}

/// A complete table: header, length and checksum in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table(Vec<u8>);

impl Table {
    /// Takes a table that is complete.
    ///
    /// # Errors
    /// Shorter than a header, a length field that is not its length, or a wrong checksum.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, AcpiError> {
        let signature = String::from_utf8_lossy(bytes.get(..4).unwrap_or(&bytes)).into_owned();
        let error = |why| Err(AcpiError::Malformed { signature: signature.clone(), why });
        let stated = match bytes.get(4..8) {
            Some(field) if bytes.len() >= HEADER_LEN as usize => {
                u32::from_le_bytes([field[0], field[1], field[2], field[3]])
            }
            _ => return error("it is shorter than a header"),
        };
        if u32::try_from(bytes.len()) != Ok(stated) {
            return error("its length field is not its length");
        }
        if checksum(&bytes) != 0 {
            return error("its bytes do not add up to zero");
        }
        Ok(Self(bytes))
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn to_bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Writes all tables and returns the address of the RSDP.
///
/// `uarts` says which of the two serial ports exist, and `virtio` how many virtio devices.
///
/// # Errors
/// Too many tables, or guest memory that cannot be written.
pub fn write(
    ram: &GuestRam,
    cpus: u8,
    uarts: [bool; 2],
    virtio: usize,
    extra: &[Table],
) -> Result<u64, AcpiError> {
    let image = build(cpus, uarts, virtio, extra)?;
    ram.write(ACPI_START, &image).map_err(AcpiError::Write)?;
    Ok(ACPI_START)
}

/// The bytes that go to [`ACPI_START`].
fn build(cpus: u8, uarts: [bool; 2], virtio: usize, extra: &[Table]) -> Result<Vec<u8>, AcpiError> {
    let mut image = vec![0; Rsdp::len()];
    let place = |image: &mut Vec<u8>, table: &[u8]| {
        image.resize(image.len().next_multiple_of(ALIGNMENT), 0);
        let at = ACPI_START + image.len() as u64;
        image.extend_from_slice(table);
        at
    };

    let dsdt = place(&mut image, dsdt(cpus, uarts, virtio).as_slice());
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(place(&mut image, &to_bytes(&fadt(dsdt))));
    xsdt.add_entry(place(&mut image, &to_bytes(&madt(cpus))));
    for table in extra {
        xsdt.add_entry(place(&mut image, table.as_bytes()));
    }
    let xsdt = place(&mut image, &to_bytes(&xsdt));
    image[..Rsdp::len()].copy_from_slice(&to_bytes(&Rsdp::new(OEM_ID, xsdt)));

    let (needed, room) = (image.len() as u64, ACPI_END - ACPI_START);
    if needed > room {
        return Err(AcpiError::TooLarge { needed, room });
    }
    Ok(image)
}

fn port(address: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(address))
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(cpus: u8) -> MADT {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(LOCAL_APIC),
    );
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    madt.add_structure(InterruptSourceOverride::edge(interrupts::ERROR_SOURCE_IRQ));
    madt
}

/// The trigger mode and polarity of a legacy interrupt (ACPI 6.5, 5.2.12.5). Linux looks them up before it takes an
/// interrupt that a table names by number (`acpi_gsi_to_irq` in `arch/x86/kernel/acpi/boot.c`).
#[repr(C, packed)]
#[derive(Clone, Copy, IntoBytes, Immutable)]
struct InterruptSourceOverride {
    kind: u8,
    len: u8,
    bus: u8,
    source: u8,
    gsi: [u8; 4],
    flags: [u8; 2],
}

impl InterruptSourceOverride {
    /// The interrupt keeps its number and is edge-triggered, active high.
    fn edge(irq: u8) -> Self {
        Self {
            kind: 2,
            len: 10,
            // ISA, the only one.
            bus: 0,
            source: irq,
            gsi: u32::from(irq).to_le_bytes(),
            flags: [0b01 | 0b01 << 2, 0],
        }
    }
}

impl Aml for InterruptSourceOverride {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(self.as_bytes());
    }
}

fn dsdt(cpus: u8, uarts: [bool; 2], virtio: usize) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_LEN, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut append = |aml: &dyn Aml| dsdt.append_slice(&to_bytes(aml));

    append(&Name::new(
        "_S5_".into(),
        &Package::new(vec![&SLEEP_TYPE_S5, &SLEEP_TYPE_S5, &0_u8, &0_u8]),
    ));
    for ((number, uart), exists) in (1_u8..).zip(&UARTS).zip(uarts) {
        if !exists {
            continue;
        }
        append(&Scope::new(
            "_SB_".into(),
            vec![&Device::new(
                Path::new(&format!("COM{number}")),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                    &Name::new("_UID".into(), &number),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![
                            &IO::new(uart.port, uart.port, 1, UART_PORTS),
                            &Interrupt::new(true, true, false, false, uart.irq),
                        ]),
                    ),
                ],
            )],
        ));
    }
    for (number, _) in (0..).zip(0..virtio) {
        append(&Scope::new("_SB_".into(), vec![&virtio_device(number)]));
    }
    append(&Scope::new("_SB_".into(), vec![&power_button(), &events(), &panic_device()]));
    for id in 0..cpus {
        append(&Scope::new(
            "_SB_".into(),
            vec![&Device::new(
                Path::new(&format!("C{id:03}")),
                vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &id)],
            )],
        ));
    }
    dsdt
}

/// A virtio device's window and interrupt (`virtio_mmio_acpi_match` in drivers/virtio/virtio_mmio.c in Linux).
fn virtio_device(number: u32) -> impl Aml {
    // There are too few windows for either to overflow.
    #[allow(clippy::cast_possible_truncation, reason = "the windows lie below 4 GiB")]
    let (start, len) =
        ((VIRTIO_START + u64::from(number) * VIRTIO_WINDOW) as u32, VIRTIO_WINDOW as u32);
    let gsi = interrupts::VIRTIO_GSI + number;
    aml(&Device::new(
        Path::new(&format!("V{number:03}")),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &number),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, start, len),
                    &Interrupt::new(true, true, false, false, gsi),
                ]),
            ),
        ],
    ))
}

/// The power button. On a hardware-reduced platform it has no register of its own.
fn power_button() -> impl Aml {
    aml(&Device::new(
        "PWRB".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
            &Name::new("_UID".into(), &0_u8),
        ],
    ))
}

/// The generic event device, by which such platforms signal events (ACPI 6.5, 5.6.9). It has one event, the button's.
fn events() -> impl Aml {
    aml(&Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0_u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(
                    true,
                    true,
                    false,
                    false,
                    interrupts::POWER_BUTTON_GSI,
                )]),
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &PRESSED)],
            ),
        ],
    ))
}

/// The device by which a guest's kernel reports its panic (drivers/misc/pvpanic/pvpanic-mmio.c in Linux).
fn panic_device() -> impl Aml {
    aml(&Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(PVPANIC_PORT, PVPANIC_PORT, 1, 1)]),
            ),
        ],
    ))
}

/// AML that is serialised already.
struct Made(Vec<u8>);

impl Aml for Made {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn aml(what: &dyn Aml) -> Made {
    Made(to_bytes(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(image: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(image[at..at + 4].try_into().unwrap())
    }

    fn u64_at(image: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(image[at..at + 8].try_into().unwrap())
    }

    fn table_at(image: &[u8], gpa: u64) -> &[u8] {
        let at = usize::try_from(gpa - ACPI_START).unwrap();
        &image[at..at + u32_at(image, at + 4) as usize]
    }

    fn xsdt_tables(image: &[u8]) -> Vec<&[u8]> {
        let xsdt = table_at(image, u64_at(image, 24));
        assert_eq!(checksum(xsdt), 0);
        xsdt[36..]
            .chunks(8)
            .map(|entry| table_at(image, u64::from_le_bytes(entry.try_into().unwrap())))
            .collect()
    }

    #[test]
    fn every_table_is_reachable_and_adds_up() {
        let image = build(2, [true, true], 0, &[]).unwrap();
        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!((checksum(&image[..20]), checksum(&image[..36])), (0, 0));
        let tables = xsdt_tables(&image);
        let signatures: Vec<_> = tables.iter().map(|table| &table[..4]).collect();
        assert_eq!(signatures, [b"FACP", b"APIC"]);
        let dsdt = table_at(&image, u64_at(tables[0], 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        for table in tables.iter().chain([&dsdt]) {
            assert_eq!(checksum(table), 0, "{:?}", String::from_utf8_lossy(&table[..4]));
        }
    }

    #[test]
    fn fadt_has_the_reset_and_sleep_ports() {
        let image = build(1, [true, true], 0, &[]).unwrap();
        let fadt = xsdt_tables(&image)[0];
        // ACPI 6.5 table 5.9: RESET_REG at 116, RESET_VALUE at 128, SLEEP_CONTROL_REG at 244.
        assert_eq!(fadt.len(), 276);
        assert_eq!((fadt[116], u64_at(fadt, 120)), (1, u64::from(RESET_PORT)));
        assert_eq!(fadt[128], RESET_VALUE);
        assert_eq!(u64_at(fadt, 248), u64::from(SLEEP_CONTROL_PORT));
        assert_eq!(u64_at(fadt, 260), u64::from(SLEEP_STATUS_PORT));
        let flags = u32_at(fadt, 112);
        assert_eq!(flags >> 10 & 1, 1, "reset register");
        assert_eq!(flags >> 20 & 1, 1, "hardware reduced");
    }

    #[test]
    fn madt_names_every_cpu() {
        for cpus in [1, 2, 254] {
            let image = build(cpus, [true, false], 0, &[]).unwrap();
            let madt = xsdt_tables(&image)[1];
            assert_eq!(madt.len(), 44 + 8 * usize::from(cpus) + 12 + 10);
            let edge = [2, 10, 0, 9, 9, 0, 0, 0, 0b0101, 0];
            assert_eq!(madt[madt.len() - 10..], edge, "the error source's interrupt");
        }
    }

    #[test]
    fn absent_uarts_are_not_described() {
        let has = |uarts, name: &[u8]| {
            build(1, uarts, 0, &[]).unwrap().windows(4).any(|window| window == name)
        };
        assert!(has([true, false], b"COM1") && !has([true, false], b"COM2"));
        assert!(has([false, true], b"COM2") && !has([false, true], b"COM1"));
    }

    #[test]
    fn the_button_its_events_and_the_panic_device_are_described() {
        let image = build(1, [true, true], 0, &[]).unwrap();
        let dsdt = table_at(&image, u64_at(xsdt_tables(&image)[0], 140));
        let has = |what: &[u8]| dsdt.windows(what.len()).any(|window| window == what);
        // ACPI 6.5, 20.2.5: NotifyOp, the root and two names, BytePrefix.
        assert!(has(b"\x86\x5c\x2e_SB_PWRB\x0a\x80"));
        // 6.4.3.6: an extended interrupt, two bytes of flags (consumer, edge) and one number.
        assert!(has(&[0x89, 6, 0, 0b11, 1, 10, 0, 0, 0]), "its interrupt");
        // 6.4.2.5: 16-bit decoding, from and to 0x505, one port.
        assert!(
            has(&[0x47, 1, 0x05, 0x05, 0x05, 0x05, 1, 1]),
            "where it says that it has panicked"
        );
        assert!(has(b"ACPI0013") && has(b"QEMU0001"));
    }

    #[test]
    fn tables_from_outside_are_checked_and_added() {
        let mut extra = Sdt::new(*b"HEST", 40, 1, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        extra.update_checksum();
        let table = Table::from_bytes(extra.as_slice().to_vec()).unwrap();
        let image = build(1, [true, true], 0, std::slice::from_ref(&table)).unwrap();
        assert_eq!(xsdt_tables(&image)[2], table.as_bytes());

        let mut bad = table.as_bytes().to_vec();
        bad[39] ^= 1;
        assert!(Table::from_bytes(bad).unwrap_err().to_string().contains("HEST"));
        assert!(Table::from_bytes(b"HEST".to_vec()).is_err());
        assert!(Table::from_bytes(table.as_bytes()[..38].to_vec()).is_err());
    }

    #[test]
    fn too_many_tables_are_an_error() {
        let mut large = Sdt::new(*b"LRGE", 0x1_0000, 1, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        large.update_checksum();
        let table = Table::from_bytes(large.as_slice().to_vec()).unwrap();
        assert!(matches!(build(1, [true, true], 0, &[table]), Err(AcpiError::TooLarge { .. })));
    }
}
