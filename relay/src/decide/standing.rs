//! Which vCPU can be given an error: what looks at one vCPU's state over time tell of it. A pure state machine for each
//! vCPU.

use std::cmp::Reverse;
use std::time::Duration;

use crate::x86::mca::McaState;

/// How long after MCG_STATUS.MCIP was seen clear a vCPU has surely left its handler, though it was
/// never seen with interrupts on (a guest may idle with them off). The rest of Linux' handler is some
/// hundred instructions.
pub(crate) const LEAVE: Duration = Duration::from_secs(1);

/// How long a vCPU has to have been seen in HLT with interrupts off before a record that only lies in its bank
/// is taken back: a processor that waits for a lock may halt so, too, for a moment
/// (`kvm_wait`, `arch/x86/kernel/kvm.c`).
const HALTED: Duration = Duration::from_secs(1);

/// Two looks that are further apart than this say nothing of the time between them. A vCPU for which something waits is
/// looked at twice a second.
const STALE: Duration = Duration::from_secs(2);

/// A vCPU that does not halt counts as offline, too, once each look for this long has found it with interrupts off: an
/// offline processor may wait by other means (MWAIT).
pub(crate) const MASKED: Duration = Duration::from_secs(10);

/// What has been seen of a vCPU over time.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Seen {
    /// Since when it has been started and had CR4.MCE set.
    pub(crate) open_since: Option<Duration>,
    /// It was given a machine check and has not been seen out of its handler since.
    pub(crate) in_handler: bool,
    /// Since when it has been seen in that handler with MCG_STATUS.MCIP clear.
    pub(crate) leaving_since: Option<Duration>,
    /// When its state was last read.
    looked_at: Option<Duration>,
    /// When its thread was first called after that.
    pub(crate) called_at: Option<Duration>,
    /// How it stood at that look.
    pub(crate) standing: Standing,
    /// When a look has last found it with interrupts on.
    last_on: Option<Duration>,
    /// It waited in HLT with interrupts off then.
    halted: bool,
    /// Since when each look has found it with interrupts off.
    masked_since: Option<Duration>,
    /// Each look for [`MASKED`] has found it with interrupts off.
    pub(crate) stopped: bool,
    /// It took a machine check and left the record in its bank, and has had interrupts off since.
    pub(crate) ignores: bool,
}

impl Seen {
    /// It has no thread.
    pub(crate) fn absent() -> Self {
        Self { standing: Standing::Absent, ..Self::default() }
    }

    /// For how long each look has found it with interrupts off.
    fn masked_for(&self, now: Duration) -> Duration {
        self.masked_since.map_or(Duration::ZERO, |since| now.saturating_sub(since))
    }

    /// It has halted with interrupts off for [`HALTED`], longer than a wait for a lock takes.
    pub(crate) fn is_stopped(&self, now: Duration) -> bool {
        self.halted && self.masked_for(now) >= HALTED
    }

    /// Whether its thread was called so long ago that it cannot be expected to answer soon.
    pub(crate) fn is_overdue(&self, now: Duration) -> bool {
        self.called_at.is_some_and(|at| now.saturating_sub(at) > STALE)
    }

    /// Whether the guest may have started it since it was last looked at.
    pub(crate) fn may_have_come(&self, now: Duration) -> bool {
        let closed = matches!(self.standing, Standing::Closed | Standing::NotStarted);
        closed && self.looked_at.is_some_and(|at| now.saturating_sub(at) > STALE)
    }

    /// How well it suits errors that concern no particular processor; the smallest rank is the best. Among vCPUs that
    /// have interrupts off now, one that was seen with them on lately was not left behind by a crash, so it comes
    /// first.
    pub(crate) fn rank(&self) -> (Standing, Reverse<Option<Duration>>) {
        (self.standing, Reverse(self.last_on.filter(|_| self.standing == Standing::Masked)))
    }

    /// Whether records that offline processors left untaken may be told on it: it takes interrupts, or will soon.
    pub(crate) fn goes_on(&self, now: Duration) -> bool {
        match self.standing {
            Standing::Online => true,
            Standing::Masked => !self.is_masked(now),
            _ => false,
        }
    }

    /// Whether it has had interrupts off at each look for so long that it polls nothing.
    pub(crate) fn is_masked(&self, now: Duration) -> bool {
        self.masked_for(now) >= MASKED
    }

    /// Its state is `state` now.
    pub(crate) fn look(&mut self, state: &McaState, now: Duration) {
        // What held before a long gap without looks (a pause, say) need not have held in between.
        if self.looked_at.is_some_and(|at| now.saturating_sub(at) > STALE) {
            (self.masked_since, self.leaving_since) = (None, None);
        }
        (self.looked_at, self.called_at) = (Some(now), None);
        if state.is_closed() {
            let standing = match (state.waits_for_sipi, state.halted && !state.interrupts_on) {
                (true, _) => Standing::NotStarted,
                (_, true) => Standing::Offline,
                _ => Standing::Closed,
            };
            let masked_since = self.masked_since.or(Some(now)).filter(|_| !state.interrupts_on);
            let halted = state.halted && !state.interrupts_on;
            let looked_at = self.looked_at;
            *self = Seen { standing, halted, masked_since, looked_at, ..Seen::default() };
        } else {
            self.open_since = self.open_since.or(Some(now));
            self.halted = state.halted && !state.interrupts_on;
            // Linux does not halt in a handler, so a vCPU that halts has left it; and so has one that takes interrupts.
            if self.in_handler && !state.mcip() {
                let since = *self.leaving_since.get_or_insert(now);
                let left = state.interrupts_on || self.halted;
                self.in_handler = !left && now.saturating_sub(since) < LEAVE;
            }
            if state.interrupts_on {
                self.last_on = Some(now);
                self.masked_since = None;
                self.ignores = false;
            } else {
                self.masked_since = self.masked_since.or(Some(now));
            }
            self.stopped = self.is_stopped(now);
            let offline = self.halted || self.ignores;
            self.standing = match (offline, state.interrupts_on) {
                (true, _) => Standing::Offline,
                (false, true) => Standing::Online,
                (false, false) => Standing::Masked,
            };
        }
    }
}

/// How far a vCPU can take part in telling the guest, from the best on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) enum Standing {
    /// Its handler is open and it takes interrupts; also the value before the first look.
    #[default]
    Online,
    /// Its handler is open, and it takes no interrupts now. A processor that a crash kernel left behind spins like this
    /// for ever, once a machine check has woken it out of its HLT.
    Masked,
    /// CR4.MCE is clear.
    Closed,
    /// It has halted with interrupts off for good: the guest has taken it offline.
    Offline,
    /// It waits for its start-up IPI.
    NotStarted,
    /// It was called and its thread does not answer: something else holds it up.
    Held,
    /// It has no thread.
    Absent,
}
