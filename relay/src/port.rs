//! A vCPU thread's door to the relay, and the gathering of all of them for one machine check.
//!
//! Injection happens here, on the vCPU's own thread, between two KVM_RUNs. Where a machine check
//! has to reach every processor at once, the vCPU threads gather in a [`Round`]: all stop, all show
//! their state, and either all inject or none, so no guest waits in its handler for a processor
//! that was never called.

use std::io;
use std::marker::PhantomData;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use log::warn;

use crate::delivery::{Cannot, Step, Told, Wait, index};
use crate::event::{Event, Injection, Reach, Thread};
use crate::failure::{Kind, PAGE_SHIFT};
use crate::ledger::{Place, State};
use crate::mca::{Form, McaState, Record, mcg};
use crate::read::{self, AccessError};
use crate::relay::{Change, IDLE_TICK, Inner, RETRY_FIRST, Shared};
use crate::signal::{self, Caught, ThreadSlot};

/// How long a vCPU that touched a bad page is held back while other processors leave their
/// machine-check handlers. A guest that takes longer has given up on its own one-second limit.
const AR_PATIENCE: Duration = Duration::from_secs(5);
/// How often it looks meanwhile.
const AR_LOOK: Duration = Duration::from_millis(1);

/// What the relay needs of a hypervisor: one vCPU's machine-check state, and a way to set it.
///
/// All calls are made on the thread that runs the vCPU, while it is not running, by
/// [`VcpuPort::before_run`]. They may block briefly (an ioctl), never for another vCPU.
pub trait Mca {
    /// The vCPU's machine-check state now.
    ///
    /// # Errors
    /// The hypervisor does not say. Nothing is told on this vCPU until it does: an AO waits, an AR is
    /// undeliverable.
    fn state(&mut self) -> io::Result<McaState>;

    /// Puts `record` into its bank and raises what it raises. Called only when `state` has just
    /// shown that the guest can take it.
    ///
    /// # Errors
    /// The hypervisor refuses the record.
    fn inject(&mut self, record: &Record) -> io::Result<()>;

    /// MCi_STATUS of `bank`, and MCG_STATUS: what became of a record that was just injected. A back end
    /// that reads these two alone is quicker than this one, which reads all.
    ///
    /// # Errors
    /// The hypervisor does not say; the record then does not count as injected.
    fn read_back(&mut self, bank: u8) -> io::Result<(u64, u64)> {
        let state = self.state()?;
        Ok((state.banks[usize::from(bank)].status, state.mcg_status))
    }
}

/// What a vCPU thread is to do after [`VcpuPort::before_run`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Enter the guest.
    Run,
    /// Do not enter the guest: it would touch a bad page it cannot be told of. What to do instead
    /// (reset, pause, stop) is the user's policy.
    Undeliverable {
        /// Guest-physical address of the page.
        gpa: u64,
        /// Why the guest cannot be told.
        why: Cannot,
        /// Where the vCPU was: its RIP, if the hypervisor said it.
        rip: Option<u64>,
    },
}

/// A gathering of all vCPUs for one machine check.
pub(crate) struct Round {
    /// Tells it from those before and after it.
    number: u64,
    /// The vCPU that asked for it.
    leader: usize,
    /// The vCPUs that have to stop before it is settled.
    asked: Vec<usize>,
    /// The state of each of them that has stopped.
    states: Vec<Option<McaState>>,
    /// Set once everybody has stopped: what each is to inject, or why nobody does.
    outcome: Option<Result<Vec<Told>, Wait>>,
    /// vCPUs that have not acted on the outcome yet.
    leaving: Vec<usize>,
}

impl Round {
    fn settle(&mut self, outcome: Result<Vec<Told>, Wait>) {
        self.outcome = Some(outcome);
        self.leaving = self.asked.clone();
    }
}

/// A vCPU thread's door to the relay. Made on that thread, used there, dropped there.
pub struct VcpuPort {
    pub(crate) vcpu: usize,
    pub(crate) slot: ThreadSlot,
    pub(crate) shared: Arc<Shared>,
    pub(crate) not_send: PhantomData<*const ()>,
}

impl VcpuPort {
    /// Call before every KVM_RUN, after the last exit's I/O has been completed and after
    /// `immediate_exit` has been cleared.
    #[inline]
    pub fn before_run<M: Mca>(&mut self, mca: &mut M) -> Verdict {
        if self.slot.attention() { self.attend(mca) } else { Verdict::Run }
    }

    /// Whether [`Self::before_run`] has something to do. For a VMM that completes the last exit's I/O
    /// only when it has to. One relaxed load.
    #[inline]
    pub fn wants_attention(&self) -> bool {
        self.slot.attention()
    }

    /// An MMIO exit at `gpa`: true when that is guest RAM, which means that KVM emulated an
    /// instruction that met poison. The page is then taken for touched (AR).
    pub fn mmio_hit(&mut self, gpa: u64) -> bool {
        let Some(hva) = self.shared.ram().hva(gpa) else {
            return false;
        };
        let mut inner = self.shared.lock();
        let caught = Caught { kind: Kind::ActionRequired, hva, lsb: PAGE_SHIFT };
        self.shared.enter(&mut inner, caught, Thread::Vcpu(self.vcpu));
        self.slot.shared().ask_attention();
        true
    }

    /// Whether the byte of guest RAM at `gpa` can be read, and if not, why. For exits that may be about
    /// poison and may be about something else.
    ///
    /// # Errors
    /// See [`AccessError`].
    pub fn probe(&self, gpa: u64) -> Result<(), AccessError> {
        read::read_ram(&self.shared.ram(), gpa, &mut [0]).map(drop)
    }

    /// Runs `wait`, which blocks while the virtual machine is paused. Meanwhile nobody waits for this
    /// vCPU: machine checks that have to reach every processor are put off.
    pub fn park(&mut self, wait: impl FnOnce()) {
        self.shared.set_parked(self.vcpu, true);
        wait();
        self.shared.set_parked(self.vcpu, false);
        // What came in the meantime, and whatever was put off.
        self.slot.shared().ask_attention();
        self.shared.wake();
    }

    #[cold]
    fn attend<M: Mca>(&mut self, mca: &mut M) -> Verdict {
        let shared = Arc::clone(&self.shared);
        let me = self.vcpu;
        let mut inner = shared.lock();
        let mut held_since = None;
        loop {
            self.slot.clear_attention();
            for caught in shared.take(&mut inner, &self.slot, Thread::Vcpu(me)) {
                if caught.kind == Kind::ActionRequired {
                    // Not under the lock: whoever was there before us may end the process, and have
                    // something to put in order first.
                    drop(inner);
                    signal::give_up(caught);
                    inner = shared.lock();
                }
            }
            let state = match mca.state() {
                Ok(state) => state,
                Err(error) => {
                    // Nobody may be kept waiting in a round by a vCPU that cannot take part.
                    warn!("vCPU {me}: cannot read its machine-check state: {error}");
                    shared.absent(&mut inner, me);
                    // Back in the guest it would meet its AR again, and again without end.
                    let Some(error) = inner.delivery.first_ar(me) else { return Verdict::Run };
                    let why = Cannot::NoState;
                    shared.undeliverable(&mut inner, me, error, why, None);
                    return Verdict::Undeliverable { gpa: error.gpa, why, rip: None };
                }
            };
            let now = shared.now();
            let taken = inner.delivery.taken(me, &state, now);
            shared.taken(&mut inner, me, &taken);
            let gathering = inner.round.is_some();
            let step = if gathering { None } else { Some(inner.delivery.next(me, &state, now)) };
            match step {
                Some(Step::Idle) => return Verdict::Run,
                Some(Step::Inject(told)) => {
                    let (at, reach) = (state.rip, Reach::Local);
                    if let Err(verdict) = shared.inject(&mut inner, mca, &told, reach, at) {
                        return verdict;
                    }
                    // Reading the state again costs as much as all the rest.
                    if !inner.delivery.has_something_for(me) {
                        return Verdict::Run;
                    }
                }
                Some(Step::Wait(error, wait)) => {
                    shared.waiting(&mut inner, error, wait);
                    return Verdict::Run;
                }
                Some(Step::Cannot(error, why)) => {
                    shared.undeliverable(&mut inner, me, error, why, Some(state.rip));
                    if error.kind == Kind::ActionRequired {
                        let rip = Some(state.rip);
                        return Verdict::Undeliverable { gpa: error.gpa, why, rip };
                    }
                }
                Some(Step::Rendezvous(_)) | None => {
                    if step.is_some() {
                        shared.call_round(&mut inner, me);
                    }
                    let error = step.and_then(|step| match step {
                        Step::Rendezvous(error) => Some(error),
                        _ => None,
                    });
                    let (guard, part) = shared.take_part(inner, me, state, mca);
                    inner = guard;
                    match (part, error) {
                        (Part::Refused(verdict), _) => return verdict,
                        // Ours, and it is done.
                        (Part::Told, Some(_)) if !inner.delivery.has_something_for(me) => {
                            return Verdict::Run;
                        }
                        // Somebody else's round, or there is more.
                        (Part::Told, _) | (Part::Postponed(_), None) => {}
                        (Part::Postponed(wait), Some(error)) => {
                            shared.waiting(&mut inner, error, wait);
                            // A vCPU that is paused will not come, and this one is to pause, too: an
                            // AR is met again after that.
                            let paused = matches!(wait, Wait::Paused { .. });
                            if error.kind == Kind::ActionOptional || paused {
                                return Verdict::Run;
                            }
                            let since: Instant = *held_since.get_or_insert_with(Instant::now);
                            if since.elapsed() > AR_PATIENCE {
                                let (why, rip) = (Cannot::Blocked { by: wait }, Some(state.rip));
                                shared.undeliverable(&mut inner, me, error, why, rip);
                                return Verdict::Undeliverable { gpa: error.gpa, why, rip };
                            }
                            inner = shared.pause(inner, AR_LOOK);
                        }
                    }
                }
            }
        }
    }
}

impl Drop for VcpuPort {
    fn drop(&mut self) {
        let mut inner = self.shared.lock();
        inner.vcpus[self.vcpu] = None;
        self.shared.absent(&mut inner, self.vcpu);
    }
}

/// How a round ended for one vCPU.
enum Part {
    /// Everybody who takes part was given a record.
    Told,
    /// Nobody was.
    Postponed(Wait),
    /// This vCPU's own record was refused.
    Refused(Verdict),
}

/// The gathering of all vCPUs, and the injection itself.
impl Shared {
    /// Lets go of the lock for `time` at most, or until a round takes a step.
    fn pause<'a>(&self, inner: MutexGuard<'a, Inner>, time: Duration) -> MutexGuard<'a, Inner> {
        self.gathered.wait_timeout(inner, time).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Says whether `vcpu` is held by a pause. A round that waits for it is put off.
    fn set_parked(&self, vcpu: usize, parked: bool) {
        let mut inner = self.lock();
        if let Some(attached) = inner.vcpus[vcpu].as_mut() {
            attached.parked = parked;
        }
        // A vCPU that has shown its state is in the round, not here.
        if parked && let Some(round) = inner.round.as_mut().filter(|r| r.asked.contains(&vcpu)) {
            if round.outcome.is_none() {
                round.settle(Err(Wait::Paused { vcpu: index(vcpu) }));
            }
            self.leave(&mut inner, vcpu);
            self.gathered.notify_all();
        }
    }

    /// `leader` wants every vCPU to stop.
    fn call_round(&self, inner: &mut Inner, leader: usize) {
        let count = inner.vcpus.len();
        let asked: Vec<usize> = (0..count).filter(|vcpu| inner.vcpus[*vcpu].is_some()).collect();
        inner.rounds += 1;
        let number = inner.rounds;
        let is_parked = |vcpu: &&usize| inner.vcpus[**vcpu].as_ref().is_some_and(|v| v.parked);
        let parked = asked.iter().find(is_parked).copied();
        if let Some(vcpu) = parked {
            inner.round = Some(Round {
                number,
                leader,
                asked: vec![leader],
                states: vec![None; count],
                outcome: Some(Err(Wait::Paused { vcpu: index(vcpu) })),
                leaving: vec![leader],
            });
            return;
        }
        for vcpu in asked.iter().filter(|vcpu| **vcpu != leader) {
            inner.call(*vcpu);
        }
        inner.round = Some(Round {
            number,
            leader,
            asked,
            states: vec![None; count],
            outcome: None,
            leaving: Vec::new(),
        });
    }

    /// Shows `state` to the round, waits until everybody has, and does this vCPU's part of it.
    fn take_part<'a, M: Mca>(
        &self,
        mut inner: MutexGuard<'a, Inner>,
        me: usize,
        state: McaState,
        mca: &mut M,
    ) -> (MutexGuard<'a, Inner>, Part) {
        let mut number = None;
        if let Some(round) = inner.round.as_mut() {
            number = Some(round.number);
            if round.outcome.is_none() && round.asked.contains(&me) {
                round.states[me] = Some(state);
            }
        }
        self.decide(&mut inner);
        loop {
            let outcome = match inner.round.as_ref().filter(|r| Some(r.number) == number) {
                // The last one out has closed it, and this vCPU had no part in it. If there is a
                // new one, that one wants this vCPU's state as it is now.
                None => return (inner, Part::Told),
                Some(round) if round.leaving.contains(&me) => round.outcome.clone(),
                Some(_) => None,
            };
            match outcome {
                None => inner = self.pause(inner, IDLE_TICK),
                Some(outcome) => {
                    let part = match outcome {
                        Err(wait) => Part::Postponed(wait),
                        Ok(records) => match records.iter().find(|told| told.vcpu == me) {
                            None => Part::Told,
                            Some(told) => {
                                let reach = Reach::Rendezvous;
                                match self.inject(&mut inner, mca, told, reach, state.rip) {
                                    Ok(()) => Part::Told,
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

    /// Settles the round once every vCPU that was asked has shown its state.
    fn decide(&self, inner: &mut Inner) {
        let Some(round) = inner.round.as_mut().filter(|round| round.outcome.is_none()) else {
            return;
        };
        if round.asked.iter().all(|vcpu| round.states[*vcpu].is_some()) {
            let outcome = inner.delivery.rendezvous(round.leader, &round.states);
            round.settle(outcome);
            self.gathered.notify_all();
        }
    }

    fn leave(&self, inner: &mut Inner, me: usize) {
        if let Some(round) = inner.round.as_mut() {
            round.leaving.retain(|vcpu| *vcpu != me);
            if round.leaving.is_empty() && round.outcome.is_some() {
                inner.round = None;
                self.gathered.notify_all();
            }
        }
    }

    /// `me` takes no further part: its thread has ended, or cannot say what state it is in.
    fn absent(&self, inner: &mut Inner, me: usize) {
        let Some(round) = inner.round.as_mut() else {
            return;
        };
        if round.outcome.is_some() {
            self.leave(inner, me);
        } else if round.leader == me {
            inner.round = None;
            self.gathered.notify_all();
        } else {
            round.asked.retain(|vcpu| *vcpu != me);
            self.decide(inner);
        }
    }

    /// Injects one record on the calling vCPU's thread and reads back what became of it.
    fn inject<M: Mca>(
        &self,
        inner: &mut Inner,
        mca: &mut M,
        told: &Told,
        reach: Reach,
        rip: u64,
    ) -> Result<(), Verdict> {
        let Told { vcpu, error, record } = *told;
        let done = mca.inject(&record).and_then(|()| mca.read_back(record.bank));
        let bank = match done {
            Ok((held, mcg_status)) => {
                // A return of 0 from KVM is not a delivery; what the bank holds is.
                let raised = record.mcg_status == 0 || mcg_status == record.mcg_status;
                (held == record.status && raised).then_some((held, mcg_status))
            }
            Err(error) => {
                warn!("vCPU {vcpu}: cannot inject into bank {}: {error}", record.bank);
                None
            }
        };
        let Some((pending, form)) = error else {
            match bank {
                Some(_) => inner.delivery.told(told),
                None => warn!("vCPU {vcpu}: was not given its part of a rendezvous"),
            }
            return Ok(());
        };
        let Some((status, mcg_status)) = bank else {
            let (why, rip) = (Cannot::Refused, Some(rip));
            self.undeliverable(inner, vcpu, pending, why, rip);
            return match pending.kind {
                Kind::ActionOptional => Ok(()),
                Kind::ActionRequired => Err(Verdict::Undeliverable { gpa: pending.gpa, why, rip }),
            };
        };
        inner.delivery.told(told);
        inner.retry = RETRY_FIRST;
        // It may be asleep, and it is the one who looks for the acknowledgement.
        self.wake();
        let place = Place::Mce { vcpu: index(vcpu), bank: record.bank, form };
        let Change { after_micros, forged, .. } =
            self.set(inner, pending.gpa, State::Injected { place });
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
        self.emit(&Event::Injected { gpa: pending.gpa, by, after_micros, forged });
        Ok(())
    }
}
