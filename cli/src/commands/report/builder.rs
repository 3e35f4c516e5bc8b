//! Makes a report of the lines of a file of events, one after another.

use mce_relay::{FailureKind, State};
use mce_relay_vmm::api::types::vm::{Extent, Status};
use mce_relay_vmm::api::types::vm_event::VmEvent;

use super::latency::{Latencies, Spread};
use super::line::{Line, Said};
use super::memory_map::{Mark, MemoryMap};
use super::model::{
    Boot, Broken, Happened, Log, LostTo, Origin, Page, Report, Totals, Toucher, Vmm,
};
use super::pages::{Now, Pages};

const PAGE_SIZE: u64 = 4096;

/// A report in the making.
#[derive(Debug, Default)]
pub struct Builder {
    log: Log,
    vmms: Vec<Vmm>,
    pages: Pages,
    happened: Vec<Happened>,
    /// The number of the last line.
    line: u64,
    /// The last VMM has ended.
    ended: bool,
}

impl Builder {
    /// Takes in the next line; an empty one is nothing.
    pub fn line(&mut self, text: &str) {
        self.line += 1;
        if text.trim().is_empty() {
            return;
        }
        match Line::read(text) {
            Ok(line) => self.take(line),
            Err(error) => self.broken(error),
        }
    }

    /// Counts a line that is no event, and why it is none.
    pub fn broken(&mut self, why: String) {
        self.log.broken += 1;
        self.log.first_broken.get_or_insert(Broken { line: self.line, why });
    }

    /// The same for a line that was not read as a whole.
    pub fn too_long(&mut self, why: String) {
        self.line += 1;
        self.broken(why);
    }

    fn take(&mut self, Line { at, said }: Line) {
        self.log.events += 1;
        if let Said::Missed(events) = said {
            // Its time is later than that of the events behind it.
            self.log.missed = self.log.missed.saturating_add(events);
            return;
        }
        let now = self.now(at, &said);
        match said {
            Said::Memory(event) => {
                if !self.pages.take(&event, now) {
                    self.happens(now, event.to_string());
                }
            }
            Said::Vm(event) => self.of_vm(&event, now),
            Said::Unknown(name) => *self.log.unknown.entry(name).or_default() += 1,
            Said::Missed(_) => {}
        }
    }

    /// Which VMM and boot an event belongs to. Several VMMs may have written to a file, one after another: the time of
    /// each begins anew, and so do its boots.
    fn now(&mut self, at: u64, said: &Said) -> Now {
        let another = self.vmms.last().is_none_or(|vmm| {
            let first_again = match said {
                Said::Vm(VmEvent::Booting { boot, .. }) => {
                    vmm.boots.last().is_some_and(|last| *boot <= last.boot)
                }
                _ => false,
            };
            at < vmm.last || first_again || self.ended
        });
        if another {
            self.vmms.push(Vmm::default());
            self.pages.another_vmm();
            self.ended = false;
        }
        let index = self.vmms.len() - 1;
        let vmm = &mut self.vmms[index];
        vmm.last = at;
        Now { at, vmm: index, boot: vmm.boots.last().map_or(0, |boot| boot.boot) }
    }

    fn of_vm(&mut self, event: &VmEvent, now: Now) {
        self.happens(now, event.to_string());
        let vmm = &mut self.vmms[now.vmm];
        let end = |vmm: &mut Vmm, words: &str| {
            if let Some(boot) = vmm.boots.last_mut() {
                boot.end.get_or_insert(words.to_owned());
            }
        };
        match event {
            VmEvent::Booting { boot, unix_time, vendor, .. } => {
                vmm.began = Some(unix_time - seconds(now.at)).filter(|began| began.is_finite());
                vmm.boots.push(Boot {
                    boot: *boot,
                    at: now.at,
                    vendor: vendor.to_string(),
                    end: None,
                });
            }
            VmEvent::Reset { reason, .. } => end(vmm, reason),
            VmEvent::Ended { how, status } => {
                end(vmm, &format!("{how} (exit status {status})"));
                self.ended = true;
            }
            _ => {}
        }
    }

    fn happens(&mut self, now: Now, words: String) {
        self.happened.push(Happened { vmm: now.vmm, at: now.at, words });
    }

    /// Completes the report, `made` at that time (seconds since 1970), with what else is known of the VM.
    #[must_use]
    pub fn finish(mut self, of: Origin, status: Option<&Status>, made: f64) -> Report {
        if let Some(status) = status {
            self.add_ledger(status);
        }
        let Self { log, vmms, pages: Pages { mut list, huge, rescued, predicted, .. }, .. } = self;
        for page in &mut list {
            // A signal is known to be of a page only when the relay has looked at it.
            page.steps.sort_by_key(|step| step.at);
            page.lost_to = lost_to(page);
        }
        let rest = || huge.iter().map(|huge| (huge, huge.rest()));
        let mut totals = Totals::default();
        list.iter().for_each(|page| count(&mut totals, page));
        for (_, (pages, there)) in rest() {
            totals.bad += pages;
            *(if there { &mut totals.waiting } else { &mut totals.removed }) += pages;
            if pages > 0 {
                *totals.lost_to.entry(LostTo::Nobody).or_default() += pages;
            }
        }
        totals.bytes = totals.bad.saturating_mul(PAGE_SIZE);
        let of_huge = rest().filter(|(_, (pages, _))| *pages > 0).map(|(huge, (_, there))| {
            (huge.gpa, huge.len / PAGE_SIZE, if there { Mark::Waiting } else { Mark::Removed })
        });
        let marks = list.iter().map(|page| (page.gpa, 1, mark(page))).chain(of_huge).collect();
        let ram = status.map(|status| {
            status.vm.memory.iter().map(|block| Extent { gpa: block.gpa, len: block.len }).collect()
        });
        let told = || list.iter().flat_map(|page| &page.told);
        let latencies = Latencies {
            injected: Spread::of(told().filter_map(|told| told.after).collect()),
            acknowledged: Spread::of(told().filter_map(|told| told.taken_after).collect()),
        };
        Report {
            version: env!("CARGO_PKG_VERSION"),
            made,
            of,
            log,
            vmms,
            totals,
            memory: MemoryMap::new(ram, marks),
            latencies,
            pages: list,
            huge,
            rescued,
            predicted,
            happened: self.happened,
        }
    }

    /// Adds those pages of the ledger whose events are no longer kept.
    fn add_ledger(&mut self, status: &Status) {
        if status.pages.is_empty() {
            return;
        }
        if self.vmms.is_empty() {
            self.vmms.push(Vmm::default());
        }
        let vmm = self.vmms.len() - 1;
        let now = Now { at: self.vmms[vmm].last, vmm, boot: status.vm.boot };
        for page in &status.pages {
            self.log.by_ledger += u64::from(self.pages.add_ledgered(page, now));
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "it is shown to the millisecond")]
fn seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}

/// Whether the guest could not be told of it the last time that it was to be, whatever became of it later.
fn is_undeliverable(page: &Page) -> bool {
    let tried = ["injected", "acknowledged", "undeliverable"];
    let last = page.steps.iter().rev().find(|step| tried.contains(&step.what));
    match last {
        Some(step) => step.what == "undeliverable",
        None => matches!(page.state, State::Undeliverable { .. }),
    }
}

fn lost_to(page: &Page) -> LostTo {
    let by_guest = page.touched_by.iter().any(|by| *by != Toucher::Vmm);
    let untold = is_undeliverable(page);
    match page.touched_by.is_empty() {
        false if by_guest && untold && page.kind == FailureKind::ActionRequired => {
            LostTo::GuestUntold
        }
        false if by_guest => LostTo::Guest,
        false => LostTo::Vmm,
        true if page.told.is_empty() && page.state.is_untold() => LostTo::Nobody,
        true if page.told.is_empty() && matches!(page.state, State::Healed | State::Removed) => {
            LostTo::Nobody
        }
        true => LostTo::Told,
    }
}

fn count(totals: &mut Totals, page: &Page) {
    if page.forged {
        totals.forged += 1;
        return;
    }
    let acknowledged = matches!(page.state, State::Acknowledged { .. });
    totals.bad += 1;
    totals.told += u64::from(
        !page.told.is_empty() || acknowledged || matches!(page.state, State::Injected { .. }),
    );
    totals.acknowledged +=
        u64::from(acknowledged || page.told.iter().any(|told| told.taken_after.is_some()));
    totals.undeliverable += u64::from(is_undeliverable(page));
    *totals.lost_to.entry(page.lost_to).or_default() += 1;
    match page.state {
        State::Seen | State::Waiting { .. } => totals.waiting += 1,
        State::Healed => totals.healed += 1,
        State::Removed => totals.removed += 1,
        State::Injected { .. } | State::Acknowledged { .. } | State::Undeliverable { .. } => {}
    }
}

fn mark(page: &Page) -> Mark {
    match page.state {
        State::Removed => Mark::Removed,
        _ if page.forged => Mark::Forged,
        State::Seen | State::Waiting { .. } => Mark::Waiting,
        State::Injected { .. } => Mark::Injected,
        State::Acknowledged { .. } => Mark::Acknowledged,
        State::Undeliverable { .. } => Mark::Undeliverable,
        State::Healed => Mark::Healed,
    }
}
