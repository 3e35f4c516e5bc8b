//! Shows what this host and its kernel offer, line by line, each with what to do about it.
//!
//! Everything is only looked at, or tried where that changes nothing: no memory is poisoned, no module loaded, nothing
//! mounted and no setting changed. Each group of lines has a file of its own.

pub mod failure;
pub mod finding;
pub mod gap;
pub mod kvm;
pub mod memory;
pub mod poisoning;
pub mod privileges;
pub mod report;
pub mod section;
