//! A huge page that has gone bad waits to be rescued, and what comes of it enters the ledger.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::inner::Inner;
use super::rescue::Report;
use super::shared::Shared;
use crate::event::Event;
use crate::guard;
use crate::memory::map::RamMap;
use crate::memory::scan::is_poisoned;
use crate::types::{Caught, FailureKind, FoundBy, PAGE_SHIFT, PAGE_SIZE, RescueRefusal, Rescued};

impl Shared {
    /// Whether nothing enters the ledger for `caught` now: it is of a huge page that is being rescued from here on, or it
    /// speaks of one that was, where the page is good again.
    pub(crate) fn is_rescued(
        &self,
        inner: &mut Inner,
        ram: &RamMap,
        caught: Caught,
        found_by: FoundBy,
        vcpu: Option<usize>,
    ) -> bool {
        let page = caught.hva & !(PAGE_SIZE - 1);
        if found_by == FoundBy::Forged {
            return false;
        }
        let vcpu = vcpu.filter(|_| caught.kind == FailureKind::ActionRequired);
        if ram.is_stand_in(page) {
            return is_late(inner, caught, found_by, vcpu) && !is_poisoned(page);
        }
        let shift = ram.page_shift(page);
        if shift == PAGE_SHIFT {
            return false;
        }
        let start = page & !((1 << shift) - 1);
        let hvas = start..start + (1 << shift);
        if !inner.rescues.has(page) && !self.may_be_rescued(inner, ram, &hvas) {
            return false;
        }
        inner.rescues.take(hvas, Report { page, found_by, vcpu });
        inner.wake_relay();
        true
    }

    /// Whether the guest has all of the huge page at `hvas`, has lost nothing of it yet, and none of it is mapped.
    fn may_be_rescued(&self, inner: &Inner, ram: &RamMap, hvas: &Range<u64>) -> bool {
        let known = |gpa: u64| inner.ledger.contains(gpa);
        inner.rescues.may_be(hvas)
            && ram.covers(hvas)
            && !self.is_any_present(hvas)
            && !ram.pages(hvas.start, shift_of(hvas)).iter().any(|(_, gpa)| known(*gpa))
    }

    /// Whether a page at `hvas` is mapped. What is left of a huge page that went bad is not, and so does not change.
    pub(crate) fn is_any_present(&self, hvas: &Range<u64>) -> bool {
        self.mapped.are_present(hvas.clone().step_by(1 << PAGE_SHIFT)).contains(&true)
    }

    /// The huge page at `hvas` was rescued: good memory lies in its place, and the pages at `gone`, host addresses,
    /// are marked as bad.
    pub(crate) fn rescued(&self, hvas: &Range<u64>, gone: &[u64]) -> Option<Rescued> {
        let mut inner = self.lock();
        let open = inner.rescues.close(hvas)?;
        self.change_ram(|ram| Ok(ram.with_stand_in(hvas.clone()))).ok()?;
        let bad: Vec<Range<u64>> = gone.iter().map(|page| *page..page + PAGE_SIZE).collect();
        guard::replaced(hvas, &bad);
        let extent = hvas.end - hvas.start;
        let micros = |since: Instant| since.elapsed().as_micros().try_into().unwrap_or(u64::MAX);
        let rescued = Rescued {
            gpa: self.ram().gpas(hvas.start).next().unwrap_or(0),
            hva: hvas.start,
            extent,
            kept: extent / PAGE_SIZE - gone.len() as u64,
            gone: gone.len() as u64,
            micros: micros(open.since),
            held_micros: open.held_since.map(micros),
        };
        inner.ledger.note_rescue(rescued);
        inner.emit(Event::Rescued(rescued));
        for &page in gone {
            let mut reports = open.reports.iter().filter(|report| report.page == page).peekable();
            if reports.peek().is_none() {
                self.enter_report(&mut inner, page, FoundBy::Scan, None);
            }
            for report in reports {
                // One that has gone touches nothing.
                let is_there = |vcpu: &usize| inner.vcpus.get(*vcpu).is_some_and(Option::is_some);
                let vcpu = report.vcpu.filter(is_there);
                self.enter_report(&mut inner, page, report.found_by, vcpu);
            }
        }
        self.gathered.notify();
        Some(rescued)
    }

    /// It was not: all of it is gone.
    pub(crate) fn not_rescued(&self, inner: &mut Inner, hvas: &Range<u64>, why: RescueRefusal) {
        let Some(open) = inner.rescues.refuse(hvas) else { return };
        let (hva, extent) = (hvas.start, hvas.end - hvas.start);
        let gpa = self.ram().gpas(hva).next().unwrap_or(0);
        inner.emit(Event::NotRescued { gpa, hva, extent, why });
        for report in &open.reports {
            self.enter_report(inner, report.page, report.found_by, report.vcpu);
        }
        self.gathered.notify();
    }

    /// There is nobody any more who does it.
    pub(crate) fn give_up_rescues(&self, inner: &mut Inner) {
        inner.rescues.switch_off();
        while let Some(hvas) = inner.rescues.next() {
            self.not_rescued(inner, &hvas, RescueRefusal::Forbidden);
        }
    }

    fn enter_report(&self, inner: &mut Inner, hva: u64, found_by: FoundBy, vcpu: Option<usize>) {
        let kind = match vcpu {
            Some(_) => FailureKind::ActionRequired,
            None => FailureKind::ActionOptional,
        };
        self.enter_pages(inner, Caught { kind, hva, lsb: PAGE_SHIFT }, found_by, vcpu);
    }

    /// Waits until nothing is being rescued any more, for `patience` at most.
    pub(crate) fn wait_for_rescues(&self, patience: Duration) {
        let mut inner = self.lock();
        let since = Instant::now();
        while inner.rescues.next().is_some() && since.elapsed() < patience && self.is_working() {
            inner = inner.wait(&self.gathered, Duration::from_millis(10));
        }
    }

    /// Waits until nothing of the page at `hva` is being rescued any more, for `patience` at most.
    pub(crate) fn wait_for_rescue(&self, hva: u64, patience: Duration) {
        let mut inner = self.lock();
        let since = Instant::now();
        while inner.rescues.has(hva) && since.elapsed() < patience && self.is_working() {
            inner = inner.wait(&self.gathered, Duration::from_millis(10));
        }
    }
}

/// `log2` of the length of `hvas`, which is a power of two.
fn shift_of(hvas: &Range<u64>) -> u8 {
    (hvas.end - hvas.start).trailing_zeros().try_into().unwrap_or(PAGE_SHIFT)
}

/// Whether what was heard of a stand-in's page may be about the huge page that was there: the page has to be asked then.
fn is_late(inner: &mut Inner, caught: Caught, found_by: FoundBy, vcpu: Option<usize>) -> bool {
    match (found_by, vcpu) {
        // KVM says 4 KiB of any page. A vCPU that touches a good page again and again has an error that the page tables
        // do not show, as of a huge page that could not be split.
        (FoundBy::Signal, Some(vcpu)) => inner.rescues.drops(vcpu, caught.hva & !(PAGE_SIZE - 1)),
        // An AO of the huge page says how large that was.
        (FoundBy::Signal, None) => caught.lsb > PAGE_SHIFT,
        _ => true,
    }
}
