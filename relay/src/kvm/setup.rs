//! Sets up the machine-check architecture that a guest is given.

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_CAP_MCE, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_FILTER_READ,
    KVM_MSR_FILTER_WRITE, kvm_enable_cap, kvm_msr_filter, kvm_msr_filter_range,
};
use log::warn;

use super::guest::GuestMca;
use super::ioctl;
use super::smca::{ALL, DEFERRED, SMCA_BANK_MSRS, SMCA_MC0_CTL};
use crate::x86::mca::{BANKS, Caps, Vendor, cap, msr};

/// Why a guest could not be given a machine-check architecture.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MceError {
    /// The kernel's KVM has no machine checks to give.
    #[error("this host's KVM has no machine-check support (KVM_CAP_MCE)")]
    NoMce,
    /// The supported capabilities could not be read.
    #[error("cannot read KVM's machine-check capabilities (KVM_X86_GET_MCE_CAP_SUPPORTED)")]
    Supported(#[source] io::Error),
    /// A vCPU could not be set up.
    #[error("cannot set up machine checks with MCG_CAP {mcg_cap:#x} (KVM_X86_SETUP_MCE)")]
    Setup {
        /// What was asked for.
        mcg_cap: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// No vCPU could be made on which to try the setup.
    #[error("cannot make a vCPU to try machine checks on")]
    Probe(#[source] io::Error),
    /// Registers that KVM does not have cannot be shown to the guest.
    #[error(
        "cannot show this guest its machine-check registers: KVM does not send MSR accesses to user space \
         (KVM_CAP_X86_USER_SPACE_MSR, Linux 5.10)"
    )]
    MsrExits(#[source] io::Error),
    /// An MSR that the setup needs could not be read or written.
    #[error("cannot access MSR {index:#x} of a vCPU")]
    Msr {
        /// The register.
        index: u32,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// The bits of MCG_CAP that this host's KVM, `/dev/kvm`, says it supports; not all of them survive
/// [`MceSetup::prepare_vcpu`].
///
/// # Errors
/// KVM has no machine checks, or does not answer.
pub fn supported(kvm: &impl AsRawFd) -> Result<u64, MceError> {
    match ioctl::check_extension(kvm, KVM_CAP_MCE) {
        Ok(1..) => ioctl::supported_mce(kvm).map_err(MceError::Supported),
        _ => Err(MceError::NoMce),
    }
}

/// What MCG_CAP reads back as on this host after `asked` was set up. Tried on a vCPU that is made for it and thrown
/// away.
///
/// # Errors
/// See [`MceError`].
pub fn held(kvm: &impl AsRawFd, asked: u64) -> Result<u64, MceError> {
    let vm = ioctl::create_vm(kvm).map_err(MceError::Probe)?;
    let vcpu = ioctl::create_vcpu(&vm).map_err(MceError::Probe)?;
    setup_mce(&vcpu, asked)?;
    let values = ioctl::read_msrs(&vcpu, &[msr::MCG_CAP]);
    values.map(|values| values[0]).map_err(|(index, source)| MceError::Msr { index, source })
}

fn setup_mce(vcpu: &impl AsRawFd, mcg_cap: u64) -> Result<(), MceError> {
    ioctl::setup_mce(vcpu, mcg_cap).map_err(|source| MceError::Setup { mcg_cap, source })
}

/// The MSRs whose accesses have to come to user space for a guest that is shown more than KVM has: see
/// [`GuestMca::read_msr`].
const SHOWN_MSRS: [u32; 3] = [msr::FEAT_CTL, msr::MCG_CAP, msr::MCG_EXT_CTL];

/// MSRs of which some accesses, reads and writes, have to come to user space (KVM_X86_SET_MSR_FILTER), for a VMM that
/// has a filter of its own.
#[derive(Debug, Clone, Copy)]
pub struct MsrRange {
    /// Number of the first MSR.
    pub base: u32,
    /// How many MSRs.
    pub count: u32,
    /// One bit for each MSR, the lowest first: clear where the access comes to user space. Its length is a multiple of
    /// eight bytes, as KVM reads it in such units.
    pub bitmap: &'static [u8],
}

/// The machine-check architecture that all vCPUs of a VM are to have.
#[derive(Debug, Clone, Copy)]
pub struct MceSetup {
    caps: Caps,
    /// What KVM is asked for: what the guest is shown, less what KVM says it does not support.
    asked: u64,
    /// Some registers that the guest sees are not KVM's: the VMM answers for [`SHOWN_MSRS`].
    shown_by_us: bool,
}

/// CPUID leaf 1, EDX: machine checks, and their architecture (SDM vol. 2A, table 3-11).
const CPUID_1_EDX_MCE: u32 = 1 << 7;
const CPUID_1_EDX_MCA: u32 = 1 << 14;
/// CPUID leaf 8000_0007, EBX (AMD APM vol. 3, E.4.6): recovery from overflows, containment (SUCCOR), scalable MCA.
const CPUID_8000_0007_EBX_OVERFLOW_RECOVERY: u32 = 1 << 0;
const CPUID_8000_0007_EBX_SUCCOR: u32 = 1 << 1;
const CPUID_8000_0007_EBX_SCALABLE_MCA: u32 = 1 << 3;

impl MceSetup {
    /// Ten banks, and what `vendor` has, which the guest's CPUID names: for Intel software error recovery, and local
    /// machine checks if `lmce`, which spare a guest of many vCPUs that all of them are stopped for one error; for AMD
    /// containment (`succor`, true unless its CPUID cannot show it). Each is ignored for the other vendor.
    ///
    /// What KVM (the descriptor of `/dev/kvm`) makes of it is tried on a vCPU that is made for it and thrown away. Call
    /// it before the relay is started.
    ///
    /// # Errors
    /// See [`MceError`].
    pub fn new(
        kvm: &impl AsRawFd,
        vendor: Vendor,
        lmce: bool,
        succor: bool,
    ) -> Result<Self, MceError> {
        let wanted = u64::from(BANKS)
            | cap::CTL_P
            | match vendor {
                Vendor::Intel => cap::SER_P | if lmce { cap::LMCE_P } else { 0 },
                Vendor::Amd => 0,
            };
        let asked = wanted & (supported(kvm)? | cap::COUNT_MASK);
        let shown_by_us = held(kvm, asked)? != wanted;
        Ok(Self { caps: Caps { vendor, mcg_cap: wanted, succor }, asked, shown_by_us })
    }

    /// The machine-check architecture that the guest is shown: for
    /// [`RelayBuilder::machine_checks`](crate::RelayBuilder::machine_checks).
    #[must_use]
    pub fn caps(&self) -> Caps {
        self.caps
    }

    /// Sets and clears in the CPUID leaf `function`, whose registers are `[eax, ebx, ecx, edx]`, the bits that describe
    /// machine checks. Call it for each leaf before KVM_SET_CPUID2; leaves without such bits stay as they are. An
    /// AMD-style guest needs leaf 8000_0007, and EAX of leaf 8000_0000 at least that: without SUCCOR it panics at an
    /// AR.
    pub fn show_in_cpuid(&self, function: u32, registers: &mut [u32; 4]) {
        let [_, ebx, _, edx] = registers;
        match function {
            1 => *edx |= CPUID_1_EDX_MCE | CPUID_1_EDX_MCA,
            0x8000_0007 if self.caps.vendor == Vendor::Amd => {
                *ebx &= !(CPUID_8000_0007_EBX_SCALABLE_MCA | CPUID_8000_0007_EBX_SUCCOR);
                if self.caps.succor {
                    *ebx |= CPUID_8000_0007_EBX_OVERFLOW_RECOVERY | CPUID_8000_0007_EBX_SUCCOR;
                }
            }
            _ => {}
        }
    }

    /// The MSRs whose accesses the VMM has to answer by [`GuestMca`], for a VMM with an MSR filter of its own.
    #[must_use]
    pub fn shown_msrs(&self) -> Vec<MsrRange> {
        let mut ours = Vec::new();
        if self.shown_by_us {
            ours.extend(SHOWN_MSRS.map(|base| MsrRange { base, count: 1, bitmap: &ALL }));
        }
        if self.caps.vendor == Vendor::Amd {
            let count = SMCA_BANK_MSRS * u32::from(self.caps.banks());
            ours.push(MsrRange { base: SMCA_MC0_CTL, count, bitmap: &DEFERRED });
        }
        ours
    }

    /// Has KVM send accesses to [`Self::shown_msrs`] to user space, if there are any. Call it once for each VM. It sets
    /// the VM's MSR filter: a VMM that has one puts those ranges into it instead.
    ///
    /// Where KVM cannot do that, an AMD guest to which KVM gives everything else goes without these registers: only
    /// newer guest kernels read them, and only when they find a deferred error.
    ///
    /// # Errors
    /// The guest needs it and KVM cannot do it (before Linux 5.10).
    pub fn prepare_vm(&self, vm: &impl AsRawFd) -> Result<(), MceError> {
        let ours = self.shown_msrs();
        if ours.is_empty() {
            return Ok(());
        }
        match send_to_user_space(vm, &ours) {
            Err(error) if !self.shown_by_us => {
                warn!(
                    "KVM does not send MSR accesses to user space (Linux 5.10 does): a guest with \
                     Linux 6.19 or newer may panic when it finds a deferred error ({error})"
                );
                Ok(())
            }
            done => done.map_err(MceError::MsrExits),
        }
    }

    /// Sets up `vcpu`. Call it for each vCPU, after KVM_SET_CPUID2 and before it runs; of a vCPU that is restored, before its
    /// MSRs are. IA32_FEATURE_CONTROL of a guest with local machine checks is written and locked: with VMX where its
    /// CPUID has that.
    ///
    /// # Errors
    /// See [`MceError`].
    pub fn prepare_vcpu(&self, vcpu: &impl AsRawFd) -> Result<GuestMca, MceError> {
        setup_mce(vcpu, self.asked)?;
        if !self.shown_by_us && self.caps.has(cap::LMCE_P) {
            let (index, data) = (msr::FEAT_CTL, msr::FEAT_CTL_LOCKED | msr::FEAT_CTL_LMCE);
            // Locked without it, a guest whose CPUID has VMX could not use that. KVM refuses the bit to one that has not.
            ioctl::write_msr(vcpu, index, data | msr::FEAT_CTL_VMX)
                .or_else(|_| ioctl::write_msr(vcpu, index, data))
                .map_err(|source| MceError::Msr { index, source })?;
        }
        Ok(GuestMca::new(self.caps, self.shown_by_us))
    }
}

/// Has KVM send the guest's accesses to `ranges` to user space.
fn send_to_user_space(vm: &impl AsRawFd, ranges: &[MsrRange]) -> io::Result<()> {
    let exits = kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        args: [u64::from(KVM_MSR_EXIT_REASON_FILTER), 0, 0, 0],
        ..Default::default()
    };
    ioctl::enable_cap(vm, &exits)?;
    // The default, 0, allows what no range names.
    let mut filter = kvm_msr_filter::default();
    for (to, MsrRange { base, count, bitmap }) in filter.ranges.iter_mut().zip(ranges) {
        *to = kvm_msr_filter_range {
            flags: KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE,
            nmsrs: *count,
            base: *base,
            // KVM reads it, whatever the type says.
            bitmap: bitmap.as_ptr().cast_mut(),
        };
    }
    // SAFETY: each bitmap is a `FilterBits`, with a bit for all registers that there can be of a range.
    unsafe { ioctl::set_msr_filter(vm, &filter) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn amd() -> MceSetup {
        let caps = Caps { vendor: Vendor::Amd, mcg_cap: u64::from(BANKS), succor: true };
        MceSetup { caps, asked: caps.mcg_cap, shown_by_us: false }
    }

    /// The numbers of the guest kernels that use them, as literals on purpose.
    #[test]
    fn an_amd_guest_has_deferred_registers_that_hold_nothing() {
        let setup = amd();
        let mut guest = GuestMca::new(setup.caps, false);
        for index in [0xc000_2008, 0xc000_2098, 0xc000_2009, 0xc000_2099] {
            assert!(guest.write_msr(index, 0) && guest.write_msr(index, u64::MAX), "{index:#x}");
            assert_eq!(guest.read_msr(index), Some(0), "{index:#x}");
        }
        for (index, bit) in (0xc000_2000_u32..0xc000_20a0).zip(0..) {
            let to_user_space = DEFERRED[bit / 8] & 1 << (bit % 8) == 0;
            assert_eq!(to_user_space, guest.read_msr(index).is_some(), "{index:#x}");
        }
        // The rest of the banks that are shown, and banks that are not.
        let rest = (0xc000_2000..0xc000_20a0).filter(|index| ![8, 9].contains(&(index % 16)));
        for index in rest.chain([0xc000_1ff8, 0xc000_20a8, 0xc000_20a9]) {
            assert_eq!(guest.read_msr(index), None, "{index:#x}");
            assert!(!guest.write_msr(index, 0), "{index:#x}");
        }
        let [range] = setup.shown_msrs()[..] else { panic!("one range") };
        assert_eq!((range.base, range.count), (0xc000_2000, 160));
    }

    #[test]
    fn a_cpuid_shows_what_the_guest_has() {
        let mut leaf = [0, 0, 0, 0];
        amd().show_in_cpuid(1, &mut leaf);
        assert_eq!(leaf, [0, 0, 0, 0x4080]);
        let mut leaf = [7, 0b1100, 7, 7];
        amd().show_in_cpuid(0x8000_0007, &mut leaf);
        assert_eq!(leaf, [7, 0b0111, 7, 7], "SUCCOR, overflow recovery, and no scalable MCA");
        let mut none = amd();
        none.caps.succor = false;
        let mut leaf = [0, 0b1110, 0, 0];
        none.show_in_cpuid(0x8000_0007, &mut leaf);
        assert_eq!(leaf, [0, 0b0100, 0, 0]);
        let mut leaf = [1, 2, 3, 4];
        amd().show_in_cpuid(0x8000_0008, &mut leaf);
        assert_eq!(leaf, [1, 2, 3, 4]);
    }
}
