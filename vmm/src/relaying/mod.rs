//! Connects the machine and the relay: the VM's hooks for the relay, the ACPI error source, machine checks that a user
//! asks for, and memory that the VMM itself makes go bad. All of it is in the VMM's process.

pub mod error_source;
pub mod hooks;
pub mod manual_mce;
pub mod rescue;
pub mod self_poison;
pub mod uffd;
