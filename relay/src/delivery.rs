//! What to do next with the errors that wait: a pure state machine.
//!
//! It holds the errors a guest has not been told of and those it has not acknowledged, and answers
//! one question: given this vCPU's machine-check state, what is the next step? It reads no clock,
//! takes no lock and calls no hypervisor, so every rule in it can be tested against a model of KVM.
//!
//! The rules exist because a careless injection kills the guest: `KVM_X86_SET_MCE` requests a
//! triple fault while a machine check is in progress or CR4.MCE is clear, does nothing at all while
//! reporting is switched off, and marks an overflow where a bank was still full
//! (`kvm_vcpu_ioctl_x86_set_mce` in `arch/x86/kvm/x86.c`).

use std::collections::VecDeque;
use std::fmt;

use crate::mca::{
    self, AO_BANK, AR_BANKS, BYSTANDER_BANKS, Caps, Form, Kind, McaState, Record, Vendor,
};

/// The vCPU that is told of action-optional errors: the boot processor, which is always online.
pub const AO_VCPU: usize = 0;

/// Why an error cannot be told now, though it may be later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case", tag = "reason"))]
pub enum Wait {
    /// The vCPU has not been started by the guest.
    NotStarted {
        /// The vCPU in question.
        vcpu: usize,
    },
    /// CR4.MCE is clear: the guest has not opened its machine-check handler (yet).
    Cr4MceClear {
        /// The vCPU in question.
        vcpu: usize,
    },
    /// MCG_STATUS.MCIP is set: the guest is in its handler.
    Mcip {
        /// The vCPU in question.
        vcpu: usize,
    },
    /// MCG_CTL is not all ones: the guest has switched reporting off.
    McgCtlOff {
        /// The vCPU in question.
        vcpu: usize,
    },
    /// MCi_CTL is not all ones: the guest has switched this bank off.
    BankCtlOff {
        /// The vCPU in question.
        vcpu: usize,
        /// The bank in question.
        bank: u8,
    },
    /// MCi_STATUS.VAL is set: the guest has not taken the last error out of the bank.
    BankValid {
        /// The vCPU in question.
        vcpu: usize,
        /// The bank in question.
        bank: u8,
    },
    /// The guest was shown too few banks for this kind of error.
    NoBank {
        /// The vCPU in question.
        vcpu: usize,
    },
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NotStarted { vcpu } => write!(f, "vCPU {vcpu} waits for its start-up IPI"),
            Self::Cr4MceClear { vcpu } => write!(f, "CR4.MCE is clear on vCPU {vcpu}"),
            Self::Mcip { vcpu } => write!(f, "vCPU {vcpu} is in its machine-check handler (MCIP)"),
            Self::McgCtlOff { vcpu } => write!(f, "MCG_CTL is off on vCPU {vcpu}"),
            Self::BankCtlOff { vcpu, bank } => write!(f, "MC{bank}_CTL is off on vCPU {vcpu}"),
            Self::BankValid { vcpu, bank } => {
                write!(f, "bank {bank} of vCPU {vcpu} still holds an error (VAL)")
            }
            Self::NoBank { vcpu } => write!(f, "vCPU {vcpu} has no bank for it"),
        }
    }
}

/// Why an error cannot be told at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case", tag = "reason"))]
pub enum Cannot {
    /// The guest was shown no form of it that it survives (no SER_P, or no SUCCOR).
    NoForm,
    /// An action-required error cannot wait for this.
    Blocked {
        /// What it would have to wait for.
        by: Wait,
    },
    /// The hypervisor refused the record, or took it and did not act on it.
    Refused,
}

impl fmt::Display for Cannot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoForm => f.write_str(
                "the guest's machine-check architecture has no form of it that the guest survives",
            ),
            Self::Blocked { by } => write!(f, "an AR cannot wait, and {by}"),
            Self::Refused => f.write_str("the hypervisor did not put the record into the bank"),
        }
    }
}

/// One error that a guest is to be told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pending {
    /// Guest-physical address of the 4 KiB page.
    pub gpa: u64,
    /// AO or AR.
    pub kind: Kind,
}

/// A record together with what it tells of; `error` is `None` for a bystander's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Told {
    /// The vCPU that is to be given the record.
    pub vcpu: usize,
    /// The page, its kind and the form chosen.
    pub error: Option<(Pending, Form)>,
    /// The record itself.
    pub record: Record,
}

/// The next step for one vCPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Nothing to do on this vCPU: let it run.
    Idle,
    /// Inject this on the vCPU that asked, now.
    Inject(Told),
    /// The machine check has to reach every online vCPU: stop them all, then ask
    /// [`Delivery::rendezvous`].
    Rendezvous(Pending),
    /// Nothing can be told now; ask again later.
    Wait(Pending, Wait),
    /// This error can never be told.
    Cannot(Pending, Cannot),
}

/// A record in a bank that the guest has not cleared yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Unacknowledged {
    vcpu: usize,
    bank: u8,
    gpa: u64,
}

/// The errors of one virtual machine that wait to be told or to be acknowledged.
#[derive(Debug)]
pub struct Delivery {
    caps: Caps,
    ao: VecDeque<u64>,
    ar: Vec<VecDeque<u64>>,
    unacknowledged: Vec<Unacknowledged>,
}

impl Delivery {
    /// For a guest with `vcpus` processors that was shown `caps`.
    pub fn new(caps: Caps, vcpus: usize) -> Self {
        Self {
            caps,
            ao: VecDeque::new(),
            ar: vec![VecDeque::new(); vcpus],
            unacknowledged: Vec::new(),
        }
    }

    /// A page that nobody has touched. Call once per page: the ledger knows which are new.
    pub fn push_ao(&mut self, gpa: u64) {
        self.ao.push_back(gpa);
    }

    /// A page that `vcpu` touched. It takes the place of an AO that waits for the same page: the
    /// guest learns of it by the AR.
    pub fn push_ar(&mut self, vcpu: usize, gpa: u64) {
        self.ao.retain(|waiting| *waiting != gpa);
        if let Some(queue) = self.ar.get_mut(vcpu)
            // The same touch may raise its signal more than once before it is told.
            && !queue.contains(&gpa)
        {
            queue.push_back(gpa);
        }
    }

    /// Whether nothing waits, neither to be told nor to be acknowledged.
    pub fn is_idle(&self) -> bool {
        self.ao.is_empty()
            && self.unacknowledged.is_empty()
            && self.ar.iter().all(VecDeque::is_empty)
    }

    /// The vCPUs that have to look at their state for something to go on, without duplicates.
    pub fn waiting_vcpus(&self) -> Vec<usize> {
        let ao = (!self.ao.is_empty()).then_some(AO_VCPU);
        let ar = self.ar.iter().enumerate().filter(|(_, queue)| !queue.is_empty());
        let mut all: Vec<usize> = ao
            .into_iter()
            .chain(ar.map(|(vcpu, _)| vcpu))
            .chain(self.unacknowledged.iter().map(|u| u.vcpu))
            .collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// The next step for `vcpu`, whose state is `state`.
    pub fn next(&self, vcpu: usize, state: &McaState) -> Step {
        let Some(error) = self.first(vcpu) else {
            return Step::Idle;
        };
        let Some(form) = mca::form(error.kind, &self.caps) else {
            return Step::Cannot(error, Cannot::NoForm);
        };
        let lmce = state.lmce && self.caps.has(mca::cap::LMCE_P);
        match self.place(vcpu, state, form) {
            Err(wait) => self.blocked(error, wait),
            Ok(_) if self.caps.vendor == Vendor::Intel && !lmce => Step::Rendezvous(error),
            Ok(bank) => Step::Inject(Told {
                vcpu,
                error: Some((error, form)),
                record: mca::record(form, error.gpa, bank, lmce),
            }),
        }
    }

    /// With every vCPU stopped: the records of one rendezvous that `leader` asked for, or why it
    /// has to wait. `states[vcpu]` is `None` for a vCPU that no longer exists.
    ///
    /// vCPUs that could not take a machine check (not started, CR4.MCE clear, MCG_CTL off) are left out: Linux
    /// opens its handler before it counts a processor as online, so it does not wait for them. A
    /// vCPU with an AR of its own takes part with that.
    ///
    /// # Errors
    /// A vCPU is still in its handler, or a bank has not been cleared.
    pub fn rendezvous(
        &self,
        leader: usize,
        states: &[Option<McaState>],
    ) -> Result<Vec<Told>, Wait> {
        let mut all = Vec::new();
        for (vcpu, state) in states.iter().enumerate() {
            let Some(state) = state else { continue };
            let closed = state.waits_for_sipi || !state.cr4_mce || state.mcg_ctl != u64::MAX;
            if closed && vcpu != leader {
                continue;
            }
            let own = self
                .first(vcpu)
                .filter(|error| vcpu == leader || error.kind == Kind::ActionRequired)
                .and_then(|error| Some((error, mca::form(error.kind, &self.caps)?)));
            all.push(match own {
                Some((error, form)) => Told {
                    vcpu,
                    error: Some((error, form)),
                    record: mca::record(form, error.gpa, self.place(vcpu, state, form)?, false),
                },
                None => Told {
                    vcpu,
                    error: None,
                    record: mca::bystander(Self::free_bank(vcpu, state, &BYSTANDER_BANKS)?),
                },
            });
        }
        Ok(all)
    }

    /// The record was put into the bank: the error no longer waits to be told.
    pub fn told(&mut self, told: &Told) {
        let Some((error, _)) = told.error else { return };
        self.forget(told.vcpu, &error);
        self.unacknowledged.push(Unacknowledged {
            vcpu: told.vcpu,
            bank: told.record.bank,
            gpa: error.gpa,
        });
    }

    /// The error will not be told: drop it from the queue it waits in.
    pub fn forget(&mut self, vcpu: usize, error: &Pending) {
        match error.kind {
            Kind::ActionOptional => self.ao.retain(|gpa| *gpa != error.gpa),
            Kind::ActionRequired => {
                if let Some(queue) = self.ar.get_mut(vcpu) {
                    queue.retain(|gpa| *gpa != error.gpa);
                }
            }
        }
    }

    /// The pages (guest-physical address and bank) that `state` shows to be acknowledged: the guest
    /// has cleared the bank, and MCG_STATUS.MCIP, which Linux clears last. Each is returned once.
    pub fn acknowledged(&mut self, vcpu: usize, state: &McaState) -> Vec<(u64, u8)> {
        let mut done = Vec::new();
        self.unacknowledged.retain(|u| {
            let taken =
                u.vcpu == vcpu && !state.mcip() && !state.banks[usize::from(u.bank)].valid();
            if taken {
                done.push((u.gpa, u.bank));
            }
            !taken
        });
        done
    }

    /// The error `vcpu` is to be told of next.
    fn first(&self, vcpu: usize) -> Option<Pending> {
        let ar = self.ar.get(vcpu).and_then(VecDeque::front);
        match ar {
            Some(gpa) => Some(Pending { gpa: *gpa, kind: Kind::ActionRequired }),
            None if vcpu == AO_VCPU => {
                self.ao.front().map(|gpa| Pending { gpa: *gpa, kind: Kind::ActionOptional })
            }
            None => None,
        }
    }

    /// The bank of `vcpu` that can take a record of `form` now.
    fn place(&self, vcpu: usize, state: &McaState, form: Form) -> Result<u8, Wait> {
        if state.waits_for_sipi {
            return Err(Wait::NotStarted { vcpu });
        }
        // A deferred record only lies in its bank, so KVM would take it even from a guest that has
        // not set up its machine checks; but such a guest clears the banks unread when it does.
        if !state.cr4_mce {
            return Err(Wait::Cr4MceClear { vcpu });
        }
        if state.mcip() {
            return Err(Wait::Mcip { vcpu });
        }
        if state.mcg_ctl != u64::MAX {
            return Err(Wait::McgCtlOff { vcpu });
        }
        let banks: &[u8] = match form {
            Form::Srao | Form::Deferred => &[AO_BANK],
            Form::Srar | Form::AmdAr => &AR_BANKS,
        };
        let have = self.caps.banks();
        let shown: Vec<u8> = banks.iter().copied().filter(|bank| *bank < have).collect();
        Self::free_bank(vcpu, state, &shown)
    }

    /// The first of `banks` that is enabled and empty, or why the last one is not.
    fn free_bank(vcpu: usize, state: &McaState, banks: &[u8]) -> Result<u8, Wait> {
        if state.mcip() {
            return Err(Wait::Mcip { vcpu });
        }
        let mut why = Wait::NoBank { vcpu };
        for &bank in banks {
            let now = state.banks[usize::from(bank)];
            if now.ctl != u64::MAX {
                why = Wait::BankCtlOff { vcpu, bank };
            } else if now.valid() {
                why = Wait::BankValid { vcpu, bank };
            } else {
                return Ok(bank);
            }
        }
        Err(why)
    }

    fn blocked(&self, error: Pending, wait: Wait) -> Step {
        match error.kind {
            Kind::ActionOptional => Step::Wait(error, wait),
            Kind::ActionRequired => Step::Cannot(error, Cannot::Blocked { by: wait }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mca::{BANKS, Bank, MAX_BANKS, cap, mcg, status};

    const PAGE: u64 = 0x1234_5000;

    fn intel(extra: u64) -> Caps {
        let mcg_cap = u64::from(BANKS) | cap::CTL_P | cap::SER_P | extra;
        Caps { vendor: Vendor::Intel, mcg_cap, succor: false }
    }

    fn amd() -> Caps {
        Caps { vendor: Vendor::Amd, mcg_cap: u64::from(BANKS) | cap::CTL_P, succor: true }
    }

    /// A vCPU of a guest that has set up its machine checks and has nothing in its banks.
    fn ready() -> McaState {
        McaState {
            waits_for_sipi: false,
            cr4_mce: true,
            mcg_status: 0,
            mcg_ctl: u64::MAX,
            lmce: false,
            banks: [Bank { ctl: u64::MAX, status: 0 }; MAX_BANKS],
        }
    }

    fn with(change: impl FnOnce(&mut McaState)) -> McaState {
        let mut state = ready();
        change(&mut state);
        state
    }

    #[test]
    fn nothing_pending_is_idle() {
        let delivery = Delivery::new(amd(), 2);
        assert_eq!(delivery.next(0, &ready()), Step::Idle);
        assert!(delivery.is_idle());
    }

    #[test]
    fn an_ao_waits_for_everything_that_would_harm_the_guest() {
        for (caps, name) in [(amd(), "AMD"), (intel(0), "Intel")] {
            let mut delivery = Delivery::new(caps, 1);
            delivery.push_ao(PAGE);
            let cases = [
                (with(|s| s.waits_for_sipi = true), Wait::NotStarted { vcpu: 0 }),
                (with(|s| s.cr4_mce = false), Wait::Cr4MceClear { vcpu: 0 }),
                (with(|s| s.mcg_status = mcg::MCIP), Wait::Mcip { vcpu: 0 }),
                (with(|s| s.mcg_ctl = 0), Wait::McgCtlOff { vcpu: 0 }),
                (with(|s| s.banks[9].ctl = 0), Wait::BankCtlOff { vcpu: 0, bank: 9 }),
                (with(|s| s.banks[9].status = status::VAL), Wait::BankValid { vcpu: 0, bank: 9 }),
            ];
            for (state, why) in cases {
                let error = Pending { gpa: PAGE, kind: Kind::ActionOptional };
                assert_eq!(delivery.next(0, &state), Step::Wait(error, why), "{name}");
            }
        }
    }

    #[test]
    fn an_ar_that_would_harm_the_guest_cannot_be_told() {
        let mut delivery = Delivery::new(amd(), 2);
        delivery.push_ar(1, PAGE);
        let state = with(|s| s.mcg_status = mcg::MCIP);
        let error = Pending { gpa: PAGE, kind: Kind::ActionRequired };
        let by = Wait::Mcip { vcpu: 1 };
        assert_eq!(delivery.next(1, &state), Step::Cannot(error, Cannot::Blocked { by }));
    }

    #[test]
    fn an_ar_goes_to_its_vcpu_and_before_an_ao() {
        let mut delivery = Delivery::new(amd(), 2);
        delivery.push_ao(0x1000);
        delivery.push_ar(0, 0x2000);
        let Step::Inject(told) = delivery.next(0, &ready()) else { panic!("AR first") };
        assert_eq!((told.record.addr, told.record.bank), (0x2000, AR_BANKS[0]));
        assert_eq!(delivery.next(1, &ready()), Step::Idle);
        delivery.told(&told);
        let Step::Inject(told) = delivery.next(0, &ready()) else { panic!("then the AO") };
        assert_eq!((told.record.addr, told.record.bank), (0x1000, AO_BANK));
    }

    #[test]
    fn an_ar_takes_the_place_of_its_pages_ao() {
        let mut delivery = Delivery::new(amd(), 1);
        delivery.push_ao(PAGE);
        delivery.push_ar(0, PAGE);
        delivery.push_ar(0, PAGE);
        let Step::Inject(told) = delivery.next(0, &ready()) else { panic!() };
        delivery.told(&told);
        assert_eq!(delivery.next(0, &ready()), Step::Idle, "told once");
    }

    #[test]
    fn a_deferred_record_in_its_bank_does_not_hold_up_an_ar() {
        let mut delivery = Delivery::new(amd(), 1);
        delivery.push_ar(0, PAGE);
        let state = with(|s| s.banks[9].status = status::VAL);
        assert!(matches!(delivery.next(0, &state), Step::Inject(_)));
    }

    #[test]
    fn intel_gathers_unless_the_guest_has_lmce() {
        let mut delivery = Delivery::new(intel(cap::LMCE_P), 2);
        delivery.push_ao(PAGE);
        assert!(matches!(delivery.next(0, &ready()), Step::Rendezvous(_)));
        let Step::Inject(told) = delivery.next(0, &with(|s| s.lmce = true)) else { panic!() };
        assert_ne!(told.record.mcg_status & mcg::LMCES, 0);
    }

    #[test]
    fn a_rendezvous_reaches_every_open_vcpu_and_no_other() {
        let mut delivery = Delivery::new(intel(0), 4);
        delivery.push_ao(PAGE);
        let states = [
            Some(ready()),
            Some(ready()),
            Some(with(|s| s.waits_for_sipi = true)),
            Some(with(|s| s.cr4_mce = false)),
        ];
        let told = delivery.rendezvous(0, &states).unwrap();
        assert_eq!(told.iter().map(|t| t.vcpu).collect::<Vec<_>>(), [0, 1]);
        assert!(told[0].error.is_some() && told[1].error.is_none());
        assert_eq!(told[1].record.bank, BYSTANDER_BANKS[0]);
    }

    #[test]
    fn a_rendezvous_waits_for_a_vcpu_in_its_handler() {
        let mut delivery = Delivery::new(intel(0), 2);
        delivery.push_ao(PAGE);
        let states = [Some(ready()), Some(with(|s| s.mcg_status = mcg::MCIP))];
        assert_eq!(delivery.rendezvous(0, &states), Err(Wait::Mcip { vcpu: 1 }));
        assert!(matches!(delivery.next(0, &ready()), Step::Rendezvous(_)), "nothing is lost");
    }

    #[test]
    fn two_ars_share_one_rendezvous() {
        let mut delivery = Delivery::new(intel(0), 2);
        delivery.push_ar(0, 0x1000);
        delivery.push_ar(1, 0x2000);
        let told = delivery.rendezvous(0, &[Some(ready()), Some(ready())]).unwrap();
        assert_eq!(told.iter().map(|t| t.record.addr).collect::<Vec<_>>(), [0x1000, 0x2000]);
    }

    #[test]
    fn acknowledged_means_bank_and_mcip_clear() {
        let mut delivery = Delivery::new(amd(), 1);
        delivery.push_ar(0, PAGE);
        let Step::Inject(told) = delivery.next(0, &ready()) else { panic!() };
        delivery.told(&told);
        let bank = usize::from(told.record.bank);
        assert!(delivery.acknowledged(0, &with(|s| s.mcg_status = mcg::MCIP)).is_empty());
        assert!(delivery.acknowledged(0, &with(|s| s.banks[bank].status = status::VAL)).is_empty());
        assert_eq!(delivery.waiting_vcpus(), [0]);
        assert_eq!(delivery.acknowledged(0, &ready()), [(PAGE, told.record.bank)]);
        assert!(delivery.acknowledged(0, &ready()).is_empty(), "once");
        assert!(delivery.is_idle());
    }

    #[test]
    fn a_guest_with_too_few_banks_is_not_written_beyond_them() {
        let caps = Caps { vendor: Vendor::Amd, mcg_cap: 4 | cap::CTL_P, succor: true };
        let mut delivery = Delivery::new(caps, 1);
        delivery.push_ao(PAGE);
        let error = Pending { gpa: PAGE, kind: Kind::ActionOptional };
        assert_eq!(delivery.next(0, &ready()), Step::Wait(error, Wait::NoBank { vcpu: 0 }));
    }
}
