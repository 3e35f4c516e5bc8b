//! Guest RAM: where it is, how it is read although it may be bad, and how its bad pages are found.

#[allow(unsafe_code, reason = "it is where the system is asked")]
pub mod access;
pub(crate) mod fresh;
pub(crate) mod headroom;
pub mod map;
#[allow(unsafe_code, reason = "it is where the system is asked")]
mod mapping;
#[cfg(feature = "vm-memory")]
#[allow(unsafe_code, reason = "it is where the system is asked")]
pub(crate) mod page_size;
#[allow(unsafe_code, reason = "it is where the system is asked")]
pub mod scan;
#[allow(unsafe_code, reason = "it is where the system is asked")]
pub(crate) mod stand_in;
#[allow(unsafe_code, reason = "it is where the system is asked")]
pub mod uffd;
