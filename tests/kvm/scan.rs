//! The search for poisoned pages that no signal told of: by marks of UFFDIO_POISON anywhere, and by
//! real poison in the lab.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use mce_relay::KillPolicy;
use mce_relay::internals::scan::{FailureCounter, Method, Scanner};
use mce_relay_cli::poison::host::hwpoison_inject;
use mce_relay_tests::lab::may_poison;
use mce_relay_vmm::host::{page_frames, pagemap};

use crate::uffd::write_protect;
use crate::uffd::{
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP, Uffd,
};

const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;

/// Memory of this process; with a memfd behind it as guest RAM has, or anonymous.
struct Mapping {
    hva: u64,
    len: u64,
    memfd: Option<File>,
}

impl Mapping {
    fn memfd(len: u64, flags: libc::c_uint) -> Self {
        // SAFETY: takes a string that lives as long as the program.
        let fd = unsafe { libc::memfd_create(c"scan".as_ptr(), flags) };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: a descriptor that the kernel has just made, owned by nobody else.
        let memfd = unsafe { File::from_raw_fd(fd) };
        memfd.set_len(len).unwrap();
        Self::new(len, Some(memfd))
    }

    fn anonymous(len: u64) -> Self {
        Self::new(len, None)
    }

    fn new(len: u64, memfd: Option<File>) -> Self {
        let (kind, fd) = match &memfd {
            Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        };
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = kind | libc::MAP_NORESERVE;
        let bytes = usize::try_from(len).unwrap();
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, flags, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Self { hva: at.expose_provenance() as u64, len, memfd }
    }

    fn page(&self, index: u64) -> u64 {
        assert!(index * PAGE < self.len);
        self.hva + index * PAGE
    }

    fn range(&self) -> Range<u64> {
        self.hva..self.hva + self.len
    }

    fn write(&self, hva: u64) {
        assert!(self.range().contains(&hva));
        // SAFETY: a byte of our mapping, to which there are no references.
        unsafe { pointer(hva).write_volatile(1) };
    }

    fn read(&self, hva: u64) {
        assert!(self.range().contains(&hva));
        // SAFETY: as for `write`.
        unsafe { pointer(hva).read_volatile() };
    }

    /// How many pages have memory behind them.
    fn populated(&self) -> u64 {
        if let Some(memfd) = &self.memfd {
            return memfd.metadata().unwrap().blocks() * 512 / PAGE;
        }
        mincore(self.range()).iter().map(|byte| u64::from(byte & 1)).sum()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody uses any more.
        unsafe { libc::munmap(pointer(self.hva).cast(), usize::try_from(self.len).unwrap()) };
    }
}

fn pointer(hva: u64) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(usize::try_from(hva).unwrap())
}

fn mincore(range: Range<u64>) -> Vec<u8> {
    let len = usize::try_from(range.end - range.start).unwrap();
    let mut vec = vec![0u8; len.div_ceil(4096)];
    // SAFETY: mincore writes a byte for each page of the range.
    let result = unsafe { libc::mincore(pointer(range.start).cast(), len, vec.as_mut_ptr()) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    vec
}

fn in_core(page: u64) -> bool {
    mincore(page..page + PAGE)[0] & 1 == 1
}

fn advise(range: Range<u64>, advice: libc::c_int) -> io::Result<()> {
    let len = usize::try_from(range.end - range.start).unwrap();
    // SAFETY: the range is a mapping of ours, to which there are no references.
    let result = unsafe { libc::madvise(pointer(range.start).cast(), len, advice) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A scanner for each method that this kernel has.
fn scanners() -> Vec<Scanner> {
    let best = Scanner::new().unwrap();
    let other = (best.method() == Method::PagemapScan)
        .then(|| Scanner::with_method(Method::Pagemap).unwrap());
    std::iter::once(best).chain(other).collect()
}

pub fn marks_are_found_and_nothing_is_populated() {
    // Few and far between; more than one look at the page tables gives; more in a row than mincore
    // is asked about at once.
    let sparse = 64 * GIB;
    for (len, marks) in
        [(sparse, 0), (sparse, 100), (sparse, 4096), (8192 * PAGE, 4096), (1500 * PAGE, 1500)]
    {
        for ram in [Mapping::memfd(len, 0), Mapping::anonymous(len)] {
            find_marks(&ram, marks);
        }
    }
}

fn find_marks(ram: &Mapping, marks: u64) {
    let pages = ram.len / PAGE;
    // Pairs of neighbours, all over the mapping; the first page and the last are among them.
    let place = |n: u64| match n {
        _ if n == marks - 1 => pages - 1,
        _ => (n & !1) * (pages / marks) + (n & 1),
    };
    let marked: BTreeSet<u64> = (0..marks).map(|n| ram.page(place(n))).collect();
    assert_eq!(marked.len() as u64, marks);
    let uffd = Uffd::open().unwrap();
    uffd.register(&(ram.range()), UFFDIO_REGISTER_MODE_MISSING).unwrap();
    for &page in &marked {
        uffd.mark(page, 4096).unwrap();
    }
    // The marks stay, and a page that is touched now is populated instead of being missed.
    drop(uffd);
    // Present pages among them.
    for page in marked.iter().step_by(10).map(|page| page + 2 * PAGE) {
        if ram.range().contains(&page) && !marked.contains(&page) {
            ram.write(page);
        }
    }

    let before = ram.populated();
    for mut scanner in scanners() {
        // Overlapping, rounded, with something unmapped on either side, empty, and nonsense.
        let hva = ram.hva;
        let ranges = [
            hva + ram.len / 2..hva + ram.len - 1,
            hva + 1..hva + ram.len / 2 + 10 * PAGE,
            hva..hva,
            0..4 * PAGE,
            u64::MAX - 1..u64::MAX,
        ];
        let start = Instant::now();
        let found = scanner.scan(ranges.clone().into_iter(), |_| false).unwrap();
        let took = start.elapsed();
        assert!(found.iter().eq(&marked), "{} of {marks}: {found:x?}", found.len());

        let known: BTreeSet<u64> = marked.iter().step_by(3).copied().collect();
        let start = Instant::now();
        let found = scanner.scan(ranges.clone().into_iter(), |page| known.contains(&page)).unwrap();
        assert!(found.iter().eq(marked.difference(&known)), "{} of {marks}", found.len());
        let rest = start.elapsed();

        let start = Instant::now();
        let found = scanner.scan(ranges.into_iter(), |page| marked.contains(&page)).unwrap();
        assert!(found.is_empty());
        println!(
            "    {} of {} MiB, {}, {marks} poisoned: {took:?}; a third known: {rest:?}; all known: {:?}",
            scanner.method(),
            ram.len >> 20,
            if ram.memfd.is_some() { "memfd" } else { "anonymous" },
            start.elapsed()
        );
    }
    assert_eq!(ram.populated(), before, "a scan gives no page memory");
}

/// Whether the page's entry in the page table is neither empty nor present.
fn is_candidate(page: u64) -> bool {
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut entry, page / PAGE * 8).unwrap();
    // Documentation/admin-guide/mm/pagemap.rst: bit 63 present, bit 62 swapped.
    u64::from_ne_bytes(entry) >> 62 == 1
}

/// Whether this kernel has markers that are not poison.
pub fn has_markers() -> Result<(), String> {
    Uffd::with_features(UFFD_FEATURE_WP_HUGETLBFS_SHMEM)
        .map(drop)
        .map_err(|error| format!("needs userfaultfd's write protection of holes: {error}"))
}

pub fn a_marker_that_is_not_poison_is_left_alone() {
    let ram = Mapping::memfd(64 * PAGE, 0);
    let uffd = Uffd::with_features(UFFD_FEATURE_WP_HUGETLBFS_SHMEM).unwrap();
    uffd.register(&(ram.range()), UFFDIO_REGISTER_MODE_WP).unwrap();
    write_protect(&uffd, ram.range()).unwrap();
    let guarded = Mapping::anonymous(64 * PAGE);
    // include/uapi/asm-generic/mman-common.h; from Linux 6.13 on.
    const MADV_GUARD_INSTALL: libc::c_int = 102;
    let guards = advise(guarded.range(), MADV_GUARD_INSTALL);
    println!("    guard pages: {guards:?}");

    let entry = |hva: u64| {
        let mut entry = [0; 8];
        File::open("/proc/self/pagemap")
            .unwrap()
            .read_exact_at(&mut entry, hva / PAGE * 8)
            .unwrap();
        u64::from_ne_bytes(entry)
    };
    let is_candidate = |hva| entry(hva) >> 62 == 1;
    assert!(is_candidate(ram.hva), "{:#x}: not what this test is about", entry(ram.hva));
    assert!(guards.is_err() || is_candidate(guarded.hva), "{:#x}", entry(guarded.hva));
    for mut scanner in scanners() {
        let ranges = [ram.range(), guarded.range()];
        assert_eq!(scanner.scan(ranges.into_iter(), |_| false).unwrap(), [0u64; 0]);
    }
    assert_eq!((ram.populated(), guarded.populated()), (0, 0));
    drop(uffd);
}

/// Whether this host swaps to memory: what goes to a disk stays in the swap cache, and so in memory,
/// until there is a shortage.
pub fn has_zram_swap() -> Result<(), String> {
    match std::fs::read_to_string("/proc/swaps") {
        Ok(swaps) if swaps.contains("/dev/zram") => Ok(()),
        _ => Err("needs swap space on zram".to_owned()),
    }
}

pub fn what_is_swapped_out_stays_there() {
    let ram = Mapping::anonymous(1024 * PAGE);
    let pages: Vec<u64> = (1..1024).map(|n| ram.page(n)).collect();
    ram.range().step_by(4096).for_each(|page| ram.write(page));
    let start = Instant::now();
    while ram.populated() > 512 {
        assert!(start.elapsed() < Duration::from_secs(20), "nothing is being swapped out");
        advise(ram.range(), libc::MADV_PAGEOUT).unwrap();
        std::thread::sleep(Duration::from_millis(100));
    }
    let bad = may_poison().is_ok().then(|| {
        ram.write(ram.hva);
        poison(ram.hva);
        ram.hva
    });
    // What is still on its way out has memory, and may be asked about.
    let swapped: Vec<u64> = pages.into_iter().filter(|page| !in_core(*page)).collect();
    assert!(swapped.len() >= 256 && swapped.iter().all(|page| is_candidate(*page)));
    for mut scanner in scanners() {
        let found = scanner.scan(std::iter::once(ram.range()), |_| false).unwrap();
        assert!(found.iter().eq(&bad), "{found:x?}");
    }
    let brought_in = swapped.iter().filter(|page| in_core(**page)).count();
    println!(
        "    {} pages swapped out, {brought_in} brought in; poisoned: {bad:x?}",
        swapped.len()
    );
    assert_eq!(brought_in, 0);
}

/// Poisons the page frame behind `hva` of this process and waits until the kernel says so.
fn poison(hva: u64) {
    let pfn = pagemap::pfn(std::process::id(), hva).unwrap();
    poison_pfn(pfn, pfn);
}

/// Poisons page frame `pfn` and waits until the kernel marks `marked`.
fn poison_pfn(pfn: u64, marked: u64) {
    hwpoison_inject::Injector::open().unwrap().corrupt(pfn).unwrap();
    let start = Instant::now();
    while !page_frames::is_poisoned(marked).unwrap() {
        assert!(start.elapsed() < Duration::from_secs(10), "PFN {pfn:#x} was not poisoned");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn is_gone(page: u64) -> bool {
    let result = advise(page..page + PAGE, libc::MADV_POPULATE_READ);
    result.is_err_and(|error| error.raw_os_error() == Some(libc::EHWPOISON))
}

pub fn poison_without_a_signal_is_found() {
    // Late kill, and a SIGBUS ends the test: no signal tells of anything here.
    std::thread::spawn(|| {
        KillPolicy::Late.set().unwrap();
        let ram = Mapping::memfd(256 * PAGE, 0);
        let private = Mapping::anonymous(64 * PAGE);
        let dirty: Vec<u64> = (0..16).map(|n| ram.page(10 * n)).collect();
        let clean: Vec<u64> = (0..16).map(|n| ram.page(10 * n + 5)).collect();
        let anonymous: Vec<u64> = (0..16).map(|n| private.page(2 * n)).collect();
        dirty.iter().for_each(|page| ram.write(*page));
        clean.iter().for_each(|page| ram.read(*page));
        anonymous.iter().for_each(|page| private.write(*page));
        // In the page cache, and mapped nowhere once the second mapping is gone.
        let cached = [ram.page(200), ram.page(201), ram.page(202)];
        let frames: Vec<u64> = {
            let file = ram.memfd.as_ref().unwrap().try_clone().unwrap();
            let second = Mapping::new(ram.len, Some(file));
            let pages = cached.map(|page| second.hva + (page - ram.hva));
            pages.iter().for_each(|page| second.write(*page));
            pages.iter().map(|page| pagemap::pfn(std::process::id(), *page).unwrap()).collect()
        };

        let mut counter = FailureCounter::new().expect("a count of failures");
        println!("    counted in {}", counter.source());
        let mut scanners = scanners();
        let ranges = || [private.range(), ram.range()].into_iter();
        for scanner in &mut scanners {
            assert_eq!(scanner.scan(ranges(), |_| false).unwrap(), [0u64; 0]);
        }
        assert!(!counter.changed(), "nothing has failed yet");
        let before = ram.populated();
        dirty.iter().chain(&clean).chain(&anonymous).for_each(|page| poison(*page));
        assert!(counter.changed());
        assert!(!counter.changed());

        let expected: BTreeSet<u64> =
            dirty.iter().chain(&clean).chain(&anonymous).copied().collect();
        for scanner in &mut scanners {
            let start = Instant::now();
            let found = scanner.scan(ranges(), |_| false).unwrap();
            println!("    {}: {} found in {:?}", scanner.method(), found.len(), start.elapsed());
            assert!(found.iter().eq(&expected), "found {found:x?}, not {expected:x?}");
        }

        frames.iter().for_each(|pfn| poison_pfn(*pfn, *pfn));
        assert!(counter.changed());
        for scanner in &mut scanners {
            let known = |page: u64| expected.contains(&page);
            assert_eq!(scanner.scan(ranges(), known).unwrap(), [0u64; 0], "not mapped, not found");
        }
        assert!(cached.iter().all(|page| is_gone(*page)), "but gone");
        assert_eq!(ram.populated(), before);

        // Poison that is write-protected afterwards looks like a marker and is none.
        if let Ok(uffd) = Uffd::with_features(UFFD_FEATURE_WP_HUGETLBFS_SHMEM) {
            uffd.register(&(private.range()), UFFDIO_REGISTER_MODE_WP).unwrap();
            write_protect(&uffd, private.range()).unwrap();
            for scanner in &mut scanners {
                let range = std::iter::once(private.range());
                assert_eq!(scanner.scan(range, |_| false).unwrap(), anonymous);
            }
        }
    })
    .join()
    .unwrap();
}

pub fn a_poisoned_huge_page_is_found_page_by_page() {
    const HUGE: u64 = 2 << 20;
    const RESERVED: &str = "/proc/sys/vm/nr_hugepages";
    std::thread::spawn(|| {
        KillPolicy::Late.set().unwrap();
        let before = std::fs::read(RESERVED).unwrap();
        std::fs::write(RESERVED, "4").unwrap();
        let ram = Mapping::memfd(3 * HUGE, libc::MFD_HUGETLB);
        (0..2).for_each(|n| ram.write(ram.hva + n * HUGE));
        // The kernel marks the first frame of the huge page.
        let first = pagemap::pfn(std::process::id(), ram.hva + HUGE).unwrap();
        poison_pfn(first + 7, first);
        for mut scanner in scanners() {
            let expected = match scanner.method() {
                Method::PagemapScan => ram.hva + HUGE..ram.hva + 2 * HUGE,
                Method::Pagemap => 0..0,
            };
            let start = Instant::now();
            let found = scanner.scan(std::iter::once(ram.range()), |_| false).unwrap();
            println!("    {}: {} found in {:?}", scanner.method(), found.len(), start.elapsed());
            assert!(found.iter().copied().eq(expected.step_by(4096)), "{found:x?}");
        }
        drop(ram);
        std::fs::write(RESERVED, before).unwrap();

        // A transparent huge page is split first.
        let ram = Mapping::anonymous(4 * HUGE);
        advise(ram.range(), libc::MADV_HUGEPAGE).unwrap();
        let huge = ram.hva.next_multiple_of(HUGE);
        (0..3).for_each(|n| ram.write(huge + n * HUGE));
        poison(huge + HUGE + 7 * PAGE);
        for mut scanner in scanners() {
            let found = scanner.scan(std::iter::once(ram.range()), |_| false).unwrap();
            assert_eq!(found, [huge + HUGE + 7 * PAGE], "{}", scanner.method());
        }
    })
    .join()
    .unwrap();
}
