//! The command line: options and values as they are written, and what the VMM takes instead.

pub mod commands;
pub mod inject;
pub mod mca_status;
pub mod memory;
pub mod poison;
pub mod run;
pub mod values;
pub mod vm;
