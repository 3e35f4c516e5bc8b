//! Carries out one order to poison pages: what is refused, what is done, and the outcome.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use mce_relay_vmm::api::types::means::Means;
use mce_relay_vmm::api::types::pages::{Gpa, Poison, Poisoning};
use mce_relay_vmm::api::types::vm::{Status, VmInfo};
use mce_relay_vmm::host;
use mce_relay_vmm::host::error::HostError;

use crate::client::error::ClientError;
use crate::client::life::Life;
use crate::client::requests;
use crate::poison::asked::{Asked, Until, untried};
use crate::poison::burst::{Burst, NotPoisoned, Poisoned};
use crate::poison::error::PoisonError;
use crate::poison::host::filter::Filter;
use crate::poison::look::{Looked, look};
use crate::poison::order::Order;
use crate::poison::target::Target;
use crate::poison::targets::targets;
use crate::poison::{by_frame, forecast, interrupted};

/// How long the kernel may take to mark the pages after the last request.
const PATIENCE: Duration = Duration::from_secs(1);
/// How many pages one request to the VMM names, where no check is needed right before each page.
const AT_ONCE: usize = 1000;

/// Everything is checked, and nothing done yet.
pub struct Prepared<'a> {
    order: &'a Order<'a>,
    vm: VmInfo,
    life: Life,
    targets: Vec<Target>,
    pages: Vec<Poisoned>,
    looked: Looked,
    filter: Option<Filter>,
    notes: Vec<String>,
}

/// Checks everything about `order` before the first page is touched.
///
/// # Errors
/// See [`PoisonError`].
pub fn prepare<'a>(order: &'a Order<'a>) -> Result<Prepared<'a>, PoisonError> {
    let Status { vm, pages, .. } = requests::get_of_process(order.socket, "relay.status")?;
    let bad: HashSet<u64> =
        pages.iter().filter(|page| !page.is_forged()).map(|page| page.gpa).collect();
    let life = Life::of(order.socket, vm.pid);
    let targets = targets(&vm, order.ranges)?;
    let looked = Looked::new(vm.pid, order.via)?;
    let (pages, more) = look(&vm, order.via, &targets, &looked, &bad)?;
    let mut notes = forecast::words(&vm, order.via, &pages, order.whose.as_deref());
    notes.extend(more);
    let (filter, more) = by_frame::filter(&vm, order, &targets)?;
    notes.extend(more);
    Ok(Prepared { order, vm, life, targets, pages, looked, filter, notes })
}

impl Prepared<'_> {
    /// What the user has to know before: what is lost with the pages, and what would keep pages from being poisoned.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The outcome as if everything succeeded, for --dry-run.
    #[must_use]
    pub fn plan(mut self) -> Burst {
        self.pages.iter_mut().for_each(|page| page.dry_run = true);
        let (poisoned, took) = (self.pages, Duration::ZERO);
        let (failed, notes) = (Vec::new(), Vec::new());
        Burst { poisoned, failed, took, notes, interrupted: None, ended: None }
    }

    /// Poisons the pages, each once, as fast as the kernel takes them, and checks the result. `progress` is called with
    /// the number of pages done and in all.
    ///
    /// # Errors
    /// See [`PoisonError`]; no page has been touched then. Later failures are in the returned outcome.
    pub fn carry_out(self, progress: &mut dyn FnMut(usize, usize)) -> Result<Burst, PoisonError> {
        let Self { order, vm, life, targets, pages, looked, filter, .. } = self;
        let alone = targets.into_iter().zip(&pages).filter(|(_, page)| page.goes_with.is_none());
        let targets: Vec<Target> = alone.map(|(target, _)| target).collect();
        let by_vmm = match order.via {
            Means::Uffd | Means::Signal => true,
            // The VMM's private memory, which no other process can map.
            Means::Madvise | Means::SoftOffline => targets.iter().any(|target| target.fd.is_none()),
            Means::HwpoisonInject | Means::MceInject | Means::Einj => false,
        };
        // Before anything on the host is changed.
        let interrupted = interrupted::Interrupted::new();
        let until = Until { life: &life, interrupted: &interrupted };
        if by_vmm {
            let start = Instant::now();
            let asked = ask_vmm(order, &targets, &looked, &until, progress)?;
            let done = settle(order, pages, asked, &looked, start.elapsed(), Vec::new());
            return Ok(done.cut(&until));
        }
        let mut poisoner = by_frame::Poisoner::open(vm.pid, order.via, filter)?;
        let start = Instant::now();
        let asked = by_frame::poison(&mut poisoner, &targets, &looked, &until, progress);
        let notes = poisoner.close().into_iter().collect();
        Ok(settle(order, pages, asked, &looked, start.elapsed(), notes).cut(&until))
    }
}

fn ask_vmm(
    order: &Order<'_>,
    targets: &[Target],
    looked: &Looked,
    until: &Until<'_>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Asked>, PoisonError> {
    let Order { via, kind, vcpu, .. } = *order;
    let of_frames = via.is_of_frames();
    let mut asked = Vec::with_capacity(targets.len());
    progress(0, targets.len());
    for some in targets.chunks(if of_frames { 1 } else { AT_ONCE }) {
        if let Some(why) = until.reached() {
            asked.extend(untried(&why, targets.len() - asked.len()));
            return Ok(asked);
        }
        let mut pfn = None;
        if let [target] = some
            && of_frames
        {
            // The VMM is not shown whose a page frame is, so it is checked here, right before.
            match looked.fit(target) {
                Ok(found) => pfn = Some(found),
                // The process that it is poisoned for has ended, or the VM has.
                Err(error) if until.is_behind(&error) => {
                    asked.extend(untried(&PoisonError::Ended, targets.len() - asked.len()));
                    return Ok(asked);
                }
                Err(error) => {
                    asked.push(Asked::new(None, Err(error)));
                    progress(asked.len(), targets.len());
                    continue;
                }
            }
        }
        let gpas = some.iter().map(|target| Gpa(target.gpa)).collect();
        let body = Poison { gpas, via, kind, vcpu };
        let done: Vec<Poisoning> = match requests::put_json(order.socket, "vm.poison", &body) {
            Ok(done) => done,
            Err(error) => match broken_off(error, until.life) {
                BrokenOff::Before => {
                    asked.extend(untried(&PoisonError::Ended, targets.len() - asked.len()));
                    return Ok(asked);
                }
                // Some of the pages in the last request may have been done.
                BrokenOff::Within => {
                    let why = |_| Asked::new(None, Err(PoisonError::NotKnown));
                    asked.extend(some.iter().map(why));
                    asked.extend(untried(&PoisonError::Ended, targets.len() - asked.len()));
                    return Ok(asked);
                }
                // Pages that were done before keep their results, and the others get this error.
                BrokenOff::ByError(error) if !asked.is_empty() => {
                    let error = error.to_string();
                    let left = asked.len()..targets.len();
                    asked.extend(
                        left.map(|_| Asked::new(None, Err(PoisonError::Vmm(error.clone())))),
                    );
                    return Ok(asked);
                }
                BrokenOff::ByError(error) => return Err(error.into()),
            },
        };
        asked.extend(done.into_iter().map(|page| Asked {
            was_bad: page.was_bad,
            ..Asked::new(pfn, page.error.map_or(Ok(()), |error| Err(PoisonError::Vmm(error))))
        }));
        progress(asked.len(), targets.len());
    }
    Ok(asked)
}

/// How a request came to have no answer.
enum BrokenOff {
    /// The VM had ended before the request was sent, or has no guest any more.
    Before,
    /// The VM ended after it was sent.
    Within,
    /// The VM runs.
    ByError(ClientError),
}

fn broken_off(error: ClientError, life: &Life) -> BrokenOff {
    // A VM that ends takes its socket away before its process is gone.
    let is_unsent = match &error {
        ClientError::Refused { status: 503, .. } => life.ends(),
        ClientError::Connect { .. } => true,
        _ => false,
    };
    match life.explain(error) {
        ClientError::Ended { .. } if is_unsent => BrokenOff::Before,
        ClientError::Ended { .. } => BrokenOff::Within,
        ClientError::Refused { status: 503, .. } if is_unsent => BrokenOff::Before,
        error => BrokenOff::ByError(error),
    }
}

/// Checks the result of each page.
fn settle(
    order: &Order<'_>,
    pages: Vec<Poisoned>,
    asked: Vec<Asked>,
    looked: &Looked,
    took: Duration,
    notes: Vec<String>,
) -> Burst {
    let deadline = Instant::now() + PATIENCE;
    let (poisoned, failed) = (Vec::new(), Vec::new());
    let mut burst = Burst { poisoned, failed, took, notes, interrupted: None, ended: None };
    let (alone, others): (Vec<_>, Vec<_>) =
        pages.into_iter().partition(|page| page.goes_with.is_none());
    for (mut page, Asked { pfn, was_bad, result }) in alone.into_iter().zip(asked) {
        let gpa = page.gpa;
        page.pfn = pfn.or(page.pfn);
        page.was_bad = was_bad.or(page.was_bad);
        match check_result(order.via, &mut page, result, looked, deadline) {
            Ok(()) => burst.poisoned.push(page),
            Err(error) => burst.failed.push(NotPoisoned { gpa, error }),
        }
    }
    let lost: HashSet<u64> = burst.poisoned.iter().map(|page| page.gpa).collect();
    for page in others {
        match page.goes_with {
            Some(first) if !lost.contains(&first) => {
                let error = PoisonError::NotWith { first };
                burst.failed.push(NotPoisoned { gpa: page.gpa, error });
            }
            _ => burst.poisoned.push(page),
        }
    }
    burst
}

fn check_result(
    via: Means,
    page: &mut Poisoned,
    result: Result<(), PoisonError>,
    looked: &Looked,
    deadline: Instant,
) -> Result<(), PoisonError> {
    let (Looked::Whole(frames), Some(pfn)) = (looked, page.pfn) else {
        return result;
    };
    let is_marked = || {
        let flags = frames.flags_of(pfn, page.extent)?;
        Ok::<_, HostError>(flags & host::flags::HWPOISON != 0)
    };
    if let Err(error) = result {
        // The kernel was not asked.
        if matches!(error, PoisonError::Interrupted | PoisonError::Ended | PoisonError::Frame(_)) {
            return Err(error);
        }
        return Err(match is_marked() {
            Ok(true) => PoisonError::MarkedOnly { pfn, source: error.into() },
            _ => error,
        });
    }
    if !wait_for_mark(is_marked, deadline)? {
        return Err(PoisonError::NotDone { pfn });
    }
    if via == Means::SoftOffline {
        // It may be on its way back to memory, or not needed yet.
        page.moved_to = frames.pagemap.pfn(page.hva).ok();
        if page.moved_to == Some(pfn) {
            return Err(PoisonError::NotMoved { pfn });
        }
    }
    Ok(())
}

fn wait_for_mark(
    is_marked: impl Fn() -> Result<bool, HostError>,
    deadline: Instant,
) -> Result<bool, HostError> {
    loop {
        if is_marked()? {
            return Ok(true);
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
