//! Makes pages of a running guest's RAM go bad, on the host, by every means that software has.
//!
//! This only poisons. What the VMM then takes, and what it tells its guest, is shown by the VM (`mce-relay status`, the
//! event monitor).

pub mod asked;
pub mod burst;
pub mod by_frame;
pub mod carry_out;
pub mod error;
pub mod forecast;
pub mod frame;
pub mod host;
pub mod interrupted;
pub mod look;
pub mod order;
pub mod shown;
pub mod target;
pub mod targets;
