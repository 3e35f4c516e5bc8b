//! Huge pages that have gone bad and are being rescued: what is known of each until it is settled.

use std::ops::Range;
use std::time::Instant;

use crate::types::FoundBy;

/// What was heard of a page within a huge page that is being rescued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Report {
    /// Host address of the page of 4 KiB.
    pub(crate) page: u64,
    pub(crate) found_by: FoundBy,
    /// Who touched it.
    pub(crate) vcpu: Option<usize>,
}

/// One huge page.
#[derive(Debug)]
pub(crate) struct Open {
    hvas: Range<u64>,
    pub(crate) reports: Vec<Report>,
    pub(crate) since: Instant,
    /// Since when a vCPU stands still for it.
    pub(crate) held_since: Option<Instant>,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Rescues {
    /// There is somebody who does it.
    is_on: bool,
    open: Vec<Open>,
    /// Those that could not be rescued: they are lost as a whole.
    refused: Vec<Range<u64>>,
    /// Touches of good pages that were dropped, as their signals may have been late: each once.
    dropped: Vec<(usize, u64)>,
}

/// So many dropped touches are kept in mind.
const DROPPED: usize = 256;

impl Rescues {
    pub(crate) fn new(is_on: bool) -> Self {
        Self { is_on, ..Self::default() }
    }

    /// Whether the huge page at `hvas` may be rescued: there is somebody who does it, and it was not tried before.
    pub(crate) fn may_be(&self, hvas: &Range<u64>) -> bool {
        self.is_on && !self.refused.contains(hvas)
    }

    /// `vcpu` goes back to the guest: what it touched it touches again, or something else.
    pub(crate) fn let_go(&mut self, vcpu: usize) {
        let reports = self.open.iter_mut().flat_map(|open| &mut open.reports);
        reports.filter(|report| report.vcpu == Some(vcpu)).for_each(|report| report.vcpu = None);
    }

    /// The memory at `hvas` is no longer the guest's.
    pub(crate) fn forget(&mut self, hvas: &Range<u64>) {
        self.open.retain(|open| !hvas.contains(&open.hvas.start));
        self.refused.retain(|refused| !hvas.contains(&refused.start));
    }

    /// Whether a touch of the good page at `page` by `vcpu` is the first that is dropped.
    pub(crate) fn drops(&mut self, vcpu: usize, page: u64) -> bool {
        let is_first = !self.dropped.contains(&(vcpu, page));
        if is_first {
            if self.dropped.len() == DROPPED {
                self.dropped.remove(0);
            }
            self.dropped.push((vcpu, page));
        }
        is_first
    }

    /// Nothing more is rescued.
    pub(crate) fn switch_off(&mut self) {
        self.is_on = false;
    }

    /// The huge page at `hvas` is lost as a whole; what was heard of it.
    pub(crate) fn refuse(&mut self, hvas: &Range<u64>) -> Option<Open> {
        let open = self.close(hvas)?;
        self.refused.push(hvas.clone());
        Some(open)
    }

    /// The huge page that is to be looked at next.
    pub(crate) fn next(&self) -> Option<Range<u64>> {
        self.open.first().map(|open| open.hvas.clone())
    }

    /// Whether `vcpu` has touched one.
    pub(crate) fn holds(&self, vcpu: usize) -> bool {
        self.open.iter().any(|open| open.reports.iter().any(|report| report.vcpu == Some(vcpu)))
    }

    /// Whether the page at `hva` is within one.
    pub(crate) fn has(&self, hva: u64) -> bool {
        self.open.iter().any(|open| open.hvas.contains(&hva))
    }

    /// One more report of the huge page at `hvas`.
    pub(crate) fn take(&mut self, hvas: Range<u64>, report: Report) {
        let now = Instant::now();
        let at = self.open.iter().position(|open| open.hvas == hvas);
        let at = at.unwrap_or_else(|| {
            self.open.push(Open { hvas, reports: Vec::new(), since: now, held_since: None });
            self.open.len() - 1
        });
        let open = &mut self.open[at];
        if report.vcpu.is_some() {
            open.held_since.get_or_insert(now);
        }
        if !open.reports.contains(&report) {
            open.reports.push(report);
        }
    }

    /// It is settled; what was heard of it.
    pub(crate) fn close(&mut self, hvas: &Range<u64>) -> Option<Open> {
        let at = self.open.iter().position(|open| open.hvas == *hvas)?;
        Some(self.open.remove(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_huge_page_is_one_whoever_reports_it() {
        let mut rescues = Rescues::new(true);
        let hvas = 0x20_0000..0x40_0000;
        let report = |page, vcpu| Report { page, found_by: FoundBy::Signal, vcpu };
        rescues.take(hvas.clone(), report(0x20_3000, None));
        rescues.take(hvas.clone(), report(0x20_5000, Some(1)));
        rescues.take(hvas.clone(), report(0x20_5000, Some(1)));
        assert!(rescues.holds(1) && !rescues.holds(0));
        assert!(rescues.has(0x3f_ffff) && !rescues.has(0x40_0000));
        assert_eq!(rescues.next(), Some(hvas.clone()));
        let open = rescues.close(&hvas).unwrap();
        assert_eq!(open.reports, [report(0x20_3000, None), report(0x20_5000, Some(1))]);
        assert!(open.held_since.is_some());
        assert!(!rescues.holds(1) && rescues.next().is_none() && rescues.may_be(&hvas));
        rescues.take(hvas.clone(), report(0x20_3000, None));
        assert!(rescues.refuse(&hvas).is_some() && !rescues.may_be(&hvas));
    }
}
