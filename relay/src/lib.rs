//! Tells a virtual machine's guest of the memory errors that the host kernel reports to its VMM.
//!
//! Memory goes bad. Linux then unmaps the page and signals whoever used it: SIGBUS with
//! `BUS_MCEERR_AO` ("a page of yours is gone, act if you like") or `BUS_MCEERR_AR` ("you touched it,
//! you cannot go on"). Where that process is a virtual machine monitor, only it can tell the guest,
//! by a virtual machine check; a guest that is told drops one page or one process instead of dying.
//!
//! This crate is that part of a VMM, and no other part: no KVM, no device, no loader, no async
//! runtime. A VMM gives it guest RAM as intervals ([`RamMap`]), what the guest was shown of its
//! machine-check architecture ([`mca::Caps`]), and per vCPU a way to read and set that state
//! ([`Mca`]). It starts the [`Relay`] before its other threads, attaches each vCPU thread, and calls
//! [`VcpuPort::before_run`] before each KVM_RUN.
//!
//! The way of one error, by names: [`signal`] stores it, [`RamMap::pages`] translates it,
//! [`ledger::Ledger::enter`] merges it, [`delivery::Delivery::next`] decides, [`mca::record`] makes
//! the record, [`Mca::inject`] hands it to the hypervisor, and every step is an [`Event`].
//!
//! A guest that was given an ACPI error source can be told of what it has not touched without a machine
//! check: [`firmware`] decides, [`cper::record`] makes the record, [`ghes`] puts it where the guest
//! finds it and rings the [`Bell`].

#![deny(unsafe_code)]

pub mod cper;
pub mod delivery;
pub mod event;
mod failure;
pub mod firmware;
mod forge;
pub mod ghes;
pub mod ledger;
pub mod mca;
mod pace;
mod port;
mod ram;
#[allow(unsafe_code, reason = "it is where the system is asked")]
pub mod read;
mod relay;
#[allow(unsafe_code, reason = "it is where the system is asked")]
pub mod scan;
mod search;
#[allow(unsafe_code, reason = "it is where the system is asked")]
pub mod signal;
mod slot;
pub mod syscalls;
pub mod watch;

/// Where [`slot`] gets its atomics; `tests/loom.rs` gives it loom's.
mod sync {
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

    #[cfg(test)]
    pub(crate) fn model(test: impl Fn()) {
        test();
    }
}

pub use event::Event;
pub use failure::{Kind, PAGE_SHIFT, PAGE_SIZE};
pub use firmware::AoChannel;
pub use forge::ForgeError;
pub use ghes::{Bell, Ghes};
pub use ledger::{FoundBy, Ledger, Page, Place, Predicted};
pub use pace::Pace;
pub use port::{Mca, VcpuPort, Verdict};
pub use ram::{RamError, RamMap, RamRegion};
pub use read::AccessError;
pub use relay::{Config, Handle, Relay, RetireError, StartError};
pub use signal::{ExitByte, Handled, KillPolicy, Signals};
