//! Devices: port I/O, the serial ports, the power button, virtio devices, and interrupt numbers.

pub mod interrupts;
pub mod ports;
pub mod power_button;
pub mod serial;
pub mod virtio;
