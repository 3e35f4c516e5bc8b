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
use std::time::Duration;

use super::banks::{Banks, Emptied, free_bank};
use super::firmware::{self, AoChannel, Channel, Observation, Outcome};
use super::pace::{Pace, Queue};
use super::rounds::Rounds;
use super::standing::{Seen, Standing};
pub(crate) use super::step::index;
pub use super::step::{Assignment, Pending, Step, Taken};
use crate::acpi::cper::Notice;
use crate::types::FallbackReason;
pub use crate::types::{UndeliverableReason, WaitReason};
use crate::x86::mca::{
    self, AO_BANK, AR_BANKS, Caps, DEFERRED_BANKS, FailureKind, Form, McaState, Vendor, mcg,
};

/// How long CR4.MCE has to have been set before a record is only laid into a bank. Linux sets CR4.MCE
/// first and wipes the banks unread after that (`__mcheck_cpu_init_clear_banks`,
/// `arch/x86/kernel/cpu/mce/core.c`), once per processor that it starts.
const SETTLE: Duration = Duration::from_secs(1);

/// The errors of one virtual machine that wait to be told or to be acknowledged.
///
/// Times are those since a moment of the caller's choice, the same for all calls.
#[derive(Debug)]
pub struct Delivery {
    caps: Caps,
    ao: VecDeque<u64>,
    ar: Vec<VecDeque<Touch>>,
    rounds: Rounds,
    banks: Banks,
    queue: Queue,
    vcpus: Vec<Seen>,
    /// The vCPU that takes action-optional machine checks.
    ao_vcpu: usize,
    firmware: Option<Channel>,
}

/// A page that a vCPU has touched, and that it is to be told of.
#[derive(Debug, Clone, Copy)]
struct Touch {
    gpa: u64,
    /// The guest has not been told of the page before.
    untold: bool,
}

impl Delivery {
    /// For a guest with `vcpus` processors that was shown `caps`, if it has machine checks.
    pub fn new(caps: Option<Caps>, vcpus: usize, pace: Pace) -> Self {
        Self {
            caps: caps.unwrap_or(Caps::NONE),
            ao: VecDeque::new(),
            ar: vec![VecDeque::new(); vcpus],
            rounds: Rounds::default(),
            banks: Banks::default(),
            queue: Queue::new(pace),
            vcpus: vec![Seen::default(); vcpus],
            ao_vcpu: 0,
            firmware: None,
        }
    }

    /// The guest has an ACPI error source, to be used as `channel` says. `patience` is how long it may
    /// take to use it after it has come up, and to take a record.
    pub fn offer_source(&mut self, channel: AoChannel, patience: Duration) {
        let carries_aos = match channel {
            AoChannel::Auto => self.caps.vendor == Vendor::Amd || self.caps == Caps::NONE,
            AoChannel::Mce => false,
            AoChannel::Ghes => true,
        };
        self.firmware = Some(Channel::new(carries_aos, patience));
    }

    /// A page that the guest has not touched. Call once per page: the ledger knows which are new.
    pub fn push_ao(&mut self, gpa: u64) {
        match self.firmware.as_mut() {
            Some(channel) if channel.carries_aos => channel.push(Notice::Lost, gpa),
            other => {
                if let Some(channel) = other {
                    // It is no longer one that is only predicted to fail.
                    channel.touched(gpa);
                }
                self.ao.push_back(gpa);
            }
        }
    }

    /// Whether the guest has an ACPI error source.
    pub fn has_source(&self) -> bool {
        self.firmware.is_some()
    }

    /// A page that is whole and predicted to fail. There is no way to say so but the error source:
    /// without one this does nothing.
    pub fn push_predicted(&mut self, gpa: u64) {
        if let Some(channel) = self.firmware.as_mut() {
            channel.push(Notice::Predicted, gpa);
        }
    }

    /// Whether something waits on the firmware-first channel.
    pub fn firmware_is_idle(&self) -> bool {
        self.firmware.as_ref().is_none_or(Channel::is_idle)
    }

    /// The next step on the firmware-first channel, where `sight` is what is seen of the guest's side,
    /// and what has become of pages on it. AOs among those that come back wait for a machine check
    /// from here on.
    pub fn firmware_step(
        &mut self,
        sight: &Observation,
        now: Duration,
    ) -> (Vec<Outcome>, firmware::ChannelStep) {
        let Some(channel) = self.firmware.as_mut() else {
            return (Vec::new(), firmware::ChannelStep::Idle);
        };
        let mut outcomes = channel.settle(sight, now);
        // A record that was not acknowledged may have been read all the same.
        for Outcome::Taken { gpa, .. } | Outcome::Returned { gpa, .. } in &outcomes {
            self.queue.taken(*gpa, now);
        }
        let on_their_way = self.aos_in_banks();
        let up_since = self.vcpus.iter().filter_map(|seen| seen.open_since).min();
        let Some(channel) = self.firmware.as_mut() else {
            return (outcomes, firmware::ChannelStep::Idle);
        };
        let in_flight = on_their_way + channel.in_block();
        let room = self.queue.room_for_many(in_flight, firmware::QUEUE, now);
        let (more, step) = channel.step(sight, now, up_since, room);
        outcomes.extend(more);
        self.take_back(&outcomes);
        (outcomes, step)
    }

    /// The record that was to be published was not, or the guest could not be notified of it.
    pub fn firmware_refused(&mut self, why: FallbackReason) -> Vec<Outcome> {
        let outcomes = self.firmware.as_mut().map_or_else(Vec::new, |channel| channel.refused(why));
        self.take_back(&outcomes);
        outcomes
    }

    /// Whether the status word is to be zeroed now; asked once each time.
    pub fn firmware_withdraws(&mut self) -> bool {
        self.firmware.as_mut().is_some_and(Channel::take_withdrawal)
    }

    fn take_back(&mut self, outcomes: &[Outcome]) {
        for outcome in outcomes {
            if let Outcome::Returned { gpa, .. } = *outcome {
                self.queue.not_taken(gpa);
            }
            if let Outcome::Returned { gpa, notice: Notice::Lost, .. } = *outcome {
                self.ao.push_back(gpa);
            }
        }
    }

    /// A page that `vcpu` touched; `untold` where the guest has not been told of it. It takes the place of an
    /// AO that waits for the same page: the guest learns of it by the AR.
    pub fn push_ar(&mut self, vcpu: usize, gpa: u64, untold: bool, now: Duration) {
        if vcpu >= self.ar.len() {
            return;
        }
        self.ao.retain(|waiting| *waiting != gpa);
        if let Some(channel) = self.firmware.as_mut() {
            channel.touched(gpa);
        }
        if let Some(queue) = self.ar.get_mut(vcpu)
            // The same touch may raise its signal more than once before it is told.
            && !queue.iter().any(|touch| touch.gpa == gpa)
        {
            queue.push_back(Touch { gpa, untold });
            self.rounds.count(vcpu, gpa, now);
        }
    }

    /// Of the addresses at which the guest has one page, the one whose touch is told next. Which of them the guest
    /// touched is not known; if it was another, the guest touches that one again, and is told of it then.
    pub(crate) fn next_alias(&self, gpas: &[u64]) -> Option<u64> {
        gpas.iter().copied().min_by_key(|gpa| self.rounds.of(*gpa))
    }

    /// `vcpu` runs on without having been told of its touches. An AR belongs to the instruction that touched the page,
    /// so these touches are dropped: pages that the guest does not know of wait as AOs, and a page that it touches
    /// again is an AR again. Returns true when there are such AOs.
    pub fn goes_on(&mut self, vcpu: usize) -> bool {
        let touches = self.ar.get_mut(vcpu).map(std::mem::take).unwrap_or_default();
        let mut more = false;
        for Touch { gpa, untold } in touches {
            self.rounds.take_back(gpa);
            if let Some(channel) = self.firmware.as_mut() {
                // What lies in the status block is not told by this touch after all.
                channel.touch_dropped(gpa);
            }
            if untold && !self.waits(gpa) {
                self.push_ao(gpa);
                more = true;
            }
        }
        more
    }

    /// `vcpu` has no thread any more. The errors that it was to be told of are told elsewhere, and so are those whose
    /// records lie in its banks, which the guest will not read. Returns the pages of these records.
    pub fn absent(&mut self, vcpu: usize, now: Duration) -> Vec<u64> {
        if let Some(seen) = self.vcpus.get_mut(vcpu) {
            *seen = Seen::absent();
        }
        self.choose_ao_vcpu();
        self.goes_on(vcpu);
        let (left, again) = self.banks.leave(vcpu);
        // Nobody saw whether they were read.
        left.into_iter().for_each(|gpa| self.queue.taken(gpa, now));
        self.tell_again(&again);
        again
    }

    /// `vcpu` has a thread, and nothing is known of it.
    pub fn attached(&mut self, vcpu: usize) {
        if let Some(seen) = self.vcpus.get_mut(vcpu) {
            *seen = Seen::default();
        }
        self.choose_ao_vcpu();
    }

    /// Whether `error` waits to be told, and if it is an AR, on `vcpu`.
    fn still_waits(&self, vcpu: usize, error: &Pending) -> bool {
        match error.kind {
            FailureKind::ActionOptional => self.ao.contains(&error.gpa),
            FailureKind::ActionRequired => self.first_ar(vcpu) == Some(*error),
        }
    }

    /// Whether the page at `gpa` waits to be told, in whatever form.
    fn waits(&self, gpa: u64) -> bool {
        self.ao.contains(&gpa) || self.ar.iter().flatten().any(|touch| touch.gpa == gpa)
    }

    /// These pages were told where nobody read it. They wait in front of the others, in their order.
    fn tell_again(&mut self, gpas: &[u64]) {
        for gpa in gpas.iter().rev() {
            // A touch that waits will tell it, if it is told.
            let touches = self.ar.iter_mut().flatten().filter(|touch| touch.gpa == *gpa);
            touches.for_each(|touch| touch.untold = true);
            // Two records may tell of the same page, an AO's and an AR's.
            if !self.waits(*gpa) {
                self.ao.push_front(*gpa);
            }
        }
    }

    /// Whether nothing waits for a vCPU, neither to be told nor to be acknowledged.
    pub fn is_idle(&self) -> bool {
        self.ao.is_empty()
            && self.banks.are_empty()
            && self.ar.iter().all(VecDeque::is_empty)
            && !self.watches_boot()
    }

    /// The firmware-first channel has to know since when the guest is up.
    fn watches_boot(&self) -> bool {
        self.firmware.as_ref().is_some_and(|channel| channel.watches_boot)
    }

    /// The vCPUs that have to look at their state for something to go on, ascending: they are called now.
    pub fn waiting_vcpus(&mut self, now: Duration) -> Vec<usize> {
        if let Some(seen) = self.vcpus.get_mut(self.ao_vcpu).filter(|seen| seen.is_overdue(now)) {
            seen.standing = Standing::Held;
            self.choose_ao_vcpu();
        }
        let waiting = self.called_now(now);
        for vcpu in &waiting {
            if let Some(seen) = self.vcpus.get_mut(*vcpu) {
                seen.called_at = seen.called_at.or(Some(now));
            }
        }
        waiting
    }

    fn called_now(&self, now: Duration) -> Vec<usize> {
        let paced = self.room_at().is_some_and(|at| at <= now);
        // Whichever vCPU it is to be, they have to be looked at to find out.
        let nobody = !self.vcpus.iter().any(|seen| seen.standing == Standing::Online);
        let sought = nobody && (paced || !self.banks.are_empty());
        // One that was not started when it was last looked at may take AOs by now.
        let may_have_come =
            |vcpu: usize| self.vcpus.get(vcpu).is_some_and(|seen| seen.may_have_come(now));
        (0..self.ar.len())
            .filter(|vcpu| {
                !self.ar[*vcpu].is_empty()
                    || sought
                    || (paced && self.caps.vendor == Vendor::Amd && may_have_come(*vcpu))
                    || (paced && self.takes_aos(*vcpu))
                    || (*vcpu == self.ao_vcpu && self.watches_boot())
                    || self.banks.hold_any_of(*vcpu)
            })
            .collect()
    }

    /// The guest does not run from now on, or runs again.
    pub fn set_paused(&mut self, is_paused: bool, now: Duration) {
        if is_paused { self.queue.pauses(now) } else { self.queue.goes_on(now) }
    }

    /// The guest is done with the page at `gpa`; true if another one waits, and its turn may have come by that.
    pub fn finished(&mut self, gpa: u64, now: Duration) -> bool {
        let channel = self.firmware.as_ref();
        let waits = !self.ao.is_empty() || channel.is_some_and(Channel::has_waiting);
        if self.banks.hold_page(gpa) || channel.is_some_and(|channel| channel.names(gpa)) {
            return self.queue.finished_early(gpa, now) && waits;
        }
        self.queue.finished(gpa, now) && waits
    }

    /// When the pace lets the next AO go, if one waits and only time is needed.
    pub fn room_at(&self) -> Option<Duration> {
        if self.ao.is_empty() { None } else { self.queue.room_at(self.aos_in_banks()) }
    }

    /// The next step for `vcpu`, whose state is `state`.
    pub fn next(&mut self, vcpu: usize, state: &McaState, now: Duration) -> Step {
        self.watch(vcpu, state, now);
        let Some(error) = self.first(vcpu) else {
            return Step::Idle;
        };
        if error.kind == FailureKind::ActionRequired
            && let Some(rounds) = self.rounds.take_loop(error.gpa)
        {
            return Step::Cannot(error, UndeliverableReason::Loop { rounds });
        }
        let Some(form) = mca::form(error.kind, &self.caps) else {
            return Step::Cannot(error, UndeliverableReason::NoForm);
        };
        let placed = self.place(vcpu, state, form).and_then(|bank| match error.kind {
            FailureKind::ActionOptional => self.may_go(vcpu, form, now).map(|()| bank),
            FailureKind::ActionRequired => Ok(bank),
        });
        let lmce = state.lmce && self.caps.has(mca::cap::LMCE_P);
        match placed {
            Err(wait) => self.blocked(vcpu, error, wait),
            Ok(_) if self.caps.vendor == Vendor::Intel && !lmce => Step::Rendezvous(error),
            Ok(bank) => Step::Inject(Assignment {
                vcpu,
                error: Some((error, form)),
                record: mca::record(form, error.gpa, bank, lmce),
            }),
        }
    }

    /// With every vCPU stopped: the records of one rendezvous that `leader` asked for, or why it
    /// has to wait. `states[vcpu]` is `None` for a vCPU that no longer exists.
    ///
    /// vCPUs that could not take a machine check (not started, CR4.MCE clear, MCG_CTL off) are left
    /// out: Linux opens its handler before it counts a processor as online, so it does not wait for
    /// them. A vCPU with an AR of its own takes part with that. Nothing is told where the error is another vCPU's
    /// matter, as is seen now.
    ///
    /// # Errors
    /// A vCPU is still in its handler, or a bank has not been cleared.
    pub fn rendezvous(
        &mut self,
        leader: usize,
        error: Pending,
        states: &[Option<McaState>],
        now: Duration,
    ) -> Result<Vec<Assignment>, WaitReason> {
        // A machine check without any error is the guest's end ("Fatal machine check from unknown source"). It is that
        // also to those who are online where the one with the error is not.
        for (vcpu, state) in states.iter().enumerate() {
            if let Some(state) = state {
                self.watch(vcpu, state, now);
            }
        }
        let is_ao = error.kind == FailureKind::ActionOptional;
        if (is_ao && self.ao_vcpu != leader) || !self.still_waits(leader, &error) {
            return Ok(Vec::new());
        }
        // Of several with interrupts off one may have been left behind by a crash. It is seen in time which.
        let is_masked = |seen: &&Seen| seen.standing == Standing::Masked;
        let unclear = self.vcpus.get(leader).filter(is_masked).is_some_and(|s| !s.is_masked(now));
        if is_ao && unclear && self.vcpus.iter().filter(is_masked).count() > 1 {
            return Err(WaitReason::InHandler { vcpu: index(leader) });
        }

        let mut all = Vec::new();
        for (vcpu, state) in states.iter().enumerate() {
            let Some(state) = state else { continue };
            let closed = state.is_closed() || state.mcg_ctl != u64::MAX;
            // A guest that dies in its handler stops its processors there, and may go on with another kernel on one of
            // them (`stop_this_cpu`, arch/x86/kernel/process.c). Nobody waits for the others.
            let stopped = state.mcip() && self.vcpus.get(vcpu).is_some_and(|seen| seen.stopped);
            if (closed || stopped) && vcpu != leader {
                continue;
            }
            let own = if vcpu == leader { Some(error) } else { self.first_ar(vcpu) };
            let own = own.and_then(|error| Some((error, mca::form(error.kind, &self.caps)?)));
            all.push(match own {
                Some((error, form)) => Assignment {
                    vcpu,
                    error: Some((error, form)),
                    record: mca::record(form, error.gpa, self.place(vcpu, state, form)?, false),
                },
                None => Assignment {
                    vcpu,
                    error: None,
                    record: mca::bystander(self.bystander_bank(vcpu, state)?),
                },
            });
        }
        Ok(all)
    }

    /// The record is being put into the bank: its error, if it has one, no longer waits to be told.
    /// [`Self::refused`] if that fails. True when AOs have come to wait: touches that are not told of
    /// ([`Self::goes_on`]).
    pub fn told(&mut self, told: &Assignment) -> bool {
        if told.record.mcg_status & mcg::MCIP != 0
            && let Some(seen) = self.vcpus.get_mut(told.vcpu)
        {
            seen.in_handler = true;
            seen.leaving_since = None;
        }
        let (vcpu, bank) = (told.vcpu, told.record.bank);
        let Some((error, form)) = told.error else {
            self.banks.put_bystander(vcpu, bank);
            return false;
        };
        self.forget(vcpu, &error);
        // Others who touched the same page need not be told of it as of a new one.
        let same = self.ar.iter_mut().flatten().filter(|touch| touch.gpa == error.gpa);
        same.for_each(|touch| touch.untold = false);
        self.banks.put(vcpu, bank, error, form);
        // One touch at once is all that a vCPU can be told of.
        error.kind == FailureKind::ActionRequired && self.goes_on(vcpu)
    }

    /// The record was not put into the bank after all.
    pub fn refused(&mut self, told: &Assignment) {
        self.banks.refused(told.vcpu, told.record.bank);
        if let Some((error, _)) = told.error {
            self.queue.not_taken(error.gpa);
            let same = self.ar.iter_mut().flatten().filter(|touch| touch.gpa == error.gpa);
            same.for_each(|touch| touch.untold = true);
        }
    }

    /// The error will not be told: drop it from the queue it waits in.
    pub fn forget(&mut self, vcpu: usize, error: &Pending) {
        // It is the first nearly always, and a burst makes these queues long.
        match error.kind {
            FailureKind::ActionOptional => {
                if let Some(at) = self.ao.iter().position(|gpa| *gpa == error.gpa) {
                    self.ao.remove(at);
                }
            }
            FailureKind::ActionRequired => {
                if let Some(queue) = self.ar.get_mut(vcpu)
                    && let Some(at) = queue.iter().position(|touch| touch.gpa == error.gpa)
                {
                    queue.remove(at);
                }
            }
        }
    }

    /// The pages that `is_gone` accepts are not the guest's any more: nobody has to be told of them.
    pub fn gone(&mut self, is_gone: &dyn Fn(u64) -> bool) {
        self.ao.retain(|waiting| !is_gone(*waiting));
        self.ar.iter_mut().for_each(|queue| queue.retain(|touch| !is_gone(touch.gpa)));
        self.banks.gone(is_gone);
        if let Some(channel) = self.firmware.as_mut() {
            channel.gone(is_gone);
        }
    }

    /// What `state` shows to have become of the records in `vcpu`'s banks. Each is returned once.
    pub fn taken(&mut self, vcpu: usize, state: &McaState, now: Duration) -> Vec<Taken> {
        self.watch(vcpu, state, now);
        let Emptied { taken, again, left } = self.banks.taken(vcpu, state);
        self.tell_again(&again);
        // A record that is lost may have been read all the same.
        left.into_iter().for_each(|gpa| self.queue.taken(gpa, now));
        taken
    }

    /// The banks of `vcpu`, which is in `state`, that hold records which it will not take: they are to be emptied,
    /// and [`Self::taken_back`] is to be called for each. After [`Self::taken`] with the same state.
    ///
    /// A processor that is offline takes a machine check that is meant for all, clears MCG_STATUS and leaves
    /// its bank as it is; and it polls nothing.
    pub fn left_behind(&mut self, vcpu: usize, state: &McaState, now: Duration) -> Vec<u8> {
        let Some(seen) = self.vcpus.get(vcpu).copied() else { return Vec::new() };
        // One whose handler is closed starts over and wipes its banks, and one that is in its handler may be reading
        // them, unless they do not go on at all.
        let stands = state.waits_for_sipi || seen.is_stopped(now);
        if !stands && (state.is_closed() || state.mcip() || seen.in_handler) {
            return Vec::new();
        }
        // It is out of its handler, whose business that record was.
        let mut banks = self.banks.bystanders_of(vcpu, state);
        let polls = !(stands || seen.is_masked(now));
        let left = self.banks.untaken(vcpu, state.interrupts_on, polls);
        if !left.is_empty() && self.others_take_aos(vcpu, now) {
            if let Some(seen) = self.vcpus.get_mut(vcpu).filter(|_| !state.is_closed()) {
                seen.ignores = true;
                seen.standing = Standing::Offline;
            }
            self.choose_ao_vcpu();
            // Of one that is empty nobody can say whether it was read, and there is nothing more to come.
            let empty = |bank: u8| !state.banks[usize::from(bank)].valid();
            let read = left.iter().filter(|bank| empty(**bank));
            read.filter_map(|bank| self.banks.page(vcpu, *bank))
                .for_each(|gpa| self.queue.taken(gpa, now));
            banks.extend(left);
        }
        banks
    }

    /// `bank` of `vcpu` cannot be emptied: the page of the record that lies there, which waits to be told elsewhere. A
    /// bystander's record stays, and is written over.
    pub fn stays(&mut self, vcpu: usize, bank: u8) -> Option<u64> {
        match self.banks.is_bystanders(vcpu, bank) {
            true => None,
            false => self.taken_back(vcpu, bank),
        }
    }

    /// `bank` of `vcpu` has been emptied: the page of the record that lay there, which waits to be told elsewhere.
    pub fn taken_back(&mut self, vcpu: usize, bank: u8) -> Option<u64> {
        let gpa = self.banks.empty(vcpu, bank)?;
        self.queue.not_taken(gpa);
        self.tell_again(&[gpa]);
        Some(gpa)
    }

    /// Takes note of what can only be told from a vCPU's states over time.
    fn watch(&mut self, vcpu: usize, state: &McaState, now: Duration) {
        let Some(seen) = self.vcpus.get_mut(vcpu) else { return };
        let before = seen.standing;
        seen.look(state, now);
        if seen.standing != before {
            self.choose_ao_vcpu();
        }
    }

    /// The vCPU that takes action-optional machine checks: the first that the guest has online, as far as has been
    /// seen. Linux can take any processor offline, the boot processor included (before 6.5).
    pub fn ao_vcpu(&self) -> usize {
        self.ao_vcpu
    }

    fn choose_ao_vcpu(&mut self) {
        let best = self.vcpus.iter().enumerate().min_by_key(|(vcpu, seen)| (seen.rank(), *vcpu));
        self.ao_vcpu = best.map_or(0, |(vcpu, _)| vcpu);
    }

    /// Whether AOs may be told on `vcpu`. Deferred records may lie anywhere but where nobody polls; a machine
    /// check for an error that concerns no processor goes to one that is online.
    fn takes_aos(&self, vcpu: usize) -> bool {
        let online = || self.vcpus.get(vcpu).is_some_and(|seen| seen.standing < Standing::Offline);
        vcpu == self.ao_vcpu || (self.caps.vendor == Vendor::Amd && online())
    }

    /// Whether another vCPU than `vcpu` is online.
    fn others_take_aos(&self, vcpu: usize, now: Duration) -> bool {
        let is_online = |(other, seen): (usize, &Seen)| other != vcpu && seen.goes_on(now);
        self.vcpus.iter().enumerate().any(is_online)
    }

    fn aos_in_banks(&self) -> usize {
        self.banks.aos()
    }

    /// Whether an error waits to be told on `vcpu`.
    pub(crate) fn has_something_for(&self, vcpu: usize) -> bool {
        self.first(vcpu).is_some()
    }

    /// The AR that `vcpu` is to be told of next.
    pub(crate) fn first_ar(&self, vcpu: usize) -> Option<Pending> {
        let touch = self.ar.get(vcpu).and_then(VecDeque::front)?;
        Some(Pending { gpa: touch.gpa, kind: FailureKind::ActionRequired })
    }

    /// The error `vcpu` is to be told of next.
    fn first(&self, vcpu: usize) -> Option<Pending> {
        let ao = || {
            let gpa = *self.ao.front().filter(|_| self.takes_aos(vcpu))?;
            Some(Pending { gpa, kind: FailureKind::ActionOptional })
        };
        self.first_ar(vcpu).or_else(ao)
    }

    /// The bank of `vcpu` that can take a record of `form` now.
    fn place(&self, vcpu: usize, state: &McaState, form: Form) -> Result<u8, WaitReason> {
        let of = vcpu;
        let vcpu = index(of);
        if state.waits_for_sipi {
            return Err(WaitReason::NotStarted { vcpu });
        }
        // A deferred record only lies in its bank, so KVM would take it even from a guest that has
        // not set up its machine checks; but such a guest clears the banks unread when it does.
        if !state.cr4_mce {
            return Err(WaitReason::Cr4MceClear { vcpu });
        }
        if state.mcip() {
            return Err(WaitReason::Mcip { vcpu });
        }
        if state.mcg_ctl != u64::MAX {
            return Err(WaitReason::McgCtlOff { vcpu });
        }
        // An AR belongs to what the vCPU was doing when it stopped, so it cannot be put off.
        if form == Form::Srao {
            self.may_be_interrupted(of, state)?;
        }
        let banks: &[u8] = match form {
            Form::Srao => &[AO_BANK],
            Form::Deferred => &DEFERRED_BANKS,
            Form::Srar | Form::AmdAr => &AR_BANKS,
        };
        let have = self.caps.banks();
        let shown: Vec<u8> = banks.iter().copied().filter(|bank| *bank < have).collect();
        free_bank(vcpu, state, &shown)
    }

    /// The bank in which `vcpu`, which did nothing, can take part in a rendezvous now.
    fn bystander_bank(&self, vcpu: usize, state: &McaState) -> Result<u8, WaitReason> {
        let bank = self.banks.of_bystander(vcpu, state)?;
        self.may_be_interrupted(vcpu, state)?;
        Ok(bank)
    }

    /// Whether a machine check that `vcpu` did not call for would harm what it is doing.
    fn may_be_interrupted(&self, vcpu: usize, state: &McaState) -> Result<(), WaitReason> {
        if self.vcpus.get(vcpu).is_some_and(|seen| seen.in_handler) {
            return Err(WaitReason::InHandler { vcpu: index(vcpu) });
        }
        if state.event_in_flight {
            return Err(WaitReason::EventInFlight { vcpu: index(vcpu) });
        }
        Ok(())
    }

    /// What holds back an AO that has a place.
    fn may_go(&self, vcpu: usize, form: Form, now: Duration) -> Result<(), WaitReason> {
        let since = self.vcpus.get(vcpu).and_then(|seen| seen.open_since);
        let settled = since.is_some_and(|since| now.saturating_sub(since) >= SETTLE);
        if !form.raises_mc() && !settled {
            return Err(WaitReason::JustOpened { vcpu: index(vcpu) });
        }
        match self.room_at() {
            Some(at) if at <= now => Ok(()),
            _ => Err(WaitReason::Pace),
        }
    }

    fn blocked(&self, vcpu: usize, error: Pending, wait: WaitReason) -> Step {
        match error.kind {
            FailureKind::ActionRequired => {
                Step::Cannot(error, UndeliverableReason::Blocked { by: wait })
            }
            // Where any vCPU will do, one of them says what all wait for.
            FailureKind::ActionOptional if vcpu != self.ao_vcpu => Step::Idle,
            FailureKind::ActionOptional => Step::Wait(error, wait),
        }
    }
}

#[cfg(test)]
mod tests;
