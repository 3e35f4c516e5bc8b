//! Makes pages of a running guest's RAM go bad, on the host, by every means that software has.
//!
//! This side only poisons. What the VMM then catches, and what it tells its guest, is in the VM's
//! own account (`mce-relay status`, the event monitor).

mod forecast;
pub mod frame;
pub mod inside;
mod outside;
mod targets;
pub mod uffd;

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use mce_relay::FailureKind;
use serde::{Deserialize, Serialize};

pub use targets::{PageRange, random};
pub(crate) use targets::{Target, targets};

use crate::api::{Gpa, Poison, Poisoning, Status, VmInfo};
use crate::client::{self, ClientError};
use crate::host::filter::{Filter, FilterError};
use crate::host::memcg::{MemcgError, NoMemcg};
use crate::host::{self, HostError, PageFlags, Pagemap, x86_injector};
use crate::life::Life;
use crate::show::counted;
use frame::{FrameError, Frames};

/// How long the kernel may take to mark the pages, after the last of them was asked for.
const PATIENCE: Duration = Duration::from_secs(1);
/// So many pages are asked of the VMM at once, where nothing has to be looked at right before each.
const AT_ONCE: usize = 1000;
const PAGE_SHIFT: u32 = 12;

/// By what a page is made to go bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Means {
    /// The hwpoison-inject module, by page frame number. The VMM gets an AO. Root.
    HwpoisonInject,
    /// madvise(MADV_HWPOISON): by this command, on a mapping of its own, where the memory is shared;
    /// else by the VMM. The caller gets an AR, the VMM an AO. Root.
    Madvise,
    /// madvise(MADV_SOFT_OFFLINE): the page moves to another frame and the old one is never used
    /// again. The guest notices nothing, and nothing goes into the ledger. Root.
    SoftOffline,
    /// The mce-inject module: the host's own machine-check code is made to believe in an error of the
    /// page. The VMM gets an AO. Root; `unpoison` is off from then on.
    MceInject,
    /// UFFDIO_POISON, by the VMM on its own memory. Nothing is signalled until somebody touches the
    /// page; then it is an AR. No privileges, no CONFIG_MEMORY_FAILURE (Linux 6.6).
    Uffd,
    /// A signal that the VMM forges for itself; the page is whole. Everything about it is labelled as
    /// forged. No privileges.
    Signal,
}

impl std::fmt::Display for Means {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::HwpoisonInject => "hwpoison-inject",
            Self::Madvise => "madvise",
            Self::SoftOffline => "soft-offline",
            Self::MceInject => "mce-inject",
            Self::Uffd => "uffd",
            Self::Signal => "signal",
        })
    }
}

impl Means {
    /// What has been done to a page by it, in a word, if the page was whole before.
    #[must_use]
    pub fn done(self) -> &'static str {
        match self {
            Self::Signal => "FORGED (the page is whole)",
            Self::SoftOffline => "taken out of use",
            _ => "poisoned",
        }
    }

    /// Whether it is the host's page frame that goes bad.
    fn is_of_frames(self) -> bool {
        !matches!(self, Self::Uffd | Self::Signal)
    }
}

/// Which of hwpoison-inject's filters to use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FilterChoice {
    /// The VM's own memory cgroup, where it has one, and what else this says: no wrong page frame can be
    /// somebody else's.
    OwnCgroup(Filter),
    /// None; what is in force stays in force.
    Nothing,
    /// This one.
    Given(Filter),
}

/// What is to be done.
#[derive(Debug)]
pub struct Order<'a> {
    /// API socket of the VM.
    pub socket: &'a Path,
    /// Which pages.
    pub ranges: &'a [PageRange],
    /// By what means.
    pub via: Means,
    /// For a forged signal: which.
    pub kind: FailureKind,
    /// For a forged AR: the vCPU that is to have touched the page.
    pub vcpu: u8,
    /// For hwpoison-inject: which filter.
    pub filter: FilterChoice,
    /// For hwpoison-inject: do it though no memory cgroup keeps everybody else's pages from it.
    pub force: bool,
    /// The process of the guest, in words, whose pages its agent has named.
    pub whose: Option<String>,
    /// It is not going to be done, so what would be refused is only said to be.
    pub dry_run: bool,
}

/// What was done to one page, or is going to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Poisoned {
    /// Guest-physical address of the page.
    #[serde(with = "mce_relay::hex")]
    pub gpa: u64,
    /// Host virtual address of the page in the VMM.
    #[serde(with = "mce_relay::hex")]
    pub hva: u64,
    /// The host's page frame number, where it is known to this user.
    #[serde(with = "mce_relay::hex_option")]
    pub pfn: Option<u64>,
    /// By what it is poisoned.
    pub via: Means,
    /// The signal is made up, and does nothing to the page; see `was_bad` for whether that is whole.
    pub forged: bool,
    /// Whether the page was really bad before; `null` where nobody can say.
    pub was_bad: Option<bool>,
    /// How often the page frame is mapped on this host, where that is known.
    pub mapped: Option<u64>,
    /// Bytes that are lost with the page, which are the whole of a huge page of hugetlb.
    pub extent: u64,
    /// Some of them are in the range where the guest's kernel was loaded.
    pub guest_kernel: bool,
    /// The page of the same huge page that was asked for before, with which it goes.
    #[serde(with = "mce_relay::hex_option")]
    pub goes_with: Option<u64>,
    /// The page frame that it moved to (soft offline).
    #[serde(with = "mce_relay::hex_option")]
    pub moved_to: Option<u64>,
    /// Nothing was done.
    pub dry_run: bool,
}

impl Poisoned {
    /// A page of 4 KiB of which nothing else is known.
    #[must_use]
    pub fn new(gpa: u64, hva: u64, via: Means) -> Self {
        let forged = via == Means::Signal;
        Self {
            gpa,
            hva,
            pfn: None,
            via,
            forged,
            was_bad: None,
            mapped: None,
            extent: 1 << PAGE_SHIFT,
            guest_kernel: false,
            goes_with: None,
            moved_to: None,
            dry_run: false,
        }
    }

    /// What has been done, in a word.
    #[must_use]
    pub fn done(&self) -> &'static str {
        match (self.via, self.was_bad) {
            (Means::Signal, Some(true)) => "FORGED signal (the page is really bad already)",
            (Means::Signal, None) => "FORGED signal (nothing is done to the page)",
            (via, _) => via.done(),
        }
    }
}

impl std::fmt::Display for Poisoned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { gpa, hva, pfn, via, goes_with, moved_to, dry_run, .. } = self;
        f.write_str(if *dry_run { "would be " } else { "" })?;
        f.write_str(self.done())?;
        write!(f, ": GPA {gpa:#x} = HVA {hva:#x} of the VMM")?;
        if let Some(pfn) = pfn {
            write!(f, " = host pfn {pfn:#x}")?;
        }
        write!(f, ", via {via}")?;
        if let Some(first) = goes_with {
            write!(f, ", with GPA {first:#x}")?;
        }
        match moved_to {
            Some(to) => write!(f, ", moved to host pfn {to:#x}"),
            None => Ok(()),
        }
    }
}

/// A page that was not poisoned as it should have been.
#[derive(Debug)]
pub struct NotPoisoned {
    /// Guest-physical address of the page.
    pub gpa: u64,
    /// FallbackReason.
    pub error: PoisonError,
}

/// What became of a list of pages.
#[derive(Debug)]
pub struct Burst {
    /// The pages to which it was done, in the order asked for. What the host marks as poisoned was
    /// seen to be marked.
    pub poisoned: Vec<Poisoned>,
    /// The others.
    pub failed: Vec<NotPoisoned>,
    /// How long it took to poison them, without the looking before and after.
    pub took: Duration,
    /// Things to know.
    pub notes: Vec<String>,
    /// The signal that ended it before all pages were tried.
    pub interrupted: Option<u8>,
    /// That the VM ended before all pages were tried, and how.
    pub ended: Option<ClientError>,
}

impl Burst {
    /// With the signal that came, or the VM's end, if there was something left to do by then.
    fn cut(self, until: &Until<'_>) -> Self {
        let any = |is: fn(&PoisonError) -> bool| self.failed.iter().any(|page| is(&page.error));
        let by_signal = any(|error| matches!(error, PoisonError::Interrupted));
        let by_end = any(|error| matches!(error, PoisonError::Ended));
        let interrupted = until.interrupted.signal().filter(|_| by_signal);
        Self { interrupted, ended: by_end.then(|| until.life.ended()), ..self }
    }
}

/// Why a page was not poisoned.
#[derive(Debug, thiserror::Error)]
pub enum PoisonError {
    /// The VM does not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The host cannot be asked or told.
    #[error(transparent)]
    Host(#[from] HostError),
    /// There is no page of the host behind the address, or it must not be poisoned.
    #[error("GPA {gpa:#x}{}", other_pages(.others))]
    Page {
        /// Guest-physical address of the page.
        gpa: u64,
        /// How many other pages that were asked for cannot be poisoned, either.
        others: usize,
        /// The cause.
        #[source]
        source: FrameError,
    },
    /// The page is not poisoned.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// It is bad, so there is nothing to be done.
    #[error("GPA {gpa:#x} is bad already{}; nothing was done", other_pages(.others))]
    AlreadyBad {
        /// Guest-physical address of the page.
        gpa: u64,
        /// How many other pages that were asked for are so, too.
        others: usize,
    },
    /// The VM's memory cgroup cannot be found out.
    #[error(transparent)]
    Memcg(#[from] MemcgError),
    /// Nothing would keep the kernel from somebody else's page.
    #[error(
        "{why}, so nothing keeps a page frame safe that becomes somebody else's between the look at it and the \
         poison; start the VM in a memory cgroup of its own (systemd-run --scope mce-relay run …), or take the \
         risk with --force"
    )]
    Unprotected {
        /// Why there is no filter.
        why: NoMemcg,
    },
    /// The kernel cannot poison memory.
    #[error(
        "this host's kernel has no memory failure handling (CONFIG_MEMORY_FAILURE: {path} is missing); \
         boot one that has it, or use the lab (make lab)",
        path = host::EARLY_KILL_SYSCTL
    )]
    NoMemoryFailure,
    /// The address is not RAM of that guest.
    #[error("GPA {gpa:#x} is not guest RAM; this guest has {ram}")]
    OutsideRam {
        /// The address asked for.
        gpa: u64,
        /// Where there is RAM.
        ram: String,
    },
    /// hwpoison-inject's filters cannot be used.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The VM has not that many pages that could go bad.
    #[error(
        "{} asked for at random, and this guest has {there} that have memory of its own and are whole, at most one of \
         them in each huge page",
        pages(.wanted)
    )]
    TooFew {
        /// How many were asked for.
        wanted: usize,
        /// How many there are.
        there: usize,
    },
    /// The VMM was asked, and could not.
    #[error("{0}")]
    Vmm(String),
    /// It is part of a huge page, another page of which was to be poisoned.
    #[error("it would have gone with GPA {first:#x}, which was not poisoned")]
    NotWith {
        /// Guest-physical address of that page.
        first: u64,
    },
    /// The user stopped it.
    #[error("interrupted before this page was reached; it is as it was")]
    Interrupted,
    /// The VMM was asked, and has ended.
    #[error("the VM ended before it said whether this was done")]
    NotKnown,
    /// There is no VM any more.
    #[error("the VM had ended before this page was reached")]
    Ended,
    /// A page that was to move did not.
    #[error("the kernel took the request, but the page is where it was (page frame {pfn:#x})")]
    NotMoved {
        /// The page frame.
        pfn: u64,
    },
    /// The VMM's memory cannot be opened.
    #[error("cannot open the VM's memory {path}; run it as root", path = .path.display())]
    Memory {
        /// The path in /proc.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The page cannot be mapped here.
    #[error("cannot map the page at offset {offset:#x} of the VM's memory")]
    Map {
        /// Offset in the VM's memory file.
        offset: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// madvise was refused.
    #[error("madvise was refused; it needs root (CAP_SYS_ADMIN) and CONFIG_MEMORY_FAILURE")]
    Madvise(#[source] io::Error),
    /// The kernel took the request and did nothing.
    #[error(
        "the kernel took the request, but page frame {pfn:#x} is not marked as poisoned; \
         a hwpoison filter may hold it back (/sys/kernel/debug/hwpoison/corrupt-filter-*), and its log says more"
    )]
    NotDone {
        /// The page frame.
        pfn: u64,
    },
    /// The kernel failed, but not before it had marked the page.
    #[error(
        "page frame {pfn:#x} is marked as poisoned, but the kernel could not handle its failure, \
         so the VM may not have been told"
    )]
    MarkedOnly {
        /// The page frame.
        pfn: u64,
        /// What the kernel said.
        #[source]
        source: Box<PoisonError>,
    },
}

fn other_pages(others: &usize) -> String {
    match others {
        0 => String::new(),
        1 => " (and one other page)".to_owned(),
        others => format!(" (and {others} other pages)"),
    }
}

fn pages(count: &usize) -> String {
    counted(*count as u64, "page")
}

/// Everything is looked at, and nothing is done yet.
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

/// Looks at everything that `order` is about, before the first page is touched.
///
/// # Errors
/// See [`PoisonError`].
pub fn prepare<'a>(order: &'a Order<'a>) -> Result<Prepared<'a>, PoisonError> {
    let Status { vm, pages, .. } = client::get_of_process(order.socket, "relay.status")?;
    let bad: HashSet<u64> =
        pages.iter().filter(|page| !page.is_forged()).map(|page| page.gpa).collect();
    let life = Life::of(order.socket, vm.pid);
    let targets = targets(&vm, order.ranges)?;
    let looked = Looked::new(vm.pid, order.via)?;
    let (pages, more) = look(&vm, order.via, &targets, &looked, &bad)?;
    let mut notes = forecast::words(&vm, order.via, &pages, order.whose.as_deref());
    notes.extend(more);
    let (filter, more) = outside::filter(&vm, order, &targets)?;
    notes.extend(more);
    Ok(Prepared { order, vm, life, targets, pages, looked, filter, notes })
}

impl Prepared<'_> {
    /// What is to be known before it is done: what goes, and what would hold pages back.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What would be done.
    #[must_use]
    pub fn plan(mut self) -> Burst {
        self.pages.iter_mut().for_each(|page| page.dry_run = true);
        let (poisoned, took) = (self.pages, Duration::ZERO);
        let (failed, notes) = (Vec::new(), Vec::new());
        Burst { poisoned, failed, took, notes, interrupted: None, ended: None }
    }

    /// Does to the pages what was ordered, each once, as fast as the kernel takes them, and sees that it
    /// is done. `progress` is called with the number of pages done so far and the number of all.
    ///
    /// # Errors
    /// See [`PoisonError`]; no page has been touched then. Later failures are in the answer.
    pub fn carry_out(self, progress: &mut dyn FnMut(usize, usize)) -> Result<Burst, PoisonError> {
        let Self { order, vm, life, targets, pages, looked, filter, .. } = self;
        let alone = targets.into_iter().zip(&pages).filter(|(_, page)| page.goes_with.is_none());
        let targets: Vec<Target> = alone.map(|(target, _)| target).collect();
        let by_vmm = match order.via {
            Means::Uffd | Means::Signal => true,
            // The VMM's own memory, which no other process can map.
            Means::Madvise | Means::SoftOffline => targets.iter().any(|target| target.fd.is_none()),
            Means::HwpoisonInject | Means::MceInject => false,
        };
        // Before anything of the host's is changed.
        let interrupted = outside::Interrupted::new();
        let until = Until { life: &life, interrupted: &interrupted };
        if by_vmm {
            let start = Instant::now();
            let asked = ask_vmm(order, &targets, &looked, &until, progress)?;
            let done = settle(order, pages, asked, &looked, start.elapsed(), Vec::new());
            return Ok(done.cut(&until));
        }
        let mut poisoner = outside::Poisoner::open(vm.pid, order.via, filter)?;
        let start = Instant::now();
        let asked = outside::poison(&mut poisoner, &targets, &looked, &until, progress);
        let notes = poisoner.close().into_iter().collect();
        Ok(settle(order, pages, asked, &looked, start.elapsed(), notes).cut(&until))
    }
}

/// What is known of the host's side of a VM's pages, as far as this user may know it.
enum Looked {
    /// All of it, as it has to be where page frames are poisoned.
    Whole(Frames),
    /// For what does nothing to page frames.
    Part { pagemap: Option<Pagemap>, flags: Option<PageFlags> },
}

impl Looked {
    fn new(pid: u32, via: Means) -> Result<Self, PoisonError> {
        if !via.is_of_frames() {
            let (pagemap, flags) = (Pagemap::open(pid).ok(), PageFlags::open().ok());
            return Ok(Self::Part { pagemap, flags });
        }
        if !Path::new(host::EARLY_KILL_SYSCTL).exists() {
            return Err(PoisonError::NoMemoryFailure);
        }
        if via == Means::MceInject {
            x86_injector::check_processor()?;
        }
        Ok(Self::Whole(Frames::open(pid)?))
    }

    /// The page frame behind `target`, which may be poisoned, at this moment.
    fn fit(&self, target: &Target) -> Result<u64, PoisonError> {
        match self {
            Self::Whole(frames) => Ok(frames.fit(target)?.pfn),
            Self::Part { .. } => Err(HostError::Hidden.into()),
        }
    }
}

/// Looks at every page before the first is touched; what is to be known of them, too.
fn look(
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
    // The first page that was asked for of each huge page.
    let mut firsts = HashMap::new();
    for target in targets {
        let &Target { gpa, hva, page_size, .. } = target;
        let extent = page_size.max(1 << PAGE_SHIFT);
        let guest_kernel = forecast::touches_kernel(vm, gpa - gpa % extent, extent);
        let first = *firsts.entry(gpa - gpa % extent).or_insert(gpa);
        // A signal may be sent for each of them.
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

/// Whether a page that cannot be looked at is bad: the host says so of its frame, or the ledger of one that the
/// VMM does not have mapped any more.
fn is_bad(error: &FrameError, in_ledger: bool) -> bool {
    let unmapped =
        matches!(error, FrameError::Host(HostError::NotMapped { .. } | HostError::Absent { .. }));
    matches!(error, FrameError::Unfit { why: frame::Unfit::Bad, .. }) || (unmapped && in_ledger)
}

/// Pages that more than the VM has, in words.
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

/// One page that was asked for.
struct Asked {
    /// The page frame that was behind it at that moment.
    pfn: Option<u64>,
    /// Whether it was bad before, by the VMM's own look.
    was_bad: Option<bool>,
    /// What the kernel said.
    result: Result<(), PoisonError>,
}

impl Asked {
    fn new(pfn: Option<u64>, result: Result<(), PoisonError>) -> Self {
        Self { pfn, was_bad: None, result }
    }
}

/// What ends the work before all is done.
struct Until<'a> {
    life: &'a Life,
    interrupted: &'a outside::Interrupted,
}

impl Until<'_> {
    /// Why no more pages are tried.
    fn reached(&self) -> Option<PoisonError> {
        match (self.interrupted.is_set(), self.life.is_over()) {
            (true, _) => Some(PoisonError::Interrupted),
            (_, true) => Some(PoisonError::Ended),
            _ => None,
        }
    }

    /// Whether the VM's end is behind the error of a page that was not asked for.
    fn is_behind(&self, error: &PoisonError) -> bool {
        // The memory is gone a moment before the process is.
        let gone =
            |error: &HostError| matches!(error, HostError::Absent { .. } | HostError::File { .. });
        matches!(error, PoisonError::Frame(FrameError::Host(error)) if gone(error))
            && self.life.ends()
    }
}

/// So many pages that are not tried any more.
fn untried(why: &PoisonError, count: usize) -> impl Iterator<Item = Asked> {
    let by_end = matches!(why, PoisonError::Ended);
    let error = move |_| if by_end { PoisonError::Ended } else { PoisonError::Interrupted };
    (0..count).map(error).map(|error| Asked::new(None, Err(error)))
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
            // The VMM may not see whose a page frame is, so it is looked at here, right before.
            match looked.fit(target) {
                Ok(found) => pfn = Some(found),
                Err(error) if until.is_behind(&error) => continue,
                Err(error) => {
                    asked.push(Asked::new(None, Err(error)));
                    progress(asked.len(), targets.len());
                    continue;
                }
            }
        }
        let gpas = some.iter().map(|target| Gpa(target.gpa)).collect();
        let body = Poison { gpas, via, kind, vcpu };
        let done: Vec<Poisoning> = match client::put_json(order.socket, "vm.poison", &body) {
            Ok(done) => done,
            // There is no guest, and none comes.
            Err(ClientError::Refused { status: 503, .. }) if until.life.ends() => {
                asked.extend(untried(&PoisonError::Ended, targets.len() - asked.len()));
                return Ok(asked);
            }
            // Of the last that were asked for some may have been done.
            Err(error) if matches!(error, ClientError::Ended { .. }) || until.life.is_over() => {
                let why = |_| Asked::new(None, Err(PoisonError::NotKnown));
                asked.extend(some.iter().map(why));
                asked.extend(untried(&PoisonError::Ended, targets.len() - asked.len()));
                return Ok(asked);
            }
            // What was done before is not lost, and neither is what was not.
            Err(error) if !asked.is_empty() => {
                let why = |error: &ClientError| Err(PoisonError::Vmm(error.to_string()));
                let left = asked.len()..targets.len();
                asked.extend(left.map(|_| Asked::new(None, why(&error))));
                return Ok(asked);
            }
            Err(error) => return Err(error.into()),
        };
        asked.extend(done.into_iter().map(|page| Asked {
            was_bad: page.was_bad,
            ..Asked::new(pfn, page.error.map_or(Ok(()), |error| Err(PoisonError::Vmm(error))))
        }));
        progress(asked.len(), targets.len());
    }
    Ok(asked)
}

/// Looks whether it was done.
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
        match seen_to(order.via, &mut page, result, looked, deadline) {
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

fn seen_to(
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
        // Nothing was asked of the kernel then.
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
        // It may be on its way back in, or nobody has asked for it yet.
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
