//! Why a VM could not be built.

use std::io;

use thiserror::Error;

use crate::config::ConfigError;
use crate::host::dev_kvm;
use crate::machine::acpi::AcpiError;
use crate::machine::boot::error::BootError;
use crate::machine::boot::regs;
use crate::machine::cpu::msr::MsrError;
use crate::machine::devices::virtio::build::BuildError;
use crate::machine::devices::virtio::bus::BusError;
use crate::machine::memory::error::MemoryError;
use crate::machine::vcpu::hooks::HookError;

/// Why a VM could not be built.
#[derive(Debug, Error)]
pub enum VmError {
    /// The configuration is impossible.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is no KVM.
    #[error("there is no {KVM_PATH} that works: {}", dev_kvm::advice_now())]
    NoKvm,
    /// This user may not open /dev/kvm.
    #[error("no permission to open {KVM_PATH}: {}", dev_kvm::advice_now())]
    KvmPermission,
    /// KVM could not be opened.
    #[error("cannot open {KVM_PATH}")]
    OpenKvm(#[source] kvm_ioctls::Error),
    /// KVM has another interface version.
    #[error("{KVM_PATH} has API version {found}, expected {KVM_API}")]
    KvmVersion {
        /// The version found.
        found: i32,
    },
    /// This KVM is too old.
    #[error("this KVM lacks {0}; use a newer host kernel")]
    MissingCap(&'static str),
    /// A call on the VM failed.
    #[error("KVM: cannot {what}")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Guest RAM could not be made.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel could not be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The ACPI tables could not be written.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// A vCPU could not be made ready.
    #[error("vCPU {vcpu}: cannot {what}")]
    Vcpu {
        /// Its index.
        vcpu: u8,
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The registers of vCPU 0 were refused.
    #[error("vCPU 0: entry state")]
    Regs(#[from] regs::RegsError),
    /// The MSRs of a vCPU were refused.
    #[error("vCPU {vcpu}: MSRs")]
    Msr {
        /// Its index.
        vcpu: u8,
        /// The cause.
        #[source]
        source: MsrError,
    },
    /// The CPUID list could not be built.
    #[error("the CPUID list has {0} entries, more than KVM takes")]
    CpuidList(usize),
    /// A virtio device could not be made.
    #[error(transparent)]
    Device(#[from] BuildError),
    /// A virtio device could not be put into the VM.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A hook refused.
    #[error(transparent)]
    Hook(HookError),
    /// Out of file descriptors, or the like.
    #[error("cannot {what}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

pub(crate) fn kvm_error(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Kvm { what, source }
}

pub(crate) fn os_error(what: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Os { what, source }
}

/// The device of KVM.
pub(crate) const KVM_PATH: &str = "/dev/kvm";
/// The version of KVM's interface ever since it is stable.
pub(crate) const KVM_API: i32 = 12;
