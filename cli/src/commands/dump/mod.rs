//! Reads a running guest's memory through the VM, also where pages are bad.
//!
//! The VM does the reading, so a bad page costs only that page, and harms neither the VM nor the reader. The guest may
//! run meanwhile. One request reads at most [`mce_relay_vmm::api::types::limits::MAX_READ`] bytes, so parts of a dump
//! may be of different moments; pause the VM first where that
//! matters.
//!
//! A [`dump`](job::dump) is an ELF core, for crash, drgn and makedumpfile: bad pages are absent from it, and a note of
//! our own lists them. Or it is a raw image, in which the offset is the guest-physical address; its account, in JSON,
//! is written beside it last. A file whose writing was ended by force (kill -9, a crash of the host) can be told: a
//! core has no ELF header then, a raw image no account.

pub mod account;
pub mod elf;
pub mod error;
pub mod file;
pub mod form;
pub mod interrupt;
pub mod job;
pub mod note;
pub mod prstatus;
pub mod ram;
pub mod stretch;
pub mod sweep;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
pub(crate) mod tests;
pub mod vm;
pub mod vmcoreinfo;
