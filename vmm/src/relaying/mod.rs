//! Where the machine and the relay meet: the VM's hooks with the relay in them, the ACPI error source, machine checks
//! by hand, and memory that the VMM makes go bad itself. All of it is in the VMM's process.

pub mod error_source;
pub mod hooks;
pub mod manual_mce;
pub mod rescue;
pub mod self_poison;
pub mod uffd;
