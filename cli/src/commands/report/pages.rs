//! What became of each page, from the events of one page after another.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use mce_relay::{
    Event, FailureKind, Form, FoundBy, Injection, Page as Ledgered, Place, SignalledThread, State,
};

use super::huge::{Huge, HugePages};
use super::memory_map::PAGE_SIZE;
use super::model::{Course, Page, Rescue, Step, Telling, Toucher};
use super::predicted::Predictions;
use super::signals::{About, Signal, Signals};

/// What can be lost at once.
const HUGE: [u64; 2] = [2 << 20, 1 << 30];

/// When and where an event happened.
#[derive(Debug, Clone, Copy)]
pub(super) struct Now {
    /// Microseconds since the start of the VMM.
    pub at: u64,
    /// Which VMM.
    pub vmm: usize,
    /// Which boot, if an event has said it.
    pub boot: Option<u32>,
}

/// All pages.
#[derive(Debug, Default)]
pub(super) struct Pages {
    pub list: Vec<Page>,
    pub huge: HugePages,
    pub rescued: Vec<Rescue>,
    pub predicted: Predictions,
    /// Pages that are bad now, by address.
    open: BTreeMap<u64, usize>,
    /// Pages that were removed.
    gone: HashMap<u64, usize>,
    signals: Signals,
    /// Since when the guest is to be told of a page, by its index.
    asked: HashMap<usize, u64>,
}

/// The power of two that a huge page is long, or a page.
fn extent_of(extent: u64) -> u64 {
    if HUGE.contains(&extent) { extent } else { PAGE_SIZE }
}

impl Pages {
    /// Another VMM: nothing that follows is about these pages.
    pub fn another_vmm(&mut self) {
        let Self { list, mut huge, rescued, mut predicted, .. } = std::mem::take(self);
        huge.close();
        predicted.close();
        *self = Self { list, huge, rescued, predicted, ..Self::default() };
    }

    /// The guest starts over: what it was to be told of pages that are whole it is not told.
    pub fn started_over(&mut self) {
        self.predicted.drop_untold(0..u64::MAX);
        self.predicted.close();
    }

    /// What became known in this VMM before the first boot that is known was in `boot`; returns whether there is any.
    pub fn of_boot(&mut self, vmm: usize, boot: u32) -> bool {
        let pages = self.list.iter_mut().map(|page| (page.vmm, &mut page.boot));
        let huge = self.huge.list.iter_mut().map(|huge| (huge.vmm, &mut huge.boot));
        let mut any = false;
        for (_, known) in pages.chain(huge).filter(|(of, known)| *of == vmm && known.is_none()) {
            (*known, any) = (Some(boot), true);
        }
        any
    }

    /// Takes in an event of memory; returns whether it was about pages.
    pub fn take(&mut self, event: &Event, now: Now) -> bool {
        match event {
            Event::Caught { kind, hva, lsb, thread, forged } => {
                let (at, kind, forged, thread, lsb) = (now.at, *kind, *forged, *thread, *lsb);
                self.signals.caught(*hva, Signal { at, kind, forged, thread, lsb });
            }
            Event::Outside { hva, .. } => {
                self.signals.outside(*hva);
                return false;
            }
            Event::Seen { gpa, hva, kind, found_by, extent, pages } => {
                self.seen(*gpa, *hva, *kind, *found_by, (*extent, *pages as u64), now);
            }
            Event::Again { gpa, kind, forged } => self.again(*gpa, *kind, *forged, now),
            Event::Waiting { gpa, kind, wait, forged } => {
                let at = self.find(*gpa, *kind, *forged, now);
                self.list[at].state = State::Waiting { wait: *wait };
                self.said_kind(at, *kind, Toucher::Guest);
                self.step(at, now, "waiting", wait.to_string());
            }
            Event::Injected { gpa, by, after_micros, forged } => {
                self.injected(*gpa, by, *after_micros, *forged, now);
            }
            Event::Acknowledged { gpa, place, forged, .. } => {
                let at = self.find(*gpa, FailureKind::ActionOptional, *forged, now);
                self.told_at(at, *place);
                let page = &mut self.list[at];
                page.state = State::Acknowledged { place: *place };
                match page.told.last_mut() {
                    Some(told) => {
                        told.taken_after.get_or_insert(now.at.saturating_sub(told.injected));
                    }
                    None => (page.told_before, page.taken_before) = (true, true),
                }
                self.step(at, now, "acknowledged", place.to_string());
            }
            Event::Undeliverable { gpa, kind, vcpu, why, rip, forged } => {
                let at = self.find(*gpa, *kind, *forged, now);
                let rip = rip.map(|rip| format!(", RIP {rip:#x}")).unwrap_or_default();
                self.list[at].state = State::Undeliverable { why: *why };
                self.said_kind(at, *kind, Toucher::Vcpu(*vcpu as u64));
                self.step(at, now, "undeliverable", format!("{kind} on vCPU {vcpu}{rip}: {why}"));
            }
            Event::Healed { gpa, .. } if self.huge.heal(*gpa) => {}
            Event::Healed { gpa, forged } => {
                let at = self.find(*gpa, FailureKind::ActionOptional, *forged, now);
                self.list[at].state = State::Healed;
                self.step(at, now, "healed", "good memory is there now".to_owned());
                self.open.remove(gpa);
                self.gone.remove(gpa);
                self.asked.remove(&at);
            }
            Event::Removed { gpa, len } => {
                self.removed(*gpa, gpa.saturating_add(*len), now);
                return false;
            }
            Event::Predicted { gpa, state } => self.predicted.take(*gpa, state, now.vmm, now.at),
            Event::Rescued(what) => {
                self.signals.rescued(what.hva, extent_of(what.extent), what.gone);
                self.rescued.push(Rescue { vmm: now.vmm, at: Some(now.at), what: *what });
                return false;
            }
            Event::NotRescued { .. } | Event::Overrun { .. } | Event::Scanned { .. } => {
                return false;
            }
        }
        true
    }

    fn seen(
        &mut self,
        gpa: u64,
        hva: u64,
        kind: FailureKind,
        found_by: FoundBy,
        (extent, pages): (u64, u64),
        now: Now,
    ) {
        let extent = extent_of(extent);
        let about = self.signals.of_known(hva, extent, found_by == FoundBy::Signal);
        let whole = gpa & !(extent - 1);
        let lost = if pages > 1 {
            whole..whole.saturating_add(extent)
        } else {
            gpa..gpa.saturating_add(1)
        };
        self.predicted.went_bad(lost.clone(), now.at);
        let named = self.open.range(lost).map(|(gpa, _)| *gpa);
        let named: BTreeSet<u64> = named.chain([gpa]).collect();
        let at = self.add(gpa, kind, found_by == FoundBy::Forged, now);
        if pages > 1 && extent > PAGE_SIZE {
            self.huge.add(Huge {
                vmm: now.vmm,
                boot: now.boot,
                gpa: whole,
                hva: hva & !(extent - 1),
                len: extent,
                kind,
                found_by,
                pages: pages.min(extent / PAGE_SIZE),
                listed: 1,
                healed: 0,
                removed: 0,
                caught: about.first(),
                seen: now.at,
                named,
                healed_pages: BTreeSet::new(),
                rest_removed: 0,
            });
        }
        let page = &mut self.list[at];
        (page.hva, page.found_by, page.course) = (Some(hva), Some(found_by), Course::Whole);
        self.signalled(at, &about, kind, now);
        self.step(at, now, "seen", format!("by {found_by}"));
    }

    /// Puts the signals of a page among its steps.
    fn signalled(&mut self, at: usize, about: &About, kind: FailureKind, now: Now) {
        self.asked.insert(at, about.first().unwrap_or(now.at));
        let page = &mut self.list[at];
        if let (true, Some(at)) = (about.own.is_empty(), about.with) {
            let words = "with its huge page".to_owned();
            page.steps.push(Step { at, what: "caught", words });
        }
        for signal in &about.own {
            page.steps.push(signal.step());
            // Nobody has touched what was forged.
            if signal.kind == FailureKind::ActionRequired && !signal.forged {
                let by = match signal.thread {
                    SignalledThread::Vcpu(vcpu) => Toucher::Vcpu(vcpu as u64),
                    SignalledThread::Relay => Toucher::Guest,
                    SignalledThread::Other | SignalledThread::Caller => Toucher::Vmm,
                };
                page.touched(by);
            }
        }
        if page.found_by == Some(FoundBy::Access) {
            page.touched(Toucher::Vmm);
        } else if kind == FailureKind::ActionRequired && page.touched_by.is_empty() && !page.forged
        {
            page.touched(Toucher::Guest);
        }
    }

    /// An event says of what kind the page's signal was that the guest is, or was to be, told of. Of a page whose first
    /// events are missing that may be all that says that it was touched.
    fn said_kind(&mut self, at: usize, kind: FailureKind, by: Toucher) {
        let page = &mut self.list[at];
        if kind == FailureKind::ActionRequired && !page.forged {
            page.kind = kind;
            if page.touched_by.is_empty() {
                page.touched(by);
            }
        }
    }

    /// The same of a record's form: it is that of an AR where the page was touched.
    fn told_at(&mut self, at: usize, place: Place) {
        if let Place::Mce { vcpu, form: Form::Srar | Form::AmdAr, .. } = place {
            self.said_kind(at, FailureKind::ActionRequired, Toucher::Vcpu(vcpu.into()));
        }
    }

    fn again(&mut self, gpa: u64, kind: FailureKind, forged: bool, now: Now) {
        let at = self.find(gpa, kind, forged, now);
        let own = self.list[at].hva.map(|hva| self.signals.of_page(hva)).unwrap_or_default();
        let page = &mut self.list[at];
        page.kind = kind;
        if page.forged && !forged {
            // It has really gone bad now. That no signal was caught does not say how that was found.
            page.forged = false;
            page.found_by = own.iter().any(|signal| !signal.forged).then_some(FoundBy::Signal);
        }
        let untold = page.state.is_untold() && page.told.is_empty();
        let asked = self.asked.get(&at).copied();
        self.signalled(at, &About { own, with: None }, kind, now);
        // An AO is not told again, and what was not told yet has waited since its first signal, unless it was touched.
        match asked {
            Some(asked) if untold && kind == FailureKind::ActionOptional => {
                self.asked.insert(at, asked);
            }
            None if kind == FailureKind::ActionOptional => drop(self.asked.remove(&at)),
            _ => {}
        }
        self.step(at, now, "again", format!("{kind}, known"));
    }

    fn injected(&mut self, gpa: u64, by: &Injection, micros: Option<u64>, forged: bool, now: Now) {
        let at = self.find(gpa, FailureKind::ActionOptional, forged, now);
        let (place, words) = match *by {
            Injection::Mce { vcpu, bank, form, reach, status, .. } => {
                let vcpu = u32::try_from(vcpu).unwrap_or(u32::MAX);
                let place = Place::Mce { vcpu, bank, form };
                (place, format!("{place}, {reach}, status {status:#018x}"))
            }
            Injection::Ghes { record, pages } => {
                let place = Place::Ghes { record };
                (place, format!("{place}, of {pages} in all"))
            }
        };
        let after = match self.asked.remove(&at) {
            Some(asked) => Some(now.at.saturating_sub(asked)),
            None => micros,
        };
        self.told_at(at, place);
        let page = &mut self.list[at];
        page.state = State::Injected { place };
        let (injected, forged) = (now.at, forged && page.forged);
        page.told.push(Telling { place, after, injected, taken_after: None, forged });
        self.step(at, now, "injected", words);
    }

    fn removed(&mut self, start: u64, end: u64, now: Now) {
        let pages: Vec<(u64, usize)> =
            self.open.range(start..end).map(|(gpa, at)| (*gpa, *at)).collect();
        for (gpa, at) in pages {
            self.open.remove(&gpa);
            self.gone.insert(gpa, at);
            self.list[at].state = State::Removed;
            self.step(at, now, "removed", "no longer part of the guest's memory".to_owned());
        }
        self.huge.remove(start, end);
        self.predicted.drop_untold(start..end.max(start));
    }

    /// The page at `gpa`, which is added if it became known with others, or the event is missing that made it known.
    pub fn find(&mut self, gpa: u64, kind: FailureKind, forged: bool, now: Now) -> usize {
        if let Some(at) = self.open.get(&gpa).or_else(|| self.gone.get(&gpa)) {
            return *at;
        }
        let at = self.add(gpa, kind, forged, now);
        if let Some(huge) = self.huge.unnamed(gpa) {
            huge.listed += 1;
            huge.named.insert(gpa);
            let page = &mut self.list[at];
            // No signal named it.
            page.first_kind = FailureKind::ActionOptional;
            (page.boot, page.found_by) = (huge.boot, Some(huge.found_by));
            (page.hva, page.course) = (huge.hva.checked_add(gpa - huge.gpa), Course::Whole);
            let words = format!("with the {} KiB at {:#x}", huge.len >> 10, huge.gpa);
            let caught = huge.caught.map(|at| Step { at, what: "caught", words: words.clone() });
            page.steps.extend(caught);
            page.steps.push(Step { at: huge.seen, what: "seen", words });
            self.asked.insert(at, huge.caught.unwrap_or(huge.seen));
        }
        at
    }

    /// Adds a page of which the events begin later.
    pub fn add(&mut self, gpa: u64, kind: FailureKind, forged: bool, now: Now) -> usize {
        let at = self.list.len();
        self.list.push(Page::new(now.vmm, now.boot, gpa, kind, forged));
        self.gone.remove(&gpa);
        self.open.insert(gpa, at);
        at
    }

    /// The page of the ledger of which there is no event: added, or taken out of its huge page.
    pub fn add_ledgered(&mut self, page: &Ledgered, now: Now) -> usize {
        if matches!(page.state, State::Healed | State::Removed) {
            // It is not bad now, so that the next one at its address is another.
            self.list.push(Page::new(now.vmm, now.boot, page.gpa, page.kind, page.is_forged()));
            let at = self.list.len() - 1;
            self.list[at].course = Course::Ledger;
            return at;
        }
        let at = self.find(page.gpa, page.kind, page.is_forged(), now);
        if self.list[at].steps.is_empty() {
            self.list[at].course = Course::Ledger;
        }
        at
    }

    pub fn step(&mut self, at: usize, now: Now, what: &'static str, words: String) {
        self.list[at].steps.push(Step { at: now.at, what, words });
    }
}
