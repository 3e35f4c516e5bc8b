//! How bad memory is, as the drawings of it show.

use mce_relay::State;
use serde::Serialize;

/// From harmless to worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mark {
    /// No memory behind it.
    Empty,
    /// In use and whole.
    Whole,
    /// Bad in an earlier boot, and good now.
    Healed,
    /// Whole and predicted to fail.
    Predicted,
    /// Whole: the signal that named it was forged.
    Forged,
    /// The guest has taken the page's error.
    Acknowledged,
    /// The guest was told and has not taken it yet.
    Injected,
    /// Known, and the guest has not been told yet.
    Waiting,
    /// No longer part of the guest's memory.
    Removed,
    /// The guest cannot be told.
    Undeliverable,
}

impl Mark {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Empty,
        Self::Whole,
        Self::Healed,
        Self::Predicted,
        Self::Forged,
        Self::Acknowledged,
        Self::Injected,
        Self::Waiting,
        Self::Removed,
        Self::Undeliverable,
    ];

    /// Of a page in `state`; `forged`: all its signals were forged.
    #[must_use]
    pub fn of(state: State, forged: bool) -> Self {
        match state {
            // Whatever the guest was told: a removed page is not part of its memory.
            State::Removed => Self::Removed,
            _ if forged => Self::Forged,
            State::Seen | State::Waiting { .. } => Self::Waiting,
            State::Injected { .. } => Self::Injected,
            State::Acknowledged { .. } => Self::Acknowledged,
            State::Undeliverable { .. } => Self::Undeliverable,
            State::Healed => Self::Healed,
        }
    }

    /// Its name, as JSON has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Whole => "whole",
            Self::Healed => "healed",
            Self::Predicted => "predicted",
            Self::Forged => "forged",
            Self::Acknowledged => "acknowledged",
            Self::Injected => "injected",
            Self::Waiting => "waiting",
            Self::Removed => "removed",
            Self::Undeliverable => "undeliverable",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_the_name_that_json_has() {
        for mark in Mark::ALL {
            assert_eq!(serde_json::to_value(mark).unwrap(), mark.name());
        }
        assert!(Mark::ALL.is_sorted(), "from harmless to worst");
    }
}
