//! What the host's kernel says: of page frames and page tables, of its users, and of KVM. The VMM and the commands
//! both ask it; page frame numbers are root's to see.

pub mod accounts;
pub mod credentials;
pub mod dev_kvm;
pub mod error;
pub mod flags;
pub mod memory_failure;
pub mod page_frames;
pub mod pagemap;
