//! Makes pages of a running guest's RAM go bad, on the host, as software can.
//!
//! This side only poisons. What the VMM then catches, and what it tells its guest, is in the VM's
//! own account (`mce-relay status`, the event monitor).

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::ptr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use libc::{c_int, c_void, siginfo_t};
use serde::Serialize;
use vmm_sys_util::signal::register_signal_handler;

use crate::api::VmInfo;
use crate::client::{self, ClientError};
use crate::host::{self, HostError, Injector, PageFlags, Pagemap};

const PAGE_SHIFT: u32 = 12;
/// How long the kernel may take to mark the pages, after the last of them was asked for.
const PATIENCE: Duration = Duration::from_secs(5);

/// By what the host is asked to poison a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Means {
    /// The hwpoison-inject module, by page frame number: the VMM gets an AO.
    HwpoisonInject,
    /// madvise(MADV_HWPOISON) on a second mapping of the page: the VMM gets an AO.
    Madvise,
}

impl std::fmt::Display for Means {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::HwpoisonInject => "hwpoison-inject",
            Self::Madvise => "madvise",
        })
    }
}

/// Some 4 KiB pages in a row, at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRange {
    /// Number of the first page: its guest-physical address in units of 4 KiB.
    first: u64,
    /// Number of the page behind the last.
    end: u64,
}

impl PageRange {
    /// The page that holds the guest-physical address `gpa`.
    pub fn page(gpa: u64) -> Self {
        let first = gpa >> PAGE_SHIFT;
        Self { first, end: first + 1 }
    }

    /// All pages that hold an address from `start` to before `end`; `None` when there is none.
    pub fn new(start: u64, end: u64) -> Option<Self> {
        let last = end.checked_sub(1).filter(|last| start <= *last)?;
        Some(Self { first: start >> PAGE_SHIFT, end: (last >> PAGE_SHIFT) + 1 })
    }
}

/// What was done to one page.
#[derive(Debug, Serialize)]
pub struct Poisoned {
    /// Guest-physical address of the page.
    #[serde(with = "mce_relay::event::hex")]
    pub gpa: u64,
    /// Host virtual address of the page in the VMM.
    #[serde(with = "mce_relay::event::hex")]
    pub hva: u64,
    /// The host's page frame number.
    #[serde(with = "mce_relay::event::hex")]
    pub pfn: u64,
    /// By what it was poisoned.
    pub via: Means,
}

impl std::fmt::Display for Poisoned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { gpa, hva, pfn, via } = self;
        write!(f, "poisoned: GPA {gpa:#x} = HVA {hva:#x} of the VMM = host pfn {pfn:#x}, via {via}")
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
    /// The pages that the host has marked as poisoned, in the order asked for.
    pub poisoned: Vec<Poisoned>,
    /// The others.
    pub failed: Vec<NotPoisoned>,
    /// How long it took to poison them, without the looking before and after.
    pub took: Duration,
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
    /// Nobody else can map the page.
    #[error(
        "the page at GPA {gpa:#x} is memory of the VMM alone, which no other process can poison by madvise; \
         start the VM with --memory size=…,shared=on, or use --via hwpoison-inject"
    )]
    Private {
        /// Guest-physical address of the page.
        gpa: u64,
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
    #[error("madvise(MADV_HWPOISON) was refused; it needs root (CAP_SYS_ADMIN)")]
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

/// Poisons the page that holds `gpa` in the VM behind `socket`, and sees that it is done.
///
/// # Errors
/// See [`PoisonError`]; the page is unharmed then, unless it says otherwise.
pub fn poison(socket: &Path, gpa: u64, via: Means) -> Result<Poisoned, PoisonError> {
    let burst = poison_all(socket, &[PageRange::page(gpa)], via, &mut |_, _| {})?;
    let Burst { poisoned, failed, .. } = burst;
    match (poisoned.into_iter().next(), failed.into_iter().next()) {
        (Some(page), _) => Ok(page),
        (None, Some(failed)) => Err(failed.error),
        // One page was asked for, so it is in one of the lists.
        (None, None) => Err(PoisonError::OutsideRam { gpa, ram: "nothing there".to_owned() }),
    }
}

/// Poisons all pages in `ranges` of the VM behind `socket`, each once, as fast as the kernel takes
/// them, and sees that it is done. `progress` is called after each with the number of pages that the
/// kernel was asked for and the number of all.
///
/// # Errors
/// See [`PoisonError`]; no page has been touched then. Later failures are in the answer.
pub fn poison_all(
    socket: &Path,
    ranges: &[PageRange],
    via: Means,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Burst, PoisonError> {
    let vm: VmInfo = client::get(socket, "vm.info")?;
    let targets = targets(&vm, ranges)?;
    if !Path::new(host::EARLY_KILL_SYSCTL).exists() {
        return Err(PoisonError::NoMemoryFailure);
    }
    let pagemap = Pagemap::open(vm.pid)?;
    for &Target { gpa, hva, .. } in &targets {
        pagemap.pfn(hva).map_err(|source| PoisonError::Page { gpa, source })?;
    }
    let flags = PageFlags::open()?;
    let mut poisoner = Poisoner::open(&vm, via, &targets)?;

    let mut asked = Vec::with_capacity(targets.len());
    let start = Instant::now();
    for target in &targets {
        // The host may have moved the page since it was looked up, and the frame may be somebody
        // else's by now. Looking again leaves no more time for that than poisoning one page does.
        let result = pagemap.pfn(target.hva).map(|pfn| (pfn, poisoner.poison(target, pfn)));
        asked.push((target, result));
        progress(asked.len(), targets.len());
    }
    let took = start.elapsed();

    let deadline = Instant::now() + PATIENCE;
    let mut burst = Burst { poisoned: Vec::new(), failed: Vec::new(), took };
    for (&Target { gpa, hva, .. }, result) in asked {
        let error = match result {
            Err(error) => Some(error.into()),
            Ok((pfn, Ok(()))) => match wait_for_mark(&flags, pfn, deadline) {
                Ok(true) => {
                    burst.poisoned.push(Poisoned { gpa, hva, pfn, via });
                    None
                }
                Ok(false) => Some(PoisonError::NotDone { pfn }),
                Err(error) => Some(error.into()),
            },
            Ok((pfn, Err(error))) => Some(match flags.is_poisoned(pfn) {
                Ok(true) => PoisonError::MarkedOnly { pfn, source: error.into() },
                _ => error,
            }),
        };
        burst.failed.extend(error.map(|error| NotPoisoned { gpa, error }));
    }
    Ok(burst)
}

fn wait_for_mark(flags: &PageFlags, pfn: u64, deadline: Instant) -> Result<bool, HostError> {
    loop {
        if flags.is_poisoned(pfn)? {
            return Ok(true);
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        sleep(Duration::from_millis(10));
    }
}

/// A page to be poisoned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) gpa: u64,
    hva: u64,
    /// The VMM's descriptor of the file that other processes can map; `None` where there is none.
    fd: Option<i32>,
    /// Offset in that file.
    offset: u64,
    /// The pages that the file comes in, in bytes.
    page_size: u64,
}

/// The pages of `ranges` in the order given, each once. All of them are guest RAM, so however long
/// a range was written down, there are no more of them than the guest has pages.
pub(crate) fn targets(vm: &VmInfo, ranges: &[PageRange]) -> Result<Vec<Target>, PoisonError> {
    for range in ranges {
        let mut page = range.first;
        while page < range.end {
            let gpa = page << PAGE_SHIFT;
            page = match vm.block(gpa) {
                Some(block) => (block.gpa + block.len) >> PAGE_SHIFT,
                None => return Err(PoisonError::OutsideRam { gpa, ram: vm.ram_in_words() }),
            };
        }
    }
    let mut known = HashSet::new();
    let pages = ranges.iter().flat_map(|range| range.first..range.end);
    let new = pages.map(|page| page << PAGE_SHIFT).filter(|gpa| known.insert(*gpa));
    let target = |gpa| {
        let block = vm.block(gpa)?;
        let inside = gpa - block.gpa;
        Some(Target {
            gpa,
            hva: block.hva + inside,
            fd: block.fd.filter(|_| block.shared),
            offset: block.fd_offset + inside,
            page_size: block.page_size,
        })
    };
    Ok(new.filter_map(target).collect())
}

/// One of the means, ready to be used again and again.
enum Poisoner {
    Inject(Injector),
    /// In the process `pid`, with the files of its memory that have been opened.
    Madvise {
        pid: u32,
        files: HashMap<i32, File>,
    },
}

impl Poisoner {
    fn open(vm: &VmInfo, via: Means, targets: &[Target]) -> Result<Self, PoisonError> {
        match via {
            Means::HwpoisonInject => Ok(Self::Inject(Injector::open()?)),
            Means::Madvise => {
                register_signal_handler(libc::SIGBUS, ignore)
                    .map_err(|error| PoisonError::Madvise(error.into()))?;
                if let Some(target) = targets.iter().find(|target| target.fd.is_none()) {
                    return Err(PoisonError::Private { gpa: target.gpa });
                }
                Ok(Self::Madvise { pid: vm.pid, files: HashMap::new() })
            }
        }
    }

    fn poison(&mut self, target: &Target, pfn: u64) -> Result<(), PoisonError> {
        match self {
            Self::Inject(injector) => Ok(injector.corrupt(pfn)?),
            Self::Madvise { pid, files } => {
                // Checked when it was opened.
                let fd = target.fd.ok_or(PoisonError::Private { gpa: target.gpa })?;
                let file = match files.entry(fd) {
                    Entry::Occupied(file) => file.into_mut(),
                    Entry::Vacant(place) => {
                        let path = PathBuf::from(format!("/proc/{pid}/fd/{fd}"));
                        let file = File::options().read(true).write(true).open(&path);
                        place.insert(file.map_err(|source| PoisonError::Memory { path, source })?)
                    }
                };
                madvise(file, target.offset, target.page_size)
            }
        }
    }
}

/// The kernel takes the caller of MADV_HWPOISON for one who touched the page, and sends it an AR,
/// whatever its policy. The page is of no use to this process, so there is nothing to do about it.
extern "C" fn ignore(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

/// Poisons the page at `offset` of the VM's memory through a mapping of our own, so that the VMM is
/// one of those who have it mapped and not the one who asked.
fn madvise(memory: &File, offset: u64, page_size: u64) -> Result<(), PoisonError> {
    const LEN: usize = 1 << PAGE_SHIFT;
    let map_error = |source| PoisonError::Map { offset, source };
    let odd = |error| map_error(io::Error::other(error));
    // A file of huge pages is mapped by whole ones.
    let inside = usize::try_from(offset % page_size).map_err(odd)?;
    let at = libc::off_t::try_from(offset - offset % page_size).map_err(odd)?;
    let all = usize::try_from(page_size).map_err(odd)?;
    // SAFETY: a new mapping at an address of the kernel's choice; the file outlives the call, and
    // nothing but madvise and munmap is done with it.
    let page = unsafe {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(ptr::null_mut(), all, prot, libc::MAP_SHARED, memory.as_raw_fd(), at)
    };
    if page == libc::MAP_FAILED {
        return Err(map_error(io::Error::last_os_error()));
    }
    // SAFETY: `page` is the mapping made above, and nothing refers into it.
    let result = unsafe { libc::madvise(page.byte_add(inside), LEN, libc::MADV_HWPOISON) };
    let error = io::Error::last_os_error();
    // SAFETY: as above; it is not used afterwards.
    unsafe { libc::munmap(page, all) };
    if result == 0 { Ok(()) } else { Err(PoisonError::Madvise(error)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::MemoryBlock;

    fn block(gpa: u64, hva: u64, fd_offset: u64) -> MemoryBlock {
        let (fd, shared, page_size) = (Some(3), true, 4096);
        MemoryBlock { gpa, len: 0x10000, hva, fd, fd_offset, shared, page_size }
    }

    /// Two blocks of 16 pages, with a hole of as many between.
    fn vm() -> VmInfo {
        VmInfo {
            memory: vec![block(0, 0x7000_0000, 0), block(0x20000, 0x8000_0000, 0x10000)],
            ..crate::api::an_info()
        }
    }

    fn gpas(ranges: &[PageRange]) -> Vec<u64> {
        targets(&vm(), ranges).unwrap().iter().map(|target| target.gpa).collect()
    }

    #[test]
    fn ranges_are_whole_pages_without_their_end() {
        let range = |start, end| PageRange::new(start, end).unwrap();
        assert_eq!(gpas(&[range(0x3000, 0x5000)]), [0x3000, 0x4000]);
        assert_eq!(gpas(&[range(0x3fff, 0x4001)]), [0x3000, 0x4000], "whatever they touch");
        assert_eq!(gpas(&[PageRange::page(0x5fff)]), [0x5000]);
        assert_eq!(PageRange::new(0x3000, 0x3000), None);
        assert_eq!(PageRange::new(0x3000, 0x2000), None);
        assert_eq!(PageRange::new(0x3000, 0), None);
    }

    #[test]
    fn each_page_once_in_the_order_given() {
        let range = |start, end| PageRange::new(start, end).unwrap();
        let list = [
            PageRange::page(0x5123),
            range(0x20000, 0x22000),
            range(0x4000, 0x7000),
            PageRange::page(0x5000),
        ];
        assert_eq!(gpas(&list), [0x5000, 0x20000, 0x21000, 0x4000, 0x6000]);
        let (hva, fd, page_size) = (0x8000_1000, Some(3), 4096);
        let target = Target { gpa: 0x21000, hva, fd, offset: 0x11000, page_size };
        assert_eq!(targets(&vm(), &[PageRange::page(0x21000)]).unwrap(), [target]);
    }

    #[test]
    fn one_address_outside_ram_is_named_and_refuses_all() {
        let good = PageRange::page(0x1000);
        for (range, bad) in [
            (PageRange::page(0x10000), "0x10000"),
            (PageRange::new(0xf000, 0x21000).unwrap(), "0x10000"),
            (PageRange::new(0x2f000, 0x31000).unwrap(), "0x30000"),
            (PageRange::page(u64::MAX), "0xfffffffffffff000"),
            // Not one by one: this would take for ever.
            (PageRange::new(0x20000, u64::MAX).unwrap(), "0x30000"),
        ] {
            let error = targets(&vm(), &[good, range]).unwrap_err().to_string();
            let expected = format!("GPA {bad} is not guest RAM; this guest has 0x0 to 0xffff, ");
            assert!(error.starts_with(&expected), "{range:?}: {error}");
        }
    }
}
