//! The records that lie in the guest's banks, and what its vCPUs' states show to have become of them.

use super::step::{Pending, Taken, index};
use crate::types::WaitReason;
use crate::x86::mca::{self, BYSTANDER_BANKS, Bank, FailureKind, Form, McaState};

/// A record in a bank that the guest has not cleared yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct InBank {
    vcpu: usize,
    bank: u8,
    error: Pending,
    form: Form,
    /// The vCPU was seen with its handler closed since.
    restarted: bool,
    /// The page is not the guest's any more, so it is not told again.
    gone: bool,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Banks {
    records: Vec<InBank>,
    /// Banks that hold a bystander's record, with their vCPUs, as far as has been seen.
    bystanders: Vec<(usize, u8)>,
}

/// What has become of records.
#[derive(Debug, Default)]
pub(crate) struct Emptied {
    /// Of each page once.
    pub(crate) taken: Vec<Taken>,
    /// The pages that have to be told again.
    pub(crate) again: Vec<u64>,
    /// The pages of the records that do not lie in a bank any more, each record's.
    pub(crate) left: Vec<u64>,
}

impl Banks {
    /// The record of `error` lies in `bank` of `vcpu`.
    pub(crate) fn put(&mut self, vcpu: usize, bank: u8, error: Pending, form: Form) {
        self.records.push(InBank { vcpu, bank, error, form, restarted: false, gone: false });
    }

    /// A bystander's record lies there.
    pub(crate) fn put_bystander(&mut self, vcpu: usize, bank: u8) {
        if !self.is_bystanders(vcpu, bank) {
            self.bystanders.push((vcpu, bank));
        }
    }

    /// Whether a bystander's record lies there.
    pub(crate) fn is_bystanders(&self, vcpu: usize, bank: u8) -> bool {
        self.bystanders.contains(&(vcpu, bank))
    }

    /// No record lies there after all.
    pub(crate) fn refused(&mut self, vcpu: usize, bank: u8) {
        self.records.retain(|one| (one.vcpu, one.bank) != (vcpu, bank));
        self.bystanders.retain(|one| *one != (vcpu, bank));
    }

    /// Whether the guest has taken all records of errors.
    pub(crate) fn are_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Whether `vcpu` has such a record.
    pub(crate) fn hold_any_of(&self, vcpu: usize) -> bool {
        self.records.iter().any(|record| record.vcpu == vcpu)
    }

    /// How many records are of AOs.
    pub(crate) fn aos(&self) -> usize {
        let is_ao = |record: &&InBank| record.error.kind == FailureKind::ActionOptional;
        self.records.iter().filter(is_ao).count()
    }

    /// The pages that `is_gone` accepts are not the guest's any more.
    pub(crate) fn gone(&mut self, is_gone: &dyn Fn(u64) -> bool) {
        self.records.iter_mut().for_each(|record| record.gone |= is_gone(record.error.gpa));
    }

    /// `vcpu` has no thread any more: the pages of the records that lay in its banks, and those among them that are the
    /// guest's.
    pub(crate) fn leave(&mut self, vcpu: usize) -> (Vec<u64>, Vec<u64>) {
        let (mut left, mut again) = (Vec::new(), Vec::new());
        self.records.retain(|record| {
            let stays = record.vcpu != vcpu;
            if !stays {
                left.push(record.error.gpa);
            }
            if !stays && !record.gone {
                again.push(record.error.gpa);
            }
            stays
        });
        self.bystanders.retain(|(of, _)| *of != vcpu);
        (left, again)
    }

    /// What `state` shows to have become of the records in `vcpu`'s banks.
    pub(crate) fn taken(&mut self, vcpu: usize, state: &McaState) -> Emptied {
        let closed = state.is_closed();
        let mut emptied = Emptied::default();
        self.records.retain_mut(|record| {
            if record.vcpu != vcpu {
                return true;
            }
            record.restarted |= closed;
            if closed || state.mcip() || state.banks[usize::from(record.bank)].valid() {
                return true;
            }
            let InBank { bank, form, error: Pending { gpa, .. }, .. } = *record;
            emptied.left.push(gpa);
            match (record.gone, record.restarted) {
                (true, _) => {}
                (false, true) => {
                    emptied.again.push(gpa);
                    emptied.taken.push(Taken::Lost { gpa });
                }
                (false, false) => emptied.taken.push(Taken::Acknowledged { gpa, bank, form }),
            }
            false
        });
        self.bystanders.retain(|(of, bank)| {
            *of != vcpu || state.mcip() || state.banks[usize::from(*bank)].valid()
        });
        emptied
    }

    /// The banks of `vcpu`, which is in `state`, that hold a bystander's record.
    pub(crate) fn bystanders_of(&self, vcpu: usize, state: &McaState) -> Vec<u8> {
        let own = self.bystanders.iter().filter(|(of, _)| *of == vcpu).map(|(_, bank)| *bank);
        own.filter(|bank| state.banks[usize::from(*bank)].valid()).collect()
    }

    /// The banks of `vcpu` with records that it will not take: those of a machine check, unless it has `interrupts_on`;
    /// deferred ones, unless it `polls`.
    pub(crate) fn untaken(&self, vcpu: usize, interrupts_on: bool, polls: bool) -> Vec<u8> {
        let will_take = |form: Form| if form.raises_mc() { interrupts_on } else { polls };
        let own = self.records.iter().filter(|record| record.vcpu == vcpu);
        own.filter(|record| !will_take(record.form)).map(|record| record.bank).collect()
    }

    /// Whether a record of the page at `gpa` lies in a bank.
    pub(crate) fn hold_page(&self, gpa: u64) -> bool {
        self.records.iter().any(|record| record.error.gpa == gpa)
    }

    /// The page of the record that lies in `bank` of `vcpu`.
    pub(crate) fn page(&self, vcpu: usize, bank: u8) -> Option<u64> {
        let record = self.records.iter().find(|one| (one.vcpu, one.bank) == (vcpu, bank));
        record.map(|record| record.error.gpa)
    }

    /// `bank` of `vcpu` is empty: the page of the record that lay there, if it is the guest's.
    pub(crate) fn empty(&mut self, vcpu: usize, bank: u8) -> Option<u64> {
        self.bystanders.retain(|one| *one != (vcpu, bank));
        let at = self.records.iter().position(|one| (one.vcpu, one.bank) == (vcpu, bank))?;
        let InBank { error, gone, .. } = self.records.swap_remove(at);
        (!gone).then_some(error.gpa)
    }

    /// The bank in which `vcpu`, which did nothing, can take part in a rendezvous now.
    pub(crate) fn of_bystander(&self, vcpu: usize, state: &McaState) -> Result<u8, WaitReason> {
        free_bank(index(vcpu), state, &BYSTANDER_BANKS).or_else(|why| {
            // A record of ours that an offline processor left there, and that the hypervisor does not take back.
            // Writing over it adds OVER, and Linux looks at nothing in a record without EN ("Not enabled",
            // the second rule in `severities`, arch/x86/kernel/cpu/mce/severity.c).
            let old = self.bystanders.iter().find(|(of, bank)| {
                let Bank { ctl, status } = state.banks[usize::from(*bank)];
                let ours = status & !mca::status::OVER == mca::bystander(*bank).status;
                *of == vcpu && !state.mcip() && ctl == u64::MAX && ours
            });
            old.map(|(_, bank)| *bank).ok_or(why)
        })
    }
}

/// The first of `banks` that is enabled and empty, or why the first one is not.
pub(crate) fn free_bank(vcpu: u32, state: &McaState, banks: &[u8]) -> Result<u8, WaitReason> {
    if state.mcip() {
        return Err(WaitReason::Mcip { vcpu });
    }
    let why_not = |bank: u8| {
        let now = state.banks[usize::from(bank)];
        if now.ctl != u64::MAX {
            Some(WaitReason::BankCtlOff { vcpu, bank })
        } else if now.valid() {
            Some(WaitReason::BankValid { vcpu, bank })
        } else {
            None
        }
    };
    match banks.iter().copied().find(|bank| why_not(*bank).is_none()) {
        Some(bank) => Ok(bank),
        None => Err(banks
            .first()
            .and_then(|bank| why_not(*bank))
            .unwrap_or(WaitReason::NoBank { vcpu })),
    }
}
