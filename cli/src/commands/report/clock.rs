//! When, by the time of events, something happened of which the ledger has the time of day.

use std::time::{Duration, SystemTime};

use mce_relay::{State, Times};

/// Events and the ledger have the same time to so many microseconds, as an event comes a little later.
const CLOSE: u64 = 1_000_000;
/// The start of a VMM is known to so many microseconds.
const EXACT: u64 = 10_000;

/// The time of day at which events have the time 0; `None` if no event has said it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock(pub Option<f64>);

impl Clock {
    /// Microseconds from the start of the VMM to `time`.
    pub fn at(self, time: SystemTime) -> Option<u64> {
        let began = Duration::try_from_secs_f64(self.0?).ok()?;
        let since = time.duration_since(SystemTime::UNIX_EPOCH).ok()?.saturating_sub(began);
        u64::try_from(since.as_micros()).ok()
    }

    /// When a page in this state came to it.
    pub fn of_state(self, times: &Times, state: &State) -> Option<u64> {
        let time = match state {
            State::Seen => Some(times.seen),
            State::Waiting { .. } => times.waiting,
            State::Injected { .. } => times.injected,
            State::Acknowledged { .. } => times.acknowledged,
            State::Undeliverable { .. } => times.undeliverable,
            State::Healed => times.healed,
            State::Removed => times.removed,
        };
        time.and_then(|time| self.at(time))
    }

    /// Whether two times can be of the same step.
    pub fn is_close(one: u64, other: u64) -> bool {
        one.abs_diff(other) <= CLOSE
    }

    /// Whether the ledger's step is surely later than the last event.
    pub fn is_newer(ledger: Option<u64>, event: Option<u64>) -> bool {
        ledger.zip(event).is_some_and(|(ledger, event)| ledger > event.saturating_add(EXACT))
    }
}
