//! Devices: what port I/O reaches, the serial ports, the power button, and whose interrupt is whose.

pub mod interrupts;
pub mod ports;
pub mod power_button;
pub mod serial;
