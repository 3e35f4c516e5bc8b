//! What the host's kernel reports: page frames and page tables, its users, and KVM. The VMM and the commands both use
//! it; page frame numbers are shown to root only.

pub mod accounts;
pub mod credentials;
pub mod dev_kvm;
pub mod error;
pub mod flags;
pub mod memory_failure;
pub mod page_frames;
pub mod pagemap;
