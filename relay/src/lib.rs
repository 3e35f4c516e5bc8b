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
//! ```
//! use std::io;
//! use std::sync::mpsc::channel;
//!
//! use mce_relay::mca::{BANKS, Caps, McaState, Record, Vendor, cap, msr};
//! use mce_relay::{Config, Event, ExitByte, Mca, RamMap, RamRegion, Relay, Verdict};
//!
//! // What the guest is shown: an AMD processor that recovers.
//! const CAPS: Caps =
//!     Caps { vendor: Vendor::Amd, mcg_cap: cap::CTL_P | BANKS as u64, succor: true };
//!
//! /// A vCPU: the values of `CAPS.state_msrs()`. A real one has KVM_GET_MSRS and KVM_X86_SET_MCE.
//! struct Vcpu(Vec<u64>);
//!
//! impl Vcpu {
//!     fn register(&mut self, index: u32) -> &mut u64 {
//!         let at = CAPS.state_msrs().iter().position(|msr| *msr == index);
//!         &mut self.0[at.unwrap()]
//!     }
//! }
//!
//! impl Mca for Vcpu {
//!     fn state(&mut self) -> io::Result<McaState> {
//!         Ok(McaState { cr4_mce: true, interrupts_on: true, ..CAPS.state(&self.0) })
//!     }
//!
//!     fn inject(&mut self, record: &Record) -> io::Result<()> {
//!         *self.register(msr::mc_status(record.bank)) = record.status;
//!         *self.register(msr::MCG_STATUS) = record.mcg_status;
//!         Ok(())
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Where guest RAM is: HVA, GPA, length.
//! // SAFETY: nothing is mapped there. Of a real guest: its memory, which no reference of Rust's leads to.
//! let ram = RamMap::new(&[unsafe { RamRegion::new(0x7f00_0000_0000, 0, 1 << 30) }])?;
//! let (send, events) = channel();
//! let observer = move |event: &Event| drop(send.send(event.to_string()));
//! let relay = Relay::start(Config::new(1, CAPS, ram, observer))?;
//!
//! // On the vCPU's thread, with kvm_run.immediate_exit and a way to make it leave KVM_RUN.
//! let mut vcpu = Vcpu(vec![0; CAPS.state_msrs().len()]);
//! (0..BANKS).for_each(|bank| *vcpu.register(msr::mc_ctl(bank)) = u64::MAX);
//! *vcpu.register(msr::MCG_CTL) = u64::MAX;
//! let mut port = relay.attach(0, ExitByte::NONE, Box::new(|| {}))?;
//!
//! // The guest touches a bad page: here by a signal that says so, and comes round.
//! relay.handle().forge(0x5000, Some(0))?;
//! assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
//! let told: Vec<String> = events.try_iter().collect();
//! assert!(told.last().unwrap().starts_with("injected"), "{told:?}");
//! assert_eq!(relay.pages()[0].gpa, 0x5000);
//! # Ok(())
//! # }
//! ```
//!
//! A guest that was given an ACPI error source can be told of what it has not touched without a machine
//! check: [`firmware`] decides, [`cper::record`] makes the record, [`ghes`] puts it where the guest
//! finds it and rings the [`Bell`].

#![deny(unsafe_code)]

mod acpi;
mod core;
mod decide;
pub mod event;
#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
#[allow(unsafe_code, reason = "it is where KVM is asked")]
pub mod kvm;
pub mod ledger;
mod memory;
mod relay;
#[allow(unsafe_code, reason = "it is where the system is asked")]
pub mod signal;
pub mod syscalls;
mod types;
pub mod watch;
mod x86;

/// Where [`slot`] gets its atomics; `tests/loom.rs` gives it loom's.
mod sync {
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

    #[cfg(test)]
    pub(crate) fn model(test: impl Fn()) {
        test();
    }
}

pub use acpi::cper;
pub use decide::firmware::{self, AoChannel};
pub use decide::machine_check as delivery;
pub use decide::pace::Pace;
pub use event::Event;
pub use ledger::{Ledger, Page, Predicted};
pub use memory::access::{self as read, AccessError};
pub use memory::map::{RamError, RamMap, RamRegion};
pub use memory::scan;
pub use relay::config::Config;
pub use relay::error::{AttachError, StartError};
pub use relay::error_source::{self as ghes, Bell, Ghes};
pub use relay::forge::ForgeError;
pub use relay::handle::{Handle, RetireError};
pub use relay::inject::Verdict;
pub use relay::start::Relay;
pub use relay::vcpu_port::VcpuPort;
pub use signal::{ExitByte, Handled, KillPolicy, Signals};
pub use types::{Caught, FailureKind, FoundBy, PAGE_SHIFT, PAGE_SIZE, Place};
pub use x86::back_end::Mca;
pub use x86::mca;
