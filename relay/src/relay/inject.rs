//! One record goes into one vCPU; the first of its form is read back.

use log::warn;

use crate::core::host::{BACK_END, ask_host};
use crate::core::inner::Inner;
use crate::core::locked::Locked;
use crate::core::shared::Shared;
use crate::core::transition::Change;
use crate::decide::machine_check::{Assignment, index};
use crate::event::{Event, Injection, Reach};
use crate::types::{FailureKind, Form, Place, State, UndeliverableReason};
use crate::x86::back_end::Mca;
use crate::x86::mca::{mcg, status};

/// What the vCPU thread has to do after [`VcpuPort::before_run`](crate::VcpuPort::before_run).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Enter the guest.
    Run,
    /// Do not enter the guest: it would touch a bad page that it cannot be told of. What to do instead (reset, pause,
    /// stop) is the VMM's policy.
    Undeliverable {
        /// Guest-physical address of the page.
        gpa: u64,
        /// Why the guest cannot be told.
        why: UndeliverableReason,
        /// Where the vCPU was: its RIP, if the hypervisor said it.
        rip: Option<u64>,
    },
}

impl Shared {
    /// Injects one record on the calling vCPU's thread, without the lock, and reads back what became of the first of its
    /// form there.
    pub(crate) fn inject<'a>(
        &'a self,
        mut inner: Locked<'a, Inner>,
        mca: &mut dyn Mca,
        told: &Assignment,
        reach: Reach,
        rip: u64,
    ) -> (Locked<'a, Inner>, Result<(), Verdict>) {
        let Assignment { vcpu, error, record } = *told;
        // First, so that no other thread tells the same error meanwhile.
        if inner.delivery.told(told) {
            inner.aos_wait();
        }
        // Without delivering events: other vCPUs may be in their handlers already, and wait for this one for a short
        // time only.
        let proof = (vcpu, record.bank, error.map(|(_, form)| form));
        let is_proven = inner.proven.contains(&proof);
        inner.give_back_quietly();
        let done = ask_host(BACK_END, || {
            mca.inject(&record)?;
            match is_proven {
                // What it depends on was read a moment ago, on this thread, and the hypervisor has kept its word before.
                true => Ok((record.status, record.mcg_status)),
                false => mca.read_back(record.bank),
            }
        });
        let bank = match done {
            Ok((held, mcg_status)) => {
                // That KVM returns 0 does not mean that the guest was told; the bank's contents show it.
                let raised = record.mcg_status == 0 || mcg_status == record.mcg_status;
                // A bystander's record may have overwritten an earlier bystander's (OVER).
                let held_so = if error.is_none() { held & !status::OVER } else { held };
                (held_so == record.status && raised).then_some((held, mcg_status))
            }
            Err(error) => {
                warn!("vCPU {vcpu}: cannot inject into bank {}: {error}", record.bank);
                None
            }
        };
        if bank.is_none() && error.is_none() {
            warn!("vCPU {vcpu}: was not given its part of a rendezvous");
        }
        let mut inner = self.lock_again();
        match bank {
            Some(_) => inner.proven.insert(proof),
            None => {
                inner.delivery.refused(told);
                inner.proven.remove(&proof)
            }
        };
        let Some((pending, form)) = error else { return (inner, Ok(())) };
        let Some((status, mcg_status)) = bank else {
            let (why, rip) = (UndeliverableReason::Refused, Some(rip));
            self.undeliverable(&mut inner, vcpu, pending, why, rip);
            let verdict = match pending.kind {
                FailureKind::ActionOptional => Ok(()),
                FailureKind::ActionRequired => {
                    Err(Verdict::Undeliverable { gpa: pending.gpa, why, rip })
                }
            };
            return (inner, verdict);
        };
        inner.wake_relay_soon();
        let place = Place::Mce { vcpu: index(vcpu), bank: record.bank, form };
        let Change { after_micros, forged, .. } =
            self.set(&mut inner, pending.gpa, State::Injected { place });
        let by = Injection::Mce {
            vcpu,
            bank: record.bank,
            form,
            reach: match form {
                Form::Deferred => Reach::Logged,
                _ if record.mcg_status & mcg::LMCES != 0 => Reach::Lmce,
                _ => reach,
            },
            status,
            mcg_status,
        };
        inner.emit(Event::Injected { gpa: pending.gpa, by, after_micros, forged });
        (inner, Ok(()))
    }
}
