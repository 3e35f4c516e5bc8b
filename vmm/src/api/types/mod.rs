//! The data of the API's requests and answers, and of events: types, and words for people.
//!
//! They know neither the server nor the client. The VMM's process and the commands share them.

pub mod device;
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
