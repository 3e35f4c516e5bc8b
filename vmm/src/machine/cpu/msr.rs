//! The model-specific registers a vCPU starts with, as firmware would leave them.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use thiserror::Error;

/// IA32_MISC_ENABLE.
const IA32_MISC_ENABLE: u32 = 0x1a0;
/// IA32_MISC_ENABLE: fast string operations.
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// IA32_MTRR_DEF_TYPE.
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// IA32_MTRR_DEF_TYPE: MTRRs on, everything write-back.
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;

/// Why a vCPU's MSRs could not be set.
#[derive(Debug, Error)]
pub enum MsrError {
    /// The list could not be built.
    #[error("cannot build a list of {0} MSRs")]
    List(usize),
    /// The call failed.
    #[error("KVM refused to set MSRs")]
    Set(#[source] kvm_ioctls::Error),
    /// KVM stopped at one of them.
    #[error("KVM refused MSR {index:#x} = {data:#x}")]
    Refused {
        /// The MSR.
        index: u32,
        /// The value.
        data: u64,
    },
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

/// Sets the MSRs of one vCPU, which already has its CPUID.
///
/// # Errors
/// What KVM refused.
pub fn set_boot_msrs(vcpu: &VcpuFd) -> Result<(), MsrError> {
    let entries = [
        entry(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(IA32_MTRR_DEF_TYPE, MTRR_ON_WRITE_BACK),
    ];
    let list = Msrs::from_entries(&entries).map_err(|_| MsrError::List(entries.len()))?;
    let done = vcpu.set_msrs(&list).map_err(MsrError::Set)?;
    match entries.get(done) {
        None => Ok(()),
        Some(refused) => Err(MsrError::Refused { index: refused.index, data: refused.data }),
    }
}
