//! Plays a history: what the relay's thread and `VcpuPort::attend` do with `Delivery`, on one thread.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use mce_relay::internals::machine_check::{Assignment, Delivery, Pending, Step, Taken};
use mce_relay::mca::{Caps, McaState, msr};
use mce_relay::{
    FailureKind, FoundBy, Ledger, PAGE_SHIFT, Place, State, UndeliverableReason, WaitReason,
};

use super::audit::Audit;
use super::guest::{self, GuestStep, TRIPLE_FAULT, Took};
use super::{Counts, History, Op, Vcpu, gpa};

/// How long an AR is held back for other processors (`AR_PATIENCE` in `relay/src/relay/vcpu_port.rs`).
const AR_PATIENCE: Duration = Duration::from_secs(5);

/// Plays `history` on `vcpus` and has the guest become well at its end; what happened.
///
/// # Panics
/// An invariant is broken: see [`Audit`].
pub fn play<V: Vcpu>(history: &History, vcpus: Vec<V>) -> Counts {
    let mut driver = Driver::new(history, vcpus);
    for op in &history.ops {
        driver.op(*op);
    }
    driver.become_well();
    driver.audit.finish(&driver.ledger);
    driver.audit.counts.count("histories");
    driver.audit.counts
}

struct Driver<V> {
    caps: Caps,
    vcpus: Vec<V>,
    delivery: Delivery,
    ledger: Ledger,
    audit: Audit,
    now: Duration,
    /// An AR's signal lies in the slot of its thread, which therefore comes round before it runs.
    attention: Vec<bool>,
    /// Since when a vCPU has been kept out of the guest for others to leave their handlers.
    held: Vec<Option<Duration>>,
    /// The vCPU was started once.
    started: Vec<bool>,
    /// The vCPU is plugged in.
    plugged: Vec<bool>,
    /// Pages that are not the guest's.
    gone: BTreeSet<u64>,
}

impl<V: Vcpu> Driver<V> {
    fn new(history: &History, vcpus: Vec<V>) -> Self {
        let History { caps, pace, .. } = *history;
        let count = vcpus.len();
        Self {
            caps,
            vcpus,
            delivery: Delivery::new(Some(caps), count, pace),
            ledger: Ledger::default(),
            audit: Audit::new(caps, count, pace),
            now: Duration::ZERO,
            attention: vec![false; count],
            held: vec![None; count],
            started: (0..count).map(|vcpu| vcpu == 0).collect(),
            plugged: vec![true; count],
            gone: BTreeSet::new(),
        }
    }

    fn op(&mut self, op: Op) {
        self.audit.counts.count("steps");
        match op {
            Op::Ao { first, pages } => {
                (first..first + pages)
                    .for_each(|page| self.enter(FailureKind::ActionOptional, page, None));
            }
            Op::Ar { vcpu, page } => {
                // It has to run to touch anything; what its thread has not come round for it has
                // touched already.
                if !self.runs(vcpu) || self.vcpus[vcpu].state().halted {
                    return;
                }
                if !self.audit.has_touched(vcpu) {
                    self.guest(vcpu, GuestStep::Run);
                    if self.held[vcpu].is_some() {
                        return;
                    }
                }
                self.enter(FailureKind::ActionRequired, page, Some(vcpu));
                self.attention[vcpu] = true;
            }
            Op::Interrupt(vcpu) => self.interrupt(vcpu),
            Op::Look(vcpu) => self.look(vcpu),
            Op::Advance(time) => self.now += time,
            Op::Guest(vcpu, step) => {
                self.guest(vcpu, step);
            }
            Op::Pause(vcpu, on) => self.pause(vcpu, on),
            Op::Late(vcpu, on) => self.audit.late[vcpu] = on && self.held[vcpu].is_none(),
            Op::Plug(vcpu, on) => self.plug(vcpu, on),
            Op::Ram(page, on) => self.ram(gpa(page), on),
        }
        for vcpu in 0..self.vcpus.len() {
            if self.held[vcpu].is_some() {
                self.look(vcpu);
            }
        }
        for (vcpu, state) in self.states().iter().enumerate() {
            Audit::no_over(vcpu, state);
        }
    }

    fn states(&mut self) -> Vec<McaState> {
        self.vcpus.iter_mut().map(Vcpu::state).collect()
    }

    fn set(&mut self, gpa: u64, state: State) {
        self.ledger.set(gpa, state, SystemTime::UNIX_EPOCH + self.now);
    }

    /// Its thread is there, and is held neither by a pause nor by anything else.
    fn runs(&self, vcpu: usize) -> bool {
        self.plugged[vcpu] && !self.audit.paused[vcpu] && !self.audit.late[vcpu]
    }

    /// As `VcpuPort::park`: the vCPU comes round first, and once more before it runs again.
    fn pause(&mut self, vcpu: usize, on: bool) {
        let is_late = self.audit.late[vcpu];
        if self.plugged[vcpu] && !is_late && self.held[vcpu].is_none() {
            if on && self.attention[vcpu] {
                self.look(vcpu);
            }
            if self.held[vcpu].is_none() {
                self.audit.paused[vcpu] = on;
                self.attention[vcpu] = true;
            }
        }
    }

    /// As the drop of a port, and as `Relay::attach`.
    fn plug(&mut self, vcpu: usize, on: bool) {
        let another = (0..self.vcpus.len())
            .any(|other| other != vcpu && self.plugged[other] && self.started[other]);
        if self.plugged[vcpu] == on || (!on && !another) {
            return;
        }
        self.plugged[vcpu] = on;
        self.audit.paused[vcpu] = false;
        self.audit.late[vcpu] = false;
        self.held[vcpu] = None;
        self.attention[vcpu] = false;
        self.started[vcpu] = false;
        if on {
            self.delivery.attached(vcpu);
            return;
        }
        self.audit.counts.count("unplugged");
        let again = self.delivery.absent(vcpu, self.now);
        self.audit.unplugged(vcpu, &again, self.now);
        for gpa in again {
            self.set(gpa, State::Waiting { wait: WaitReason::Unplugged { vcpu: number(vcpu) } });
        }
        // The next one there is a new one.
        let new = &mut self.vcpus[vcpu];
        new.init();
        for bank in 0..self.caps.banks() {
            new.host_wrmsr(msr::mc_ctl(bank), u64::MAX);
            new.host_wrmsr(msr::mc_status(bank), 0);
        }
        new.host_wrmsr(msr::MCG_STATUS, 0);
        new.host_wrmsr(msr::MCG_CTL, u64::MAX);
    }

    /// As `Handle::remove_ram` and `add_ram`.
    fn ram(&mut self, gpa: u64, on: bool) {
        if on {
            if self.gone.remove(&gpa) {
                self.ledger.heal(gpa, SystemTime::UNIX_EPOCH + self.now);
            }
        } else if self.gone.insert(gpa) {
            self.delivery.gone(&|one| one == gpa);
            self.audit.gone(gpa);
            self.set(gpa, State::Removed);
        }
    }

    /// As `Shared::enter`.
    fn enter(&mut self, kind: FailureKind, page: u64, vcpu: Option<usize>) {
        let (gpa, now) = (gpa(page), SystemTime::UNIX_EPOCH + self.now);
        if self.gone.contains(&gpa) {
            return;
        }
        let untold = self.ledger.get(gpa).is_none_or(|page| page.state.is_untold());
        let new = self.ledger.enter(gpa, gpa, PAGE_SHIFT, kind, FoundBy::Signal, now);
        match vcpu {
            Some(vcpu) => {
                self.delivery.push_ar(vcpu, gpa, untold, self.now);
                self.audit.ar(vcpu, gpa, untold);
            }
            None if new => {
                self.delivery.push_ao(gpa);
                self.audit.ao(gpa);
            }
            None => {}
        }
    }

    /// The guest runs on `vcpu`, after its thread has come round if it has to.
    fn guest(&mut self, vcpu: usize, step: GuestStep) -> Vec<Took> {
        if !self.runs(vcpu) {
            return Vec::new();
        }
        if self.attention[vcpu] {
            self.look(vcpu);
        }
        if self.held[vcpu].is_some() {
            return Vec::new();
        }
        let took = guest::step(&mut self.vcpus[vcpu], &self.caps, step);
        let state = self.vcpus[vcpu].state();
        self.started[vcpu] |= !state.waits_for_sipi;
        self.audit.stepped(vcpu, step, &state, &took, self.now);
        took
    }

    fn interrupt(&mut self, vcpu: usize) {
        let state = self.vcpus[vcpu].state();
        let runs = self.runs(vcpu)
            && !state.waits_for_sipi
            && !self.attention[vcpu]
            && self.held[vcpu].is_none();
        if runs && state.interrupts_on && !state.event_in_flight {
            self.vcpus[vcpu].interrupt();
        }
    }

    /// As `VcpuPort::attend`.
    fn look(&mut self, me: usize) {
        if !self.runs(me) {
            return;
        }
        self.attention[me] = false;
        loop {
            let state = self.see(me);
            match self.delivery.next(me, &state, self.now) {
                Step::Idle => {
                    let takes_aos = self.delivery.ao_vcpu() == me;
                    self.audit.idle(me, takes_aos);
                    break;
                }
                Step::Inject(told) => self.inject(&[told]),
                Step::Wait(error, wait) => {
                    self.waiting(error, wait);
                    break;
                }
                // After an AR that cannot be told the VMM decides; it comes back before it runs.
                Step::Cannot(error, why) => self.cannot(me, error, why),
                Step::Rendezvous(error) => {
                    let paused = (0..self.vcpus.len()).find(|vcpu| self.audit.paused[*vcpu]);
                    let late = (0..self.vcpus.len()).find(|vcpu| self.audit.late[*vcpu]);
                    let outcome = match (paused, late) {
                        (Some(vcpu), _) => Err(WaitReason::Paused { vcpu: number(vcpu) }),
                        (None, Some(vcpu)) => Err(WaitReason::NotComing { vcpu: number(vcpu) }),
                        (None, None) => {
                            let all = 0..self.vcpus.len();
                            let states: Vec<_> =
                                all.map(|v| self.plugged[v].then(|| self.see(v))).collect();
                            self.delivery.rendezvous(me, error, &states, self.now)
                        }
                    };
                    match outcome {
                        // It is another vCPU's matter, which looks next.
                        Ok(told) if told.is_empty() => {
                            let other = self.delivery.ao_vcpu();
                            assert_ne!(other, me, "nothing is told, and there is no other");
                            self.attention[other] = true;
                        }
                        Ok(told) => {
                            self.inject(&told);
                            // The others go round once more before they run.
                            told.iter().for_each(|told| self.attention[told.vcpu] = true);
                        }
                        Err(wait) => {
                            self.waiting(error, wait);
                            if error.kind == FailureKind::ActionOptional {
                                break;
                            }
                            if paused.is_some() {
                                // It pauses, too, and touches again what it touched.
                                self.delivery.goes_on(me);
                                self.audit.goes_on(me);
                                break;
                            }
                            let since = *self.held[me].get_or_insert(self.now);
                            if self.now - since <= AR_PATIENCE {
                                return;
                            }
                            self.cannot(me, error, UndeliverableReason::Blocked { by: wait });
                        }
                    }
                }
            }
        }
        self.held[me] = None;
    }

    /// Reads `vcpu`'s state, and what has become of the records in its banks; takes back those that it leaves there.
    fn see(&mut self, vcpu: usize) -> McaState {
        let mut state = self.seen(vcpu);
        let left = self.delivery.left_behind(vcpu, &state, self.now);
        for &bank in &left {
            self.vcpus[vcpu].host_wrmsr(msr::mc_status(bank), 0);
            let gpa = self.delivery.taken_back(vcpu, bank);
            self.audit.taken_back(vcpu, bank, gpa, &state, self.now);
            if let Some(gpa) = gpa {
                self.set(gpa, State::Waiting { wait: WaitReason::Offline { vcpu: number(vcpu) } });
            }
        }
        if !left.is_empty() {
            state = self.seen(vcpu);
        }
        state
    }

    fn seen(&mut self, vcpu: usize) -> McaState {
        let state = self.vcpus[vcpu].state();
        self.audit.seen(vcpu, &state, self.now);
        self.audit.of_gone_pages(vcpu, &state, self.now);
        for taken in self.delivery.taken(vcpu, &state, self.now) {
            self.audit.taken(vcpu, taken, &state, self.now);
            match taken {
                Taken::Acknowledged { gpa, bank, form } => {
                    let place = Place::Mce { vcpu: number(vcpu), bank, form };
                    self.set(gpa, State::Acknowledged { place });
                }
                Taken::Lost { gpa } => {
                    let wait = WaitReason::Restarted { vcpu: number(vcpu) };
                    self.set(gpa, State::Waiting { wait });
                }
            }
        }
        state
    }

    fn waiting(&mut self, error: Pending, wait: WaitReason) {
        let states = self.states();
        self.audit.waiting(&error, wait, &states, self.now);
        let untold = self.ledger.get(error.gpa).is_some_and(|page| page.state.is_untold());
        if untold || error.kind == FailureKind::ActionOptional {
            self.set(error.gpa, State::Waiting { wait });
        }
    }

    fn cannot(&mut self, vcpu: usize, error: Pending, why: UndeliverableReason) {
        let states = self.states();
        self.audit.cannot(vcpu, &error, why, &states, self.now);
        self.delivery.forget(vcpu, &error);
        if error.kind == FailureKind::ActionRequired {
            self.delivery.goes_on(vcpu);
            self.audit.goes_on(vcpu);
        }
        self.set(error.gpa, State::Undeliverable { why });
    }

    /// As `Shared::inject`, for one record or for all of a rendezvous.
    fn inject(&mut self, all: &[Assignment]) {
        let before = self.states();
        let handlers: Vec<_> = self.vcpus.iter().map(Vcpu::handlers).collect();
        self.audit.before_injection(all, &before, &handlers, self.now);
        for told in all {
            let Assignment { vcpu, error, record } = *told;
            let accepted = self.vcpus[vcpu].inject(&record);
            let state = self.vcpus[vcpu].state();
            Audit::no_over(vcpu, &state);
            let held = state.banks[usize::from(record.bank)].status == record.status;
            let raised = record.mcg_status == 0 || state.mcg_status == record.mcg_status;
            if accepted && held && raised {
                self.audit.injected(told);
                self.delivery.told(told);
                if let Some((error, form)) = error {
                    let place = Place::Mce { vcpu: number(vcpu), bank: record.bank, form };
                    self.set(error.gpa, State::Injected { place });
                }
            } else {
                assert!(self.vcpus[vcpu].resume(), "{TRIPLE_FAULT}: {record:x?} for vCPU {vcpu}");
                panic!("refused or swallowed: {record:x?} for vCPU {vcpu}");
            }
        }
    }

    /// The guest does all that a well guest does, again and again, and the relay's thread has those
    /// vCPUs look that `Delivery` names, until nothing is left to do.
    fn become_well(&mut self) {
        for vcpu in 0..self.vcpus.len() {
            self.op(Op::Late(vcpu, false));
            self.op(Op::Pause(vcpu, false));
        }
        // An offline processor waits ten seconds at most for what it does not do, and each page may wait there.
        let rounds = 40 + 4 * self.ledger.pages().count();
        for _ in 0..rounds {
            for vcpu in 0..self.vcpus.len() {
                self.be_well(vcpu);
            }
            self.op(Op::Advance(Duration::from_secs(1)));
            for vcpu in self.delivery.waiting_vcpus(self.now) {
                self.op(Op::Look(vcpu));
            }
            let idle = self.delivery.is_idle();
            assert_eq!(idle, self.audit.is_idle(), "whether nothing waits: {:x?}", self.audit);
            if idle {
                break;
            }
        }
    }

    fn be_well(&mut self, vcpu: usize) {
        if !self.started[vcpu] || !self.plugged[vcpu] {
            return;
        }
        if self.vcpus[vcpu].state().halted {
            // It takes what is queued, and stays offline as long as another one is there.
            self.guest(vcpu, GuestStep::Run);
            let others = (0..self.vcpus.len())
                .filter(|other| *other != vcpu && self.started[*other] && self.plugged[*other]);
            if others.into_iter().any(|other| !self.vcpus[other].state().halted) {
                return;
            }
            self.guest(vcpu, GuestStep::Init);
            self.guest(vcpu, GuestStep::Start);
        }
        // One more than it is in, for the one that may be queued.
        let handlers = 0..=self.vcpus[vcpu].handlers();
        let mut guest = |step| self.guest(vcpu, step);
        guest(GuestStep::Interrupts(true));
        for _ in handlers {
            while !guest(GuestStep::HandleOneBank).is_empty() {}
            guest(GuestStep::LeaveHandler);
        }
        guest(GuestStep::Poll);
        // What no handler and no poll takes is there until the guest starts over on this vCPU.
        let state = self.vcpus[vcpu].state();
        let banks = &state.banks[..usize::from(self.caps.banks())];
        let stuck = banks.iter().any(|bank| bank.valid() || bank.ctl != u64::MAX);
        if stuck || state.waits_for_sipi || !state.cr4_mce || state.mcg_ctl != u64::MAX {
            self.guest(vcpu, GuestStep::CloseHandler);
            self.op(Op::Look(vcpu));
            for step in [
                GuestStep::Start,
                GuestStep::Interrupts(true),
                GuestStep::OpenHandler,
                GuestStep::McgCtl(true),
                GuestStep::WipeBanks,
            ] {
                self.guest(vcpu, step);
            }
        }
    }
}

/// A vCPU's index as the ledger has it.
fn number(vcpu: usize) -> u32 {
    u32::try_from(vcpu).expect("a history has a few vCPUs")
}
