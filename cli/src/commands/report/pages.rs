//! What became of each page, from the events of one page after another.

use std::collections::{BTreeMap, HashMap};

use mce_relay::{
    Event, FailureKind, FoundBy, Injection, Page as Ledgered, Place, SignalledThread, State,
};

use super::model::{Huge, LostTo, Page, Predicted, Rescue, Step, Telling, Toucher};

const PAGE_SIZE: u64 = 4096;
/// What can be lost at once.
const HUGE: [u64; 2] = [2 << 20, 1 << 30];

/// When and where an event happened.
#[derive(Debug, Clone, Copy)]
pub(super) struct Now {
    /// Microseconds since the start of the VMM.
    pub at: u64,
    /// Which VMM.
    pub vmm: usize,
    /// Which boot.
    pub boot: u32,
}

/// A signal whose page is not known yet.
#[derive(Debug, Clone)]
struct Signal {
    at: u64,
    kind: FailureKind,
    forged: bool,
    thread: SignalledThread,
    lsb: u8,
}

/// All pages.
#[derive(Debug, Default)]
pub(super) struct Pages {
    pub list: Vec<Page>,
    pub huge: Vec<Huge>,
    pub rescued: Vec<Rescue>,
    pub predicted: Vec<Predicted>,
    /// Pages that are bad now, by address.
    open: BTreeMap<u64, usize>,
    /// Pages that were removed.
    gone: HashMap<u64, usize>,
    /// Huge pages that are bad now, by address.
    open_huge: BTreeMap<u64, usize>,
    /// Predicted pages, by address.
    open_predicted: HashMap<u64, usize>,
    /// Signals that no event has given a page yet, by host virtual address.
    signals: BTreeMap<u64, Vec<Signal>>,
    /// When the pages were signalled that were lost with a rescued huge page, by its address.
    rescues: BTreeMap<u64, (u64, Option<Signal>)>,
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
        let Self { list, huge, rescued, predicted, .. } = std::mem::take(self);
        *self = Self { list, huge, rescued, predicted, ..Self::default() };
    }

    /// Takes in an event of memory; returns whether it was about pages.
    pub fn take(&mut self, event: &Event, now: Now) -> bool {
        match event {
            Event::Caught { kind, hva, lsb, thread, forged } => {
                let signal =
                    Signal { at: now.at, kind: *kind, forged: *forged, thread: *thread, lsb: *lsb };
                self.signals.entry(*hva & !(PAGE_SIZE - 1)).or_default().push(signal);
            }
            Event::Outside { hva, .. } => {
                self.signals.remove(&(*hva & !(PAGE_SIZE - 1)));
                return false;
            }
            Event::Seen { gpa, hva, kind, found_by, extent, pages } => {
                self.seen(*gpa, *hva, *kind, *found_by, (*extent, *pages as u64), now);
            }
            Event::Again { gpa, kind, forged } => self.again(*gpa, *kind, *forged, now),
            Event::Waiting { gpa, kind, wait, forged } => {
                let at = self.find(*gpa, *kind, *forged, now);
                self.list[at].state = State::Waiting { wait: *wait };
                self.step(at, now, "waiting", wait.to_string());
            }
            Event::Injected { gpa, by, after_micros, forged } => {
                self.injected(*gpa, by, *after_micros, *forged, now);
            }
            Event::Acknowledged { gpa, place, forged, .. } => {
                let at = self.find(*gpa, FailureKind::ActionOptional, *forged, now);
                let page = &mut self.list[at];
                page.state = State::Acknowledged { place: *place };
                if let Some(last) = page.told.last_mut() {
                    last.taken_after.get_or_insert(now.at.saturating_sub(last.injected));
                }
                self.step(at, now, "acknowledged", place.to_string());
            }
            Event::Undeliverable { gpa, kind, vcpu, why, rip, forged } => {
                let at = self.find(*gpa, *kind, *forged, now);
                let rip = rip.map(|rip| format!(", RIP {rip:#x}")).unwrap_or_default();
                self.list[at].state = State::Undeliverable { why: *why };
                self.step(at, now, "undeliverable", format!("{kind} on vCPU {vcpu}{rip}: {why}"));
            }
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
            Event::Predicted { gpa, state } => self.predicted(*gpa, state, now),
            Event::Rescued(what) => {
                let end = what.hva.saturating_add(extent_of(what.extent));
                let signal = self.signals_in(what.hva, end).into_iter().next();
                self.rescues.insert(what.hva, (end, signal));
                self.rescued.push(Rescue { vmm: now.vmm, at: now.at, what: *what });
                return false;
            }
            Event::NotRescued { .. } | Event::Overrun { .. } | Event::Scanned { .. } => {
                return false;
            }
        }
        true
    }

    /// Takes the signals for addresses from `start` to before `end`, in the order in which they came.
    fn signals_in(&mut self, start: u64, end: u64) -> Vec<Signal> {
        let addresses: Vec<u64> =
            self.signals.range(start..end.max(start)).map(|(at, _)| *at).collect();
        let mut all: Vec<Signal> =
            addresses.iter().filter_map(|at| self.signals.remove(at)).flatten().collect();
        all.sort_by_key(|signal| signal.at);
        all
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
        let (extent, page) = (extent_of(extent), hva & !(PAGE_SIZE - 1));
        let mut signals = self.signals_in(page, page.saturating_add(PAGE_SIZE));
        if signals.is_empty() && extent > PAGE_SIZE {
            let start = hva & !(extent - 1);
            signals = self.signals_in(start, start.saturating_add(extent));
        }
        if signals.is_empty() && found_by == FoundBy::Signal {
            // The signal named the huge page that was rescued.
            let rescue = self.rescues.range(..=hva).next_back().map(|(_, rescue)| rescue);
            signals.extend(
                rescue.filter(|(end, _)| hva < *end).and_then(|(_, signal)| signal.clone()),
            );
        }
        let at = self.add(gpa, kind, found_by == FoundBy::Forged, now);
        if pages > 1 && extent > PAGE_SIZE {
            let start = gpa & !(extent - 1);
            self.open_huge.insert(start, self.huge.len());
            self.huge.push(Huge {
                vmm: now.vmm,
                boot: now.boot,
                gpa: start,
                hva: hva & !(extent - 1),
                len: extent,
                kind,
                found_by,
                pages: pages.min(extent / PAGE_SIZE),
                listed: 1,
                removed: 0,
                caught: signals.first().map(|signal| signal.at),
                seen: now.at,
            });
        }
        let page = &mut self.list[at];
        (page.hva, page.found_by) = (Some(hva), Some(found_by));
        self.signalled(at, &signals, kind, now);
        self.step(at, now, "seen", format!("by {found_by}"));
    }

    /// Puts the signals of a page among its steps.
    fn signalled(&mut self, at: usize, signals: &[Signal], kind: FailureKind, now: Now) {
        self.asked.insert(at, signals.first().map_or(now.at, |signal| signal.at));
        let page = &mut self.list[at];
        for Signal { at, kind, forged, thread, lsb } in signals {
            let label = if *forged { "FORGED " } else { "" };
            let lost = if *lsb > 12 {
                format!(", {} KiB lost", (1_u64 << (*lsb).min(63)) >> 10)
            } else {
                String::new()
            };
            let words = format!("{label}{kind}, on {thread}{lost}");
            page.steps.push(Step { at: *at, what: "caught", words });
            if *kind == FailureKind::ActionRequired {
                touched(
                    page,
                    match thread {
                        SignalledThread::Vcpu(vcpu) => Toucher::Vcpu(*vcpu as u64),
                        SignalledThread::Relay => Toucher::Guest,
                        SignalledThread::Other | SignalledThread::Caller => Toucher::Vmm,
                    },
                );
            }
        }
        if page.found_by == Some(FoundBy::Access) {
            touched(page, Toucher::Vmm);
        } else if kind == FailureKind::ActionRequired && page.touched_by.is_empty() {
            touched(page, Toucher::Guest);
        }
    }

    fn again(&mut self, gpa: u64, kind: FailureKind, forged: bool, now: Now) {
        let at = self.find(gpa, kind, forged, now);
        let signals = match self.list[at].hva {
            Some(hva) => {
                let page = hva & !(PAGE_SIZE - 1);
                self.signals_in(page, page.saturating_add(PAGE_SIZE))
            }
            None => Vec::new(),
        };
        let page = &mut self.list[at];
        page.kind = kind;
        page.forged &= forged;
        let untold = page.state.is_untold() && page.told.is_empty();
        let asked = self.asked.get(&at).copied();
        self.signalled(at, &signals, kind, now);
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
        let page = &mut self.list[at];
        page.state = State::Injected { place };
        page.told.push(Telling { place, after, injected: now.at, taken_after: None });
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
        let before = self.open_huge.range(..start).next_back();
        let huge: Vec<(u64, usize)> = before
            .into_iter()
            .chain(self.open_huge.range(start..end))
            .map(|(gpa, at)| (*gpa, *at))
            .collect();
        for (gpa, at) in huge {
            let huge = &mut self.huge[at];
            let (from, to) = (start.max(gpa), end.min(gpa.saturating_add(huge.len)));
            huge.removed += to.saturating_sub(from);
            if huge.removed >= huge.len {
                self.open_huge.remove(&gpa);
            }
        }
    }

    fn predicted(&mut self, gpa: u64, state: &State, now: Now) {
        match self.open_predicted.get(&gpa) {
            Some(at) if !matches!(state, State::Seen) => {
                let page = &mut self.predicted[*at];
                (page.state, page.last) = (*state, now.at);
            }
            _ => {
                self.open_predicted.insert(gpa, self.predicted.len());
                let (at, state) = (now.at, *state);
                self.predicted.push(Predicted { vmm: now.vmm, gpa, at, last: at, state });
            }
        }
    }

    /// The page at `gpa`, which is added if it became known with others, or the event is missing that made it known.
    fn find(&mut self, gpa: u64, kind: FailureKind, forged: bool, now: Now) -> usize {
        if let Some(at) = self.open.get(&gpa).or_else(|| self.gone.get(&gpa)) {
            return *at;
        }
        let at = self.add(gpa, kind, forged, now);
        let huge = self.open_huge.range(..=gpa).next_back().map(|(_, at)| &mut self.huge[*at]);
        if let Some(huge) =
            huge.filter(|huge| gpa - huge.gpa < huge.len && huge.listed < huge.pages)
        {
            huge.listed += 1;
            let page = &mut self.list[at];
            // No signal named it.
            page.first_kind = FailureKind::ActionOptional;
            (page.boot, page.found_by) = (huge.boot, Some(huge.found_by));
            page.hva = huge.hva.checked_add(gpa - huge.gpa);
            let words = format!("with the {} KiB at {:#x}", huge.len >> 10, huge.gpa);
            let caught = huge.caught.map(|at| Step { at, what: "caught", words: words.clone() });
            page.steps.extend(caught);
            page.steps.push(Step { at: huge.seen, what: "seen", words });
            self.asked.insert(at, huge.caught.unwrap_or(huge.seen));
        }
        at
    }

    /// Adds a page.
    fn add(&mut self, gpa: u64, kind: FailureKind, forged: bool, now: Now) -> usize {
        let at = self.list.len();
        self.list.push(Page {
            vmm: now.vmm,
            boot: now.boot,
            gpa,
            hva: None,
            first_kind: kind,
            kind,
            found_by: None,
            forged,
            state: State::Seen,
            touched_by: Vec::new(),
            lost_to: LostTo::Nobody,
            told: Vec::new(),
            steps: Vec::new(),
        });
        self.gone.remove(&gpa);
        self.open.insert(gpa, at);
        at
    }

    /// Adds a page of the ledger unless there were events of it; returns whether it did.
    pub fn add_ledgered(&mut self, page: &Ledgered, now: Now) -> bool {
        let known = self.open.contains_key(&page.gpa) || self.gone.contains_key(&page.gpa);
        let huge = self.open_huge.range(..=page.gpa).next_back().map(|(_, at)| &self.huge[*at]);
        if known || huge.is_some_and(|huge| page.gpa - huge.gpa < huge.len) {
            return false;
        }
        let at = self.add(page.gpa, page.kind, page.is_forged(), now);
        let added = &mut self.list[at];
        (added.hva, added.found_by) = (Some(page.hva), Some(page.found_by));
        added.state = page.state;
        if page.found_by == FoundBy::Access {
            touched(added, Toucher::Vmm);
        } else if page.kind == FailureKind::ActionRequired {
            touched(added, Toucher::Guest);
        }
        true
    }

    fn step(&mut self, at: usize, now: Now, what: &'static str, words: String) {
        self.list[at].steps.push(Step { at: now.at, what, words });
    }
}

fn touched(page: &mut Page, by: Toucher) {
    if !page.touched_by.contains(&by) {
        page.touched_by.push(by);
    }
}
