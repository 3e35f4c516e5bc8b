//! One vCPU's machine-check architecture as its guest sees it, and the [`Mca`] back end for it.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, RawFd};

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, kvm_vcpu_events,
};

use super::ioctl;
use super::smca::is_deferred_msr;
use crate::x86::back_end::Mca;
use crate::x86::mca::{CR4_MCE, Caps, McaState, Record, Vendor, cap, msr};

/// RFLAGS.IF (SDM vol. 1, 3.4.3).
const RFLAGS_IF: u64 = 1 << 9;

/// One vCPU's machine-check architecture as its guest sees it. Made by
/// [`MceSetup::prepare_vcpu`](super::MceSetup::prepare_vcpu).
#[derive(Debug, Clone)]
pub struct GuestMca {
    caps: Caps,
    /// Some registers that the guest sees are not KVM's: the VMM answers for them.
    shown_by_us: bool,
    /// MCG_EXT_CTL, where the VMM keeps it.
    mcg_ext_ctl: u64,
}

/// What a vCPU's state is made of beside its machine-check MSRs, for VMMs that read it by a layer of their own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VcpuValues {
    /// CR4 (KVM_GET_SREGS).
    pub cr4: u64,
    /// RFLAGS (KVM_GET_REGS).
    pub rflags: u64,
    /// RIP (KVM_GET_REGS).
    pub rip: u64,
    /// An interrupt, an NMI or an exception is being delivered: `interrupt.injected`, `nmi.injected`,
    /// `exception.injected` or `exception.pending` of KVM_GET_VCPU_EVENTS.
    pub event_in_flight: bool,
    /// KVM_GET_MP_STATE; `None` where it was not read, which is allowed while RFLAGS.IF and CR4.MCE are both set.
    pub mp_state: Option<u32>,
}

/// See [`VcpuValues::event_in_flight`].
pub(super) fn event_in_flight(events: &kvm_vcpu_events) -> bool {
    events.interrupt.injected != 0
        || events.nmi.injected != 0
        || events.exception.injected != 0
        || events.exception.pending != 0
}

impl GuestMca {
    pub(super) fn new(caps: Caps, shown_by_us: bool) -> Self {
        Self { caps, shown_by_us, mcg_ext_ctl: 0 }
    }

    /// The machine-check architecture that the guest is shown.
    #[must_use]
    pub fn caps(&self) -> Caps {
        self.caps
    }

    /// The guest reads MSR `index`: returns its value, or `None` for a register that is not kept here; the VMM then
    /// raises #GP. Call it on KVM_EXIT_X86_RDMSR.
    #[must_use]
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

    /// Whether `index` is one of the registers in which a guest looks for deferred errors that are not in their bank.
    /// The relay always puts them into the bank, so these registers are empty, and a write has nothing to clear.
    fn has_deferred_msr(&self, index: u32) -> bool {
        self.caps.vendor == Vendor::Amd && is_deferred_msr(index, self.caps.banks())
    }

    /// The guest writes `value` to MSR `index`: returns false when that is not allowed; the VMM then raises #GP. Call
    /// it on KVM_EXIT_X86_WRMSR.
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

    /// The capabilities of which KVM keeps the registers.
    fn in_kvm(&self) -> Caps {
        let mut caps = self.caps;
        if self.shown_by_us {
            caps.mcg_cap &= !cap::LMCE_P;
        }
        caps
    }

    /// The MSRs to read (KVM_GET_MSRS) for [`Self::state`], in this order.
    #[must_use]
    pub fn state_msrs(&self) -> Vec<u32> {
        self.in_kvm().state_msrs()
    }

    /// The state of the vCPU whose [`Self::state_msrs`] have the values `msrs`, in their order.
    #[must_use]
    pub fn state(&self, msrs: &[u64], values: &VcpuValues) -> McaState {
        let banks = self.in_kvm().state(msrs);
        let VcpuValues { cr4, rflags, rip, event_in_flight, mp_state } = *values;
        let (cr4_mce, interrupts_on) = (cr4 & CR4_MCE != 0, rflags & RFLAGS_IF != 0);
        let is = |state| mp_state == Some(state);
        McaState {
            waits_for_sipi: !cr4_mce
                && (is(KVM_MP_STATE_UNINITIALIZED) || is(KVM_MP_STATE_INIT_RECEIVED)),
            cr4_mce,
            lmce: banks.lmce || self.mcg_ext_ctl & msr::MCG_EXT_CTL_LMCE != 0,
            event_in_flight,
            interrupts_on,
            halted: !interrupts_on && is(KVM_MP_STATE_HALTED),
            rip,
            ..banks
        }
    }

    /// The back end for `vcpu`, for one call of [`VcpuPort::before_run`](crate::VcpuPort::before_run).
    pub fn on<'a>(&'a self, vcpu: &'a impl AsRawFd) -> VcpuMca<'a> {
        VcpuMca { guest: self, vcpu: vcpu.as_raw_fd(), exit: None, _borrowed: PhantomData }
    }
}

/// A vCPU and what its guest was shown, for one call of [`VcpuPort::before_run`](crate::VcpuPort::before_run). Its
/// system calls are KVM_GET_REGS, KVM_GET_MP_STATE, KVM_GET_MSRS, KVM_GET_VCPU_EVENTS, KVM_GET_SREGS, KVM_X86_SET_MCE
/// and KVM_SET_MSRS.
#[derive(Debug)]
pub struct VcpuMca<'a> {
    guest: &'a GuestMca,
    vcpu: RawFd,
    /// What came with the last exit, until it is used: what happens then may change it.
    exit: Option<VcpuValues>,
    /// The descriptor stays open as long as this.
    _borrowed: PhantomData<&'a ()>,
}

impl VcpuMca<'_> {
    /// With what came with the vCPU's last exit ([`ExitRegisters::take`](super::ExitRegisters::take)): where that says all
    /// there is to know, the first look at the state is KVM_GET_MSRS alone.
    #[must_use]
    pub fn after_exit(self, exit: Option<VcpuValues>) -> Self {
        Self { exit, ..self }
    }
}

impl Mca for VcpuMca<'_> {
    fn state(&mut self) -> io::Result<McaState> {
        let vcpu = &self.vcpu;
        let says_all = |exit: &VcpuValues| exit.rflags & RFLAGS_IF != 0 && exit.cr4 & CR4_MCE != 0;
        if let Some(exit) = self.exit.take().filter(says_all) {
            let msrs =
                ioctl::read_msrs(vcpu, &self.guest.state_msrs()).map_err(|(_, error)| error)?;
            return Ok(self.guest.state(&msrs, &exit));
        }
        // A vCPU that takes interrupts does not halt for good, so it need not be asked.
        let mut regs = ioctl::get_regs(vcpu)?;
        let mut mp_state = None;
        if regs.rflags & RFLAGS_IF == 0 {
            // Before all else: KVM_GET_MP_STATE makes KVM apply a pending INIT, and what was read before it would be
            // that of before the INIT.
            mp_state = Some(ioctl::get_mp_state(vcpu)?);
            regs = ioctl::get_regs(vcpu)?;
        }
        let msrs = ioctl::read_msrs(vcpu, &self.guest.state_msrs()).map_err(|(_, error)| error)?;
        let events = ioctl::get_vcpu_events(vcpu)?;
        let cr4 = ioctl::get_sregs(vcpu)?.cr4;
        // INIT clears CR4 (SDM vol. 3, table 9-1), so a vCPU with CR4.MCE set does not wait for SIPI, and one call is
        // saved.
        let mp_state = match mp_state {
            None if cr4 & CR4_MCE == 0 => Some(ioctl::get_mp_state(vcpu)?),
            known => known,
        };
        let event_in_flight = event_in_flight(&events);
        let (rflags, rip) = (regs.rflags, regs.rip);
        let values = VcpuValues { cr4, rflags, rip, event_in_flight, mp_state };
        Ok(self.guest.state(&msrs, &values))
    }

    fn inject(&mut self, record: &Record) -> io::Result<()> {
        ioctl::set_mce(&self.vcpu, record)
    }

    fn read_back(&mut self, bank: u8) -> io::Result<(u64, u64)> {
        let values = ioctl::read_msrs(&self.vcpu, &[msr::mc_status(bank), msr::MCG_STATUS]);
        values.map(|values| (values[0], values[1])).map_err(|(_, error)| error)
    }

    fn take_back(&mut self, bank: u8) -> io::Result<()> {
        ioctl::write_msr(&self.vcpu, msr::mc_status(bank), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::mca::BANKS;

    fn shown(lmce: bool) -> GuestMca {
        let mcg_cap = u64::from(BANKS) | cap::SER_P | if lmce { cap::LMCE_P } else { 0 };
        GuestMca::new(Caps { vendor: Vendor::Intel, mcg_cap, succor: false }, true)
    }

    #[test]
    fn a_guest_turns_lmce_on_where_it_is_shown() {
        let mut guest = shown(true);
        assert_eq!(guest.read_msr(msr::MCG_EXT_CTL), Some(0));
        assert!(!guest.write_msr(msr::MCG_EXT_CTL, 2), "a reserved bit");
        assert!(guest.write_msr(msr::MCG_EXT_CTL, 1));
        assert_eq!(guest.read_msr(msr::MCG_EXT_CTL), Some(1));
        assert_eq!(guest.read_msr(msr::FEAT_CTL), Some(0x10_0001));
        assert_eq!(guest.read_msr(0xc000_2098), None, "an AMD guest's");
        assert!(!guest.write_msr(0xc000_2098, 0));
        let registers = vec![0; guest.state_msrs().len()];
        assert!(guest.state(&registers, &VcpuValues::default()).lmce, "it is ours, not KVM's");
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

    #[test]
    fn a_state_is_made_of_values() {
        let guest = shown(false);
        let msrs = vec![0; guest.state_msrs().len()];
        let values = VcpuValues { cr4: 1 << 6, rflags: 1 << 9, rip: 7, ..VcpuValues::default() };
        let state = guest.state(&msrs, &values);
        assert!(state.cr4_mce && state.interrupts_on && !state.halted && !state.waits_for_sipi);
        assert_eq!(state.rip, 7);
        // include/uapi/linux/kvm.h: 1 is uninitialized, 3 is halted.
        let waits = VcpuValues { mp_state: Some(1), ..VcpuValues::default() };
        assert!(guest.state(&msrs, &waits).waits_for_sipi);
        let halted = VcpuValues { cr4: 1 << 6, mp_state: Some(3), ..VcpuValues::default() };
        assert!(guest.state(&msrs, &halted).halted && !guest.state(&msrs, &halted).waits_for_sipi);
    }
}
