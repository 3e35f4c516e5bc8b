//! The KVM side of the relay: a vCPU's machine-check state, and `KVM_X86_SET_MCE`.
//!
//! This is the back end that the relay asks for by its [`Mca`] trait, and all that a VMM on
//! kvm-ioctls has to write. Three things here are not obvious:
//!
//! * Without `KVM_X86_SETUP_MCE` every MCi_CTL is 0, and KVM swallows uncorrected errors.
//! * KVM drops capability bits without a word (SER_P on AMD hosts). What MCG_CAP reads back as is
//!   what the guest has; a guest that is shown more, because its CPUID is of another vendor than
//!   the host's processor, gets those reads answered by us ([`GuestMca::read_msr`]).
//! * Linux guests from about 6.19 use the deferred-error registers of an AMD processor's scalable MCA
//!   whether the processor has that or not, and panic if it does not. KVM does not have them, so
//!   they are ours, too.
//! * `KVM_X86_SET_MCE` returns 0 for errors it ignores and for errors it turns into a triple fault.
//!   The relay asks only when the state says that neither will happen, and reads back afterwards.

use std::io;

use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, KVM_MSR_EXIT_REASON_FILTER, Msrs, kvm_enable_cap, kvm_msr_entry,
    kvm_regs, kvm_x86_mce,
};
use kvm_ioctls::{
    Cap, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd,
};
use log::warn;
use mce_relay::Mca;
use mce_relay::mca::{BANKS, CR4_MCE, Caps, MAX_BANKS, McaState, Record, Vendor, cap, msr};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

use ioctls::{KVM_X86_GET_MCE_CAP_SUPPORTED, KVM_X86_SET_MCE, KVM_X86_SETUP_MCE};

/// include/uapi/linux/kvm.h; kvm-ioctls has no wrappers for these three.
mod ioctls {
    use kvm_bindings::{KVMIO, kvm_x86_mce};
    use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

    ioctl_iow_nr!(KVM_X86_SETUP_MCE, KVMIO, 0x9c, u64);
    ioctl_ior_nr!(KVM_X86_GET_MCE_CAP_SUPPORTED, KVMIO, 0x9d, u64);
    ioctl_iow_nr!(KVM_X86_SET_MCE, KVMIO, 0x9e, kvm_x86_mce);
}

/// RFLAGS.IF (SDM vol. 1, 3.4.3).
const RFLAGS_IF: u64 = 1 << 9;

/// FallbackReason a vCPU could not be given a machine-check architecture.
#[derive(Debug, thiserror::Error)]
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
    /// What KVM makes of a setup could not be tried.
    #[error("cannot make a vCPU to try machine checks on")]
    Probe(#[source] io::Error),
    /// The registers that KVM does not have cannot be shown.
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

/// The bits of MCG_CAP that this host's KVM says it supports; not all of them survive
/// [`MceSetup::prepare_vcpu`].
///
/// # Errors
/// KVM has no machine checks, or does not answer.
pub fn supported(kvm: &Kvm) -> Result<u64, MceError> {
    if kvm.check_extension_int(Cap::Mce) <= 0 {
        return Err(MceError::NoMce);
    }
    let mut supported = 0u64;
    // SAFETY: the ioctl writes one u64 to the reference, and `kvm` is an open /dev/kvm.
    let result =
        unsafe { ioctl_with_mut_ref(kvm, KVM_X86_GET_MCE_CAP_SUPPORTED(), &mut supported) };
    if result == 0 { Ok(supported) } else { Err(MceError::Supported(io::Error::last_os_error())) }
}

/// The MSRs whose accesses have to come to user space for a guest that is shown more than KVM
/// has: see [`GuestMca::read_msr`].
const SHOWN_MSRS: [u32; 3] = [msr::FEAT_CTL, msr::MCG_CAP, msr::MCG_EXT_CTL];

/// The first MSR of AMD's scalable MCA (SMCA, AMD PPR: MCA_CTL of bank 0), which has 16 for each
/// bank. `arch/x86/include/asm/msr-index.h`: MSR_AMD64_SMCA_MC0_CTL.
const SMCA_MC0_CTL: u32 = 0xc000_2000;
/// MSRs of each bank.
const SMCA_BANK_MSRS: u32 = 16;
/// The one of a bank's MSRs that holds the status of a deferred error (MCA_DESTAT).
const SMCA_DESTAT: u32 = 8;
/// The one that holds its address (MCA_DEADDR).
const SMCA_DEADDR: u32 = 9;

/// Whether `index` is MCA_DESTAT or MCA_DEADDR of one of the first `banks` banks.
fn is_deferred_msr(index: u32, banks: u8) -> bool {
    let Some(offset) = index.checked_sub(SMCA_MC0_CTL) else {
        return false;
    };
    offset / SMCA_BANK_MSRS < u32::from(banks)
        && [SMCA_DESTAT, SMCA_DEADDR].contains(&(offset % SMCA_BANK_MSRS))
}

/// Bits of a filter range, a set one for each MSR that is KVM's own business and a clear one for each
/// that goes to user space. KVM reads them in units of eight bytes, whatever the number of MSRs
/// (`kvm_add_msr_filter` in arch/x86/kvm/x86.c).
type FilterBits = [u8; MAX_BANKS * SMCA_BANK_MSRS as usize / 8];
/// Everything goes to user space.
static ALL: FilterBits = [0; size_of::<FilterBits>()];
/// Of every bank's registers MCA_DESTAT and MCA_DEADDR do.
static DEFERRED: FilterBits = deferred_bits();

const fn deferred_bits() -> FilterBits {
    let mut bits = [u8::MAX; size_of::<FilterBits>()];
    let mut bank = 0;
    while bank < MAX_BANKS {
        bits[2 * bank + 1] &= !(1 << (SMCA_DESTAT - 8) | 1 << (SMCA_DEADDR - 8));
        bank += 1;
    }
    bits
}

/// The machine-check architecture that all vCPUs of a VM are to have.
#[derive(Debug, Clone, Copy)]
pub struct MceSetup {
    caps: Caps,
    /// What KVM is asked for: what the guest is shown, as far as KVM says it supports it.
    asked: u64,
    /// Some of what the guest sees is not KVM's: [`SHOWN_MSRS`] are ours.
    shown_by_us: bool,
}

impl MceSetup {
    /// Ten banks and what belongs to `vendor`: for Intel software error recovery, and local machine
    /// checks if `lmce`; for AMD containment (`succor`, which its CPUID must show).
    ///
    /// What KVM makes of that is tried on a vCPU that is made for it and thrown away.
    ///
    /// # Errors
    /// See [`MceError`].
    pub fn new(kvm: &Kvm, vendor: Vendor, lmce: bool, succor: bool) -> Result<Self, MceError> {
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

    /// What the guest is shown.
    pub fn caps(&self) -> Caps {
        self.caps
    }

    /// Has accesses to the MSRs that are not KVM's sent to user space, if there are any.
    ///
    /// An AMD guest that KVM gives everything else to does without, where KVM cannot do that: only
    /// newer guest kernels need it, and only when they find a deferred error.
    ///
    /// # Errors
    /// KVM cannot do that (Linux 5.10 can).
    pub fn prepare_vm(&self, vm: &VmFd) -> Result<(), MceError> {
        let mut ours = Vec::new();
        if self.shown_by_us {
            ours.extend(SHOWN_MSRS.map(|index| range(index, 1, &ALL)));
        }
        if self.caps.vendor == Vendor::Amd {
            let count = SMCA_BANK_MSRS * u32::from(self.caps.banks());
            ours.push(range(SMCA_MC0_CTL, count, &DEFERRED));
        }
        if ours.is_empty() {
            return Ok(());
        }
        match send_to_user_space(vm, &ours) {
            Err(MceError::MsrExits(error)) if !self.shown_by_us => {
                warn!(
                    "KVM does not send MSR accesses to user space (Linux 5.10 does): a guest with \
                     Linux 6.19 or newer may panic when it finds a deferred error ({error})"
                );
                Ok(())
            }
            done => done,
        }
    }

    /// Sets up `vcpu`.
    ///
    /// # Errors
    /// See [`MceError`].
    pub fn prepare_vcpu(&self, vcpu: &VcpuFd) -> Result<GuestMca, MceError> {
        setup_mce(vcpu, self.asked)?;
        if !self.shown_by_us && self.caps.has(cap::LMCE_P) {
            write_msr(vcpu, msr::FEAT_CTL, msr::FEAT_CTL_LOCKED | msr::FEAT_CTL_LMCE)?;
        }
        Ok(GuestMca { caps: self.caps, shown_by_us: self.shown_by_us, mcg_ext_ctl: 0 })
    }
}

fn range(base: u32, msr_count: u32, bitmap: &[u8]) -> MsrFilterRange<'_> {
    let flags = MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE;
    MsrFilterRange { flags, base, msr_count, bitmap }
}

/// Has the accesses of `vm`'s guest to what `ranges` say sent to user space.
fn send_to_user_space(vm: &VmFd, ranges: &[MsrFilterRange<'_>]) -> Result<(), MceError> {
    let failed = |error: kvm_ioctls::Error| MceError::MsrExits(error.into());
    let exits = kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        args: [u64::from(KVM_MSR_EXIT_REASON_FILTER), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&exits).map_err(failed)?;
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, ranges).map_err(failed)
}

/// What MCG_CAP reads back as on this host after `asked` was set up.
///
/// # Errors
/// See [`MceError`].
pub fn held(kvm: &Kvm, asked: u64) -> Result<u64, MceError> {
    let failed = |error: kvm_ioctls::Error| MceError::Probe(error.into());
    let vm = kvm.create_vm().map_err(failed)?;
    let vcpu = vm.create_vcpu(0).map_err(failed)?;
    setup_mce(&vcpu, asked)?;
    read_msr(&vcpu, msr::MCG_CAP)
}

fn setup_mce(vcpu: &VcpuFd, mcg_cap: u64) -> Result<(), MceError> {
    // SAFETY: the ioctl reads one u64 from the reference, and `vcpu` is an open vCPU.
    if unsafe { ioctl_with_ref(vcpu, KVM_X86_SETUP_MCE(), &mcg_cap) } == 0 {
        Ok(())
    } else {
        Err(MceError::Setup { mcg_cap, source: io::Error::last_os_error() })
    }
}

/// One vCPU's machine-check architecture as its guest sees it.
#[derive(Debug, Clone)]
pub struct GuestMca {
    caps: Caps,
    /// Some of what the guest sees is not KVM's: [`SHOWN_MSRS`] are ours.
    shown_by_us: bool,
    /// MCG_EXT_CTL, where it is ours.
    mcg_ext_ctl: u64,
}

impl GuestMca {
    /// What the guest is shown.
    pub fn caps(&self) -> Caps {
        self.caps
    }

    /// The guest reads MSR `index`: its value, or `None` for one that is not ours (#GP).
    pub fn read_msr(&self, index: u32) -> Option<u64> {
        let lmce = self.caps.has(cap::LMCE_P);
        match index {
            _ if self.has_deferred_msr(index) => Some(0),
            msr::MCG_CAP => Some(self.caps.mcg_cap),
            msr::FEAT_CTL if lmce => Some(msr::FEAT_CTL_LOCKED | msr::FEAT_CTL_LMCE),
            msr::FEAT_CTL => Some(msr::FEAT_CTL_LOCKED),
            msr::MCG_EXT_CTL if lmce => Some(self.mcg_ext_ctl),
            _ => None,
        }
    }

    /// Whether `index` is one of the registers in which a guest looks for deferred errors that are not
    /// in their bank. Ours always are, so these hold nothing, and there is nothing to clear.
    fn has_deferred_msr(&self, index: u32) -> bool {
        self.caps.vendor == Vendor::Amd && is_deferred_msr(index, self.caps.banks())
    }

    /// The guest writes `value` to MSR `index`: false when that is not allowed (#GP).
    pub fn write_msr(&mut self, index: u32, value: u64) -> bool {
        if self.has_deferred_msr(index) {
            return true;
        }
        let allowed = index == msr::MCG_EXT_CTL
            && self.caps.has(cap::LMCE_P)
            && value & !msr::MCG_EXT_CTL_LMCE == 0;
        if allowed {
            self.mcg_ext_ctl = value;
        }
        allowed
    }

    /// The view of `vcpu` that the relay works with.
    pub fn on<'a>(&'a self, vcpu: &'a VcpuFd) -> VcpuMca<'a> {
        VcpuMca { guest: self, vcpu }
    }
}

/// A vCPU and what its guest was shown, for one visit of the relay.
#[derive(Debug)]
pub struct VcpuMca<'a> {
    guest: &'a GuestMca,
    vcpu: &'a VcpuFd,
}

impl Mca for VcpuMca<'_> {
    fn state(&mut self) -> io::Result<McaState> {
        let mut in_kvm = self.guest.caps;
        if self.guest.shown_by_us {
            in_kvm.mcg_cap &= !cap::LMCE_P;
        }
        // First, as KVM takes an INIT that is on its way in this call, and what is read before would be of a vCPU
        // that is another one after it. One that takes interrupts does not halt for good.
        let interrupts_on = |regs: &kvm_regs| regs.rflags & RFLAGS_IF != 0;
        let mp_state = match interrupts_on(&self.vcpu.get_regs()?) {
            true => None,
            false => Some(self.vcpu.get_mp_state()?.mp_state),
        };
        let values = read_msrs(self.vcpu, &in_kvm.state_msrs()).map_err(|(_, error)| error)?;
        let banks = in_kvm.state(&values);

        let events = self.vcpu.get_vcpu_events()?;
        let regs = self.vcpu.get_regs()?;
        let cr4_mce = self.vcpu.get_sregs()?.cr4 & CR4_MCE != 0;
        let interrupts_on = interrupts_on(&regs);
        // INIT clears CR4 (SDM vol. 3, table 9-1), so a vCPU with CR4.MCE does not wait, and a call is saved.
        let mp_state = match mp_state {
            None if !cr4_mce => Some(self.vcpu.get_mp_state()?.mp_state),
            known => known,
        };
        let is = |state| mp_state == Some(state);
        Ok(McaState {
            waits_for_sipi: !cr4_mce
                && (is(KVM_MP_STATE_UNINITIALIZED) || is(KVM_MP_STATE_INIT_RECEIVED)),
            cr4_mce,
            lmce: banks.lmce || self.guest.mcg_ext_ctl & msr::MCG_EXT_CTL_LMCE != 0,
            event_in_flight: events.interrupt.injected != 0
                || events.nmi.injected != 0
                || events.exception.injected != 0
                || events.exception.pending != 0,
            interrupts_on,
            halted: !interrupts_on && is(KVM_MP_STATE_HALTED),
            rip: regs.rip,
            ..banks
        })
    }

    fn inject(&mut self, record: &Record) -> io::Result<()> {
        set_mce(self.vcpu, record)
    }

    fn read_back(&mut self, bank: u8) -> io::Result<(u64, u64)> {
        let values = read_msrs(self.vcpu, &[msr::mc_status(bank), msr::MCG_STATUS]);
        values.map(|values| (values[0], values[1])).map_err(|(_, error)| error)
    }

    fn take_back(&mut self, bank: u8) -> io::Result<()> {
        write_msr(self.vcpu, msr::mc_status(bank), 0).map_err(io::Error::other)
    }
}

/// `KVM_X86_SET_MCE`, as bare as it is: a return of `Ok` says only that KVM took the call.
///
/// # Errors
/// EINVAL for a bank the vCPU does not have or a record without VAL.
pub fn set_mce(vcpu: &VcpuFd, record: &Record) -> io::Result<()> {
    let mce = kvm_x86_mce {
        status: record.status,
        addr: record.addr,
        misc: record.misc,
        mcg_status: record.mcg_status,
        bank: record.bank,
        ..Default::default()
    };
    // SAFETY: the ioctl reads one kvm_x86_mce from the reference, and `vcpu` is an open vCPU.
    if unsafe { ioctl_with_ref(vcpu, KVM_X86_SET_MCE(), &mce) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The values of `indices`, in order.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<u64>, (u32, io::Error)> {
    let entries: Vec<kvm_msr_entry> =
        indices.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
    let first = indices.first().copied().unwrap_or_default();
    let mut msrs = Msrs::from_entries(&entries)
        .map_err(|error| (first, io::Error::other(format!("{error:?}"))))?;
    let read = vcpu.get_msrs(&mut msrs).map_err(|error| (first, error.into()))?;
    // KVM stops at the first one it does not know, and says how far it came.
    match indices.get(read) {
        Some(index) => Err((*index, io::Error::from_raw_os_error(libc::EINVAL))),
        None => Ok(msrs.as_slice().iter().map(|entry| entry.data).collect()),
    }
}

fn read_msr(vcpu: &VcpuFd, index: u32) -> Result<u64, MceError> {
    let values =
        read_msrs(vcpu, &[index]).map_err(|(index, source)| MceError::Msr { index, source })?;
    Ok(values[0])
}

fn write_msr(vcpu: &VcpuFd, index: u32, data: u64) -> Result<(), MceError> {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    let failed = |source| MceError::Msr { index, source };
    let msrs = Msrs::from_entries(&[entry])
        .map_err(|error| failed(io::Error::other(format!("{error:?}"))))?;
    match vcpu.set_msrs(&msrs) {
        Ok(1) => Ok(()),
        Ok(_) => Err(failed(io::Error::from_raw_os_error(libc::EINVAL))),
        Err(error) => Err(failed(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(lmce: bool) -> GuestMca {
        let mcg_cap = u64::from(BANKS) | cap::SER_P | if lmce { cap::LMCE_P } else { 0 };
        let caps = Caps { vendor: Vendor::Intel, mcg_cap, succor: false };
        GuestMca { caps, shown_by_us: true, mcg_ext_ctl: 0 }
    }

    /// The numbers of the guest kernels that use them, as literals on purpose.
    #[test]
    fn an_amd_guest_has_deferred_registers_that_hold_nothing() {
        let caps = Caps { vendor: Vendor::Amd, mcg_cap: u64::from(BANKS), succor: true };
        let mut guest = GuestMca { caps, shown_by_us: false, mcg_ext_ctl: 0 };
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
        let mut intel = shown(true);
        assert_eq!(intel.read_msr(0xc000_2098), None);
        assert!(!intel.write_msr(0xc000_2098, 0));
    }

    /// The numbers of include/uapi/linux/kvm.h, as literals on purpose.
    #[test]
    fn ioctl_numbers() {
        assert_eq!(KVM_X86_SETUP_MCE(), 0x4008_ae9c);
        assert_eq!(KVM_X86_GET_MCE_CAP_SUPPORTED(), 0x8008_ae9d);
        assert_eq!(KVM_X86_SET_MCE(), 0x4040_ae9e);
    }

    #[test]
    fn a_guest_turns_lmce_on_where_it_is_shown() {
        let mut guest = shown(true);
        assert_eq!(guest.read_msr(msr::MCG_EXT_CTL), Some(0));
        assert!(!guest.write_msr(msr::MCG_EXT_CTL, 2), "a reserved bit");
        assert!(guest.write_msr(msr::MCG_EXT_CTL, 1));
        assert_eq!(guest.read_msr(msr::MCG_EXT_CTL), Some(1));
        assert_eq!(guest.read_msr(msr::FEAT_CTL), Some(0x10_0001));
    }

    #[test]
    fn without_lmce_its_registers_do_not_exist() {
        let mut guest = shown(false);
        assert_eq!(guest.read_msr(msr::MCG_EXT_CTL), None);
        assert!(!guest.write_msr(msr::MCG_EXT_CTL, 1));
        assert_eq!(guest.read_msr(msr::FEAT_CTL), Some(1), "locked, and nothing offered");
        assert!(!guest.write_msr(msr::MCG_CAP, 0));
        assert_eq!(guest.read_msr(0x10), None);
    }
}
