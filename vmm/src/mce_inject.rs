//! The VMM's back end for the relay: a vCPU's machine-check state, and the injection by `KVM_X86_SET_MCE`.
//!
//! The rest of what a VMM on KVM needs is in the component ([`mce_relay::kvm`]): [`MceSetup`] gives the guest its
//! machine checks before it runs, [`GuestMca`] is what one vCPU's guest sees of them. What remains here are the four
//! calls of [`Mca`], which the relay makes on the vCPU's thread between two KVM_RUNs.

use std::io;

use kvm_ioctls::VcpuFd;
use mce_relay::mca::{McaState, Record};
use mce_relay::{Mca, kvm};

pub use mce_relay::kvm::{ExitRegisters, GuestMca, MceError, MceSetup, held, supported};

/// A vCPU and what its guest was shown, for one call of `before_run`.
#[derive(Debug)]
pub struct VcpuMca<'a> {
    in_kvm: kvm::VcpuMca<'a>,
    vcpu: &'a VcpuFd,
}

impl<'a> VcpuMca<'a> {
    /// The back end for `vcpu`, whose guest was shown `guest`.
    #[must_use]
    pub fn new(guest: &'a GuestMca, vcpu: &'a VcpuFd) -> Self {
        Self { in_kvm: guest.on(vcpu), vcpu }
    }

    /// With the registers that came with the vCPU's last exit, if they did.
    #[must_use]
    pub fn after_exit(self, exit: Option<kvm::VcpuValues>) -> Self {
        Self { in_kvm: self.in_kvm.after_exit(exit), ..self }
    }
}

impl Mca for VcpuMca<'_> {
    fn state(&mut self) -> io::Result<McaState> {
        self.in_kvm.state()
    }

    fn inject(&mut self, record: &Record) -> io::Result<()> {
        set_mce(self.vcpu, record)
    }

    fn read_back(&mut self, bank: u8) -> io::Result<(u64, u64)> {
        self.in_kvm.read_back(bank)
    }

    fn take_back(&mut self, bank: u8) -> io::Result<()> {
        self.in_kvm.take_back(bank)
    }
}

/// `KVM_X86_SET_MCE` without any check: `Ok` says only that KVM took the call. It returns 0 also for errors that it
/// ignores and for errors that it turns into a triple fault; only the bank's contents afterwards show what happened.
///
/// # Errors
/// EINVAL for a bank the vCPU does not have or a record without VAL.
pub fn set_mce(vcpu: &VcpuFd, record: &Record) -> io::Result<()> {
    kvm::set_mce(vcpu, record)
}
