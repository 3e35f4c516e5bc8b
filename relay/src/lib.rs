//! Tells a virtual machine's guest of the memory errors that the host kernel reports to its VMM.
//!
//! Memory goes bad. Linux then unmaps the page and signals the process that used it: SIGBUS with
//! `BUS_MCEERR_AO` ("a page of yours is gone, act if you like") or `BUS_MCEERR_AR` ("you touched it,
//! you cannot go on"). Where that process is a virtual machine monitor, only it can tell the guest,
//! by a virtual machine check; a guest that is told drops one page or one process instead of dying.
//!
//! This crate is that part of a VMM, and no other part: no device, no loader, no async runtime, and no KVM unless feature
//! `kvm` is asked for. What a VMM does, once for a boot and once for each vCPU:
//!
//! | step | by |
//! |---|---|
//! | says where guest RAM is | [`RamMap`] of [`RamRegion`]s |
//! | says what the guest was shown of its machine checks | [`mca::Caps`]; on KVM `kvm::MceSetup` finds out and sets up |
//! | starts the relay | [`Relay::builder`], [`RelayBuilder::start`], or [`RelayBuilder::start_polled`] in an event loop |
//! | attaches each vCPU's thread | [`Handle::attach`], with the [`ExitByte`] and a kick |
//! | calls the relay before each KVM_RUN, and obeys the [`Verdict`] | [`VcpuPort::clear_exit`], [`VcpuPort::before_run`] with its [`Mca`] |
//! | is told of every step | [`Event`], by [`RelayBuilder::observer`] |
//! | has the good part of huge pages back | [`RelayBuilder::rescue`] with a [`MemoryOwner`] |
//! | reads guest memory that may be bad, plugs RAM, asks what is known | [`Handle`]: [`Ledger`], [`Page`], [`AccessError`] |
//!
//! A guest that has an ACPI error source can be told without a machine check of pages that it has not touched:
//! [`ErrorSource`] and its [`Bell`]. For a program without a guest there is [`watch`]. Lists of system calls for
//! seccomp are in [`syscalls`], the call for a SIGBUS handler of the host's own is in [`signal`], and the bits of x86's
//! machine checks are in [`mca`].
//!
//! What is guaranteed: every page that the kernel reports as bad gets an outcome in the ledger; the guest is told of it
//! once, in a form that it survives, when it can take it; "injected" is said only of a record that is there
//! ([`Mca::inject`]). What the VMM owes is said at each call: above all, it calls [`VcpuPort::before_run`] before every KVM_RUN, and obeys the
//! verdict.
//!
//! Hosts on aarch64 have all of it but the telling: signals, ledger, [`watch`] and [`guard`]. There are no machine checks on
//! Arm, and [`ErrorSource`] has no notification for what an Arm guest touches.
//!
//! Optional features: `kvm` (x86-64; nothing is in it elsewhere), `serde` (events and the ledger as data), `seccompiler` and `vm-memory` (their types
//! beside plain values), `forge` (memory failures that this process forges, for tests).
//!
//! ```
//! use std::io;
//! use std::sync::mpsc::channel;
//!
//! use mce_relay::mca::{BANKS, Caps, McaState, Record, Vendor, cap, msr};
//! use mce_relay::{Event, ExitByte, Mca, RamMap, RamRegion, Relay, Verdict};
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
//! let relay = Relay::builder(ram).vcpus(1).machine_checks(CAPS).observer(observer).start()?;
//!
//! // On the vCPU's thread, with kvm_run.immediate_exit and a way to make it leave KVM_RUN.
//! let mut vcpu = Vcpu(vec![0; CAPS.state_msrs().len()]);
//! (0..BANKS).for_each(|bank| *vcpu.register(msr::mc_ctl(bank)) = u64::MAX);
//! *vcpu.register(msr::MCG_CTL) = u64::MAX;
//! let mut port = relay.attach(0, ExitByte::NONE, || {})?;
//! port.clear_exit();
//! assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
//! # #[cfg(feature = "forge")] {
//!
//! // The guest touches a bad page: here a forged signal says so (feature `forge`). The vCPU calls `before_run` again.
//! relay.handle().forge(0x5000, Some(0))?;
//! assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
//! assert_eq!(relay.pages()[0].gpa, 0x5000);
//!
//! // When the relay has been dropped the observer has been told of everything.
//! drop((port, relay));
//! let told: Vec<String> = events.try_iter().collect();
//! assert!(told.last().unwrap().starts_with("injected"), "{told:?}");
//! # }
//! # drop(events);
//! # Ok(())
//! # }
//! ```

#![deny(unsafe_code)]

mod acpi;
mod core;
mod decide;
mod event;
#[allow(unsafe_code, reason = "it is where guest memory is touched")]
pub mod guard;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals;
#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
#[allow(unsafe_code, reason = "it is where KVM is asked")]
pub mod kvm;
mod ledger;
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

pub use decide::firmware::AoChannel;
pub use decide::pace::Pace;
pub use event::{Event, Injection, Reach, SignalledThread};
pub use ledger::{Ledger, Page, Predicted, Times, Untold};
pub use memory::access::AccessError;
pub use memory::map::{RamError, RamMap, RamRegion};
pub use relay::builder::RelayBuilder;
pub use relay::error::{AttachError, StartError};
pub use relay::error_source::{Bell, ErrorSource};
#[cfg(feature = "forge")]
pub use relay::forge::ForgeError;
pub use relay::handle::{Handle, RetireError};
pub use relay::inject::Verdict;
pub use relay::polled::Polled;
pub use relay::rescue::{HugePage, MemoryOwner, Rescue};
pub use relay::start::Relay;
pub use relay::vcpu_port::VcpuPort;
pub use signal::{ExitByte, Handled, KillPolicy, Signals};
pub use types::{
    FailureKind, FallbackReason, Form, FoundBy, PAGE_SHIFT, PAGE_SIZE, Place, RescueRefusal,
    RescueStep, Rescued, State, UndeliverableReason, WaitReason,
};
#[cfg(feature = "serde")]
pub use types::{hex, hex_option};
pub use x86::back_end::{Mca, NoMachineChecks};
pub use x86::mca;
