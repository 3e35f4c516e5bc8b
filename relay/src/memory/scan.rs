//! Finds poisoned pages that no signal told of, and notices failures that raised none.
//!
//! SIGBUS does not queue: of thousands of pages poisoned in a burst most signals are lost, and a
//! clean page raises none at all. The page tables lose nothing: the kernel puts a hwpoison entry in
//! place of each poisoned page that this process has mapped, and only then signals and counts. So
//! every signal, and every step of the kernel's count ([`FailureCounter`]), is a reason to scan.
//!
//! A scan has two steps. The page tables are asked for entries that are neither empty nor present
//! ([`Method`]); such a candidate may be poison, but also swap, a page under migration or a marker
//! of userfaultfd. madvise(MADV_POPULATE_READ) on each candidate then answers EHWPOISON for poison and for nothing
//! else, and raises no signal. It would also allocate memory for a hole, or bring in what is swapped out. So it is
//! called only where mincore(2) finds memory, as it does behind each hwpoison entry; and behind markers if this process
//! has nothing swapped out.
//!
//! What a scan does not find (a vCPU or thread that touches such a page gets an AR):
//! - A page that this process has not mapped, such as one that lies in the memfd's page cache only,
//!   and an anonymous page that failed while it was in the swap cache: neither has a hwpoison entry.
//! - Before Linux 6.7, a page of hugetlbfs: /proc/self/pagemap shows nothing there.
//! - A page that this process itself has marked by UFFDIO_POISON, with no memory behind it, while
//!   something is swapped out.
//!
//! The kernel's side is in `fs/proc/task_mmu.c`, `mm/mincore.c`, `mm/gup.c` and `mm/memory-failure.c`.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr;

use crate::types::{PAGE_SHIFT, PAGE_SIZE};

/// [`PAGE_SIZE`] as a length of memory in this process.
const PAGE_LEN: usize = 1 << PAGE_SHIFT;
/// Bytes that one look at the page tables covers: for as long, the kernel blocks threads that change mappings.
const LOOK: u64 = 1 << 30;
/// Most runs of candidates that one look returns; the kernel's own buffer holds as many.
const RUNS: usize = 512;
/// Entries of /proc/self/pagemap that are read at once.
const ENTRIES: usize = 4096;
/// Entries that [`Mapped`] reads at once: those of a huge page of 2 MiB.
const CHUNK: usize = 512;
/// Pages that mincore is asked about at once.
const BATCH: usize = 512;

// include/uapi/linux/fs.h
const PROCFS_IOCTL_MAGIC: u32 = b'f' as u32;
/// The ioctl of /proc/self/pagemap that finds candidates (Linux 6.7).
pub const PAGEMAP_SCAN: libc::Ioctl = libc::_IOWR::<PmScanArg>(PROCFS_IOCTL_MAGIC, 16);
const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

// Documentation/admin-guide/mm/pagemap.rst
const PAGEMAP: &str = "/proc/self/pagemap";
const STATUS: &str = "/proc/self/status";
const PM_ENTRY_LEN: usize = 8;
const PM_UFFD_WP: u64 = 1 << 57;
const PM_SWAP: u64 = 1 << 62;
const PM_PRESENT: u64 = 1 << 63;

/// How the page tables are searched for candidates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum Method {
    /// The ioctl PAGEMAP_SCAN (Linux 6.7): its cost follows what is mapped.
    PagemapScan,
    /// Reading /proc/self/pagemap: its cost follows the size of the ranges.
    Pagemap,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PagemapScan => "PAGEMAP_SCAN",
            Self::Pagemap => PAGEMAP,
        })
    }
}

/// Finds poisoned pages in this process's own mappings.
///
/// It belongs to the process that made it: after a fork the child needs one of its own.
#[derive(Debug)]
pub struct Scanner {
    pagemap: File,
    /// /proc/self/status, if its line VmSwap can be read.
    status: Option<File>,
    method: Method,
    /// What the last look at the page tables found.
    runs: Box<[PageRegion]>,
    /// Room for entries of /proc/self/pagemap; empty where they are not read in bulk.
    entries: Box<[u8]>,
}

impl Scanner {
    /// A scanner that uses the best method this kernel has.
    ///
    /// # Errors
    /// `Unsupported` when the kernel has no MADV_POPULATE_READ (before Linux 5.14): without it
    /// poison cannot be told from swap. Otherwise /proc/self/pagemap cannot be opened: there is no
    /// /proc, CONFIG_PROC_PAGE_MONITOR is off, or the process may not look at itself
    /// (PR_SET_DUMPABLE).
    pub fn new() -> io::Result<Self> {
        Self::with_method(Method::PagemapScan).or_else(|_| Self::with_method(Method::Pagemap))
    }

    /// A scanner that uses `method`.
    ///
    /// # Errors
    /// As for [`Scanner::new`], and when the kernel does not have `method`.
    pub fn with_method(method: Method) -> io::Result<Self> {
        let pagemap = File::open(PAGEMAP)
            .map_err(|error| io::Error::new(error.kind(), format!("{PAGEMAP}: {error}")))?;
        let entries = match method {
            Method::PagemapScan => 0,
            Method::Pagemap => ENTRIES * PM_ENTRY_LEN,
        };
        let mut scanner = Self {
            pagemap,
            status: File::open(STATUS).ok(),
            method,
            runs: vec![PageRegion::default(); RUNS].into(),
            entries: vec![0; entries].into(),
        };
        if method == Method::PagemapScan {
            scanner
                .pagemap_scan(0, PAGE_SIZE)
                .map_err(|error| io::Error::new(error.kind(), format!("PAGEMAP_SCAN: {error}")))?;
        }
        // Any page of this process that is in memory will do to try it.
        let page = scanner.runs.as_ptr().addr() as u64 & !(PAGE_SIZE - 1);
        match populate_read(page) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the kernel has no MADV_POPULATE_READ (Linux 5.14)",
            )),
            _ => Ok(scanner),
        }
    }

    /// How candidates are looked for.
    #[cfg(feature = "internals")]
    pub fn method(&self) -> Method {
        self.method
    }

    /// The host virtual addresses of the poisoned 4 KiB pages in `ranges`, ascending and each once,
    /// for which `known` is false. Of a poisoned huge page these are all its 4 KiB pages.
    ///
    /// Ranges are rounded outwards to whole pages and may overlap; unmapped parts are skipped. Memory is used only for
    /// the pages that are found.
    ///
    /// # Errors
    /// The page tables cannot be read.
    pub fn scan(
        &mut self,
        ranges: impl Iterator<Item = Range<u64>>,
        known: impl Fn(u64) -> bool,
    ) -> io::Result<Vec<u64>> {
        let mut found = Vec::new();
        let mut swap = Swap::default();
        for range in ranges.filter(|range| !range.is_empty()) {
            let mut at = range.start & !(PAGE_SIZE - 1);
            let end = range.end.checked_next_multiple_of(PAGE_SIZE).unwrap_or(u64::MAX);
            while at < end {
                let end = end.min(at.saturating_add(LOOK));
                let (runs, next) = match self.method {
                    Method::PagemapScan => self.pagemap_scan(at, end)?,
                    Method::Pagemap => self.read_pagemap(at, end)?,
                };
                for run in &self.runs[..runs] {
                    for start in (run.start..run.end).step_by(BATCH * PAGE_LEN) {
                        let batch = start..run.end.min(start + (BATCH * PAGE_LEN) as u64);
                        self.sift(batch, &known, &mut swap, &mut found);
                    }
                }
                at = next;
            }
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// Adds to `found` what is poisoned in `batch`, at most [`BATCH`] candidates in a row.
    fn sift(
        &self,
        batch: Range<u64>,
        known: impl Fn(u64) -> bool,
        swap: &mut Swap,
        found: &mut Vec<u64>,
    ) {
        let pages = || batch.clone().step_by(PAGE_LEN);
        if pages().all(&known) {
            return;
        }
        let in_core = in_core(&batch);
        // In order of cost; the last question decides.
        found.extend(pages().zip(in_core).filter_map(|(page, in_core)| {
            (!known(page)
                && (in_core
                    || (swap.is_empty(self.status.as_ref()) && !self.is_write_protected(page)))
                && is_poisoned(page))
            .then_some(page)
        }));
    }

    /// Puts the candidates from `start` on, up to `end`, into `runs`. Returns how many runs there are, and where the
    /// next call has to begin.
    fn pagemap_scan(&mut self, start: u64, end: u64) -> io::Result<(usize, u64)> {
        let mut arg = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            start,
            end,
            vec: self.runs.as_mut_ptr().expose_provenance() as u64,
            vec_len: self.runs.len() as u64,
            category_mask: PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_SWAPPED,
            ..PmScanArg::default()
        };
        // SAFETY: the ioctl reads and writes one pm_scan_arg, and writes at most `vec_len` page_region
        // to `vec`, which is that long and borrowed for as long.
        let runs = unsafe { libc::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        match usize::try_from(runs) {
            Ok(runs) => Ok((runs, arg.walk_end)),
            Err(_) => match io::Error::last_os_error() {
                // Not an address that a process can have.
                error if error.raw_os_error() == Some(libc::EFAULT) => Ok((0, u64::MAX)),
                error => Err(error),
            },
        }
    }

    /// As [`Self::pagemap_scan`], by reading single entries.
    fn read_pagemap(&mut self, start: u64, end: u64) -> io::Result<(usize, u64)> {
        let wanted = (end - start).div_ceil(PAGE_SIZE).saturating_mul(PM_ENTRY_LEN as u64);
        let len = usize::try_from(wanted).map_or(self.entries.len(), |n| n.min(self.entries.len()));
        let read = self.pagemap.read_at(&mut self.entries[..len], entry_offset(start))?;
        let (entries, _) = self.entries[..read].as_chunks::<PM_ENTRY_LEN>();
        if entries.is_empty() {
            // Not an address that a process can have.
            return Ok((0, u64::MAX));
        }
        let (mut runs, room) = (0, self.runs.len());
        let mut page = start;
        for entry in entries {
            let entry = u64::from_ne_bytes(*entry);
            let next = page + PAGE_SIZE;
            if entry & PM_SWAP != 0 && entry & PM_PRESENT == 0 {
                match self.runs[..runs].last_mut() {
                    Some(run) if run.end == page => run.end = next,
                    _ if runs == room => return Ok((runs, page)),
                    _ => {
                        self.runs[runs] = PageRegion { start: page, end: next, categories: 0 };
                        runs += 1;
                    }
                }
            }
            page = next;
        }
        Ok((runs, page))
    }

    /// Whether userfaultfd write-protects the (absent) page: then the entry is a marker, and behind it is a hole or
    /// swap.
    fn is_write_protected(&self, page: u64) -> bool {
        let mut entry = [0; PM_ENTRY_LEN];
        match self.pagemap.read_exact_at(&mut entry, entry_offset(page)) {
            Ok(()) => u64::from_ne_bytes(entry) & PM_UFFD_WP != 0,
            Err(_) => true,
        }
    }
}

/// Which pages this process has mapped, looked up page by page.
pub(crate) struct Mapped {
    /// `None` where this process may not look at itself.
    pagemap: Option<File>,
}

impl Mapped {
    pub(crate) fn new() -> Self {
        Self { pagemap: File::open(PAGEMAP).ok() }
    }

    /// Whether each of `pages`, which ascend, is mapped to memory now. A page that went bad is not, and neither is one
    /// of which the page tables cannot be read.
    pub(crate) fn are_present(&self, pages: impl Iterator<Item = u64>) -> Vec<bool> {
        let mut entries = [[0; PM_ENTRY_LEN]; CHUNK];
        let (mut first, mut read) = (u64::MAX, 0);
        let mut is_present = |page: u64| {
            let Some(pagemap) = &self.pagemap else { return false };
            let number = page >> PAGE_SHIFT;
            if number < first || number - first >= CHUNK as u64 {
                first = number;
                let read_at = pagemap.read_at(entries.as_flattened_mut(), entry_offset(page));
                read = read_at.map_or(0, |len| len / PM_ENTRY_LEN);
            }
            let at = usize::try_from(number - first).unwrap_or(usize::MAX);
            let entry = entries[..read].get(at).copied().map(u64::from_ne_bytes);
            entry.is_some_and(|entry| entry & PM_PRESENT != 0)
        };
        pages.map(&mut is_present).collect()
    }
}

/// Where /proc/self/pagemap has the entry of the page at `hva`.
fn entry_offset(hva: u64) -> u64 {
    (hva >> PAGE_SHIFT) * PM_ENTRY_LEN as u64
}

/// `hva` as system calls want it; it is not used to reach memory.
fn address(hva: u64) -> *mut libc::c_void {
    usize::try_from(hva).map_or(ptr::null_mut(), ptr::without_provenance_mut)
}

/// For each page of `batch` whether there is memory behind it. Pages that mincore does not answer for (their mapping
/// has just changed) count as in memory.
fn in_core(batch: &Range<u64>) -> impl Iterator<Item = bool> + use<> {
    let mut vec = [1; BATCH];
    let len = usize::try_from(batch.end - batch.start).map_or(0, |len| len.min(BATCH * PAGE_LEN));
    // SAFETY: mincore only looks at page tables, and writes a byte for each page of `len`, of which
    // `vec` has BATCH.
    unsafe { libc::mincore(address(batch.start), len, vec.as_mut_ptr()) };
    // The other bits are reserved.
    vec.into_iter().map(|byte| byte & 1 != 0)
}

/// Maps the page for reading; a page without memory behind it gets some.
fn populate_read(page: u64) -> io::Result<()> {
    // SAFETY: MADV_POPULATE_READ changes no contents; at an address that is not mapped it fails.
    let result = unsafe { libc::madvise(address(page), PAGE_LEN, libc::MADV_POPULATE_READ) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether the page at host address `page` can be mapped for reading; if so, it is mapped afterwards.
pub(crate) fn can_be_mapped(page: u64) -> bool {
    populate_read(page).is_ok()
}

/// Whether the kernel says that the page at host address `page` is poisoned. A hole gets memory by the question.
pub(crate) fn is_poisoned(page: u64) -> bool {
    populate_read(page).is_err_and(|error| error.raw_os_error() == Some(libc::EHWPOISON))
}

/// Whether this process has anything swapped out, read at most once per scan. The kernel's count may be off by some
/// pages per processor (percpu_counter, Linux 6.2); as many pages may be swapped in by a scan.
#[derive(Default)]
struct Swap {
    is_empty: Option<bool>,
}

impl Swap {
    fn is_empty(&mut self, status: Option<&File>) -> bool {
        *self.is_empty.get_or_insert_with(|| {
            let mut text = [0; COUNT_LEN];
            status
                .and_then(|status| status.read_at(&mut text, 0).ok())
                .is_some_and(|len| value_of(&text[..len], b"VmSwap:") == Some(0))
        })
    }
}

/// Where the kernel counts memory failures, one file for each node (Linux 6.3).
const NODES: &str = "/sys/devices/system/node";
const NODE_TOTAL: &str = "memory_failure/total";
/// Where it shows how much memory is lost.
const MEMINFO: &str = "/proc/meminfo";
const HARDWARE_CORRUPTED: &[u8] = b"HardwareCorrupted:";
/// The most bytes read: more than /proc/meminfo or /proc/self/status has, or any sysfs file.
const COUNT_LEN: usize = 4096;

/// The kernel's count of memory failures on this host, cheap to read again and again. Failures that raise no signal
/// move it, too.
///
/// A page is counted when its page-table entries are in place (`action_result`, Linux 5.19), so the
/// scan that follows a change finds it if it is one of this process. Older kernels count first: scan
/// once more a moment later.
#[derive(Debug)]
pub struct FailureCounter {
    /// One file per node, or /proc/meminfo alone.
    files: Vec<File>,
    /// Name of the line that has the count; `None` where the whole file is the number.
    line: Option<&'static [u8]>,
    last: u64,
}

impl FailureCounter {
    /// The counters in sysfs, else HardwareCorrupted in /proc/meminfo; `None` where the kernel has
    /// neither (CONFIG_MEMORY_FAILURE is off) or does not show them to this process.
    ///
    /// Memory failures on a node whose memory is plugged in later are not counted in sysfs.
    pub fn new() -> Option<Self> {
        let nodes = fs::read_dir(NODES)
            .into_iter()
            .flatten()
            .filter_map(|node| File::open(node.ok()?.path().join(NODE_TOTAL)).ok());
        Self::of(nodes.collect(), None)
            .or_else(|| Self::of(vec![File::open(MEMINFO).ok()?], Some(HARDWARE_CORRUPTED)))
    }

    fn of(files: Vec<File>, line: Option<&'static [u8]>) -> Option<Self> {
        if files.is_empty() {
            return None;
        }
        let mut counter = Self { files, line, last: 0 };
        counter.last = counter.count()?;
        Some(counter)
    }

    /// Where the count is read, for people.
    #[cfg(feature = "internals")]
    pub fn source(&self) -> &'static str {
        match self.line {
            None => "/sys/devices/system/node/node*/memory_failure/total",
            Some(_) => "HardwareCorrupted in /proc/meminfo",
        }
    }

    /// Whether the count has changed since the last call, or since [`FailureCounter::new`]. Ask before a scan, not
    /// after it, so that no failure during the scan is missed.
    pub fn changed(&mut self) -> bool {
        // A count that cannot be read now is compared at a later call.
        let Some(count) = self.count() else { return false };
        std::mem::replace(&mut self.last, count) != count
    }

    fn count(&self) -> Option<u64> {
        self.files.iter().try_fold(0u64, |sum, file| {
            let mut text = [0; COUNT_LEN];
            let len = file.read_at(&mut text, 0).ok()?;
            let text = &text[..len];
            let count = match self.line {
                None => number(text),
                Some(line) => value_of(text, line),
            };
            Some(sum.wrapping_add(count?))
        })
    }
}

/// The number in the line of `text` that starts with `name`.
fn value_of(text: &[u8], name: &[u8]) -> Option<u64> {
    text.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(name)).and_then(number)
}

/// The number that `text` starts with, after blanks.
fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn numbers_are_read_as_the_kernel_writes_them() {
        let status = b"Name:\tx\nVmPTE:\t      40 kB\nVmSwap:\t       0 kB\nHugetlbPages:\t0 kB\n";
        assert_eq!(value_of(status, b"VmSwap:"), Some(0));
        assert_eq!(value_of(status, b"VmPTE:"), Some(40));
        assert_eq!(value_of(status, b"VmSw:"), None);
        assert_eq!(value_of(b"VmSwap:\n", b"VmSwap:"), None, "no number is not 0");
        assert_eq!(value_of(b"VmSwap:\t-1 kB\n", b"VmSwap:"), None);
        let meminfo = b"Percpu:   1 kB\nHardwareCorrupted:    16 kB\nAnonHugePages:  0 kB\n";
        assert_eq!(value_of(meminfo, HARDWARE_CORRUPTED), Some(16));
        assert_eq!(number(b"12\n"), Some(12));
        assert_eq!(number(b""), None);
    }

    /// A file that a test can rewrite, and a second handle to it.
    fn counter_file(text: &str) -> (File, File) {
        let mut path = std::env::temp_dir();
        let unique = (std::process::id(), std::thread::current().id());
        path.push(format!("mce-relay-scan-{unique:?}"));
        let mut write = File::create(&path).unwrap();
        write.write_all(text.as_bytes()).unwrap();
        let read = File::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        (write, read)
    }

    #[test]
    fn the_counter_says_once_that_any_of_its_files_has_changed() {
        let (_, first) = counter_file("3\n");
        let (write, second) = counter_file("4\n");
        let mut counter = FailureCounter::of(vec![first, second], None).unwrap();
        assert!(!counter.changed());
        write.write_at(b"5\n", 0).unwrap();
        assert!(counter.changed());
        assert!(!counter.changed());
        write.write_at(b"??", 0).unwrap();
        assert!(!counter.changed(), "nothing is known now");
        write.write_at(b"6\n", 0).unwrap();
        assert!(counter.changed());
    }

    #[test]
    fn a_counter_needs_something_to_count() {
        assert!(FailureCounter::of(Vec::new(), None).is_none());
        let (_, no_such_line) = counter_file("MemTotal: 1 kB\n");
        assert!(FailureCounter::of(vec![no_such_line], Some(HARDWARE_CORRUPTED)).is_none());
    }
}
