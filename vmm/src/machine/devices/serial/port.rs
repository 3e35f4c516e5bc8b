//! The UART that a guest finds, for one boot.
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::Serial;

use crate::machine::devices::serial::SerialLine;
use crate::machine::devices::serial::link::{Events, Guest, Irq, IrqLine, Output, Uart};
use crate::machine::lifecycle::VmControl;

/// One serial port, of one boot of the guest.
#[derive(Debug)]
pub struct SerialPort {
    pub(super) uart: Arc<Mutex<Uart>>,
    pub(super) line: Arc<SerialLine>,
}

impl SerialPort {
    /// A new UART on `line` that interrupts the guest by `irq`. Only one UART is on a line at a time.
    #[must_use]
    pub fn on(line: &Arc<SerialLine>, control: &VmControl, irq: IrqLine) -> Self {
        let link = &line.link;
        let uart = Arc::new(Mutex::new(Serial::with_events(
            Irq(irq),
            Events(Arc::clone(link)),
            Output(Arc::clone(link)),
        )));
        let taker: Arc<Mutex<Uart>> = Arc::clone(&uart);
        link.set_guest(Some(Guest { taker, control: control.clone() }));
        Self { uart, line: Arc::clone(line) }
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest reads a register.
    #[must_use]
    pub fn read(&self, offset: u8) -> u8 {
        self.uart().read(offset)
    }

    /// The guest writes a register.
    pub fn write(&self, offset: u8, value: u8) {
        if let Err(error) = self.uart().write(offset, value) {
            log::warn!("{}: {error}", self.line.label);
        }
    }
}

impl Drop for SerialPort {
    fn drop(&mut self) {
        self.line.link.set_guest(None);
    }
}
