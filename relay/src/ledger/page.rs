//! One page of the ledger.

use std::time::SystemTime;

use crate::types::{FailureKind, FoundBy, State};
#[cfg(feature = "serde")]
use crate::types::{hex, unix_time, unix_time_option};

/// One poisoned 4 KiB page of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Page {
    /// Guest-physical address.
    #[cfg_attr(feature = "serde", serde(with = "hex"))]
    pub gpa: u64,
    /// Host virtual address.
    #[cfg_attr(feature = "serde", serde(with = "hex"))]
    pub hva: u64,
    /// `log2` of the extent in bytes that was lost with it, 12 for the page alone.
    pub lsb: u8,
    /// The kind of the last signal; AO for a page that no signal named.
    pub kind: FailureKind,
    /// How the page became known.
    pub found_by: FoundBy,
    /// Number of signals that named the page.
    pub signals: u32,
    /// What became of it.
    #[cfg_attr(feature = "serde", serde(flatten))]
    pub state: State,
    /// When it last came to each state.
    pub times: Times,
}

impl Page {
    /// Whether the page is whole: every signal for it was forged ([`crate::Handle::forge`]).
    #[must_use]
    pub fn is_forged(&self) -> bool {
        self.found_by == FoundBy::Forged
    }
}

/// When a page last came to each state; `None` where it never did.
///
/// [`Self::waiting_since`] says since when a page has waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Times {
    /// It became known.
    #[cfg_attr(feature = "serde", serde(with = "unix_time"))]
    pub seen: SystemTime,
    /// It began to wait, whatever it waited for then.
    #[cfg_attr(feature = "serde", serde(with = "unix_time_option"))]
    pub waiting: Option<SystemTime>,
    /// Its record was put where the guest finds it.
    #[cfg_attr(feature = "serde", serde(with = "unix_time_option"))]
    pub injected: Option<SystemTime>,
    /// The guest was seen to have taken it.
    #[cfg_attr(feature = "serde", serde(with = "unix_time_option"))]
    pub acknowledged: Option<SystemTime>,
    /// It was found that the guest cannot be told of it.
    #[cfg_attr(feature = "serde", serde(with = "unix_time_option"))]
    pub undeliverable: Option<SystemTime>,
    /// The guest started over with good memory there.
    #[cfg_attr(feature = "serde", serde(with = "unix_time_option"))]
    pub healed: Option<SystemTime>,
    /// It was taken out of the guest's memory.
    #[cfg_attr(feature = "serde", serde(with = "unix_time_option"))]
    pub removed: Option<SystemTime>,
}

impl Times {
    /// Since when a page in [`State::Seen`] or [`State::Waiting`] has waited: since it became known, or, where the
    /// guest was told before, since it began to wait again.
    #[must_use]
    pub fn waiting_since(&self) -> SystemTime {
        let Self { seen, waiting, injected, acknowledged, undeliverable, .. } = *self;
        match injected.or(acknowledged).or(undeliverable) {
            None => seen,
            Some(_) => waiting.unwrap_or(seen),
        }
    }

    /// Seen, and nothing else yet.
    #[must_use]
    pub fn new(seen: SystemTime) -> Self {
        Self {
            seen,
            waiting: None,
            injected: None,
            acknowledged: None,
            undeliverable: None,
            healed: None,
            removed: None,
        }
    }

    /// Notes that the page's state changes from `before` to `state`.
    pub(crate) fn note(&mut self, before: &State, state: &State, now: SystemTime) {
        match state {
            State::Seen => self.seen = now,
            // It only waits for something else now: the time does not start anew.
            State::Waiting { .. } if matches!(before, State::Waiting { .. }) => {}
            State::Waiting { .. } => self.waiting = Some(now),
            State::Injected { .. } => self.injected = Some(now),
            State::Acknowledged { .. } => self.acknowledged = Some(now),
            State::Undeliverable { .. } => self.undeliverable = Some(now),
            State::Healed => self.healed = Some(now),
            State::Removed => self.removed = Some(now),
        }
    }
}

/// A 4 KiB page that is whole and predicted to fail, and that the guest was to stop using.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Predicted {
    /// Guest-physical address.
    #[cfg_attr(feature = "serde", serde(with = "hex"))]
    pub gpa: u64,
    /// How far telling the guest has come. What the guest then does with the page only the guest knows.
    #[cfg_attr(feature = "serde", serde(flatten))]
    pub state: State,
    /// When it last came to each state; `seen` is when the prediction was made.
    pub times: Times,
}
