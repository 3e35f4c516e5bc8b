//! The machine: its processors, memory, devices and tables, and its run, pause and stop. It knows no relay. All of it
//! is in the VMM's process.

pub mod acpi;
pub mod boot;
pub mod cpu;
pub mod devices;
pub mod lifecycle;
pub mod memory;
pub mod vcpu;
pub mod vm;
