//! Machine-check bits, and the record that tells a guest of one bad page.
//!
//! Pure data: what to write for each (kind, guest vendor, LMCE), and nothing about how or when.
//! Bit positions are those of the Intel SDM volume 3B chapter 17 ("Machine-Check Architecture")
//! and of the AMD APM volume 2 chapter 9; how Linux treats each combination is in `arch/x86/kernel/cpu/mce/severity.c`
//! and `core.c` (read in 6.1 and 6.12).
//!
//! This module, `decide/machine_check.rs` and the injecting half of [`VcpuPort`](crate::VcpuPort)
//! are for x86 only. Signals, translation, ledger, search, guarded reads and the firmware-first channel are not: a back
//! end for another architecture (on ARM an external abort by KVM_SET_VCPU_EVENTS, and the same firmware-first records)
//! has its place beside these three.

pub use crate::types::{FailureKind, Form, PAGE_SHIFT, PAGE_SIZE};

/// Number of banks KVM can hold at most (`KVM_MAX_MCE_BANKS`, `arch/x86/include/asm/kvm_host.h`).
pub const MAX_BANKS: usize = MAX_BANKS_U8 as usize;
const MAX_BANKS_U8: u8 = 32;
/// Number of banks a guest is given: what QEMU shows, and guest kernels are used to.
pub const BANKS: u8 = 10;
/// The bank for an action-optional machine check: the one that real Intel memory controllers and QEMU use.
pub const AO_BANK: u8 = 9;
/// The banks that may carry a deferred AMD record, so that one poll of the guest collects several.
/// Not those of [`AR_BANKS`], and not bank 4, which has a meaning of its own for AMD guests
/// (northbridge) and which 6.12 guests were seen to leave alone.
pub const DEFERRED_BANKS: [u8; 7] = [AO_BANK, 0, 1, 2, 3, 5, 6];
/// The banks that may carry an action-required error, in order of preference. Not one that may
/// carry an AO: a deferred record may stay in its bank for minutes, and an AR cannot wait for it.
pub const AR_BANKS: [u8; 2] = [8, 7];
/// The banks that may carry a bystander's record, which names no error.
pub const BYSTANDER_BANKS: [u8; 3] = [1, 2, 3];

/// CR4.MCE: machine checks are taken; clear, a machine check shuts the processor down.
pub const CR4_MCE: u64 = 1 << 6;

/// Model-specific registers of the machine-check architecture (SDM vol. 4, table 2-2).
pub mod msr {
    /// IA32_FEATURE_CONTROL.
    pub const FEAT_CTL: u32 = 0x3a;
    /// IA32_MCG_CAP.
    pub const MCG_CAP: u32 = 0x179;
    /// IA32_MCG_STATUS.
    pub const MCG_STATUS: u32 = 0x17a;
    /// IA32_MCG_CTL.
    pub const MCG_CTL: u32 = 0x17b;
    /// IA32_MCG_EXT_CTL.
    pub const MCG_EXT_CTL: u32 = 0x4d0;
    /// IA32_MC0_CTL, the first of four registers per bank.
    const MC0_CTL: u32 = 0x400;

    /// IA32_MCi_CTL of `bank`.
    pub const fn mc_ctl(bank: u8) -> u32 {
        MC0_CTL + 4 * bank as u32
    }
    /// IA32_MCi_STATUS of `bank`.
    pub const fn mc_status(bank: u8) -> u32 {
        mc_ctl(bank) + 1
    }

    /// FEAT_CTL bit 0: firmware has locked the register.
    pub const FEAT_CTL_LOCKED: u64 = 1 << 0;
    /// FEAT_CTL bit 2: the operating system may use VMX outside SMX.
    pub const FEAT_CTL_VMX: u64 = 1 << 2;
    /// FEAT_CTL bit 20: the operating system may turn LMCE on.
    pub const FEAT_CTL_LMCE: u64 = 1 << 20;
    /// MCG_EXT_CTL bit 0: the operating system has turned LMCE on.
    pub const MCG_EXT_CTL_LMCE: u64 = 1 << 0;
}

/// Bits of IA32_MCG_CAP (SDM vol. 3B, 17.3.1.1).
pub mod cap {
    /// Number of banks.
    pub const COUNT_MASK: u64 = 0xff;
    /// MCG_CTL exists.
    pub const CTL_P: u64 = 1 << 8;
    /// Corrected-error interrupts exist.
    pub const CMCI_P: u64 = 1 << 10;
    /// Software error recovery: the S and AR bits mean something.
    pub const SER_P: u64 = 1 << 24;
    /// Local machine checks exist.
    pub const LMCE_P: u64 = 1 << 27;
}

/// Bits of IA32_MCG_STATUS (SDM vol. 3B, 17.3.1.2).
pub mod mcg {
    /// The interrupted program can be restarted at the pushed instruction pointer.
    pub const RIPV: u64 = 1 << 0;
    /// The pushed instruction pointer belongs to the instruction that consumed the error.
    pub const EIPV: u64 = 1 << 1;
    /// A machine check is in progress; another one would shut the processor down.
    pub const MCIP: u64 = 1 << 2;
    /// This machine check was signalled to this logical processor only.
    pub const LMCES: u64 = 1 << 3;
}

/// Bits of IA32_MCi_STATUS (SDM vol. 3B, 17.3.2.2; AMD APM vol. 2, 9.3.2.2).
pub mod status {
    /// The bank holds an error.
    pub const VAL: u64 = 1 << 63;
    /// An error was lost because the bank was still valid.
    pub const OVER: u64 = 1 << 62;
    /// The error was not corrected.
    pub const UC: u64 = 1 << 61;
    /// The error was enabled by MCi_CTL.
    pub const EN: u64 = 1 << 60;
    /// MCi_MISC is valid.
    pub const MISCV: u64 = 1 << 59;
    /// MCi_ADDR is valid.
    pub const ADDRV: u64 = 1 << 58;
    /// Intel: signalled by a machine check (software error recovery).
    pub const S: u64 = 1 << 56;
    /// Intel: software has to act before it goes on.
    pub const AR: u64 = 1 << 55;
    /// AMD: deferred; the bad data has not been consumed yet.
    pub const DEFERRED: u64 = 1 << 44;
    /// AMD: the data is marked as poison.
    pub const POISON: u64 = 1 << 43;

    /// MCACOD of a memory-scrubbing error, channel 0 (SDM vol. 3B, table 17-15): Linux takes it as SRAO.
    pub const MCACOD_SCRUB: u64 = 0xc0;
    /// MCACOD of a data load that consumed poison (SDM vol. 3B, table 17-17): Linux takes it as SRAR.
    pub const MCACOD_DATA_LOAD: u64 = 0x134;
}

/// MCi_MISC of a physical address (address mode 2, bits 8:6) with 4 KiB granularity (bits 5:0),
/// SDM vol. 3B, 17.3.2.4.
pub const MISC_PHYSICAL_4K: u64 = (2 << 6) | PAGE_SHIFT as u64;

/// The vendor whose machine-check architecture the guest is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum Vendor {
    /// SRAO, SRAR; broadcast unless LMCE is on.
    Intel,
    /// Deferred errors and SUCCOR; always local.
    Amd,
}

impl std::fmt::Display for Vendor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Intel => "Intel",
            Self::Amd => "AMD",
        })
    }
}

/// What the guest was shown of its machine-check architecture. Fixed at boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caps {
    /// The vendor its CPUID names.
    pub vendor: Vendor,
    /// IA32_MCG_CAP as the guest reads it, not as KVM was asked for it: KVM drops bits silently.
    pub mcg_cap: u64,
    /// AMD only: CPUID 8000_0007 EBX bit 1, the guest can contain uncorrected errors.
    pub succor: bool,
}

impl Caps {
    /// Those of a guest without machine checks, which cannot be told in any form.
    pub(crate) const NONE: Self = Self { vendor: Vendor::Intel, mcg_cap: 0, succor: false };

    /// Number of banks the guest has, 0 to [`MAX_BANKS`].
    pub fn banks(&self) -> u8 {
        // Masked to 8 bits by COUNT_MASK and bounded by MAX_BANKS, so the cast keeps the value.
        #[allow(clippy::cast_possible_truncation)]
        let count = (self.mcg_cap & cap::COUNT_MASK) as u8;
        count.min(MAX_BANKS_U8)
    }

    /// Whether IA32_MCG_CAP shows `bit` (one of [`cap`]).
    pub fn has(&self, bit: u64) -> bool {
        self.mcg_cap & bit != 0
    }

    /// The MSRs that a vCPU's state is read from, in the order that [`Self::state`] expects.
    #[must_use]
    pub fn state_msrs(&self) -> Vec<u32> {
        let ctl = self.has(cap::CTL_P).then_some(msr::MCG_CTL);
        let lmce = self.has(cap::LMCE_P).then_some(msr::MCG_EXT_CTL);
        let banks = (0..self.banks()).flat_map(|bank| [msr::mc_ctl(bank), msr::mc_status(bank)]);
        [msr::MCG_STATUS].into_iter().chain(ctl).chain(lmce).chain(banks).collect()
    }

    /// The state of a vCPU whose [`Self::state_msrs`] have `values`, in their order. Fields that are in no such
    /// register are false or 0: the caller fills them in.
    #[must_use]
    pub fn state(&self, values: &[u64]) -> McaState {
        let mut values = values.iter().copied();
        let mut next = || values.next().unwrap_or_default();
        let mcg_status = next();
        // Without the register the guest cannot switch reporting off by it.
        let mcg_ctl = if self.has(cap::CTL_P) { next() } else { u64::MAX };
        let lmce = self.has(cap::LMCE_P) && next() & msr::MCG_EXT_CTL_LMCE != 0;
        let mut banks = [Bank::default(); MAX_BANKS];
        for bank in banks.iter_mut().take(usize::from(self.banks())) {
            *bank = Bank { ctl: next(), status: next() };
        }
        McaState {
            waits_for_sipi: false,
            cr4_mce: false,
            mcg_status,
            mcg_ctl,
            lmce,
            event_in_flight: false,
            interrupts_on: false,
            halted: false,
            rip: 0,
            banks,
        }
    }
}

/// One machine-check record: what goes into a bank and into MCG_STATUS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// Bank number.
    pub bank: u8,
    /// MCi_STATUS.
    pub status: u64,
    /// MCi_ADDR: guest-physical address of the bad 4 KiB page, 0 for a bystander.
    pub addr: u64,
    /// MCi_MISC.
    pub misc: u64,
    /// MCG_STATUS; 0 for a record that raises no machine check.
    pub mcg_status: u64,
}

/// The form for an error of `kind` in a guest with `caps`; `None` when the guest survives no form of it: an Intel-style
/// guest without SER_P and an AMD-style one without SUCCOR panic at any uncorrected error.
pub fn form(kind: FailureKind, caps: &Caps) -> Option<Form> {
    match (caps.vendor, kind) {
        (Vendor::Intel, _) if !caps.has(cap::SER_P) => None,
        (Vendor::Intel, FailureKind::ActionOptional) => Some(Form::Srao),
        (Vendor::Intel, FailureKind::ActionRequired) => Some(Form::Srar),
        (Vendor::Amd, FailureKind::ActionOptional) => Some(Form::Deferred),
        (Vendor::Amd, FailureKind::ActionRequired) => caps.succor.then_some(Form::AmdAr),
    }
}

/// The record that tells of the page at guest-physical `gpa` in `form`, in `bank`; `lmce` marks an
/// Intel record as signalled to one processor only.
pub fn record(form: Form, gpa: u64, bank: u8, lmce: bool) -> Record {
    use mcg::{EIPV, LMCES, MCIP, RIPV};
    use status::{
        ADDRV, AR, DEFERRED, EN, MCACOD_DATA_LOAD, MCACOD_SCRUB, MISCV, POISON, S, UC, VAL,
    };
    let located = VAL | EN | MISCV | ADDRV;
    let (status, mcg_status) = match form {
        Form::Srao => (located | UC | S | MCACOD_SCRUB, MCIP | RIPV),
        // EIPV: without it Linux cannot attribute an AR to an instruction, and ignores it.
        Form::Srar => (located | UC | S | AR | MCACOD_DATA_LOAD, MCIP | RIPV | EIPV),
        Form::Deferred => (located | DEFERRED | POISON, 0),
        Form::AmdAr => (located | UC | POISON, MCIP | RIPV | EIPV),
    };
    let local = if lmce && matches!(form, Form::Srao | Form::Srar) { LMCES } else { 0 };
    Record {
        bank,
        status,
        addr: gpa & !(PAGE_SIZE - 1),
        misc: MISC_PHYSICAL_4K,
        mcg_status: mcg_status | local,
    }
}

/// The record for each other processor of a rendezvous, in `bank`: a machine check with nothing to act on. EN is clear,
/// so Linux ignores it ("Not enabled" in severity.c); S is set, so that the handler itself clears the bank instead of
/// leaving it to a poll minutes later.
pub fn bystander(bank: u8) -> Record {
    Record {
        bank,
        status: status::VAL | status::UC | status::S,
        addr: 0,
        misc: 0,
        mcg_status: mcg::MCIP | mcg::RIPV,
    }
}

/// The two registers of a bank that decide whether it can take a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bank {
    /// MCi_CTL; anything but all ones disables reporting in KVM.
    pub ctl: u64,
    /// MCi_STATUS.
    pub status: u64,
}

impl Bank {
    /// Whether the bank holds an error the guest has not taken yet.
    pub fn valid(&self) -> bool {
        self.status & status::VAL != 0
    }
}

/// A vCPU's machine-check state at one moment, read while it does not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct McaState {
    /// The vCPU has not been started by the guest (wait-for-SIPI); a machine check would kill the VM.
    pub waits_for_sipi: bool,
    /// CR4.MCE.
    pub cr4_mce: bool,
    /// IA32_MCG_STATUS.
    pub mcg_status: u64,
    /// IA32_MCG_CTL; all ones where the register does not exist.
    pub mcg_ctl: u64,
    /// IA32_MCG_EXT_CTL bit 0: the guest takes local machine checks.
    pub lmce: bool,
    /// An interrupt, NMI or exception is on its way into the guest: the hypervisor has begun to deliver it and will go
    /// on when the vCPU runs. When a machine check is queued on top of it, KVM drops such an interrupt
    /// (`kvm_check_and_inject_events` in `arch/x86/kvm/x86.c` of 6.12 injects the exception, and the exit after that
    /// clears both), and the guest's local APIC waits for its end for ever.
    pub event_in_flight: bool,
    /// RFLAGS.IF: the vCPU takes interrupts, so it is not in its machine-check handler.
    pub interrupts_on: bool,
    /// The vCPU waits in HLT with interrupts off. So do processors that Linux has taken offline, or left behind when it
    /// started a crash kernel (`hlt_play_dead`, `arch/x86/kernel/smpboot.c`; `kdump_nmi_callback`): a machine check
    /// wakes them, they clear MCG_STATUS, and leave the bank as it is (`mce_check_crashing_cpu`). It need not be read
    /// where [`Self::interrupts_on`] is set. Where it cannot be read, false: a processor with interrupts off is then
    /// taken for offline later.
    pub halted: bool,
    /// RIP, for people who want to know which instruction touched a page.
    pub rip: u64,
    /// The banks; only the first [`Caps::banks`] mean anything.
    pub banks: [Bank; MAX_BANKS],
}

impl McaState {
    /// The state of a vCPU whose guest is up: interrupts on, handler open, all reporting enabled, banks empty. A
    /// starting point for models of a hypervisor.
    #[must_use]
    pub const fn up() -> Self {
        Self {
            waits_for_sipi: false,
            cr4_mce: true,
            mcg_status: 0,
            mcg_ctl: u64::MAX,
            lmce: false,
            event_in_flight: false,
            interrupts_on: true,
            halted: false,
            rip: 0,
            banks: [Bank { ctl: u64::MAX, status: 0 }; MAX_BANKS],
        }
    }

    /// Whether a machine check would shut the vCPU down, whatever its banks hold: the guest has not started it, or has
    /// not set CR4.MCE.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.waits_for_sipi || !self.cr4_mce
    }

    /// Whether a machine check is in progress.
    pub fn mcip(&self) -> bool {
        self.mcg_status & mcg::MCIP != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_has_every_register_in_its_place() {
        for lmce in [0, cap::LMCE_P] {
            let caps =
                Caps { vendor: Vendor::Intel, mcg_cap: 3 | cap::CTL_P | lmce, succor: false };
            let registers = caps.state_msrs();
            let values: Vec<u64> = registers.iter().map(|register| u64::from(*register)).collect();
            let state = caps.state(&values);
            assert_eq!((state.mcg_status, state.mcg_ctl), (0x17a, 0x17b));
            assert!(registers.contains(&0x17b));
            // The register's number has the bit clear.
            assert_eq!(registers.contains(&0x4d0), lmce != 0);
            assert!(!state.lmce);
            for (bank, at) in state.banks.iter().zip(0..3) {
                assert_eq!((bank.ctl, bank.status), (0x400 + 4 * at, 0x401 + 4 * at));
            }
            assert!(state.banks[3..].iter().all(|bank| *bank == Bank::default()));
        }
        // Without CTL_P there is no MCG_CTL to be read, and nothing is switched off by it.
        let caps = Caps { vendor: Vendor::Intel, mcg_cap: 3 | cap::LMCE_P, succor: false };
        assert!(!caps.state_msrs().contains(&0x17b));
        let state = caps.state(&[0, 1]);
        assert!(state.lmce);
        assert_eq!(state.mcg_ctl, u64::MAX);
    }

    /// The numbers that were seen to work with Linux guests, as literals on purpose.
    #[test]
    fn records_have_the_values_linux_was_seen_to_take() {
        let srao = record(Form::Srao, 0x1234_5678, 9, false);
        assert_eq!(srao.status, 0xBD00_0000_0000_00C0);
        assert_eq!((srao.mcg_status, srao.misc, srao.addr), (5, 0x8c, 0x1234_5000));
        let srar = record(Form::Srar, 0, 8, false);
        assert_eq!((srar.status, srar.mcg_status), (0xBD80_0000_0000_0134, 7));
        let amd = record(Form::AmdAr, 0, 8, false);
        assert_eq!((amd.status, amd.mcg_status), (0xBC00_0800_0000_0000, 7));
        let deferred = record(Form::Deferred, 0, 9, false);
        assert_eq!((deferred.status, deferred.mcg_status), (0x9C00_1800_0000_0000, 0));
    }

    #[test]
    fn only_intel_records_carry_lmces() {
        for (form, expect) in
            [(Form::Srao, true), (Form::Srar, true), (Form::Deferred, false), (Form::AmdAr, false)]
        {
            let local = record(form, 0, 9, true).mcg_status & mcg::LMCES != 0;
            assert_eq!(local, expect, "{form}");
        }
    }

    #[test]
    fn a_guest_that_would_panic_has_no_form() {
        let intel = Caps { vendor: Vendor::Intel, mcg_cap: u64::from(BANKS), succor: false };
        assert_eq!(form(FailureKind::ActionOptional, &intel), None);
        assert_eq!(form(FailureKind::ActionRequired, &intel), None);
        let amd = Caps { vendor: Vendor::Amd, mcg_cap: u64::from(BANKS), succor: false };
        assert_eq!(form(FailureKind::ActionRequired, &amd), None);
        assert_eq!(form(FailureKind::ActionOptional, &amd), Some(Form::Deferred));
    }

    #[test]
    fn bank_count_is_bounded() {
        let caps = Caps { vendor: Vendor::Amd, mcg_cap: 0xff, succor: true };
        assert_eq!(usize::from(caps.banks()), MAX_BANKS);
    }

    #[test]
    fn no_bank_serves_two_purposes() {
        assert!(!AR_BANKS.contains(&AO_BANK));
        assert!(DEFERRED_BANKS.iter().all(|b| !AR_BANKS.contains(b) && *b < BANKS));
        assert!(BYSTANDER_BANKS.iter().all(|b| !AR_BANKS.contains(b) && *b != AO_BANK));
        assert!(AR_BANKS.iter().all(|b| *b < BANKS) && AO_BANK < BANKS);
    }
}
