//! What every VMM on KVM needs for its guests' machine checks, by file descriptors and by values (feature `kvm`, x86-64).
//!
//! It takes anything that is [`AsRawFd`](std::os::fd::AsRawFd), a raw descriptor included, so it works whatever crate a
//! VMM reaches KVM by, and in whatever version: no type of kvm-ioctls or kvm-bindings is in a signature here. Four
//! things are not obvious:
//!
//! * Without `KVM_X86_SETUP_MCE` every MCi_CTL is 0, and KVM swallows uncorrected errors.
//! * KVM drops capability bits silently (SER_P on AMD hosts). MCG_CAP as read back is what KVM has. A guest may have to
//!   be shown more, because its CPUID names another vendor than the host's processor: the VMM answers those reads
//!   ([`GuestMca::read_msr`]).
//! * Linux guests from about 6.19 use the deferred-error registers of an AMD processor's scalable MCA whether the
//!   processor has it or not, and panic without it. KVM does not have them, so the VMM answers for them, too.
//! * `KVM_X86_SET_MCE` returns 0 for errors that it ignores and for errors that it turns into a triple fault. The relay
//!   calls it only when the vCPU's state rules out both, and reads the first
//!   record of each form back.
//!
//! In this order: [`MceSetup::new`] before the relay is started, as it says what the guest will have
//! ([`MceSetup::caps`]); [`show_in_cpuid`](MceSetup::show_in_cpuid) on each CPUID leaf; [`MceSetup::prepare_vm`] once,
//! or [`MceSetup::shown_msrs`] where the VMM has an MSR filter of its own; [`MceSetup::prepare_vcpu`] for each vCPU. An
//! exit for an MSR (KVM_EXIT_X86_RDMSR, WRMSR) goes to that vCPU's [`GuestMca`], and [`GuestMca::on`] is the
//! [`Mca`](crate::Mca) that [`VcpuPort::before_run`](crate::VcpuPort::before_run) wants.
//!
//! Where each system call counts, the registers of a kicked vCPU come with its exit ([`ExitRegisters`]): a kick asks for
//! them, and [`VcpuMca::after_exit`] spares three of four calls.
//!
//! ```no_run
//! use mce_relay::kvm::MceSetup;
//! use mce_relay::mca::Vendor;
//! use std::os::fd::RawFd;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let (kvm, vm, vcpu): (RawFd, RawFd, RawFd) = (0, 0, 0);
//! let setup = MceSetup::new(&kvm, Vendor::Amd, false, true)?;
//! setup.prepare_vm(&vm)?;
//! let guest = setup.prepare_vcpu(&vcpu)?;
//! let mut mca = guest.on(&vcpu); // for before_run, on the vCPU's thread
//! # drop(mca);
//! # Ok(())
//! # }
//! ```

mod exit_registers;
mod guest;
mod ioctl;
mod setup;
mod smca;

pub use exit_registers::{ExitRegisters, ExitRequest};
pub use guest::{GuestMca, VcpuMca, VcpuValues};
pub use ioctl::set_mce;
pub use setup::{MceError, MceSetup, MsrRange, held, supported};
