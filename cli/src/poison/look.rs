//! Looks up the pages before they are poisoned.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use mce_relay_vmm::api::types::means::Means;
use mce_relay_vmm::api::types::vm::VmInfo;
use mce_relay_vmm::host::error::HostError;
use mce_relay_vmm::host::memory_failure;
use mce_relay_vmm::host::page_frames::PageFlags;
use mce_relay_vmm::host::pagemap::Pagemap;

use crate::poison::burst::Poisoned;
use crate::poison::error::PoisonError;
use crate::poison::forecast;
use crate::poison::frame::{self, FrameError, Frames};
use crate::poison::host::{einj, host_mce_injector};
use crate::poison::target::PAGE_SHIFT;
use crate::poison::target::Target;

/// Access to the host's data on a VM's pages, as far as this user has it.
pub(crate) enum Looked {
    /// All of it; needed where page frames are poisoned.
    Whole(Frames),
    /// As much as there is; enough for means that do nothing to page frames.
    Part { pagemap: Option<Pagemap>, flags: Option<PageFlags> },
}

impl Looked {
    pub(crate) fn new(pid: u32, via: Means) -> Result<Self, PoisonError> {
        if !via.is_of_frames() {
            let (pagemap, flags) = (Pagemap::open(pid).ok(), PageFlags::open().ok());
            return Ok(Self::Part { pagemap, flags });
        }
        if !Path::new(memory_failure::EARLY_KILL_SYSCTL).exists() {
            return Err(PoisonError::NoMemoryFailure);
        }
        match via {
            Means::MceInject => host_mce_injector::check_processor()?,
            Means::Einj => einj::check(Path::new(einj::DIR))?,
            _ => {}
        }
        Ok(Self::Whole(Frames::open(pid)?))
    }

    /// The page frame behind `target` at this moment, which may be poisoned.
    pub(crate) fn fit(&self, target: &Target) -> Result<u64, PoisonError> {
        match self {
            Self::Whole(frames) => Ok(frames.fit(target)?.pfn),
            Self::Part { .. } => Err(HostError::Hidden.into()),
        }
    }
}

/// Looks up every page before the first is touched; also returns notes for the user.
pub(crate) fn look(
    vm: &VmInfo,
    via: Means,
    targets: &[Target],
    looked: &Looked,
    bad: &HashSet<u64>,
) -> Result<(Vec<Poisoned>, Vec<String>), PoisonError> {
    let mut pages = Vec::with_capacity(targets.len());
    let mut unfit: Vec<(u64, FrameError)> = Vec::new();
    let mut already_bad = Vec::new();
    let (mut of_others, mut of_file) = (Vec::new(), Vec::new());
    // For each huge page, its first page in the request.
    let mut firsts = HashMap::new();
    for target in targets {
        let &Target { gpa, hva, page_size, .. } = target;
        let extent = page_size.max(1 << PAGE_SHIFT);
        let guest_kernel = forecast::touches_kernel(vm, gpa - gpa % extent, extent);
        let first = *firsts.entry(gpa - gpa % extent).or_insert(gpa);
        // With forged signals each page gets one, so none is covered by another.
        let goes_with = (first != gpa && via != Means::Signal).then_some(first);
        let mut page = Poisoned { extent, guest_kernel, goes_with, ..Poisoned::new(gpa, hva, via) };
        match looked {
            Looked::Whole(frames) => match frames.fit(target) {
                Ok(frame) => {
                    (page.pfn, page.was_bad) = (Some(frame.pfn), Some(false));
                    page.mapped = frames.mapped(frame.pfn);
                    if page.mapped.is_some_and(|count| count > 1) {
                        of_others.push(gpa);
                    }
                    if frame.is_of_file() && target.is_private_file {
                        of_file.push(gpa);
                    }
                }
                Err(error) if is_bad(&error, bad.contains(&gpa)) => already_bad.push(gpa),
                Err(error) => unfit.push((gpa, error)),
            },
            Looked::Part { pagemap, flags } => {
                page.pfn = pagemap.as_ref().and_then(|pagemap| pagemap.pfn(hva).ok());
                let marked = |pfn| flags.as_ref()?.is_poisoned(pfn).ok();
                page.was_bad = match bad.contains(&gpa) {
                    true => Some(true),
                    // A page that is mapped and not marked is whole.
                    false => page.pfn.and_then(marked),
                };
            }
        }
        pages.push(page);
    }
    if let [gpa, others @ ..] = &*already_bad {
        return Err(PoisonError::AlreadyBad { gpa: *gpa, others: others.len() });
    }
    let others = unfit.len().saturating_sub(1);
    if let Some((gpa, source)) = unfit.into_iter().next() {
        return Err(PoisonError::Page { gpa, others, source });
    }
    if via == Means::Uffd {
        let mut bad = pages.iter().filter(|page| page.was_bad == Some(true));
        if let Some(page) = bad.next() {
            return Err(PoisonError::AlreadyBad { gpa: page.gpa, others: bad.count() });
        }
    }
    Ok((pages, shared_in_words(&of_others, &of_file)))
}

/// Whether a page that cannot be looked up is bad: the host has marked its frame, or the ledger has a page that the VMM
/// does not have mapped any more.
fn is_bad(error: &FrameError, in_ledger: bool) -> bool {
    let unmapped =
        matches!(error, FrameError::Host(HostError::NotMapped { .. } | HostError::Absent { .. }));
    matches!(error, FrameError::Unfit { why: frame::Unfit::Bad, .. }) || (unmapped && in_ledger)
}

/// A note on pages that other processes have, too.
fn shared_in_words(of_others: &[u64], of_file: &[u64]) -> Vec<String> {
    let named = |gpas: &[u64]| match gpas {
        [] => None,
        [gpa] => Some(format!("GPA {gpa:#x} is")),
        [gpa, more @ ..] => Some(format!("GPA {gpa:#x} and {} more are", more.len())),
    };
    let of_others = named(of_others).map(|pages| {
        format!("{pages} mapped more than once on this host; whoever else has that memory mapped loses it, too")
    });
    let of_file = named(of_file).map(|pages| {
        format!(
            "{pages} as the file has it, since the guest has not written there; whoever else uses the file \
             loses that, too"
        )
    });
    of_others.into_iter().chain(of_file).collect()
}
