//! What a guest's kernel does on one vCPU, as Linux does it (`arch/x86/kernel/cpu/mce/core.c`).

use mce_relay::mca::{Caps, Vendor, cap, msr, status};

use super::Vcpu;

/// One step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestStep {
    /// The vCPU is sent its start-up IPI.
    Start,
    /// The vCPU is sent an INIT, as when a processor is taken offline and back.
    Init,
    /// Goes on with what it does.
    Run,
    /// Sets CR4.MCE.
    OpenHandler,
    /// Starts over: gives up the handler if it is in it, and clears CR4.MCE.
    CloseHandler,
    /// Outside the handler: enables every bank and clears it unread, as Linux does right after it has
    /// set CR4.MCE (`__mcheck_cpu_init_clear_banks`).
    WipeBanks,
    /// Switches a bank's reporting on or off.
    BankCtl(u8, bool),
    /// Switches all reporting on or off.
    McgCtl(bool),
    /// Takes local machine checks, or no longer; nothing where it was not shown LMCE.
    Lmce(bool),
    /// In the handler: reads the first bank that holds what a handler takes, and clears it.
    HandleOneBank,
    /// Clears MCG_STATUS.
    ClearMcip,
    /// The same, and returns from the handler if it is in one.
    LeaveHandler,
    /// Outside the handler: takes interrupts, or no longer.
    Interrupts(bool),
    /// Outside the handler: reads and clears every bank that holds a deferred record.
    Poll,
    /// Outside the handler: the processor is taken offline. It waits in HLT with interrupts off, and whatever machine
    /// check it takes, it clears MCG_STATUS and waits on (`hlt_play_dead`, `mce_check_crashing_cpu`). An INIT
    /// and a start-up IPI bring it back.
    Offline,
}

/// A record that the guest read out of a bank before it cleared it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Took {
    /// The bank.
    pub bank: u8,
    /// MCi_STATUS.
    pub status: u64,
    /// MCi_ADDR.
    pub addr: u64,
}

/// The first of all invariants.
pub const TRIPLE_FAULT: &str = "a triple fault was requested: the guest has shut down";

/// IA32_MCi_ADDR of `bank`.
pub const fn mc_addr(bank: u8) -> u32 {
    msr::mc_status(bank) + 1
}

const fn all_ones(on: bool) -> u64 {
    if on { u64::MAX } else { 0 }
}

/// The guest does `step` on `vcpu`; what it read out.
///
/// # Panics
/// The vCPU shuts down.
pub fn step(vcpu: &mut impl Vcpu, caps: &Caps, step: GuestStep) -> Vec<Took> {
    match step {
        // A start-up IPI is nothing to a processor that does not wait for one.
        GuestStep::Start if !vcpu.state().waits_for_sipi => {}
        GuestStep::Start => vcpu.start(),
        GuestStep::Init => vcpu.init(),
        _ if vcpu.state().waits_for_sipi => {}
        _ if vcpu.state().halted => {
            if vcpu.state().event_in_flight {
                vcpu.set_halted(false);
                assert!(vcpu.resume(), "{TRIPLE_FAULT}");
                vcpu.wrmsr(msr::MCG_STATUS, 0);
                while vcpu.handlers() > 0 {
                    vcpu.iret();
                }
                vcpu.set_halted(true);
            }
        }
        _ => {
            assert!(vcpu.resume(), "{TRIPLE_FAULT}");
            return follow(vcpu, caps, step);
        }
    }
    Vec::new()
}

fn follow(vcpu: &mut impl Vcpu, caps: &Caps, step: GuestStep) -> Vec<Took> {
    let mut banks = 0..caps.banks();
    match step {
        GuestStep::Start | GuestStep::Init | GuestStep::Run => {}
        GuestStep::OpenHandler => vcpu.set_cr4_mce(true),
        GuestStep::CloseHandler => {
            while vcpu.handlers() > 0 {
                vcpu.iret();
            }
            vcpu.set_cr4_mce(false);
        }
        GuestStep::WipeBanks => {
            if vcpu.handlers() == 0 {
                for bank in banks {
                    vcpu.wrmsr(msr::mc_ctl(bank), all_ones(true));
                    vcpu.wrmsr(msr::mc_status(bank), 0);
                }
            }
        }
        GuestStep::BankCtl(bank, on) => {
            if banks.contains(&bank) {
                vcpu.wrmsr(msr::mc_ctl(bank), all_ones(on));
            }
        }
        GuestStep::McgCtl(on) => vcpu.wrmsr(msr::MCG_CTL, all_ones(on)),
        GuestStep::Lmce(on) => {
            if caps.has(cap::LMCE_P) {
                vcpu.wrmsr(msr::MCG_EXT_CTL, if on { msr::MCG_EXT_CTL_LMCE } else { 0 });
            }
        }
        GuestStep::HandleOneBank => {
            if vcpu.handlers() > 0 {
                // `__mc_scan_banks`: what is not signalled is left to the poll.
                let signalled = if caps.vendor == Vendor::Intel { status::S } else { status::UC };
                return banks.find_map(|bank| take(vcpu, bank, signalled)).into_iter().collect();
            }
        }
        GuestStep::ClearMcip => vcpu.wrmsr(msr::MCG_STATUS, 0),
        GuestStep::LeaveHandler => {
            vcpu.wrmsr(msr::MCG_STATUS, 0);
            if vcpu.handlers() > 0 {
                vcpu.iret();
            }
        }
        GuestStep::Interrupts(on) => {
            if vcpu.handlers() == 0 {
                vcpu.set_interrupts(on);
            }
        }
        GuestStep::Offline => {
            if vcpu.handlers() == 0 {
                vcpu.set_interrupts(false);
                vcpu.set_halted(true);
            }
        }
        GuestStep::Poll => {
            if vcpu.handlers() == 0 {
                return banks.filter_map(|bank| take(vcpu, bank, status::DEFERRED)).collect();
            }
        }
    }
    Vec::new()
}

/// Reads `bank` and clears it, if it holds a record with `wanted` set.
fn take(vcpu: &mut impl Vcpu, bank: u8, wanted: u64) -> Option<Took> {
    let status = vcpu.rdmsr(msr::mc_status(bank));
    if status & status::VAL == 0 || status & wanted == 0 {
        return None;
    }
    let addr = vcpu.rdmsr(mc_addr(bank));
    vcpu.wrmsr(msr::mc_status(bank), 0);
    Some(Took { bank, status, addr })
}
