//! One `mce-relay run`: the VM from its first boot to its end, its name, and the record that it leaves. In the VMM's
//! process.

pub mod boots;
pub mod config;
pub mod names;
pub mod outlets;
pub mod record;
pub mod run;
