//! The command `mce-relay`: all that reads a command line, asks a VM, works on the host and draws what came of it.
//!
//! The VM itself is the crate `mce-relay-vmm`. Of `mce-relay run` there is only the command line here, see [`args`];
//! everything else in this crate runs in the process of a command that ends when it is done.
//!
//! [`client`] asks a VM by its API, [`commands`] are what the commands do, [`poison`] makes memory go bad, and
//! [`output`] is what they print.

pub mod args;
pub mod client;
pub mod commands;
pub mod output;
pub mod poison;
#[cfg(test)]
pub(crate) mod testing;
