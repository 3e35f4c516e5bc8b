//! Reads a running guest's memory from outside, bad pages and all.
//!
//! The VM does the reading, so a bad page costs that page and nothing else: neither the VM nor who
//! asks is harmed. The guest may run meanwhile. What is read in one go is at most
//! [`mce_relay_vmm::api::types::limits::MAX_READ`] bytes, and different parts are of different moments then; pause the VM first where that
//! matters.
//!
//! A [`dump`](job::dump) is an ELF core, for crash, drgn and makedumpfile: absent from it is what is bad, which a
//! note of our own lists. Or it is a raw image, in which the offset is the guest-physical address; its account,
//! in JSON, is written beside it when all else is done. A file whose writing was ended by force (kill -9, a
//! crash of the host) shows it: a core has no ELF header then, a raw image no account.

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
