//! The VMM's back end for the relay: a vCPU's machine-check state, and the injection by `KVM_X86_SET_MCE`.
//!
//! What every VMM on KVM needs for that is taken from the component ([`mce_relay::kvm`]): [`MceSetup`] gives the guest
//! its machine checks before it runs, [`GuestMca`] is what one vCPU's guest sees of them. What is left is the seam, the
//! four calls of [`Mca`], which the relay makes on the vCPU's thread between two KVM_RUNs.

use std::io;

use kvm_ioctls::VcpuFd;
use mce_relay::mca::{McaState, Record};
use mce_relay::{Mca, kvm};

pub use mce_relay::kvm::{GuestMca, MceError, MceSetup, held, supported};

/// A vCPU and what its guest was shown, for one visit of the relay.
#[derive(Debug)]
pub struct VcpuMca<'a> {
    in_kvm: kvm::VcpuMca<'a>,
    vcpu: &'a VcpuFd,
}

impl<'a> VcpuMca<'a> {
    /// The view of `vcpu`, whose guest was shown `guest`, that the relay works with.
    #[must_use]
    pub fn new(guest: &'a GuestMca, vcpu: &'a VcpuFd) -> Self {
        Self { in_kvm: guest.on(vcpu), vcpu }
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

/// `KVM_X86_SET_MCE`, as bare as it is: a return of `Ok` says only that KVM took the call. It returns 0 for errors that it
/// ignores and for errors that it turns into a triple fault; what the bank holds afterwards is the truth.
///
/// # Errors
/// EINVAL for a bank the vCPU does not have or a record without VAL.
pub fn set_mce(vcpu: &VcpuFd, record: &Record) -> io::Result<()> {
    kvm::set_mce(vcpu, record)
}
