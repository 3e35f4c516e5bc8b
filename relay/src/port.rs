//! A vCPU thread's door to the relay, and the gathering of all of them for one machine check.
//!
//! Injection happens here, on the vCPU's own thread, between two KVM_RUNs. Where a machine check
//! has to reach every processor at once, the vCPU threads gather in a [`Round`]: all stop, all show
//! their state, and either all inject or none, so no guest waits in its handler for a processor
//! that was never called.

use std::io;
use std::marker::PhantomData;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use log::warn;

use crate::delivery::{Cannot, Pending, Step, Told, Wait, index};
use crate::event::{Event, Injection, Reach, Thread};
use crate::failure::{Kind, PAGE_SHIFT, PAGE_SIZE};
use crate::ledger::{Place, State};
use crate::locked::Locked;
use crate::mca::{Form, McaState, Record, mcg, status};
use crate::read::{self, AccessError};
use crate::relay::{Attached, Change, Inner, RETRY_FIRST, Shared};
use crate::signal::{self, Caught, ThreadSlot};

/// How long a vCPU that touched a bad page is held back while other processors leave their
/// machine-check handlers. A guest that takes longer has given up on its own one-second limit.
const AR_PATIENCE: Duration = Duration::from_secs(5);
/// How often it looks meanwhile.
const AR_LOOK: Duration = Duration::from_millis(1);
/// How long the vCPUs that have come round for a machine check wait for those that have not. A thread that takes
/// longer is held up by something else.
const GATHERING: Duration = Duration::from_secs(1);

/// So many ARs without an address within [`NAMELESS_IN`] are a touch that KVM does not give the address of either.
const NAMELESS: u32 = 64;
const NAMELESS_IN: Duration = Duration::from_secs(10);

/// How often a vCPU that does not come is called, while another one waits for it with an AR.
const CALL_AGAIN: Duration = Duration::from_millis(100);

/// How often in a row a back end may fail to empty a bank, for whatever reason but that it cannot.
pub(crate) const TAKE_BACK_ATTEMPTS: u32 = 3;

/// What the relay needs of a hypervisor: one vCPU's machine-check state, and a way to set it.
///
/// All calls are made on the thread that runs the vCPU, while it is not running, by
/// [`VcpuPort::before_run`], and without a lock of the relay's.
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

    /// Empties `bank`: sets its MCi_STATUS to 0 from outside, as the guest does when it has read the bank
    /// (KVM_SET_MSRS). It holds a record that was given to a processor which is offline, so that nobody reads it.
    ///
    /// # Errors
    /// `Unsupported` (what this does): the back end has no such call, and is not asked again; nor is it after three
    /// other errors in a row. What such records told is told elsewhere all the same; if the guest brings the processor
    /// back, it may read them, too.
    fn take_back(&mut self, _bank: u8) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
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
    /// The vCPU that asked for it, and the error that it is for.
    leader: usize,
    error: Pending,
    /// The vCPUs that have to stop before it is settled.
    asked: Vec<usize>,
    /// The state of each of them that has stopped.
    states: Vec<Option<McaState>>,
    /// Set once everybody has stopped: what each is to inject, or why nobody does.
    outcome: Option<Arc<Result<Vec<Told>, Wait>>>,
    /// vCPUs that have not acted on the outcome yet.
    leaving: Vec<usize>,
    /// When it was called.
    since: Instant,
}

impl Round {
    fn settle(&mut self, outcome: Result<Vec<Told>, Wait>) {
        self.outcome = Some(Arc::new(outcome));
        // Who has not come is not waited for.
        let came = self.asked.iter().filter(|vcpu| self.states[**vcpu].is_some());
        self.leaving = came.copied().collect();
    }

    /// The vCPUs that were asked and have not come.
    fn missing(&self) -> Vec<usize> {
        self.asked.iter().copied().filter(|vcpu| self.states[*vcpu].is_none()).collect()
    }
}

/// A vCPU thread's door to the relay. Made on that thread, used there, dropped there.
pub struct VcpuPort {
    pub(crate) vcpu: usize,
    pub(crate) slot: ThreadSlot,
    pub(crate) shared: Arc<Shared>,
    /// ARs without an address, and when the first of them came.
    pub(crate) nameless: u32,
    pub(crate) nameless_since: Option<Instant>,
    /// How often in a row the back end may still fail to empty a bank; it is not asked again after that.
    pub(crate) take_back_attempts: u32,
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

    /// An MMIO exit at `gpa`: true when that is guest RAM and the page is bad, which means that KVM emulated an
    /// instruction that met poison. The page is then taken for touched (AR). False for what else shows as MMIO
    /// in RAM: a store to a read-only slot, a slot that is being changed, a file that was cut short (see
    /// [`Self::probe`]).
    pub fn mmio_hit(&mut self, gpa: u64) -> bool {
        self.touches(gpa, 1, false)
    }

    /// A KVM_RUN that failed with `errno`, EFAULT or EHWPOISON, and KVM_EXIT_MEMORY_FAULT of `size` bytes at `gpa`: true
    /// when a page of guest RAM there is bad. KVM says it so, and raises no SIGBUS, of memory that this process has
    /// not mapped (guest_memfd); with EFAULT alone it may mean anything, and the host is asked. The first bad page is
    /// then taken for touched (AR), and the others for bad (AO).
    pub fn memory_fault(&mut self, gpa: u64, size: u64, errno: i32) -> bool {
        self.touches(gpa, size, errno == libc::EHWPOISON)
    }

    /// The guest has touched `size` bytes at `gpa`, of which the first is bad if it is `sure`, and else those of which
    /// the host says so.
    fn touches(&mut self, gpa: u64, size: u64, sure: bool) -> bool {
        let ram = self.shared.ram();
        let first = gpa & !(PAGE_SIZE - 1);
        // More than one huge page is no single fault.
        let end = gpa.saturating_add(size.clamp(1, 1 << 30));
        let pages: Vec<(u64, u64)> = (first..end)
            .step_by(1 << PAGE_SHIFT)
            .filter_map(|gpa| ram.hva(gpa).map(|hva| (gpa, hva)))
            .collect();
        let present = self.shared.mapped.are_present(pages.iter().map(|(_, hva)| *hva));
        let is_bad = |gpa: u64, is_present: bool| {
            let poisoned =
                || matches!(read::read_ram(&ram, gpa, &mut [0]), Err(AccessError::Poisoned { .. }));
            // What is mapped is not bad as far as the kernel knows, and need not be read.
            (sure && gpa == first) || (!is_present && poisoned())
        };
        let bad: Vec<u64> = pages
            .iter()
            .zip(present)
            .filter_map(|(&(gpa, hva), is_present)| is_bad(gpa, is_present).then_some(hva))
            .collect();
        let mut kind = Kind::ActionRequired;
        for &hva in &bad {
            let caught = Caught { kind, hva, lsb: PAGE_SHIFT };
            self.shared.enter(&mut self.shared.lock(), caught, Thread::Vcpu(self.vcpu));
            kind = Kind::ActionOptional;
        }
        if !bad.is_empty() {
            // What had no address has one now.
            self.nameless = 0;
            self.slot.shared().ask_attention();
        }
        !bad.is_empty()
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
        // Under no lock: what else was there may go on.
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
        let mut held_since = None;
        loop {
            self.slot.clear_attention();
            // Several system calls, for which nobody else need wait. The vCPU stands still meanwhile.
            let state = mca.state();
            let mut inner = shared.lock();
            shared.comes_round(&mut inner, me);
            for caught in shared.take(&mut inner, &self.slot, Thread::Vcpu(me)) {
                if caught.kind == Kind::ActionRequired && caught.hva == 0 && self.is_nameless() {
                    // The kernel does not say where, of memory that this process has not mapped (guest_memfd). It
                    // knows by now, and says it when the guest touches the page again.
                    shared.hint();
                } else if caught.kind == Kind::ActionRequired {
                    // Not under the lock: whoever was there before us may end the process, and have
                    // something to put in order first.
                    drop(inner);
                    signal::give_up(caught);
                    inner = shared.lock();
                }
            }
            let state = match state {
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
            let ao_vcpu = inner.delivery.ao_vcpu();
            let taken = inner.delivery.taken(me, &state, now);
            shared.taken(&mut inner, me, &taken);
            let left = inner.delivery.left_behind(me, &state, now);
            if !left.is_empty() && self.take_back_attempts > 0 {
                drop(inner);
                self.take_back(mca, &left);
                // The banks are other ones now.
                continue;
            }
            if !left.is_empty() {
                shared.given_up(&mut inner, me, &left, false);
            }
            let gathering = inner.round.is_some();
            let step = if gathering { None } else { Some(inner.delivery.next(me, &state, now)) };
            if inner.delivery.ao_vcpu() != ao_vcpu {
                // AOs are another vCPU's matter from here on.
                inner.news = true;
                shared.wake();
            }
            match step {
                Some(Step::Idle) => return Verdict::Run,
                Some(Step::Inject(told)) => {
                    let (at, reach) = (state.rip, Reach::Local);
                    let (guard, done) = shared.inject(inner, mca, &told, reach, at);
                    if let Err(verdict) = done {
                        return verdict;
                    }
                    // Reading the state again costs as much as all the rest.
                    if !guard.delivery.has_something_for(me) {
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
                    let error = step.and_then(|step| match step {
                        Step::Rendezvous(error) => Some(error),
                        _ => None,
                    });
                    if let Some(error) = error {
                        shared.call_round(&mut inner, me, error);
                    }
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
                            if error.kind == Kind::ActionOptional {
                                return Verdict::Run;
                            }
                            // A vCPU that is paused will not come, and this one is to pause, too. What it
                            // touched it touches again after that.
                            if matches!(wait, Wait::Paused { .. }) {
                                inner.goes_on(me);
                                shared.wake();
                                return Verdict::Run;
                            }
                            let since: Instant = *held_since.get_or_insert_with(Instant::now);
                            if since.elapsed() > AR_PATIENCE {
                                let (why, rip) = (Cannot::Blocked { by: wait }, Some(state.rip));
                                shared.undeliverable(&mut inner, me, error, why, rip);
                                return Verdict::Undeliverable { gpa: error.gpa, why, rip };
                            }
                            // First the kicks, which a wait would be put off for.
                            drop(inner);
                            drop(shared.pause(shared.lock(), AR_LOOK));
                        }
                    }
                }
            }
        }
    }

    /// Whether one more AR without an address may be taken for one of guest memory.
    fn is_nameless(&mut self) -> bool {
        let now = Instant::now();
        let first = *self.nameless_since.get_or_insert(now);
        self.nameless += 1;
        if now.duration_since(first) > NAMELESS_IN {
            (self.nameless_since, self.nameless) = (Some(now), 1);
        }
        self.nameless <= NAMELESS
    }

    /// Empties `banks`, whose records this vCPU does not take, and has what they told told elsewhere.
    fn take_back<M: Mca>(&mut self, mca: &mut M, banks: &[u8]) {
        let me = self.vcpu;
        let mut emptied = Vec::new();
        for &bank in banks {
            match mca.take_back(bank) {
                Ok(()) => {
                    emptied.push(bank);
                    self.take_back_attempts = TAKE_BACK_ATTEMPTS;
                }
                Err(error) => {
                    warn!(
                        "vCPU {me}: cannot empty bank {bank}, whose record it does not take: {error}"
                    );
                    self.take_back_attempts = match error.kind() {
                        io::ErrorKind::Unsupported => 0,
                        _ => self.take_back_attempts.saturating_sub(1),
                    };
                    break;
                }
            }
        }
        self.shared.given_up(&mut self.shared.lock(), me, &emptied, true);
    }
}

impl Drop for VcpuPort {
    fn drop(&mut self) {
        if self.shared.is_of_parent() {
            return;
        }
        let me = self.vcpu;
        let mut inner = self.shared.lock();
        // What came since it last looked.
        let nobodys = self.shared.take(&mut inner, &self.slot, Thread::Vcpu(me));
        let kick = inner.leaves(me);
        self.shared.leaves_round(&mut inner, me);
        drop(inner);
        if let Some(kick) = kick {
            // Whoever is kicking this vCPU is waited for.
            *kick.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        self.shared.wake();
        // One without an address is of guest memory, which this vCPU touches no more.
        let is_ar = |caught: &Caught| caught.kind == Kind::ActionRequired && caught.hva != 0;
        nobodys.into_iter().filter(is_ar).for_each(signal::give_up);
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
    fn pause<'a>(&self, inner: Locked<'a, Inner>, time: Duration) -> Locked<'a, Inner> {
        inner.wait(&self.gathered, time)
    }

    /// `vcpu` has come round; a gathering may wait for it again.
    fn comes_round(&self, inner: &mut Inner, vcpu: usize) {
        if let Some(attached) = inner.vcpus[vcpu].as_mut().filter(|attached| attached.late) {
            attached.late = false;
            inner.news = true;
            self.wake();
        }
    }

    /// The records in `banks` of `vcpu`, which were `emptied` or could not be, are not taken by it, and are told
    /// elsewhere.
    fn given_up(&self, inner: &mut Inner, vcpu: usize, banks: &[u8], emptied: bool) {
        for &bank in banks {
            let gpa = match emptied {
                true => inner.delivery.taken_back(vcpu, bank),
                false => inner.delivery.stays(vcpu, bank),
            };
            if let Some(gpa) = gpa {
                self.told_elsewhere(inner, &[gpa], Wait::Offline { vcpu: index(vcpu) });
            }
        }
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
    fn call_round(&self, inner: &mut Inner, leader: usize, error: Pending) {
        let count = inner.vcpus.len();
        let asked: Vec<usize> = (0..count).filter(|vcpu| inner.vcpus[*vcpu].is_some()).collect();
        inner.rounds += 1;
        let number = inner.rounds;
        let since = Instant::now();
        let one = |is: fn(&Attached) -> bool| {
            asked.iter().copied().find(|vcpu| inner.vcpus[*vcpu].as_ref().is_some_and(is))
        };
        // A pause first, as it holds the leader, too.
        let paused = one(|vcpu| vcpu.parked).map(|vcpu| Wait::Paused { vcpu: index(vcpu) });
        let late = one(|vcpu| vcpu.late).map(|vcpu| Wait::NotComing { vcpu: index(vcpu) });
        // A processor without a thread, which the guest may have online all the same, counts as unplugged soon.
        self.see_to_the_unplugged(inner);
        let leaves = inner.gone.first().map(|(vcpu, _)| Wait::NotComing { vcpu: index(*vcpu) });
        if let Some(wait) = paused.or(late).or(leaves) {
            // The one call that it had may have been lost. It is not to have nothing but calls.
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
            inner.round = Some(Round {
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
        inner.round = Some(Round {
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

    /// A round that has waited long enough is put off, and true is returned; who has not come is not waited for again
    /// until it does.
    fn give_up_waiting(&self, inner: &mut Inner) -> bool {
        let Some(round) = inner.round.as_mut() else { return false };
        if round.outcome.is_some() || round.since.elapsed() < GATHERING {
            return false;
        }
        let missing = round.missing();
        let Some(first) = missing.first() else { return false };
        round.settle(Err(Wait::NotComing { vcpu: index(*first) }));
        for vcpu in missing {
            if let Some(attached) = inner.vcpus[vcpu].as_mut() {
                attached.late = true;
            }
        }
        self.gathered.notify_all();
        true
    }

    /// Shows `state` to the round, waits until everybody has, and does this vCPU's part of it.
    fn take_part<'a, M: Mca>(
        &'a self,
        mut inner: Locked<'a, Inner>,
        me: usize,
        state: McaState,
        mca: &mut M,
    ) -> (Locked<'a, Inner>, Part) {
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
                None if self.give_up_waiting(&mut inner) => {}
                None => inner = self.pause(inner, GATHERING / 4),
                Some(outcome) => {
                    let part = match &*outcome {
                        Err(wait) => Part::Postponed(*wait),
                        Ok(records) => match records.iter().find(|told| told.vcpu == me) {
                            None => Part::Told,
                            Some(told) => {
                                let reach = Reach::Rendezvous;
                                let (guard, done) = self.inject(inner, mca, told, reach, state.rip);
                                inner = guard;
                                match done {
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
            let now = self.now();
            let outcome = inner.delivery.rendezvous(round.leader, round.error, &round.states, now);
            // Nothing to be told any more here; what there is elsewhere is looked for.
            inner.news |= outcome.as_ref().is_ok_and(Vec::is_empty);
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

    /// The thread of `me` ends. The guest may have that processor online all the same, so a round that waits for it is
    /// put off.
    fn leaves_round(&self, inner: &mut Inner, me: usize) {
        let waits = |round: &&mut Round| round.outcome.is_none() && round.asked.contains(&me);
        if let Some(round) = inner.round.as_mut().filter(waits).filter(|round| round.leader != me) {
            round.settle(Err(Wait::NotComing { vcpu: index(me) }));
            self.gathered.notify_all();
        }
        self.absent(inner, me);
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

    /// Injects one record on the calling vCPU's thread, without the lock, and reads back what became of it.
    fn inject<'a, M: Mca>(
        &'a self,
        mut inner: Locked<'a, Inner>,
        mca: &mut M,
        told: &Told,
        reach: Reach,
        rip: u64,
    ) -> (Locked<'a, Inner>, Result<(), Verdict>) {
        let Told { vcpu, error, record } = *told;
        // First, so that nobody else tells it meanwhile.
        if inner.delivery.told(told) {
            inner.aos_wait();
        }
        drop(inner);
        let done = mca.inject(&record).and_then(|()| mca.read_back(record.bank));
        let mut inner = self.lock();
        let bank = match done {
            Ok((held, mcg_status)) => {
                // A return of 0 from KVM is not a delivery; what the bank holds is.
                let raised = record.mcg_status == 0 || mcg_status == record.mcg_status;
                // A bystander's may have been written over one like it.
                let held_so = if error.is_none() { held & !status::OVER } else { held };
                (held_so == record.status && raised).then_some((held, mcg_status))
            }
            Err(error) => {
                warn!("vCPU {vcpu}: cannot inject into bank {}: {error}", record.bank);
                None
            }
        };
        if bank.is_none() {
            inner.delivery.refused(told);
        }
        let Some((pending, form)) = error else {
            if bank.is_none() {
                warn!("vCPU {vcpu}: was not given its part of a rendezvous");
            }
            return (inner, Ok(()));
        };
        let Some((status, mcg_status)) = bank else {
            let (why, rip) = (Cannot::Refused, Some(rip));
            self.undeliverable(&mut inner, vcpu, pending, why, rip);
            let verdict = match pending.kind {
                Kind::ActionOptional => Ok(()),
                Kind::ActionRequired => Err(Verdict::Undeliverable { gpa: pending.gpa, why, rip }),
            };
            return (inner, verdict);
        };
        inner.retry = RETRY_FIRST;
        // It may be asleep, and it is the one who looks for the acknowledgement.
        self.wake();
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
        self.emit(&Event::Injected { gpa: pending.gpa, by, after_micros, forged });
        (inner, Ok(()))
    }
}
