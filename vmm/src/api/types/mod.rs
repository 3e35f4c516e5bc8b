//! What the API's requests and answers hold, and what a program finds in the events: data, and words for people.
//!
//! They know neither who serves them nor who asks. The VMM's process and the commands' have them in common.

pub mod limits;
pub mod manual_mce;
pub mod mca_bits;
pub mod means;
pub mod pages;
pub mod pause;
pub mod policy;
pub mod registers;
pub mod vm;
pub mod vm_event;
