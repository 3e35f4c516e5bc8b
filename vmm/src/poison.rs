//! Makes pages of a running guest's RAM go bad, on the host, by every means that software has.
//!
//! This side only poisons. What the VMM then catches, and what it tells its guest, is in the VM's
//! own account (`mce-relay status`, the event monitor).

pub mod inside;
mod outside;
mod targets;
pub mod uffd;

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use mce_relay::mca::Kind;
use serde::{Deserialize, Serialize};

pub use targets::{PageRange, random};
pub(crate) use targets::{Target, targets};

use crate::api::{Gpa, Poison, Poisoning, VmInfo};
use crate::client::{self, ClientError};
use crate::host::filter::{Filter, FilterError};
use crate::host::{self, HostError, PageFlags, Pagemap, x86_injector};

/// How long the kernel may take to mark the pages, after the last of them was asked for.
const PATIENCE: Duration = Duration::from_secs(1);
/// So many pages are asked of the VMM at once.
const AT_ONCE: usize = 1000;

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
    /// What has been done to a page by it, in a word.
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
    pub kind: Kind,
    /// For a forged AR: the vCPU that is to have touched the page.
    pub vcpu: u8,
    /// For hwpoison-inject: which filter.
    pub filter: FilterChoice,
}

/// What was done to one page, or is going to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Poisoned {
    /// Guest-physical address of the page.
    #[serde(with = "mce_relay::event::hex")]
    pub gpa: u64,
    /// Host virtual address of the page in the VMM.
    #[serde(with = "mce_relay::event::hex")]
    pub hva: u64,
    /// The host's page frame number, where it is known to this user.
    #[serde(with = "mce_relay::event::hex_option")]
    pub pfn: Option<u64>,
    /// By what it is poisoned.
    pub via: Means,
    /// The page is whole: only the signal is made up.
    pub forged: bool,
    /// The page frame that it moved to (soft offline).
    #[serde(with = "mce_relay::event::hex_option")]
    pub moved_to: Option<u64>,
    /// Nothing was done.
    pub dry_run: bool,
}

impl std::fmt::Display for Poisoned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { gpa, hva, pfn, via, moved_to, dry_run, forged: _ } = self;
        f.write_str(if *dry_run { "would be " } else { "" })?;
        f.write_str(via.done())?;
        write!(f, ": GPA {gpa:#x} = HVA {hva:#x} of the VMM")?;
        if let Some(pfn) = pfn {
            write!(f, " = host pfn {pfn:#x}")?;
        }
        write!(f, ", via {via}")?;
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
    /// Why.
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
    /// There is no page of the host behind the address.
    #[error("GPA {gpa:#x}")]
    Page {
        /// Guest-physical address of the page.
        gpa: u64,
        /// The cause.
        #[source]
        source: HostError,
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
        "{wanted} pages were asked for, and this guest has {there} that have memory and are whole"
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
    /// The user stopped it.
    #[error("interrupted before its turn came; it is as it was")]
    Interrupted,
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

/// Does to the pages what `order` says, each once, as fast as the kernel takes them, and sees that it
/// is done. `progress` is called with the number of pages done so far and the number of all.
///
/// # Errors
/// See [`PoisonError`]; no page has been touched then. Later failures are in the answer.
pub fn poison_all(
    order: &Order<'_>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Burst, PoisonError> {
    let vm: VmInfo = client::get_of_process(order.socket, "vm.info")?;
    let targets = targets(&vm, order.ranges)?;
    let (pages, mut looked) = look(&vm, order, &targets)?;
    let by_vmm = match order.via {
        Means::Uffd | Means::Signal => true,
        // The VMM's own memory, which no other process can map.
        Means::Madvise | Means::SoftOffline => targets.iter().any(|target| target.fd.is_none()),
        Means::HwpoisonInject | Means::MceInject => false,
    };
    let mut notes = Vec::new();
    let start = Instant::now();
    let asked = if by_vmm {
        ask_vmm(order, &targets, progress)?
    } else {
        // Before anything of the host's is changed.
        let interrupted = outside::Interrupted::new();
        let mut poisoner = outside::Poisoner::open(&vm, order, &mut notes)?;
        let start_of_work = Instant::now();
        let asked = outside::poison(&mut poisoner, &targets, &mut looked, &interrupted, progress);
        notes.extend(poisoner.close());
        let took = start_of_work.elapsed();
        return Ok(settle(order, pages, asked, looked, took, notes));
    };
    let took = start.elapsed();
    Ok(settle(order, pages, asked, looked, took, notes))
}

/// What [`poison_all`] would do.
///
/// # Errors
/// See [`PoisonError`].
pub fn plan(order: &Order<'_>) -> Result<Burst, PoisonError> {
    let vm: VmInfo = client::get_of_process(order.socket, "vm.info")?;
    let targets = targets(&vm, order.ranges)?;
    let (mut pages, _) = look(&vm, order, &targets)?;
    pages.iter_mut().for_each(|page| page.dry_run = true);
    let notes = outside::filter_in_words(&vm, order)?.into_iter().collect();
    Ok(Burst { poisoned: pages, failed: Vec::new(), took: Duration::ZERO, notes })
}

/// What is known of the host's side of a VM's pages, as far as this user may know it.
struct Looked {
    pagemap: Option<Pagemap>,
    flags: Option<PageFlags>,
}

/// Looks at every page before the first is touched.
fn look(
    vm: &VmInfo,
    order: &Order<'_>,
    targets: &[Target],
) -> Result<(Vec<Poisoned>, Looked), PoisonError> {
    let via = order.via;
    let needed = via.is_of_frames();
    if needed && !Path::new(host::EARLY_KILL_SYSCTL).exists() {
        return Err(PoisonError::NoMemoryFailure);
    }
    if via == Means::MceInject {
        x86_injector::check_processor()?;
    }
    let pagemap = match Pagemap::open(vm.pid) {
        Ok(pagemap) => Some(pagemap),
        Err(error) if needed => return Err(error.into()),
        Err(_) => None,
    };
    let flags = match PageFlags::open() {
        Ok(flags) => Some(flags),
        Err(error) if needed => return Err(error.into()),
        Err(_) => None,
    };
    let mut pages = Vec::with_capacity(targets.len());
    for &Target { gpa, hva, .. } in targets {
        let pfn = match pagemap.as_ref().map(|pagemap| pagemap.pfn(hva)) {
            Some(Ok(pfn)) => Some(pfn),
            Some(Err(source)) if needed => return Err(PoisonError::Page { gpa, source }),
            _ => None,
        };
        let forged = via == Means::Signal;
        pages.push(Poisoned { gpa, hva, pfn, via, forged, moved_to: None, dry_run: false });
    }
    Ok((pages, Looked { pagemap, flags }))
}

/// One page that was asked for: the page frame that was behind it at that moment, and what the kernel
/// said.
type Asked = (Option<u64>, Result<(), PoisonError>);

fn ask_vmm(
    order: &Order<'_>,
    targets: &[Target],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Asked>, PoisonError> {
    let Order { via, kind, vcpu, .. } = *order;
    let mut asked = Vec::with_capacity(targets.len());
    for some in targets.chunks(AT_ONCE) {
        let gpas = some.iter().map(|target| Gpa(target.gpa)).collect();
        let body = Poison { gpas, via, kind, vcpu };
        let done: Vec<Poisoning> = match client::put_json(order.socket, "vm.poison", &body) {
            Ok(done) => done,
            // What was done before is not lost, and neither is what was not.
            Err(error) if !asked.is_empty() => {
                let why = |error: &ClientError| Err(PoisonError::Vmm(error.to_string()));
                asked.extend((asked.len()..targets.len()).map(|_| (None, why(&error))));
                return Ok(asked);
            }
            Err(error) => return Err(error.into()),
        };
        asked.extend(
            done.into_iter().map(|page| {
                (None, page.error.map_or(Ok(()), |error| Err(PoisonError::Vmm(error))))
            }),
        );
        progress(asked.len(), targets.len());
    }
    Ok(asked)
}

/// Looks whether it was done.
fn settle(
    order: &Order<'_>,
    pages: Vec<Poisoned>,
    asked: Vec<Asked>,
    looked: Looked,
    took: Duration,
    notes: Vec<String>,
) -> Burst {
    let deadline = Instant::now() + PATIENCE;
    let mut burst = Burst { poisoned: Vec::new(), failed: Vec::new(), took, notes };
    for (mut page, (pfn, result)) in pages.into_iter().zip(asked) {
        let gpa = page.gpa;
        page.pfn = pfn.or(page.pfn);
        match seen_to(order.via, &mut page, result, &looked, deadline) {
            Ok(()) => burst.poisoned.push(page),
            Err(error) => burst.failed.push(NotPoisoned { gpa, error }),
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
    let (Some(flags), Some(pfn), true) = (&looked.flags, page.pfn, via.is_of_frames()) else {
        return result;
    };
    if let Err(error) = result {
        if matches!(error, PoisonError::Interrupted) {
            return Err(error);
        }
        return Err(match flags.is_poisoned(pfn) {
            Ok(true) => PoisonError::MarkedOnly { pfn, source: error.into() },
            _ => error,
        });
    }
    if !wait_for_mark(flags, pfn, deadline)? {
        return Err(PoisonError::NotDone { pfn });
    }
    if via == Means::SoftOffline {
        // It may be on its way back in, or nobody has asked for it yet.
        page.moved_to = looked.pagemap.as_ref().and_then(|pagemap| pagemap.pfn(page.hva).ok());
        if page.moved_to == Some(pfn) {
            return Err(PoisonError::NotMoved { pfn });
        }
    }
    Ok(())
}

fn wait_for_mark(flags: &PageFlags, pfn: u64, deadline: Instant) -> Result<bool, HostError> {
    loop {
        if flags.is_poisoned(pfn)? {
            return Ok(true);
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
