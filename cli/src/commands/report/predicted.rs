//! Whole pages that are predicted to fail.

use std::collections::BTreeMap;
use std::ops::Range;

use mce_relay::{Predicted as Ledgered, State, UndeliverableReason};

use super::clock::Clock;
use super::model::Predicted;

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Predictions {
    pub list: Vec<Predicted>,
    /// The last one of each page, by address.
    open: BTreeMap<u64, usize>,
}

impl Predictions {
    /// Nothing that follows is about these.
    pub fn close(&mut self) {
        self.open.clear();
    }

    /// The prediction of a page came to a state.
    pub fn take(&mut self, gpa: u64, state: &State, vmm: usize, at: u64) {
        match self.open.get(&gpa) {
            Some(found) if !matches!(state, State::Seen) => {
                let page = &mut self.list[*found];
                (page.state, page.last) = (*state, Some(at));
            }
            _ => self.add(Predicted {
                vmm,
                gpa,
                at: Some(at),
                last: Some(at),
                state: *state,
                dropped: false,
            }),
        }
    }

    fn add(&mut self, page: Predicted) {
        self.open.insert(page.gpa, self.list.len());
        self.list.push(page);
    }

    fn change_untold(&mut self, gpas: Range<u64>, change: impl Fn(&mut Predicted)) {
        for (_, at) in self.open.range(gpas) {
            let page = &mut self.list[*at];
            if !page.dropped && matches!(page.state, State::Seen | State::Waiting { .. }) {
                change(page);
            }
        }
    }

    /// Pages went bad: of what was not told yet the guest is told as of bad pages.
    pub fn went_bad(&mut self, gpas: Range<u64>, at: u64) {
        self.change_untold(gpas, |page| {
            page.state = State::Undeliverable { why: UndeliverableReason::WentBad };
            page.last = Some(at);
        });
    }

    /// Predictions of these pages that were not told are dropped: the guest starts over, or has them no longer.
    pub fn drop_untold(&mut self, gpas: Range<u64>) {
        self.change_untold(gpas, |page| page.dropped = true);
    }

    /// Adds what the ledger knows and events do not.
    pub fn add_ledgered(&mut self, page: &Ledgered, vmm: usize, clock: Clock) {
        let (asked, last) = (clock.at(page.times.seen), clock.of_state(&page.times, &page.state));
        let same = |known: &&mut Predicted| {
            known.vmm == vmm
                && known.gpa == page.gpa
                && asked.zip(known.at).is_none_or(|(asked, at)| Clock::is_close(asked, at))
        };
        match self.list.iter_mut().rev().find(same) {
            Some(known) => {
                if Clock::is_newer(last, known.last) {
                    (known.state, known.last) = (page.state, last);
                }
            }
            None => self.add(Predicted {
                vmm,
                gpa: page.gpa,
                at: asked,
                last,
                state: page.state,
                dropped: false,
            }),
        }
    }
}
