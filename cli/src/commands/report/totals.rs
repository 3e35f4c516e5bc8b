//! How many pages there are of what, to whom each was lost, and what is drawn of it.

use mce_relay::{FailureKind, FoundBy, State};

use super::huge::Huge;
use super::memory_map::PAGE_SIZE;
use super::model::{Course, LostTo, Page, Totals, Toucher};
use crate::commands::mark::Mark;

/// Whether the guest could not be told of it the last time that it was to be, whatever became of it later.
fn is_undeliverable(page: &Page) -> bool {
    let tried = ["injected", "acknowledged", "undeliverable"];
    let last = page.steps.iter().rev().find(|step| tried.contains(&step.what));
    match last {
        Some(step) => step.what == "undeliverable",
        None => page.untold_before || matches!(page.state, State::Undeliverable { .. }),
    }
}

/// Whether the guest was told of it at least once.
fn was_told(page: &Page) -> bool {
    !page.told.is_empty()
        || page.told_before
        || matches!(page.state, State::Injected { .. } | State::Acknowledged { .. })
}

/// Whether what the events leave out is not in the ledger either.
fn begins_late(page: &Page) -> bool {
    page.course == Course::Late && !page.by_ledger
}

/// To whom it was lost.
pub(super) fn lost_to(page: &Page) -> LostTo {
    let by_guest = page.touched_by.iter().any(|by| *by != Toucher::Vmm);
    if page.forged {
        return LostTo::Nothing;
    }
    match page.touched_by.is_empty() {
        false if by_guest && is_undeliverable(page) && page.kind == FailureKind::ActionRequired => {
            LostTo::GuestUntold
        }
        false if by_guest => LostTo::Guest,
        false => LostTo::Vmm,
        true if begins_late(page) => LostTo::Unknown,
        true if was_told(page) => LostTo::Told,
        true => LostTo::Nobody,
    }
}

/// Counts all of them.
pub(super) fn totals(pages: &[Page], huge: &[Huge]) -> Totals {
    let mut totals = Totals::default();
    pages.iter().for_each(|page| count(&mut totals, page));
    for huge in huge {
        let rest = huge.rest();
        if huge.found_by == FoundBy::Forged {
            totals.forged += rest.pages();
            continue;
        }
        totals.bad += rest.pages();
        totals.waiting += rest.waiting;
        totals.healed += rest.healed;
        totals.removed += rest.removed;
        if rest.pages() > 0 {
            *totals.lost_to.entry(LostTo::Nobody).or_default() += rest.pages();
        }
    }
    totals.bytes = totals.bad.saturating_mul(PAGE_SIZE);
    totals
}

fn count(totals: &mut Totals, page: &Page) {
    if page.forged {
        totals.forged += 1;
        return;
    }
    let acknowledged = matches!(page.state, State::Acknowledged { .. })
        || page.taken_before
        || page.told.iter().any(|told| told.taken_after.is_some());
    totals.bad += 1;
    totals.told += u64::from(was_told(page));
    totals.unknown += u64::from(begins_late(page) && !was_told(page));
    totals.acknowledged += u64::from(acknowledged);
    totals.undeliverable += u64::from(is_undeliverable(page));
    *totals.lost_to.entry(page.lost_to).or_default() += 1;
    match page.state {
        State::Seen | State::Waiting { .. } => totals.waiting += 1,
        State::Healed => totals.healed += 1,
        State::Removed => totals.removed += 1,
        State::Injected { .. } | State::Acknowledged { .. } | State::Undeliverable { .. } => {}
    }
}

/// What is drawn of them: addresses, numbers of pages, and how bad they are.
pub(super) fn marks(pages: &[Page], huge: &[Huge]) -> Vec<(u64, u64, Mark)> {
    let mut all: Vec<_> =
        pages.iter().map(|page| (page.gpa, 1, Mark::of(page.state, page.forged))).collect();
    for huge in huge.iter().filter(|huge| huge.rest().pages() > 0) {
        let forged = huge.found_by == FoundBy::Forged;
        let there = match huge.rest().waiting {
            0 => Mark::Removed,
            _ if forged => Mark::Forged,
            _ => Mark::Waiting,
        };
        all.extend(huge.healed_pages.iter().map(|gpa| (*gpa, 1, Mark::Healed)));
        // What lies between those that are drawn by themselves.
        let mut from = huge.gpa;
        let apart = huge.named.iter().chain(&huge.healed_pages);
        let mut apart: Vec<u64> = apart.copied().collect();
        apart.sort_unstable();
        let end = huge.gpa.saturating_add(huge.len);
        for gpa in apart.into_iter().chain([end]) {
            let len = gpa.saturating_sub(from) / PAGE_SIZE;
            if len > 0 {
                all.push((from, len, there));
            }
            from = gpa.saturating_add(PAGE_SIZE);
        }
    }
    all
}
