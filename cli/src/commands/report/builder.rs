//! Makes a report of the lines of a file of events, one after another.

use mce_relay_vmm::api::types::vm::{Extent, Status};
use mce_relay_vmm::api::types::vm_event::VmEvent;

use super::latency::{Latencies, Spread};
use super::ledger;
use super::line::{Line, Said};
use super::memory_map::MemoryMap;
use super::model::{Boot, Broken, Happened, Lacks, Log, Origin, Report, Vmm};
use super::pages::{Now, Pages};
use super::totals::{lost_to, marks, totals};

/// What is told of words that somebody else wrote, in bytes: the rest is cut.
const WORDS: usize = 300;
/// How a boot ended of which only the next one is known.
const NO_WORD: &str = "unknown: another one followed, and no event says why";

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
    /// How the boot ended whose beginning is in no event.
    unknown_end: Option<String>,
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
        self.log.first_broken.get_or_insert(Broken { line: self.line, why: cut(why) });
    }

    /// The same for a line that was not read as a whole.
    pub fn too_long(&mut self, why: String) {
        self.line += 1;
        self.broken(why);
    }

    /// So many entries of the ledger are not in the VM's record.
    pub fn lacks(&mut self, lacks: Lacks) {
        self.log.ledger_lacks = lacks;
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
            Said::Unknown(name) => *self.log.unknown.entry(cut(name)).or_default() += 1,
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
            if let Some(boot) = self.vmms.last_mut().and_then(|vmm| vmm.boots.last_mut()) {
                boot.end.get_or_insert_with(|| NO_WORD.to_owned());
            }
            self.vmms.push(Vmm::default());
            self.pages.another_vmm();
            self.unknown_end = None;
            self.ended = false;
        }
        let index = self.vmms.len() - 1;
        let vmm = &mut self.vmms[index];
        vmm.last = at;
        Now { at, vmm: index, boot: vmm.boots.last().map(|boot| boot.boot) }
    }

    fn of_vm(&mut self, event: &VmEvent, now: Now) {
        self.happens(now, event.to_string());
        match event {
            VmEvent::Booting { boot, unix_time, vendor, .. } => {
                self.boots_before(now.vmm, *boot);
                let vmm = &mut self.vmms[now.vmm];
                vmm.began = Some(unix_time - seconds(now.at)).filter(|began| began.is_finite());
                if let Some(last) = vmm.boots.last_mut() {
                    last.end.get_or_insert_with(|| NO_WORD.to_owned());
                }
                vmm.boots.push(Boot {
                    boot: *boot,
                    at: Some(now.at),
                    vendor: Some(vendor.to_string()),
                    end: None,
                });
                self.pages.started_over();
            }
            VmEvent::Reset { reason, .. } => self.ends(now.vmm, reason.clone()),
            VmEvent::Ended { how, status } => {
                self.ends(now.vmm, format!("{how} (exit status {status})"));
                self.ended = true;
            }
            _ => {}
        }
    }

    fn ends(&mut self, vmm: usize, words: String) {
        match self.vmms[vmm].boots.last_mut() {
            Some(boot) => boot.end.get_or_insert(words),
            None => self.unknown_end.get_or_insert(words),
        };
    }

    /// The events before the first boot that is known are of the one before it, or before all of them.
    fn boots_before(&mut self, vmm: usize, boot: u32) {
        if !self.vmms[vmm].boots.is_empty() {
            return;
        }
        let (end, before) = (self.unknown_end.take(), boot.saturating_sub(1).max(1));
        let any = self.pages.of_boot(vmm, before);
        if boot > 1 && (any || end.is_some()) {
            let end = end.or_else(|| Some(NO_WORD.to_owned()));
            self.vmms[vmm].boots.push(Boot { boot: before, at: None, vendor: None, end });
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
        let Self { log, vmms, pages, happened, .. } = self;
        let Pages { list: mut pages, huge, rescued, predicted, .. } = pages;
        let huge = huge.list;
        for page in &mut pages {
            // A signal is known to be of a page only when the relay has looked at it.
            page.steps.sort_by_key(|step| step.at);
            page.lost_to = lost_to(page);
        }
        let ram = status.map(|status| {
            status.vm.memory.iter().map(|block| Extent { gpa: block.gpa, len: block.len }).collect()
        });
        let told = || {
            let real = pages.iter().filter(|page| !page.forged).flat_map(|page| &page.told);
            real.filter(|told| !told.forged)
        };
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
            totals: totals(&pages, &huge),
            memory: MemoryMap::new(ram, marks(&pages, &huge)),
            latencies,
            pages,
            huge,
            rescued,
            predicted: predicted.list,
            happened,
        }
    }

    fn add_ledger(&mut self, status: &Status) {
        if self.vmms.is_empty() {
            self.vmms.push(Vmm::default());
        }
        let last = self.vmms.len() - 1;
        if self.vmms[last].boots.is_empty() {
            // None has begun since the ledger was written, or an event would say it.
            let (boot, vendor) = (status.vm.boot, Some(status.vm.vendor.to_string()));
            self.pages.of_boot(last, boot);
            let end = self.unknown_end.take();
            self.vmms[last].boots.push(Boot { boot, at: None, vendor, end });
        }
        let merged = ledger::merge(&mut self.pages, status, &self.vmms[last], last);
        (self.log.by_ledger, self.log.filled) = (merged.added, merged.filled);
    }
}

/// Cuts words that somebody else wrote.
fn cut(mut words: String) -> String {
    if words.len() > WORDS {
        let at = (0..=WORDS).rev().find(|at| words.is_char_boundary(*at)).unwrap_or_default();
        words.truncate(at);
        words.push('…');
    }
    words
}

#[allow(clippy::cast_precision_loss, reason = "it is shown to the millisecond")]
fn seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}
