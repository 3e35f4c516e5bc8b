//! The command line: options and values as the user writes them, and the configuration that the VMM takes.

pub mod commands;
mod devices;
pub mod inject;
pub mod mca_status;
pub mod memory;
mod parts;
pub mod poison;
pub mod report;
pub mod run;
pub mod values;
pub mod vm;
