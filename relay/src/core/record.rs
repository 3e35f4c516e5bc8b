//! A failure enters: translation, ledger, and the queue of the vCPU that has to be told.

use std::collections::BTreeSet;
use std::mem;
use std::ops::Range;
use std::time::SystemTime;

use super::inner::{Inner, RETRY_FIRST};
use super::shared::Shared;
use crate::event::{Event, SignalledThread};
use crate::guard;
use crate::memory::map::RamMap;
use crate::memory::scan::{can_be_mapped, is_poisoned};
use crate::signal::{self, ThreadSlot};
use crate::types::{Caught, FailureKind, FoundBy, PAGE_SHIFT, PAGE_SIZE};

/// `log2` of the largest page of a host, 1 GiB.
const MAX_SHIFT: u8 = 30;

impl Shared {
    /// Takes the signals of the calling thread, which is `thread`: those that are forged for it are
    /// sent first.
    pub(crate) fn take(
        &self,
        inner: &mut Inner,
        slot: &ThreadSlot,
        thread: SignalledThread,
    ) -> Vec<Caught> {
        let whose = match thread {
            SignalledThread::Vcpu(vcpu) => Some(vcpu),
            _ => None,
        };
        let (mine, others) =
            mem::take(&mut inner.forgery.queued).into_iter().partition(|(to, _)| *to == whose);
        inner.forgery.queued = others;
        let mine: Vec<(Option<usize>, Caught)> = mine;
        let mut not_guest_ram = Vec::new();
        let mut empty = |inner: &mut Inner| {
            while let Some(caught) = slot.take() {
                if !self.enter(inner, caught, thread) {
                    not_guest_ram.push(caught);
                }
            }
        };
        empty(inner);
        for (_, caught) in mine {
            inner.forgery.sent.push(caught);
            signal::send_failure(caught);
            // One by one, as the slot does not hold many.
            empty(inner);
        }
        // What found the slot full was counted there, and is no mark for a later one.
        inner.forgery.sent.clear();
        not_guest_ram
    }

    /// One signal: translation, ledger, and the queue of the vCPU concerned. False when the address
    /// is not guest RAM.
    pub(crate) fn enter(&self, inner: &mut Inner, caught: Caught, thread: SignalledThread) -> bool {
        let Caught { kind, hva, lsb } = caught;
        let forged = inner.forgery.knows(caught);
        let touched = thread == SignalledThread::Other && kind == FailureKind::ActionRequired;
        let (vcpu, kind) = match thread {
            SignalledThread::Vcpu(vcpu) => (Some(vcpu), kind),
            SignalledThread::Relay => (None, kind),
            // The guest has not touched it.
            SignalledThread::Other | SignalledThread::Caller => (None, FailureKind::ActionOptional),
        };
        if touched && self.ram().gpas(hva).len() == 0 {
            // Of another VM's memory, whatever of ours lies in the same huge page's worth of addresses.
            inner.strays.push(caught);
            return false;
        }
        if touched && !is_poisoned(hva & !(PAGE_SIZE - 1)) {
            // The handler was late: there is good memory by now. Or there never was any, and nothing has gone bad. What it
            // has marked is not.
            log::debug!("the page at HVA {hva:#x} that a thread has touched is not bad");
            self.mark_only_what_is_known(inner, hva, lsb);
            return true;
        }
        inner.emit(Event::Caught { kind: caught.kind, hva, lsb, thread, forged });
        // The kernel signals a page once for each of its mappings, and one of them may be that of devices.
        let hva = guard::as_the_guest_has_it(hva);
        let found_by = match (forged, touched) {
            (true, _) => FoundBy::Forged,
            (false, true) => FoundBy::Access,
            (false, false) => FoundBy::Signal,
        };
        let known = self.enter_pages(inner, Caught { kind, hva, lsb }, found_by, vcpu);
        if touched && known && !inner.rescues.has(hva) {
            self.mark_only_what_is_known(inner, hva, lsb);
        }
        if !known && kind == FailureKind::ActionOptional {
            // The kernel tells one thread of a process; with two VMs in it that may be the other's.
            inner.strays.push(Caught { hva, ..caught });
        } else if !known {
            inner.emit(Event::Outside { kind, hva, lsb });
        }
        inner.retry = RETRY_FIRST;
        if (inner.news || !known) && thread != SignalledThread::Relay {
            inner.wake_relay();
        }
        known
    }

    /// Some of what the handler has said is lost: every page that is marked and not in the ledger is looked at.
    pub(crate) fn look_at_marks(&self, inner: &mut Inner) {
        let ram = self.ram();
        let marked = ram.hvas().flat_map(|hvas| guard::marked(&hvas));
        let pages = marked.flat_map(|run| run.step_by(1 << PAGE_SHIFT)).collect::<BTreeSet<u64>>();
        for hva in pages {
            // A look at one page finds out about all of its huge page.
            if guard::is_bad(hva, 1) && !ram.gpas(hva).any(|gpa| inner.ledger.contains(gpa)) {
                let kind = FailureKind::ActionRequired;
                let caught = Caught { kind, hva, lsb: PAGE_SHIFT };
                self.enter(inner, caught, SignalledThread::Other);
            }
        }
    }

    /// The handler marks whole pages of the host. Some of one may be good: the kernel has split it, or all of it is. Of what
    /// it has marked only what the ledger has stays so, and memory of other relays stays as it is.
    fn mark_only_what_is_known(&self, inner: &Inner, hva: u64, lsb: u8) {
        let ram = self.ram();
        let size = 1_u64 << ram.page_shift(hva).max(lsb).min(MAX_SHIFT);
        let start = hva & !(size - 1);
        let end = start.saturating_add(size);
        let within = |part: Range<u64>| part.start.max(start)..part.end.min(end);
        let lost = |page: &u64| ram.gpas(*page).any(|gpa| inner.ledger.contains(gpa));
        for part in ram.hvas().map(within).filter(|part| !part.is_empty()) {
            let bad = part.clone().step_by(1 << PAGE_SHIFT).filter(lost);
            let bad: Vec<_> = bad.map(|page| page..page + PAGE_SIZE).collect();
            guard::mark_only(&part, &bad);
        }
    }

    /// All pages that are lost with the one at `caught.hva`, of which `vcpu` has touched that one if
    /// it is an AR. False when the address is not guest RAM.
    pub(crate) fn enter_pages(
        &self,
        inner: &mut Inner,
        caught: Caught,
        found_by: FoundBy,
        vcpu: Option<usize>,
    ) -> bool {
        let Caught { kind, hva, lsb } = caught;
        let ram = self.ram();
        if self.is_rescued(inner, &ram, caught, found_by, vcpu) {
            return true;
        }
        let (pages, lsb) = self.lost(&ram, hva, lsb, found_by);
        let now = SystemTime::now();
        // The guest has the page that was touched at each of these addresses, and touched one of them.
        let touched = vcpu.filter(|_| kind == FailureKind::ActionRequired).and_then(|_| {
            let gpas: Vec<u64> = ram.gpas(hva & !(PAGE_SIZE - 1)).collect();
            inner.delivery.next_alias(&gpas)
        });
        // One event for an extent: a page of 1 GiB has 262,144 pages.
        let (mut news, mut first, mut bad) = (0, None, Vec::new());
        for &(page_hva, gpa) in &pages {
            // Of a larger extent only the page that the signal named stops a vCPU.
            let named = page_hva <= hva && hva - page_hva < PAGE_SIZE;
            let alias = touched.is_some_and(|touched| named && gpa != touched);
            let kind = if named && !alias { kind } else { FailureKind::ActionOptional };
            let before = inner.ledger.state_of(gpa);
            let known = before.is_some();
            if known && (!named || alias) {
                continue;
            }
            let new = inner.ledger.enter(gpa, page_hva, lsb, kind, found_by, now);
            if found_by != FoundBy::Forged {
                bad.push(page_hva..page_hva + PAGE_SIZE);
            }
            if new {
                news += 1;
                if named || first.is_none() {
                    first = Some((gpa, page_hva, kind));
                }
            } else {
                let forged = found_by == FoundBy::Forged;
                inner.emit(Event::Again { gpa, kind, forged });
            }
            match (kind, vcpu) {
                // A vCPU that touches a page cannot go on, however often it was told.
                (FailureKind::ActionRequired, Some(vcpu)) => {
                    let untold = before.is_none_or(|state| state.is_untold());
                    inner.delivery.push_ar(vcpu, gpa, untold, self.now());
                }
                _ if new => inner.push_ao(gpa),
                _ => {}
            }
        }
        guard::mark(bad);
        if let Some((gpa, hva, kind)) = first {
            let (extent, pages) = (1 << lsb, news);
            inner.emit(Event::Seen { gpa, hva, kind, found_by, extent, pages });
        }
        !pages.is_empty()
    }

    /// The (HVA, GPA) of the pages that are lost when `hva` is and a signal says `lsb`, and `log2` of the extent. Of a
    /// huge page whose other pages are still mapped, or can be mapped again, only the one that was named is: the
    /// kernel could not split it, or keeps it. (Trying to split a file's page takes it out of the page tables.)
    fn lost(&self, ram: &RamMap, hva: u64, lsb: u8, found_by: FoundBy) -> (Vec<(u64, u64)>, u8) {
        let (mut pages, lsb) = (ram.pages(hva, lsb), ram.extent(hva, lsb));
        // A forged failure pretends that the kernel has unmapped it all.
        if lsb == PAGE_SHIFT || found_by == FoundBy::Forged {
            return (pages, lsb);
        }
        let named = hva & !(PAGE_SIZE - 1);
        let before = pages.len();
        let mut present = self.mapped.are_present(pages.iter().map(|(page, _)| *page)).into_iter();
        // Of hugetlbfs the page tables have all or nothing, and asking of each of 262,144 pages would take long.
        let goes_whole = |page| ram.page_shift(page) > PAGE_SHIFT;
        pages.retain(|&(page, _)| {
            let is_whole =
                present.next().unwrap_or(false) || (!goes_whole(page) && can_be_mapped(page));
            !is_whole || page == named
        });
        let alone = pages.len() < before && pages.iter().all(|(page, _)| *page == named);
        (pages, if alone { PAGE_SHIFT } else { lsb })
    }
}
