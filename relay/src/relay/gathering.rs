//! The gathering of all vCPUs for one machine check.
//!
//! Some machine checks have to reach every processor at once. For these the vCPU threads gather in a [`Gathering`]: all
//! stop, all show their state, and then either all inject or none does, so that no guest waits in its handler for a
//! processor that was never given the machine check.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::inject::Verdict;
use crate::core::gathering::Gathering;
use crate::core::inner::{Attached, Inner};
use crate::core::locked::Locked;
use crate::core::shared::Shared;
use crate::decide::machine_check::{Pending, index};
use crate::event::Reach;
use crate::types::WaitReason;
use crate::x86::back_end::Mca;
use crate::x86::mca::McaState;

/// How long the vCPUs that have stopped for a machine check wait for the others. A thread that takes longer is held up
/// by something else.
const GATHERING: Duration = Duration::from_secs(1);
/// How often a late vCPU is called again while another one holds an AR back for it.
const CALL_AGAIN: Duration = Duration::from_millis(100);

/// How a gathering ended for one vCPU.
pub(crate) enum Part {
    /// Every vCPU that takes part was given its record.
    Assignment,
    /// No vCPU was given a record.
    Postponed(WaitReason),
    /// This vCPU's own record was refused.
    Refused(Verdict),
}

impl Shared {
    /// Lets go of the lock for `time` at most, or until a gathering takes a step.
    pub(crate) fn pause<'a>(&self, inner: Locked<'a, Inner>, time: Duration) -> Locked<'a, Inner> {
        inner.wait(&self.gathered, time)
    }

    /// `vcpu` has called `before_run` again; the next gathering may wait for it.
    pub(crate) fn mark_present(&self, inner: &mut Inner, vcpu: usize) {
        if let Some(attached) = inner.vcpus[vcpu].as_mut().filter(|attached| attached.late) {
            attached.late = false;
            inner.news = true;
            inner.wake_relay();
        }
    }

    /// `vcpu` does not take the records in `banks`, which were `emptied` or could not be: their pages are told of
    /// elsewhere.
    pub(crate) fn tell_elsewhere(
        &self,
        inner: &mut Inner,
        vcpu: usize,
        banks: &[u8],
        emptied: bool,
    ) {
        for &bank in banks {
            let gpa = match emptied {
                true => inner.delivery.taken_back(vcpu, bank),
                false => inner.delivery.stays(vcpu, bank),
            };
            if let Some(gpa) = gpa {
                self.told_elsewhere(inner, &[gpa], WaitReason::Offline { vcpu: index(vcpu) });
            }
        }
    }

    /// Says whether `vcpu` is held by a pause. A gathering that waits for it is put off.
    pub(crate) fn set_parked(&self, vcpu: usize, parked: bool) {
        let mut inner = self.lock();
        let was_paused = inner.is_paused();
        if let Some(attached) = inner.vcpus[vcpu].as_mut() {
            attached.parked = parked;
        }
        let is_paused = inner.is_paused();
        if is_paused != was_paused {
            inner.delivery.set_paused(is_paused, self.now());
        }
        // A vCPU that has shown its state waits in the gathering, so it cannot come here.
        if parked
            && let Some(gathering) = inner.gathering.as_mut().filter(|r| r.asked.contains(&vcpu))
        {
            if gathering.outcome.is_none() {
                gathering.settle(Err(WaitReason::Paused { vcpu: index(vcpu) }));
            }
            self.leave(&mut inner, vcpu);
            self.gathered.notify();
        }
    }

    /// Begins a gathering for `error`, which `leader` is to be told of.
    pub(crate) fn call_gathering(&self, inner: &mut Inner, leader: usize, error: Pending) {
        let count = inner.vcpus.len();
        let asked: Vec<usize> = (0..count).filter(|vcpu| inner.vcpus[*vcpu].is_some()).collect();
        inner.gatherings += 1;
        let number = inner.gatherings;
        let since = Instant::now();
        let one = |is: fn(&Attached) -> bool| {
            asked.iter().copied().find(|vcpu| inner.vcpus[*vcpu].as_ref().is_some_and(is))
        };
        // A pause first, as it holds the leader, too.
        let paused = one(|vcpu| vcpu.parked).map(|vcpu| WaitReason::Paused { vcpu: index(vcpu) });
        let late = one(|vcpu| vcpu.late).map(|vcpu| WaitReason::NotComing { vcpu: index(vcpu) });
        // The guest may have a processor online whose thread has just ended. It counts as unplugged soon.
        self.unplug_gone_vcpus(inner);
        let leaves =
            inner.gone.first().map(|(vcpu, _)| WaitReason::NotComing { vcpu: index(*vcpu) });
        if let Some(wait) = paused.or(late).or(leaves) {
            // A late vCPU's call may have been lost, so it is called again; not too often, as it could do nothing but
            // answer calls.
            let again = |attached: &mut Attached| {
                let due = attached.late && since.duration_since(attached.called) >= CALL_AGAIN;
                if due {
                    attached.called = since;
                }
                due
            };
            for vcpu in asked {
                if inner.vcpus[vcpu].as_mut().is_some_and(again) {
                    inner.call(vcpu);
                }
            }
            inner.gathering = Some(Gathering {
                number,
                leader,
                error,
                asked: vec![leader],
                states: vec![None; count],
                outcome: Some(Arc::new(Err(wait))),
                leaving: vec![leader],
                since,
            });
            return;
        }
        for vcpu in asked.iter().filter(|vcpu| **vcpu != leader) {
            inner.call(*vcpu);
        }
        // One that is held for a rescue waits here.
        self.gathered.notify();
        inner.gathering = Some(Gathering {
            number,
            leader,
            error,
            asked,
            states: vec![None; count],
            outcome: None,
            leaving: Vec::new(),
            since,
        });
    }

    /// Puts the gathering off once it has lasted for [`GATHERING`], and returns true. vCPUs that have not stopped are
    /// late: no gathering waits for them until they call `before_run` again.
    fn give_up_waiting(&self, inner: &mut Inner) -> bool {
        let Some(gathering) = inner.gathering.as_mut() else { return false };
        if gathering.outcome.is_some() || gathering.since.elapsed() < GATHERING {
            return false;
        }
        let missing = gathering.missing();
        let Some(first) = missing.first() else { return false };
        gathering.settle(Err(WaitReason::NotComing { vcpu: index(*first) }));
        for vcpu in missing {
            if let Some(attached) = inner.vcpus[vcpu].as_mut() {
                attached.late = true;
            }
        }
        self.gathered.notify();
        true
    }

    /// Shows `state` to the gathering, waits until every vCPU has shown its own, and does this vCPU's part.
    pub(crate) fn take_part<'a>(
        &'a self,
        mut inner: Locked<'a, Inner>,
        me: usize,
        state: McaState,
        mca: &mut dyn Mca,
    ) -> (Locked<'a, Inner>, Part) {
        let mut number = None;
        if let Some(gathering) = inner.gathering.as_mut() {
            number = Some(gathering.number);
            if gathering.outcome.is_none() && gathering.asked.contains(&me) {
                gathering.states[me] = Some(state);
            }
        }
        self.decide(&mut inner);
        loop {
            let outcome = match inner.gathering.as_ref().filter(|r| Some(r.number) == number) {
                // The gathering is over, and this vCPU had no part in it. If a new one has begun, it wants this vCPU's
                // state as it is now.
                None => return (inner, Part::Assignment),
                Some(gathering) if gathering.leaving.contains(&me) => gathering.outcome.clone(),
                Some(_) => None,
            };
            match outcome {
                None if self.give_up_waiting(&mut inner) => {}
                None => inner = self.pause(inner, GATHERING / 4),
                Some(outcome) => {
                    let part = match &*outcome {
                        Err(wait) => Part::Postponed(*wait),
                        Ok(records) => match records.iter().find(|told| told.vcpu == me) {
                            None => Part::Assignment,
                            Some(told) => {
                                let reach = Reach::Rendezvous;
                                let (guard, done) = self.inject(inner, mca, told, reach, state.rip);
                                inner = guard;
                                match done {
                                    Ok(()) => Part::Assignment,
                                    Err(verdict) => Part::Refused(verdict),
                                }
                            }
                        },
                    };
                    self.leave(&mut inner, me);
                    return (inner, part);
                }
            }
        }
    }

    /// Settles the gathering once every vCPU that was asked has shown its state.
    fn decide(&self, inner: &mut Inner) {
        let Some(gathering) =
            inner.gathering.as_mut().filter(|gathering| gathering.outcome.is_none())
        else {
            return;
        };
        if gathering.asked.iter().all(|vcpu| gathering.states[*vcpu].is_some()) {
            let now = self.now();
            let outcome = inner.delivery.rendezvous(
                gathering.leader,
                gathering.error,
                &gathering.states,
                now,
            );
            // Nothing is to be told here any more; errors that wait for other vCPUs are looked for.
            inner.news |= outcome.as_ref().is_ok_and(Vec::is_empty);
            gathering.settle(outcome);
            self.gathered.notify();
        }
    }

    fn leave(&self, inner: &mut Inner, me: usize) {
        if let Some(gathering) = inner.gathering.as_mut() {
            gathering.leaving.retain(|vcpu| *vcpu != me);
            if gathering.leaving.is_empty() && gathering.outcome.is_some() {
                inner.gathering = None;
                self.gathered.notify();
            }
        }
    }

    /// The thread of `me` ends. The guest may still have that processor online, so a gathering that waits for it is put
    /// off.
    pub(crate) fn leaves_gathering(&self, inner: &mut Inner, me: usize) {
        let waits = |gathering: &&mut Gathering| {
            gathering.outcome.is_none() && gathering.asked.contains(&me)
        };
        if let Some(gathering) =
            inner.gathering.as_mut().filter(waits).filter(|gathering| gathering.leader != me)
        {
            gathering.settle(Err(WaitReason::NotComing { vcpu: index(me) }));
            self.gathered.notify();
        }
        self.absent(inner, me);
    }

    /// `me` takes no part in the gathering: its thread has ended, or its state cannot be read.
    pub(crate) fn absent(&self, inner: &mut Inner, me: usize) {
        let Some(gathering) = inner.gathering.as_mut() else {
            return;
        };
        if gathering.outcome.is_some() {
            self.leave(inner, me);
        } else if gathering.leader == me {
            inner.gathering = None;
            self.gathered.notify();
        } else {
            gathering.asked.retain(|vcpu| *vcpu != me);
            self.decide(inner);
        }
    }
}
