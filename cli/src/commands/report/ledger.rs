//! What the ledger knows and the events do not.
//!
//! The ledger is older than the last events: a record has that of its last second, and of a running VM it is asked for
//! first. The events are complete at their end, and may begin late. So the ledger fills what they lack, and it has the newer
//! state only where the time of that says so.

use std::collections::{HashMap, HashSet};

use mce_relay::{FailureKind, FoundBy, Page as Ledgered, State};
use mce_relay_vmm::api::types::vm::Status;

use super::clock::Clock;
use super::model::{Course, Page, Rescue, Step, Toucher, Vmm};
use super::pages::{Now, Pages};

/// How many pages the ledger has said something of.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Merged {
    /// Those of which there is no event.
    pub added: u64,
    /// The others.
    pub filled: u64,
}

/// Adds what `status` says of the VMM with this index to `pages`.
pub(super) fn merge(pages: &mut Pages, status: &Status, vmm: &Vmm, index: usize) -> Merged {
    let clock = Clock(vmm.began);
    let mut lives: HashMap<u64, Vec<usize>> = HashMap::new();
    for (at, page) in pages.list.iter().enumerate().filter(|(_, page)| page.vmm == index) {
        lives.entry(page.gpa).or_default().push(at);
    }
    let (mut used, mut merged) = (HashSet::new(), Merged::default());
    // From the newest, as the events have the newest of each page.
    for page in status.pages.iter().chain(status.past.iter().rev()) {
        let all = lives.get(&page.gpa).map(Vec::as_slice).unwrap_or_default();
        let now = Now { at: vmm.last, vmm: index, boot: boot_of(page, vmm, status.vm.boot, clock) };
        let found = all
            .iter()
            .rev()
            .find(|at| !used.contains(*at) && is_same(&pages.list[**at], page, clock));
        if let Some(at) = found {
            used.insert(*at);
            merged.filled += u64::from(fill(&mut pages.list[*at], page, clock));
        } else if !is_of_huge(pages, page, index, clock) {
            let at = pages.add_ledgered(page, now);
            fill(&mut pages.list[at], page, clock);
            merged.added += 1;
        }
    }
    for page in &status.predicted {
        pages.predicted.add_ledgered(page, index, clock);
    }
    for what in &status.rescued {
        // How long a vCPU stood still may have become known later.
        let same = |rescue: &Rescue| {
            mce_relay::Rescued { held_micros: None, ..rescue.what }
                == mce_relay::Rescued { held_micros: None, ..*what }
        };
        if !pages.rescued.iter().any(|rescue| rescue.vmm == index && same(rescue)) {
            pages.rescued.push(Rescue { vmm: index, at: None, what: *what });
        }
    }
    merged
}

fn is_over(state: &State) -> bool {
    matches!(state, State::Healed | State::Removed)
}

/// The boot in which it became known, if that is known.
fn boot_of(page: &Ledgered, vmm: &Vmm, last: u32, clock: Clock) -> Option<u32> {
    match clock.at(page.times.seen) {
        Some(seen) => {
            let began = |at: Option<u64>| at.is_none_or(|at| at <= seen);
            vmm.boots.iter().rev().find(|boot| began(boot.at)).map(|boot| boot.boot)
        }
        // What was bad in an earlier boot was healed or removed when that ended.
        None => (!is_over(&page.state)).then_some(last),
    }
}

/// Whether the page of the events is that of the ledger, and not the same one when it was bad at another time.
fn is_same(page: &Page, ledgered: &Ledgered, clock: Clock) -> bool {
    let times = &ledgered.times;
    let over = times.healed.or(times.removed).filter(|_| is_over(&ledgered.state));
    let (first, last) = (page.steps.first(), page.steps.last());
    let (Some(seen), Some(first), Some(last)) = (clock.at(times.seen), first, last) else {
        // Without times: what is over in the ledger is over in the newer events, too.
        return !is_over(&ledgered.state)
            || is_over(&page.state)
            || ledgered.state == State::Removed;
    };
    let no_later = seen <= last.at || Clock::is_close(seen, last.at) || !is_over(&page.state);
    let no_earlier = seen >= first.at || Clock::is_close(seen, first.at);
    let begins = no_later && (no_earlier || page.course == Course::Late);
    let ends = over.and_then(|over| clock.at(over));
    let ended = ends.is_none_or(|end| end >= first.at || Clock::is_close(end, first.at));
    begins && ended
}

/// Whether it is one of those pages of a huge page of which nothing more is known, by the ledger either: what the events say
/// of the huge page is newer.
fn is_of_huge(pages: &Pages, page: &Ledgered, index: usize, clock: Clock) -> bool {
    let Some(huge) = pages.huge.with(page.gpa, index) else { return false };
    let since = |seen| seen > huge.seen && !Clock::is_close(seen, huge.seen);
    if clock.at(page.times.seen).is_some_and(since) {
        return false;
    }
    page.state == State::Seen || !huge.has_unnamed(page.gpa)
}

/// Fills what the events of a page lack; returns whether they lacked anything.
fn fill(page: &mut Page, ledgered: &Ledgered, clock: Clock) -> bool {
    let times = &ledgered.times;
    let mut filled = page.course != Course::Whole;
    page.hva.get_or_insert(ledgered.hva);
    page.found_by.get_or_insert(ledgered.found_by);
    page.forged &= ledgered.is_forged();
    let said = ["seen", "again", "waiting", "undeliverable"];
    if filled && !page.steps.iter().any(|step| said.contains(&step.what)) {
        let touched = page.kind == FailureKind::ActionRequired;
        page.kind = if touched { page.kind } else { ledgered.kind };
        page.first_kind = ledgered.kind;
    }
    if page.touched_by.is_empty() && !ledgered.is_forged() {
        match ledgered.kind {
            _ if ledgered.found_by == FoundBy::Access => page.touched(Toucher::Vmm),
            FailureKind::ActionRequired => page.touched(Toucher::Guest),
            FailureKind::ActionOptional => {}
        }
    }
    let told = times.injected.max(times.acknowledged);
    page.told_before |= told.is_some() && page.told.is_empty();
    page.taken_before |=
        times.acknowledged.is_some() && page.told.iter().all(|told| told.taken_after.is_none());
    page.untold_before = times.undeliverable.is_some_and(|at| told.is_none_or(|told| at > told));
    let (at, last) =
        (clock.of_state(times, &ledgered.state), page.steps.last().map(|step| step.at));
    // Nothing follows a removal but that the guest starts over.
    let removed = ledgered.state == State::Removed && page.state != State::Healed;
    if page.state != ledgered.state && (removed || last.is_none() || Clock::is_newer(at, last)) {
        page.state = ledgered.state;
        filled = true;
        if let (Some(at), Some(_)) = (at, last) {
            let what = page.state_name();
            page.steps.push(Step { at, what, words: "by the ledger".to_owned() });
        }
    }
    page.by_ledger |= filled;
    filled
}
