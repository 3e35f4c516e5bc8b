//! ACPI's records of hardware errors.

pub mod cper;
