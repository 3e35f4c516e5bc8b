//! The devices that exist, and the port-I/O bus that leads to them.
//!
//! Everything else reads as all-ones, as an empty bus does, and takes writes without effect.

use std::sync::Arc;

use crate::api::types::pause::Panic;
use crate::machine::devices::serial::port::SerialPort;

/// One standard serial port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UartAt {
    /// First I/O port.
    pub port: u16,
    /// Interrupt line (GSI).
    pub irq: u32,
}

/// COM1 and COM2.
pub const UARTS: [UartAt; 2] = [UartAt { port: 0x3f8, irq: 4 }, UartAt { port: 0x2f8, irq: 3 }];
/// Number of I/O ports of a UART.
pub const UART_PORTS: u8 = 8;
/// ACPI sleep control register.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register.
pub const RESET_PORT: u16 = 0x602;
/// What the guest writes to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 1;
/// The sleep type that means power off.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Sleep control: SLP_TYP begins at this bit, three bits wide (ACPI 6.5, 4.8.3.7).
const SLEEP_TYPE_SHIFT: u8 = 2;
/// Sleep control: SLP_EN.
const SLEEP_ENABLE: u8 = 1 << 5;
/// The port at which a guest reports a panic of its kernel (pvpanic; QEMU uses the same port). A read returns the
/// values that it may write.
pub const PVPANIC_PORT: u16 = 0x505;
/// Value (include/uapi/misc/pvpanic.h): the kernel has panicked.
const PVPANIC_PANICKED: u8 = 1 << 0;
/// Value: it has panicked, and a kernel that was loaded for that takes over.
const PVPANIC_CRASH_LOADED: u8 = 1 << 1;
/// Value: it has powered off (Linux 6.10); for guests without another way to say so.
const PVPANIC_SHUTDOWN: u8 = 1 << 2;
/// The keyboard controller's data port.
const I8042_DATA: u16 = 0x60;
/// The keyboard controller's command and status port.
const I8042_COMMAND: u16 = 0x64;
/// Command: pulse the reset line.
const I8042_RESET: u8 = 0xfe;

/// What a guest's write to a port asks of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// Start over.
    Reset,
    /// End.
    PowerOff,
    /// Nothing; it is a report.
    Panicked(Panic),
}

/// All devices with I/O ports.
#[derive(Debug, Default)]
pub struct PortBus {
    uarts: [Option<Arc<SerialPort>>; 2],
}

impl PortBus {
    /// A bus with these serial ports, COM1 first.
    #[must_use]
    pub fn new(uarts: [Option<Arc<SerialPort>>; 2]) -> Self {
        Self { uarts }
    }

    fn uart(&self, port: u16) -> Option<(&SerialPort, u8)> {
        UARTS.iter().zip(&self.uarts).find_map(|(at, uart)| {
            let offset = u8::try_from(port.checked_sub(at.port)?).ok()?;
            (offset < UART_PORTS).then_some((uart.as_deref()?, offset))
        })
    }

    /// The guest reads `data.len()` bytes. More than one is a string instruction (each byte a read of its own).
    pub fn read(&self, port: u16, data: &mut [u8]) {
        if let Some((uart, offset)) = self.uart(port) {
            data.fill_with(|| uart.read(offset));
            return;
        }
        data.fill(match port {
            // Zero: nothing to read, ready for a command. A reboot by keyboard controller waits for that.
            I8042_DATA | I8042_COMMAND | SLEEP_CONTROL_PORT | SLEEP_STATUS_PORT => 0,
            PVPANIC_PORT => PVPANIC_PANICKED | PVPANIC_CRASH_LOADED | PVPANIC_SHUTDOWN,
            _ => 0xff,
        });
    }

    /// The guest writes; see [`PortBus::read`] for the length.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<PowerEvent> {
        if let Some((uart, offset)) = self.uart(port) {
            data.iter().for_each(|byte| uart.write(offset, *byte));
            return None;
        }
        let byte = *data.first()?;
        match port {
            I8042_COMMAND if byte == I8042_RESET => Some(PowerEvent::Reset),
            RESET_PORT if byte == RESET_VALUE => Some(PowerEvent::Reset),
            // Several bits may be set, as with QEMU; the most severe one counts.
            PVPANIC_PORT if byte & PVPANIC_PANICKED != 0 => {
                Some(PowerEvent::Panicked(Panic::Panicked))
            }
            PVPANIC_PORT if byte & PVPANIC_CRASH_LOADED != 0 => {
                Some(PowerEvent::Panicked(Panic::CrashLoaded))
            }
            PVPANIC_PORT if byte & PVPANIC_SHUTDOWN != 0 => Some(PowerEvent::PowerOff),
            SLEEP_CONTROL_PORT if byte & SLEEP_ENABLE != 0 => {
                let sleep_type = byte >> SLEEP_TYPE_SHIFT & 7;
                (sleep_type == SLEEP_TYPE_S5).then_some(PowerEvent::PowerOff)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SerialMode;
    use crate::machine::devices::serial::SerialLine;
    use crate::machine::lifecycle::VmControl;

    #[test]
    fn an_empty_bus_reads_all_ones() {
        let bus = PortBus::default();
        for port in [0x70, 0xcf8, 0x3f8, 0x2f8, 0xffff] {
            for len in [1, 2, 4] {
                let mut data = vec![0; len];
                bus.read(port, &mut data);
                assert_eq!(data, vec![0xff; len], "port {port:#x}");
                assert_eq!(bus.write(port, &data), None);
            }
        }
        bus.read(0x3f8, &mut []);
        assert_eq!(bus.write(RESET_PORT, &[]), None);
    }

    #[test]
    fn reset_and_power_off() {
        let bus = PortBus::default();
        assert_eq!(bus.write(0x64, &[0xfe]), Some(PowerEvent::Reset));
        assert_eq!(bus.write(0x64, &[0xd1]), None);
        assert_eq!(bus.write(RESET_PORT, &[RESET_VALUE]), Some(PowerEvent::Reset));
        assert_eq!(bus.write(RESET_PORT, &[0]), None);
        assert_eq!(bus.write(SLEEP_CONTROL_PORT, &[5 << 2 | 0x20]), Some(PowerEvent::PowerOff));
        assert_eq!(bus.write(SLEEP_CONTROL_PORT, &[5 << 2]), None, "not enabled");
        assert_eq!(bus.write(SLEEP_CONTROL_PORT, &[3 << 2 | 0x20]), None, "not S5");
    }

    #[test]
    fn a_guest_says_that_it_has_panicked() {
        let bus = PortBus::default();
        let mut can = [0];
        bus.read(PVPANIC_PORT, &mut can);
        assert_eq!(can, [7]);
        let panicked = |panic| Some(PowerEvent::Panicked(panic));
        for (byte, event) in [
            (0, None),
            (1, panicked(Panic::Panicked)),
            (2, panicked(Panic::CrashLoaded)),
            (3, panicked(Panic::Panicked)),
            (4, Some(PowerEvent::PowerOff)),
            (0xf8, None),
        ] {
            assert_eq!(bus.write(PVPANIC_PORT, &[byte]), event, "{byte:#x}");
        }
    }

    #[test]
    fn uart_registers_answer_at_their_ports() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("com2");
        let control = VmControl::new(1).unwrap();
        let mode = SerialMode::File(path.clone().into());
        let line =
            SerialLine::open(1, &mode, &crate::sandbox::seccomp::Filters::default()).unwrap();
        let com2 = SerialPort::on(&Arc::new(line.unwrap()), &control, Arc::new(|| {}));
        let bus = PortBus::new([None, Some(Arc::new(com2))]);
        // Scratch register.
        assert_eq!(bus.write(0x2ff, &[0x5a]), None);
        let mut data = [0];
        bus.read(0x2ff, &mut data);
        assert_eq!(data, [0x5a]);
        bus.read(0x3ff, &mut data);
        assert_eq!(data, [0xff], "COM1 is absent");
        bus.write(0x2f8, b"out");
        drop(bus);
        assert_eq!(std::fs::read(path).unwrap(), b"out");
    }
}
