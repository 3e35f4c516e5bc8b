//! What is to be done next about an error, and what became of its record: data.

use crate::types::{UndeliverableReason, WaitReason};
use crate::x86::mca::{FailureKind, Form, Record};

/// One error that a guest is to be told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pending {
    /// Guest-physical address of the 4 KiB page.
    pub gpa: u64,
    /// AO or AR.
    pub kind: FailureKind,
}

/// A record together with what it tells of; `error` is `None` for a bystander's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Assignment {
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
    Inject(Assignment),
    /// The machine check has to reach every online vCPU: stop them all, then ask
    /// [`Delivery::rendezvous`](super::machine_check::Delivery::rendezvous).
    Rendezvous(Pending),
    /// Nothing can be told now; ask again later.
    Wait(Pending, WaitReason),
    /// This error can never be told.
    Cannot(Pending, UndeliverableReason),
}

/// What became of a record that lay in a bank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// The guest has cleared the bank, and MCG_STATUS.MCIP, which Linux clears last.
    Acknowledged {
        /// Guest-physical address of the page.
        gpa: u64,
        /// The bank it lay in.
        bank: u8,
        /// The form it was told in.
        form: Form,
    },
    /// The guest started over in between, so it is not known whether it read the bank before it was wiped. The page
    /// waits to be told again.
    Lost {
        /// Guest-physical address of the page.
        gpa: u64,
    },
}

/// A vCPU's index as the ledger keeps it, in half the memory. There are no vCPUs beyond.
pub(crate) fn index(vcpu: usize) -> u32 {
    u32::try_from(vcpu).unwrap_or(u32::MAX)
}
