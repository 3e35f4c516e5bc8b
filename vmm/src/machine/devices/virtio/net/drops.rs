//! How many frames were dropped, and why.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Frames that a device has dropped.
#[derive(Debug, Default)]
pub struct Drops {
    /// Touched bad memory, or memory that is not there.
    pub bad_memory: AtomicU64,
    /// Of the guest's, and no frame: too short or too long, or with a wish that was not offered.
    pub malformed: AtomicU64,
    /// Longer than the guest's buffer.
    pub no_room: AtomicU64,
    /// Not taken by the tap.
    pub refused: AtomicU64,
}

impl Drops {
    fn counts(&self) -> [(&'static str, u64); 4] {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [
            ("in bad memory", count(&self.bad_memory)),
            ("malformed", count(&self.malformed)),
            ("longer than the guest's buffer", count(&self.no_room)),
            ("not taken by the tap", count(&self.refused)),
        ]
    }

    /// Whether there were none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.counts().iter().all(|(_, count)| *count == 0)
    }
}

/// Adds one; returns whether it is the first.
pub(super) fn count(counter: &AtomicU64) -> bool {
    counter.fetch_add(1, Ordering::Relaxed) == 0
}

impl fmt::Display for Drops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let some = self.counts().into_iter().filter(|(_, count)| *count > 0);
        for (nth, (why, count)) in some.enumerate() {
            let comma = if nth == 0 { "" } else { ", " };
            write!(f, "{comma}{count} {why}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_dropped_is_said() {
        let drops = Drops::default();
        assert!(drops.is_empty());
        assert!(count(&drops.bad_memory) && !count(&drops.bad_memory) && count(&drops.refused));
        assert!(!drops.is_empty());
        assert_eq!(drops.to_string(), "2 in bad memory, 1 not taken by the tap");
    }
}
