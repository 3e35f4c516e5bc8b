//! The invariants. The audit sees every step of a history and keeps its own account of each error;
//! it panics at the first step that breaks a rule, with the rule.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use mce_relay::internals::LOOP_ROUNDS;
use mce_relay::internals::machine_check::{Assignment, Pending, Taken};
use mce_relay::mca::{
    AO_BANK, AR_BANKS, Bank, Caps, DEFERRED_BANKS, McaState, Record, Vendor, cap, mcg, status,
};
use mce_relay::{FailureKind, Ledger, Pace, State, UndeliverableReason, WaitReason, mca};

use super::Counts;
use super::guest::{GuestStep, Took};

/// Linux wipes its banks within this time of setting CR4.MCE. Nobody can tell a later wipe from an
/// acknowledgement.
const SETTLE: Duration = Duration::from_secs(1);

/// A guest that has had nothing to do for so long may take so long until it begins with a record.
const BEGINS: Duration = Duration::from_secs(1);

/// Linux has left its handler within this time of clearing MCG_STATUS.MCIP.
const LEAVE: Duration = Duration::from_secs(1);

/// A record of an error in a bank, until `Delivery` says what became of it.
#[derive(Debug)]
struct InBank {
    error: Pending,
    record: Record,
    /// The guest has read it.
    read: bool,
    /// The page is not the guest's any more.
    gone: bool,
    /// The guest has wiped its bank, in a way that Linux does not.
    thrown_away: bool,
    /// A look has shown the vCPU with its handler closed since.
    seen_closed: bool,
}

/// What is known of a vCPU besides its state.
#[derive(Debug, Default)]
struct Handler {
    /// Since when its handler has in fact been open.
    open_since: Option<Duration>,
    /// Since when looks have shown it open.
    seen_open_since: Option<Duration>,
    /// The last look has shown it online.
    seen_online: bool,
    /// It has been closed since the last look.
    closed_unseen: bool,
    /// It was closed and opened again between two looks: what it did with its banks then, nobody saw.
    missed: bool,
    /// MCG_STATUS.MCIP is set.
    mcip: bool,
    /// When it was last cleared.
    mcip_cleared: Duration,
}

/// Records that are worked off one after the other, each in the same time.
#[derive(Debug)]
struct Backlog {
    each: Duration,
    /// So long it takes until the first one is begun, after a rest as long as that.
    begins: Duration,
    done_at: VecDeque<Duration>,
    /// When the last one of those that are done was done.
    rests_since: Option<Duration>,
}

impl Backlog {
    fn new(pace: Pace, begins: Duration) -> Self {
        let each = Duration::from_secs(1) / pace.rate.max(1);
        Self { each, begins, done_at: VecDeque::new(), rests_since: None }
    }

    fn push(&mut self, now: Duration) {
        self.len(now);
        let is_awake = self.rests_since.is_some_and(|since| now - since < self.begins);
        let begin = match self.done_at.back() {
            Some(last) => *last,
            None if is_awake => now,
            None => now + self.begins,
        };
        self.done_at.push_back(begin + self.each);
    }

    fn len(&mut self, now: Duration) -> usize {
        while let Some(done) = self.done_at.front().copied().filter(|done| *done <= now) {
            self.done_at.pop_front();
            self.rests_since = Some(done);
        }
        self.done_at.len()
    }
}

/// An AO that waits to be told.
#[derive(Debug, Clone, Copy)]
struct WaitingAo {
    gpa: u64,
    /// It was told before, and the guest started over.
    again: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Audit {
    caps: Caps,
    burst: usize,
    /// AOs in the order they came.
    ao: Vec<WaitingAo>,
    /// ARs of each vCPU in the order they came, and whether the guest did not know of the page.
    ar: Vec<Vec<(u64, bool)>>,
    in_banks: BTreeMap<(usize, u8), InBank>,
    handlers: Vec<Handler>,
    /// vCPUs that are held by a pause.
    pub paused: Vec<bool>,
    /// vCPUs whose threads do not come round.
    pub late: Vec<bool>,
    /// What the guest has taken and not worked off: its own queue, which is short.
    guest_queue: Backlog,
    /// The same as far as anybody outside can tell.
    left_banks: Backlog,
    /// What happened.
    pub counts: Counts,
}

fn bank(state: &McaState, bank: u8) -> Bank {
    state.banks[usize::from(bank)]
}

impl Audit {
    /// For a virtual machine of which nothing is known yet.
    pub fn new(caps: Caps, vcpus: usize, pace: Pace) -> Self {
        Self {
            caps,
            burst: usize::try_from(pace.burst.max(1)).expect("a small number"),
            ao: Vec::new(),
            ar: vec![Vec::new(); vcpus],
            in_banks: BTreeMap::new(),
            handlers: (0..vcpus).map(|_| Handler::default()).collect(),
            paused: vec![false; vcpus],
            late: vec![false; vcpus],
            guest_queue: Backlog::new(pace, Duration::ZERO),
            left_banks: Backlog::new(pace, BEGINS),
            counts: Counts::default(),
        }
    }

    /// A page went bad that nobody touched, and the ledger did not know it.
    pub fn ao(&mut self, gpa: u64) {
        self.ao.push(WaitingAo { gpa, again: false });
    }

    /// `vcpu` touched a bad page, of which the guest had not been told if it is `untold`. The guest will learn of it by
    /// the AR: no AO may follow.
    pub fn ar(&mut self, vcpu: usize, gpa: u64, untold: bool) {
        self.ao.retain(|waiting| waiting.gpa != gpa);
        if !self.ar[vcpu].iter().any(|(known, _)| *known == gpa) {
            self.ar[vcpu].push((gpa, untold));
        }
    }

    /// `vcpu` goes on without its ARs: they belong to an instruction that it begins again. Of what the guest does not
    /// know it is told as AOs.
    pub fn goes_on(&mut self, vcpu: usize) {
        for (gpa, untold) in std::mem::take(&mut self.ar[vcpu]) {
            self.counts.count("touches let go");
            if untold && !self.waits(gpa) {
                self.ao.push(WaitingAo { gpa, again: false });
            }
        }
    }

    /// `vcpu` has touched a page and has not come round.
    pub fn has_touched(&self, vcpu: usize) -> bool {
        !self.ar[vcpu].is_empty()
    }

    fn waits(&self, gpa: u64) -> bool {
        let is = |(waiting, _): &(u64, bool)| *waiting == gpa;
        self.ao.iter().any(|waiting| waiting.gpa == gpa) || self.ar.iter().flatten().any(is)
    }

    /// The record in `bank` of `vcpu` was emptied from outside.
    pub fn taken_back(
        &mut self,
        vcpu: usize,
        bank: u8,
        gpa: Option<u64>,
        state: &McaState,
        now: Duration,
    ) {
        let bank_is_valid = state.banks[usize::from(bank)].valid();
        let stands = state.is_closed() || state.halted;
        assert!(!state.mcip() || stands, "taken back from under a handler");
        assert!(
            !state.interrupts_on || gpa.is_none(),
            "taken back from a processor that is online"
        );
        let in_bank = self.in_banks.remove(&(vcpu, bank));
        let told = in_bank.as_ref().filter(|one| !one.gone).map(|one| one.error.gpa);
        assert_eq!(told, gpa, "bank {bank} of vCPU {vcpu}");
        let theirs = in_bank.is_some();
        self.counts.count(if theirs { "taken back" } else { "bystanders taken back" });
        if let Some(in_bank) = in_bank {
            if !bank_is_valid {
                self.left_banks.push(now);
            }
            assert!(
                !in_bank.read || in_bank.seen_closed || state.mcip(),
                "taken back, and the guest has read it: {in_bank:x?}"
            );
            if !in_bank.gone {
                self.again(in_bank.error.gpa);
            }
        }
    }

    /// `vcpu` was unplugged; `again` is what lay in its banks.
    pub fn unplugged(&mut self, vcpu: usize, again: &[u64], now: Duration) {
        self.goes_on(vcpu);
        let keys: Vec<_> = self.in_banks.keys().copied().filter(|(of, _)| *of == vcpu).collect();
        keys.iter().for_each(|_| self.left_banks.push(now));
        let mut pages: Vec<u64> = keys
            .iter()
            .filter_map(|key| self.in_banks.remove(key))
            .filter(|one| !one.gone)
            .map(|one| one.error.gpa)
            .collect();
        let mut said = again.to_vec();
        pages.sort_unstable();
        said.sort_unstable();
        assert_eq!(pages, said, "what lay in the banks of vCPU {vcpu} is told elsewhere");
        self.handlers[vcpu] = Handler::default();
        for gpa in again.iter().rev() {
            self.again(*gpa);
        }
    }

    fn again(&mut self, gpa: u64) {
        let touches = self.ar.iter_mut().flatten().filter(|(of, _)| *of == gpa);
        touches.for_each(|(_, untold)| *untold = true);
        if !self.waits(gpa) {
            self.ao.insert(0, WaitingAo { gpa, again: true });
        }
    }

    /// The page is not the guest's any more.
    pub fn gone(&mut self, gpa: u64) {
        self.in_banks.values_mut().for_each(|one| one.gone |= one.error.gpa == gpa);
        self.ao.retain(|waiting| waiting.gpa != gpa);
        self.ar.iter_mut().for_each(|ars| ars.retain(|(of, _)| *of != gpa));
    }

    /// The guest did `step` on `vcpu`, which left it in `state`, and read `took` out.
    pub fn stepped(
        &mut self,
        vcpu: usize,
        step: GuestStep,
        state: &McaState,
        took: &[Took],
        now: Duration,
    ) {
        self.counts.count("guest steps");
        // It may have gone on to another instruction.
        assert!(
            self.ar[vcpu].is_empty(),
            "vCPU {vcpu} runs with an AR that belongs to where it was"
        );
        let handler = &mut self.handlers[vcpu];
        if state.is_closed() {
            handler.open_since = None;
            handler.closed_unseen = true;
        } else {
            handler.open_since.get_or_insert(now);
        }
        if handler.mcip && !state.mcip() {
            handler.mcip = false;
            handler.mcip_cleared = now;
        }
        let late = handler.open_since.is_some_and(|since| now.saturating_sub(since) >= SETTLE);
        if step == GuestStep::WipeBanks {
            for (_, wiped) in self.in_banks.range_mut((vcpu, 0)..(vcpu + 1, 0)) {
                // A machine check is handled before its vCPU does anything else.
                wiped.thrown_away |= late || wiped.record.mcg_status != 0;
            }
        }
        for took in took {
            self.counts.count("records read");
            // A bystander's record is nobody's.
            let Some(in_bank) = self.in_banks.get_mut(&(vcpu, took.bank)) else { continue };
            let Record { bank, status, addr, .. } = in_bank.record;
            assert_eq!(*took, Took { bank, status, addr }, "the guest reads what was told");
            in_bank.read = true;
            if in_bank.error.kind == FailureKind::ActionOptional {
                self.guest_queue.push(now);
                let held = self.guest_queue.len(now);
                let burst = self.burst;
                assert!(held <= burst, "the guest's queue overflows: {held} AOs, trusted {burst}");
            }
        }
    }

    /// After each step of the history, and after each injection.
    pub fn no_over(vcpu: usize, state: &McaState) {
        for (bank, registers) in state.banks.iter().enumerate() {
            let over = registers.status & status::OVER != 0;
            assert!(!over, "OVER is set in bank {bank} of vCPU {vcpu}");
        }
    }

    /// The relay looks at `vcpu`.
    pub fn seen(&mut self, vcpu: usize, state: &McaState, now: Duration) {
        self.counts.count("looks");
        let handler = &mut self.handlers[vcpu];
        let closed_unseen = std::mem::take(&mut handler.closed_unseen);
        handler.seen_online = !state.is_closed() && state.interrupts_on;
        if state.is_closed() {
            handler.seen_open_since = None;
            handler.missed = false;
            for (_, in_bank) in self.in_banks.range_mut((vcpu, 0)..(vcpu + 1, 0)) {
                in_bank.seen_closed = true;
            }
        } else {
            handler.missed |= closed_unseen && handler.seen_open_since.is_some();
            handler.seen_open_since.get_or_insert(now);
        }
    }

    /// Nobody says what becomes of a record of a page that is not the guest's: it goes as any other.
    pub fn of_gone_pages(&mut self, vcpu: usize, state: &McaState, now: Duration) {
        if state.is_closed() || state.mcip() {
            return;
        }
        let before = self.in_banks.len();
        self.in_banks.retain(|(of, number), in_bank| {
            *of != vcpu || !in_bank.gone || bank(state, *number).valid()
        });
        (self.in_banks.len()..before).for_each(|_| self.left_banks.push(now));
    }

    /// `Delivery` says what became of a record in one of `vcpu`'s banks.
    pub fn taken(&mut self, vcpu: usize, taken: Taken, state: &McaState, now: Duration) {
        self.left_banks.push(now);
        match taken {
            Taken::Acknowledged { gpa, bank: number, form } => {
                self.counts.count("acknowledged");
                let in_bank = self.in_banks.remove(&(vcpu, number));
                let in_bank = in_bank.expect("an acknowledgement of a record that was never there");
                assert_eq!(in_bank.error.gpa, gpa, "acknowledged is the page that was told");
                assert_eq!(Some(form), mca::form(in_bank.error.kind, &self.caps), "in this form");
                assert!(!bank(state, number).valid(), "acknowledged, and the bank is still valid");
                assert!(
                    !state.mcip(),
                    "acknowledged, and the guest is still in its handler (MCIP)"
                );
                assert!(
                    !in_bank.seen_closed,
                    "acknowledged, and the guest was seen to start over before: {in_bank:x?}"
                );
                if !in_bank.read {
                    let unknowable = in_bank.thrown_away || self.handlers[vcpu].missed;
                    assert!(unknowable, "acknowledged, and the guest never read it: {in_bank:x?}");
                    self.counts.count("wiped where nobody could see it");
                }
            }
            Taken::Lost { gpa } => {
                self.counts.count("told again");
                let restarted = self.in_banks.iter().find(|((at, number), in_bank)| {
                    let cleared = *at == vcpu && !bank(state, *number).valid();
                    cleared && in_bank.error.gpa == gpa && in_bank.seen_closed
                });
                let key = *restarted.expect("lost, and the guest did not start over").0;
                if self.in_banks.remove(&key).is_some_and(|in_bank| !in_bank.gone) {
                    self.again(gpa);
                }
            }
        }
    }

    /// `told` are to be injected, all of them, into vCPUs that are in the states `before` and in so
    /// many of their `handlers`.
    pub fn before_injection(
        &mut self,
        told: &[Assignment],
        before: &[McaState],
        handlers: &[u32],
        now: Duration,
    ) {
        for one in told {
            let Assignment { vcpu, error, record } = one;
            let state = &before[*vcpu];
            assert!(!state.waits_for_sipi, "a record for vCPU {vcpu}, which waits for SIPI");
            assert!(self.survives(record), "the guest panics: {record:x?} for vCPU {vcpu}");
            let twice = told.iter().filter(|other| other.vcpu == *vcpu).count() > 1;
            assert!(!twice, "two records for vCPU {vcpu} at once");
            let local = record.mcg_status & mcg::LMCES != 0;
            assert!(!local || state.lmce, "a local machine check for vCPU {vcpu} without LMCE");
            if local {
                self.counts.count("local machine checks");
            }
            let raises = record.mcg_status != 0;
            let ar = error.is_some_and(|(error, _)| error.kind == FailureKind::ActionRequired);
            if raises && !ar {
                let cleared = self.handlers[*vcpu].mcip_cleared;
                let leaving = now.saturating_sub(cleared) < LEAVE;
                assert!(
                    handlers[*vcpu] == 0 || !leaving,
                    "a machine check for vCPU {vcpu}, which is still leaving its handler"
                );
                let in_flight = state.event_in_flight;
                assert!(!in_flight, "vCPU {vcpu} forgets an interrupt for a machine check");
            }
            let ao = error.is_some_and(|(error, _)| error.kind == FailureKind::ActionOptional);
            if ao && raises && !local {
                // To a processor that is offline, or was left behind, it is no error, and to the others it is one from
                // nowhere, of which they panic.
                let takes = |state: &McaState| !state.is_closed() && state.interrupts_on;
                let others = told.iter().any(|told| takes(&before[told.vcpu]));
                assert!(takes(state) || !others, "vCPU {vcpu} may be offline, and is told an AO");
            }
            if raises && !local && self.caps.vendor == Vendor::Intel {
                for (other, state) in before.iter().enumerate() {
                    let stopped = state.halted && state.mcip();
                    let open = !state.is_closed() && !stopped && state.mcg_ctl == u64::MAX;
                    assert!(
                        !open || told.iter().any(|told| told.vcpu == other),
                        "a rendezvous reaches all or none: vCPU {other} is open and left out"
                    );
                }
            }
            match error {
                None => self.counts.count("bystanders"),
                Some((error, _)) => self.in_order(*vcpu, *error),
            }
        }
        assert!(
            told.is_empty() || told.iter().any(|one| one.error.is_some()),
            "a machine check without any error: the guest panics"
        );
        if told.len() > 1 {
            self.counts.count("rendezvous");
        }
    }

    /// Whether Linux with these capabilities lives on with `record` (`mce_severity`): it panics of an
    /// uncorrected error that it was not shown how to recover from, and of one that is neither
    /// signalled (Intel) nor contained (AMD).
    fn survives(&self, record: &Record) -> bool {
        let Record { status, mcg_status, .. } = *record;
        let has = |bit| status & bit != 0;
        match (self.caps.vendor, mcg_status & mcg::MCIP != 0) {
            (Vendor::Intel, raises) => raises && self.caps.has(cap::SER_P) && has(status::S),
            (Vendor::Amd, true) => self.caps.succor && has(status::POISON),
            (Vendor::Amd, false) => has(status::DEFERRED) && !has(status::UC),
        }
    }

    /// It is the turn of `error` on `vcpu`.
    fn in_order(&mut self, vcpu: usize, error: Pending) {
        let Pending { gpa, kind } = error;
        let ars = &self.ar[vcpu];
        match kind {
            FailureKind::ActionRequired => {
                self.counts.count("ARs told");
                let touched = ars.iter().any(|(of, _)| *of == gpa);
                assert!(touched, "an AR for {gpa:#x}, which vCPU {vcpu} did not touch");
                assert_eq!(ars[0].0, gpa, "ARs of vCPU {vcpu} are told in their order");
            }
            FailureKind::ActionOptional => {
                self.counts.count("AOs told");
                assert!(ars.is_empty(), "an AO on vCPU {vcpu} before its AR for {:#x}", ars[0].0);
                let at = self.ao.iter().position(|waiting| waiting.gpa == gpa);
                let at = at.unwrap_or_else(|| panic!("{gpa:#x} is told twice, or after its AR"));
                // What is to be told again is put in front, also while a machine check is under way to the guest.
                let overtakes = self.ao[..at].iter().any(|waiting| !waiting.again);
                assert!(
                    !overtakes || self.ao[at].again,
                    "AOs are told in their order: {:x?}",
                    self.ao
                );
            }
        }
    }

    /// `told` is in its bank.
    pub fn injected(&mut self, told: &Assignment) {
        self.handlers[told.vcpu].mcip |= told.record.mcg_status & mcg::MCIP != 0;
        let Some((error, _)) = told.error else { return };
        self.waits_no_longer(told.vcpu, &error);
        // The guest knows of it from here on, whoever else has touched it.
        let same = self.ar.iter_mut().flatten().filter(|(gpa, _)| *gpa == error.gpa);
        same.for_each(|(_, untold)| *untold = false);
        let record = told.record;
        let in_bank = InBank {
            error,
            record,
            read: false,
            gone: false,
            thrown_away: false,
            seen_closed: false,
        };
        let before = self.in_banks.insert((told.vcpu, record.bank), in_bank);
        assert!(before.is_none(), "{told:x?} overwrites {before:x?}");
        if error.kind == FailureKind::ActionRequired {
            // One at once is all that a vCPU can be told.
            self.goes_on(told.vcpu);
        }
    }

    fn waits_no_longer(&mut self, vcpu: usize, error: &Pending) {
        match error.kind {
            FailureKind::ActionOptional => self.ao.retain(|waiting| waiting.gpa != error.gpa),
            FailureKind::ActionRequired => self.ar[vcpu].retain(|(gpa, _)| *gpa != error.gpa),
        }
    }

    /// `Delivery` has nothing to do on `vcpu`, which is the one that is to be told of AOs, or not.
    pub fn idle(&self, vcpu: usize, takes_aos: bool) {
        assert!(self.ar[vcpu].is_empty(), "vCPU {vcpu} is let go without its AR");
        let all_told = !takes_aos || self.ao.is_empty();
        assert!(all_told, "AOs wait, and nobody says for what: {:x?}", self.ao);
    }

    /// `Delivery` says that `error` has to wait, of vCPUs that are in `states`.
    pub fn waiting(
        &mut self,
        error: &Pending,
        wait: WaitReason,
        states: &[McaState],
        now: Duration,
    ) {
        let known = match error.kind {
            FailureKind::ActionOptional => self.ao.iter().any(|waiting| waiting.gpa == error.gpa),
            FailureKind::ActionRequired => {
                self.ar.iter().flatten().any(|(gpa, _)| *gpa == error.gpa)
            }
        };
        assert!(known, "{error:x?} waits, and was told already");
        self.is_true(error.kind, wait, states, now);
        // A processor that is offline holds up nobody, but for the moment until it has left its handler.
        let holds = match wait {
            WaitReason::InHandler { vcpu } | WaitReason::BankValid { vcpu, .. } => {
                Some(vcpu as usize)
            }
            _ => None,
        };
        let offline = |vcpu: usize| states[vcpu].halted && !states[vcpu].is_closed();
        if let Some(vcpu) = holds.filter(|vcpu| offline(*vcpu)) {
            let others = self.handlers.iter().any(|other| other.seen_online);
            assert!(!others, "{error:x?} waits for vCPU {vcpu}, which is offline: {wait}");
        }
    }

    /// `Delivery` says that `error` can never be told on `vcpu`.
    pub fn cannot(
        &mut self,
        vcpu: usize,
        error: &Pending,
        why: UndeliverableReason,
        states: &[McaState],
        now: Duration,
    ) {
        self.counts.count("cannot be told");
        match why {
            UndeliverableReason::NoForm => {
                let form = match self.caps.vendor {
                    Vendor::Intel => self.caps.has(cap::SER_P),
                    Vendor::Amd => self.caps.succor || error.kind == FailureKind::ActionOptional,
                };
                assert!(!form, "{error:x?} has a form in this guest");
            }
            UndeliverableReason::Blocked { by } => {
                assert_eq!(error.kind, FailureKind::ActionRequired, "an AO can wait");
                self.is_true(error.kind, by, states, now);
                if let WaitReason::BankValid { vcpu, bank } = by
                    && let Some(in_bank) = self.in_banks.get(&(vcpu as usize, bank))
                {
                    let ar = in_bank.error.kind == FailureKind::ActionRequired;
                    assert!(ar, "an AR that an AO's record is in the way of: {by}");
                }
            }
            UndeliverableReason::Loop { rounds } => {
                assert_eq!(error.kind, FailureKind::ActionRequired, "nobody touches for an AO");
                // It is said of one vCPU when all of them may have touched the page just now.
                let late = rounds.checked_sub(LOOP_ROUNDS).map(|late| late as usize);
                assert!(
                    late < Some(self.ar.len()) && late.is_some(),
                    "as soon as it is one: {rounds}"
                );
            }
            UndeliverableReason::Refused | UndeliverableReason::NoState => {
                panic!("delivery cannot know that")
            }
            UndeliverableReason::NoTaker { .. } | UndeliverableReason::WentBad => {
                panic!("nothing is predicted here")
            }
        }
        self.waits_no_longer(vcpu, error);
    }

    /// `wait`, of an error of `kind`, has to be the truth about `states`.
    fn is_true(&mut self, kind: FailureKind, wait: WaitReason, states: &[McaState], now: Duration) {
        self.counts.count(name(wait));
        let of = |vcpu: u32| &states[vcpu as usize];
        let truth = match wait {
            WaitReason::NotStarted { vcpu } => of(vcpu).waits_for_sipi,
            WaitReason::Cr4MceClear { vcpu } => !of(vcpu).cr4_mce,
            WaitReason::Mcip { vcpu } => of(vcpu).mcip(),
            WaitReason::McgCtlOff { vcpu } => of(vcpu).mcg_ctl != u64::MAX,
            WaitReason::BankCtlOff { vcpu, bank: number } => {
                bank(of(vcpu), number).ctl != u64::MAX && number < self.caps.banks()
            }
            WaitReason::BankValid { vcpu, bank: number } => bank(of(vcpu), number).valid(),
            WaitReason::NoBank { .. } => self.lacks_banks(kind),
            WaitReason::InHandler { vcpu } => !of(vcpu).interrupts_on,
            WaitReason::EventInFlight { vcpu } => of(vcpu).event_in_flight,
            WaitReason::JustOpened { vcpu } => {
                let since = self.handlers[vcpu as usize].seen_open_since;
                since.is_some_and(|since| now.saturating_sub(since) < SETTLE)
            }
            WaitReason::Pace => {
                let aos = self.in_banks.values();
                let aos = aos.filter(|at| at.error.kind == FailureKind::ActionOptional).count();
                aos + self.left_banks.len(now) >= self.burst
            }
            // Said when a record is lost, which `taken` has checked.
            WaitReason::Restarted { .. }
            | WaitReason::Offline { .. }
            | WaitReason::Unplugged { .. } => false,
            WaitReason::Paused { vcpu } => self.paused[vcpu as usize],
            WaitReason::NotComing { vcpu } => self.late[vcpu as usize],
            // There is no error source here.
            WaitReason::NoSourceYet | WaitReason::InBlock | WaitReason::NotByFirmware { .. } => {
                false
            }
        };
        assert!(truth, "this is not so: {wait}");
    }

    /// The guest was shown none of the banks that carry errors of `kind`.
    fn lacks_banks(&self, kind: FailureKind) -> bool {
        let banks: &[u8] = match (kind, self.caps.vendor) {
            (FailureKind::ActionRequired, _) => &AR_BANKS,
            (FailureKind::ActionOptional, Vendor::Intel) => &[AO_BANK],
            (FailureKind::ActionOptional, Vendor::Amd) => &DEFERRED_BANKS,
        };
        banks.iter().all(|bank| *bank >= self.caps.banks())
    }

    /// Whether nothing waits to be told or acknowledged.
    pub fn is_idle(&self) -> bool {
        self.ao.is_empty() && self.ar.iter().all(Vec::is_empty) && self.in_banks.is_empty()
    }

    /// The guest has been well for long enough: every page is acknowledged, or there is a reason that
    /// a well guest does not lift.
    pub fn finish(&mut self, ledger: &Ledger) {
        // The first says what it waits for, and the others wait for their turn.
        let no_bank = |state| matches!(state, State::Waiting { wait: WaitReason::NoBank { .. } });
        let lacks_banks = self.lacks_banks(FailureKind::ActionOptional);
        let first_says = lacks_banks && ledger.pages().any(|page| no_bank(page.state));
        for page in ledger.pages() {
            self.counts.count("pages");
            let waits = self.ao.iter().any(|ao| ao.gpa == page.gpa);
            match page.state {
                State::Acknowledged { .. } => {}
                // Held against the state of its time by `cannot`.
                State::Undeliverable { .. } | State::Removed => {}
                _ if waits && first_says => {}
                state => panic!("in the end, {:#x} is {state}", page.gpa),
            }
        }
    }
}

/// A name to count `wait` by.
fn name(wait: WaitReason) -> &'static str {
    match wait {
        WaitReason::NotStarted { .. } => "waits for SIPI",
        WaitReason::Cr4MceClear { .. } => "waits for CR4.MCE",
        WaitReason::Mcip { .. } => "waits for MCIP",
        WaitReason::McgCtlOff { .. } => "waits for MCG_CTL",
        WaitReason::BankCtlOff { .. } => "waits for MCi_CTL",
        WaitReason::BankValid { .. } => "waits for VAL",
        WaitReason::NoBank { .. } => "waits for a bank",
        WaitReason::InHandler { .. } => "waits for the handler's end",
        WaitReason::EventInFlight { .. } => "waits for an interrupt",
        WaitReason::JustOpened { .. } => "waits to settle",
        WaitReason::Restarted { .. } => "waits after a restart",
        WaitReason::Paused { .. } => "waits for a pause",
        WaitReason::NotComing { .. } => "waits for a thread",
        WaitReason::Offline { .. } => "waits after it was offline",
        WaitReason::Unplugged { .. } => "waits after it was unplugged",
        WaitReason::Pace => "waits for the pace",
        WaitReason::NoSourceYet => "waits for a source",
        WaitReason::InBlock => "waits for the block",
        WaitReason::NotByFirmware { .. } => "waits after firmware",
    }
}
