//! A vCPU as KVM has it, as far as machine checks go. `tests/kvm/replay.rs` holds it against KVM.

use mce_relay::mca::{Bank, Caps, MAX_BANKS, McaState, Record, cap, mcg, msr, status};

use super::Vcpu;

// The four registers of a bank, in the order of their MSRs.
const CTL: usize = 0;
const STATUS: usize = 1;
const ADDR: usize = 2;
const MISC: usize = 3;

/// MCi_STATUS.PCC (SDM vol. 3B, 17.3.2.2): the processor's context is corrupt.
const PCC: u64 = 1 << 57;

/// The model.
#[derive(Debug, Clone)]
pub struct ModelVcpu {
    mcg_cap: u64,
    waits_for_sipi: bool,
    cr4_mce: bool,
    mcg_status: u64,
    mcg_ctl: u64,
    mcg_ext_ctl: u64,
    banks: Vec<[u64; 4]>,
    /// RFLAGS.IF outside the handler.
    interrupts_on: bool,
    /// It waits in HLT.
    halted: bool,
    /// An interrupt waits for the next entry into the guest.
    interrupt: bool,
    /// A machine check waits for the next entry into the guest.
    queued: bool,
    triple_fault: bool,
    handlers: u32,
}

impl ModelVcpu {
    /// vCPU `index` after `KVM_X86_SETUP_MCE`, which enables all banks.
    pub fn new(index: usize, caps: &Caps) -> Self {
        Self {
            mcg_cap: caps.mcg_cap,
            waits_for_sipi: index != 0,
            cr4_mce: false,
            mcg_status: 0,
            mcg_ctl: u64::MAX,
            mcg_ext_ctl: 0,
            banks: vec![[u64::MAX, 0, 0, 0]; usize::from(caps.banks())],
            interrupts_on: false,
            halted: false,
            interrupt: false,
            queued: false,
            triple_fault: false,
            handlers: 0,
        }
    }

    /// The register with MSR number `index`.
    fn register(&mut self, index: u32) -> &mut u64 {
        match index {
            msr::MCG_STATUS => &mut self.mcg_status,
            msr::MCG_CTL => &mut self.mcg_ctl,
            msr::MCG_EXT_CTL => &mut self.mcg_ext_ctl,
            _ => {
                let at = usize::try_from(index - msr::mc_ctl(0)).expect("an MSR of a bank");
                &mut self.banks[at / 4][at % 4]
            }
        }
    }
}

impl Vcpu for ModelVcpu {
    fn state(&mut self) -> McaState {
        let mut banks = [Bank::default(); MAX_BANKS];
        for (bank, registers) in banks.iter_mut().zip(&self.banks) {
            *bank = Bank { ctl: registers[CTL], status: registers[STATUS] };
        }
        McaState {
            waits_for_sipi: self.waits_for_sipi,
            cr4_mce: self.cr4_mce,
            mcg_status: self.mcg_status,
            mcg_ctl: self.mcg_ctl,
            lmce: self.mcg_ext_ctl & msr::MCG_EXT_CTL_LMCE != 0,
            event_in_flight: self.interrupt || self.queued,
            interrupts_on: self.interrupts_on && self.handlers == 0,
            halted: self.halted,
            rip: 0,
            banks,
        }
    }

    /// `kvm_vcpu_ioctl_x86_set_mce` (`arch/x86/kvm/x86.c`), line by line.
    fn inject(&mut self, record: &Record) -> bool {
        let Record { mut status, addr, misc, mcg_status, bank } = *record;
        let Some(bank) = self.banks.get_mut(usize::from(bank)) else {
            return false;
        };
        if status & status::VAL == 0 {
            return false;
        }
        let uncorrected = status & status::UC != 0;
        let ucna = uncorrected && mcg_status == 0 && status & (PCC | status::S | status::AR) == 0;
        if ucna {
            // kvm_vcpu_x86_set_ucna; no CMCI, since MCG_CAP does not show CMCI_P.
            (bank[STATUS], bank[ADDR], bank[MISC]) = (status, addr, misc);
            self.mcg_status = 0;
            return true;
        }
        if uncorrected && self.mcg_cap & cap::CTL_P != 0 && self.mcg_ctl != u64::MAX {
            return true;
        }
        if uncorrected && bank[CTL] != u64::MAX {
            return true;
        }
        if uncorrected {
            if self.mcg_status & mcg::MCIP != 0 || !self.cr4_mce {
                self.triple_fault = true;
                return true;
            }
            if bank[STATUS] & status::VAL != 0 {
                status |= status::OVER;
            }
            (bank[STATUS], bank[ADDR], bank[MISC]) = (status, addr, misc);
            self.mcg_status = mcg_status;
            self.queued = true;
        } else if bank[STATUS] & status::VAL == 0 || bank[STATUS] & status::UC == 0 {
            if bank[STATUS] & status::VAL != 0 {
                status |= status::OVER;
            }
            (bank[STATUS], bank[ADDR], bank[MISC]) = (status, addr, misc);
        } else {
            bank[STATUS] |= status::OVER;
        }
        true
    }

    fn start(&mut self) {
        self.waits_for_sipi = false;
    }

    fn init(&mut self) {
        self.waits_for_sipi = true;
        self.cr4_mce = false;
        self.interrupts_on = false;
        self.halted = false;
        self.interrupt = false;
        self.queued = false;
        self.handlers = 0;
    }

    fn interrupt(&mut self) {
        self.interrupt = true;
    }

    fn resume(&mut self) -> bool {
        // A machine check on top of it would make KVM lose it, or not: no history has that.
        self.interrupt = false;
        if std::mem::take(&mut self.queued) {
            self.handlers += 1;
        }
        !self.triple_fault
    }

    fn handlers(&self) -> u32 {
        self.handlers
    }

    fn rdmsr(&mut self, index: u32) -> u64 {
        *self.register(index)
    }

    fn wrmsr(&mut self, index: u32, value: u64) {
        *self.register(index) = value;
    }

    fn host_wrmsr(&mut self, index: u32, value: u64) {
        *self.register(index) = value;
    }

    fn set_cr4_mce(&mut self, set: bool) {
        self.cr4_mce = set;
    }

    fn set_interrupts(&mut self, on: bool) {
        self.interrupts_on = on;
    }

    fn set_halted(&mut self, on: bool) {
        self.halted = on;
    }

    fn iret(&mut self) {
        self.handlers -= 1;
    }
}
