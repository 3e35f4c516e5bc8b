//! How a page is stored in little memory: what [`Table`](super::table::Table) and [`Past`](super::past::Past)
//! have in common.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use super::page::Times;

/// How many fields [`Times`] has.
pub(super) const STATES: usize = 7;
/// Which of them is [`Times::healed`].
pub(super) const HEALED: usize = 5;

/// Nanoseconds since 1970; 64 bits reach to the year 2554.
pub(super) type Nanos = u64;
pub(super) const NEVER: Nanos = u64::MAX;

pub(super) fn nanos(times: &Times) -> [Nanos; STATES] {
    let Times { seen, waiting, injected, acknowledged, undeliverable, healed, removed } = *times;
    [Some(seen), waiting, injected, acknowledged, undeliverable, healed, removed].map(|time| {
        time.map_or(NEVER, |time| {
            let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
            u64::try_from(since.as_nanos()).unwrap_or(NEVER).min(NEVER - 1)
        })
    })
}

pub(super) fn times(nanos: [Nanos; STATES]) -> Times {
    let time =
        |nanos| (nanos != NEVER).then(|| SystemTime::UNIX_EPOCH + Duration::from_nanos(nanos));
    let [seen, waiting, injected, acknowledged, undeliverable, healed, removed] = nanos.map(time);
    // Each page has been seen.
    let seen = seen.unwrap_or(SystemTime::UNIX_EPOCH);
    Times { seen, waiting, injected, acknowledged, undeliverable, healed, removed }
}

/// Host address minus guest-physical address, by wrapping subtraction; each value once. There is one for each region that
/// the pages are or were in.
#[derive(Debug, Clone, Default)]
pub(super) struct Offsets(Vec<u64>);

impl Offsets {
    pub(super) fn get(&self, index: u16) -> u64 {
        self.0[usize::from(index)]
    }

    /// The index of `offset`, which is added if it is new. `used` are the indexes that are in use, at most 65,535
    /// different ones; they are changed where those that are not make room.
    #[allow(clippy::cast_possible_truncation, reason = "a u16 numbers them all")]
    pub(super) fn index<'a>(
        &mut self,
        offset: u64,
        used: impl Iterator<Item = &'a mut u16>,
    ) -> u16 {
        // The last one first: pages come in runs.
        if let Some(at) = self.0.iter().rposition(|known| *known == offset) {
            return at as u16;
        }
        if self.0.len() > usize::from(u16::MAX) {
            self.forget_all_but(used.collect());
        }
        self.0.push(offset);
        (self.0.len() - 1) as u16
    }

    #[allow(clippy::cast_possible_truncation, reason = "a u16 numbers them all")]
    fn forget_all_but(&mut self, mut used: Vec<&mut u16>) {
        let kept: BTreeSet<u16> = used.iter().map(|index| **index).collect();
        let kept: Vec<u16> = kept.into_iter().collect();
        for index in &mut used {
            **index = kept.partition_point(|at| *at < **index) as u16;
        }
        self.0 = kept.iter().map(|at| self.0[usize::from(*at)]).collect();
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;
    use crate::ledger::page::Page;
    use crate::types::{FailureKind, FoundBy, Place, State, WaitReason};

    pub(in crate::ledger) fn any_page(gpa: u64, seed: u64, signals: u32) -> Page {
        let at = |bit: u64| {
            let nanos = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> bit;
            (seed >> bit & 1 != 0).then(|| SystemTime::UNIX_EPOCH + Duration::from_nanos(nanos))
        };
        Page {
            gpa,
            hva: gpa.wrapping_add((seed % 3) << 30),
            lsb: 12 + (seed % 2) as u8 * 9,
            kind: if seed.is_multiple_of(5) {
                FailureKind::ActionRequired
            } else {
                FailureKind::ActionOptional
            },
            found_by: if seed.is_multiple_of(7) { FoundBy::Scan } else { FoundBy::Signal },
            signals,
            state: match seed % 3 {
                0 => State::Seen,
                1 => State::Waiting { wait: WaitReason::Mcip { vcpu: 3 } },
                _ => State::Acknowledged { place: Place::Ghes { record: signals } },
            },
            times: Times {
                waiting: at(1),
                injected: at(2),
                acknowledged: at(3),
                undeliverable: at(4),
                healed: at(5),
                removed: at(6),
                ..Times::new(SystemTime::UNIX_EPOCH + Duration::from_nanos(seed))
            },
        }
    }
}
