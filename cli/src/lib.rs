//! The command `mce-relay`: reads the command line, asks VMs, works on the host and prints the results.
//!
//! The VM itself is the crate `mce-relay-vmm`. Of `mce-relay run` only the command line is here, see [`args`];
//! everything else in this crate runs in the process of a command that ends when it is done.
//!
//! [`client`] asks a VM by its API, [`commands`] has the commands, [`poison`] makes memory go bad, and [`output`]
//! prints.

pub mod args;
pub mod client;
pub mod commands;
pub mod output;
pub mod poison;
#[cfg(test)]
pub(crate) mod testing;
