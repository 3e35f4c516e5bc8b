//! The pages the agent owns: how they are made, where they are, and whether they are intact.
//!
//! Every page is a mapping of its own between two guards. Neighbours would be merged into one
//! mapping, and then the loss of one page, a huge page or a same-page merge would reach others.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::ptr;
use std::time::{Duration, Instant};

use crate::failures::{self, Failures};
use crate::proto::{Body, How, Kind, Outcome, PageInfo, State};
use crate::touch::{self, Fault};
use crate::words::Hex;

/// Bytes of a page frame.
pub const FRAME: usize = 4096;
/// KPF_HWPOISON in /proc/kpageflags.
const FRAME_POISONED: u64 = 1 << 19;
/// Swap types from here up are not swap areas but what the kernel keeps in non-present entries
/// (poison, migration, devices): it takes them from the top of its 32, and how many depends on
/// its configuration. A guest with 16 swap areas is not expected.
const SPECIAL_SWAP_TYPE: u64 = 16;
/// How long `touch PAGE spin` goes on at most.
const SPIN: Duration = Duration::from_secs(30);
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
const THP_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// The word at `index` (in words) of page `page`. Different for every place in every page,
/// because the multiplication by an odd number is a bijection.
pub fn pattern(page: u32, index: usize) -> u64 {
    let place = (u64::from(page) << 32) | index as u64;
    place.wrapping_mul(0xd6e8_feb8_6659_fd93) ^ 0x5bd1_e995_0f0f_3c3c
}

/// An entry of /proc/self/pagemap.
#[derive(Debug, PartialEq, Eq)]
enum Entry {
    /// Mapped to this frame; 0 where the kernel hides frames from the caller.
    Present(u64),
    /// Not present; swap type and offset.
    Swap(u64, u64),
    Absent,
}

/// Linux, Documentation/admin-guide/mm/pagemap.rst: bit 63 present, bit 62 swapped, bits 0 to
/// 54 the frame, or 5 bits of swap type and the offset.
fn decode(entry: u64) -> Entry {
    let low = entry & ((1 << 55) - 1);
    if entry >> 63 & 1 == 1 {
        Entry::Present(low)
    } else if entry >> 62 & 1 == 1 {
        Entry::Swap(low & 0x1f, low >> 5)
    } else {
        Entry::Absent
    }
}

fn words_at(path: &str, index: u64, count: usize) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; count * 8];
    File::open(path)?.read_exact_at(&mut bytes, index * 8)?;
    let word = |chunk: &[u8]| chunk.iter().rev().fold(0, |w, &b| w << 8 | u64::from(b));
    Ok(bytes.chunks_exact(8).map(word).collect())
}

fn entries(va: usize, bytes: usize) -> Result<Vec<u64>, String> {
    words_at("/proc/self/pagemap", (va / FRAME) as u64, bytes / FRAME)
        .map_err(|e| format!("/proc/self/pagemap: {e}; is /proc mounted?"))
}

/// The page frames behind `bytes` bytes of this process's memory; 0 where there is none, or where the
/// kernel hides them (not root).
///
/// # Errors
/// There is no /proc.
pub fn frames(va: usize, bytes: usize) -> Result<Vec<u64>, String> {
    let frame = |entry: u64| match decode(entry) {
        Entry::Present(frame) => frame,
        _ => 0,
    };
    Ok(entries(va, bytes)?.into_iter().map(frame).collect())
}

/// Whether the kernel marks one of these frames as poisoned; `None` where it does not say.
fn poisoned(first: u64, frames: usize) -> Option<bool> {
    let flags = words_at("/proc/kpageflags", first, frames).ok()?;
    Some(flags.iter().any(|flags| flags & FRAME_POISONED != 0))
}

/// A field of /proc/meminfo, in kB.
///
/// # Errors
/// The file, and what it lacks.
pub fn meminfo(field: &str) -> Result<u64, String> {
    let text = fs::read_to_string("/proc/meminfo").map_err(|e| format!("/proc/meminfo: {e}"))?;
    text.lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .ok_or_else(|| format!("/proc/meminfo: has no {field}; this kernel was built without it"))
}

/// Address space of three times a page: a guard, the page, a guard.
pub struct Mapping {
    base: usize,
    bytes: usize,
}

impl Mapping {
    /// Reserves it; nothing is mapped yet.
    ///
    /// # Errors
    /// What mmap(2) refused.
    pub fn reserve(bytes: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice changes nothing that exists.
        let base = unsafe { libc::mmap(ptr::null_mut(), 3 * bytes, libc::PROT_NONE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = base.addr();
        Ok(Self { base, bytes })
    }

    /// Start of the page, aligned to its size and never the start of the reservation.
    pub fn va(&self) -> usize {
        (self.base / self.bytes + 1) * self.bytes
    }

    /// Maps the page, with the flags of mmap(2).
    ///
    /// # Errors
    /// What mmap(2) refused.
    pub fn map(&self, flags: i32, fd: i32) -> io::Result<()> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let place = ptr::with_exposed_provenance_mut(self.va());
        // SAFETY: MAP_FIXED replaces a part of our own reservation, which holds nothing yet.
        let va = unsafe { libc::mmap(place, self.bytes, prot, flags | libc::MAP_FIXED, fd, 0) };
        if va == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn advise(&self, advice: i32) -> io::Result<()> {
        let place = ptr::with_exposed_provenance_mut(self.va());
        // SAFETY: advice about huge pages does not change what our own mapping holds.
        match unsafe { libc::madvise(place, self.bytes, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn lock(&self) -> io::Result<()> {
        // SAFETY: mlock does not change what memory holds.
        match unsafe { libc::mlock(ptr::with_exposed_provenance(self.va()), self.bytes) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let base = ptr::with_exposed_provenance_mut(self.base);
        // SAFETY: the reservation is ours alone, and nothing refers to it but its address here.
        unsafe { libc::munmap(base, 3 * self.bytes) };
    }
}

struct Page {
    kind: Kind,
    mapping: Mapping,
    /// Where it is, or was last seen.
    gpa: Option<u64>,
    bad: bool,
}

impl Page {
    fn holds(&self, addr: u64) -> bool {
        let va = self.mapping.va() as u64;
        (va..va + self.kind.bytes() as u64).contains(&addr)
    }
}

/// All pages by number.
#[derive(Default)]
pub struct Pages {
    next: u32,
    pages: BTreeMap<u32, Page>,
}

impl Pages {
    /// Makes `count` pages, all or none.
    ///
    /// # Errors
    /// What could not be had, and what may help.
    pub fn alloc(&mut self, kind: Kind, count: u32, runs: bool) -> Result<Body, String> {
        let kib = kind.bytes() as u64 / 1024 * u64::from(count);
        match kind {
            Kind::Hugetlb => fill_pool(u64::from(count))?,
            _ if kib > meminfo("MemAvailable")? => {
                return Err(format!(
                    "{count} pages are {kib} KiB, more than is available; ask for fewer"
                ));
            }
            Kind::Thp => allow_thp(),
            _ => {}
        }
        let first = self.next;
        for page in first..first + count {
            let made = make(kind, page).map_err(|e| format!("page {page}: {e}"));
            match made {
                Ok(made) => self.pages.insert(page, made),
                Err(error) => {
                    self.pages.retain(|number, _| *number < first);
                    return Err(error);
                }
            };
            self.next = page + 1;
        }
        if runs {
            let gpas = self.pages.range(first..).filter_map(|(_, page)| page.gpa);
            let (bytes, runs) = (kind.bytes(), failures::runs(gpas, kind.bytes() as u64));
            return Ok(Body::AllocRuns { kind, bytes, first, runs });
        }
        let info = |(number, page): (&u32, &Page)| PageInfo {
            page: *number,
            kind,
            va: Hex(page.mapping.va() as u64),
            gpa: page.gpa.map(Hex),
            bytes: kind.bytes(),
        };
        let pages = self.pages.range(first..).map(info).collect();
        Ok(Body::Alloc { pages })
    }

    fn get(&mut self, page: u32) -> Result<&mut Page, String> {
        self.pages
            .get_mut(&page)
            .ok_or_else(|| format!("there is no page {page}; expected one that alloc returned"))
    }

    fn at(&mut self, number: u32, offset: usize) -> Result<&mut Page, String> {
        let page = self.get(number)?;
        if offset >= page.kind.bytes() {
            let bytes = page.kind.bytes();
            return Err(format!(
                "offset {offset} is outside page {number}; expected 0 to {}",
                bytes - 1
            ));
        }
        Ok(page)
    }

    /// Looks up where the 4 KiB at `offset` are now.
    ///
    /// # Errors
    /// An unknown page or offset, or no /proc.
    pub fn gpa(&mut self, number: u32, offset: usize) -> Result<Body, String> {
        let page = self.at(number, offset)?;
        let inside = offset / FRAME * FRAME;
        let entry = entries(page.mapping.va() + inside, FRAME)?[0];
        let mut gpa = page.gpa.map(|gpa| gpa + inside as u64);
        let state = match decode(entry) {
            Entry::Present(0) => State::Present,
            Entry::Present(frame) => {
                gpa = Some(frame * FRAME as u64);
                if inside == 0 {
                    page.gpa = gpa;
                }
                State::Present
            }
            Entry::Swap(kind, frame)
                if kind >= SPECIAL_SWAP_TYPE && poisoned(frame, 1) == Some(true) =>
            {
                gpa = Some(frame * FRAME as u64);
                State::Hwpoison
            }
            Entry::Swap(..) => State::Swapped,
            Entry::Absent => State::Absent,
        };
        Ok(Body::Gpa {
            page: number,
            state,
            gpa: gpa.map(Hex),
            poisoned: gpa.and_then(|gpa| poisoned(gpa / FRAME as u64, 1)),
        })
    }

    /// Touches the word that holds `offset`, or has the kernel copy the 4 KiB that hold it.
    ///
    /// # Errors
    /// An unknown page or offset, or no pipe. What the touch itself met is no error.
    pub fn touch(&mut self, number: u32, how: How, offset: usize) -> Result<Body, String> {
        let page = self.at(number, offset)?;
        let index = offset / 8;
        let addr = page.mapping.va() + index * 8;
        let mut errno = None;
        let begun = Instant::now();
        let result = match how {
            How::Read => {
                // SAFETY: `addr` is a word inside a page of ours, mapped for reading.
                unsafe { touch::read(addr) }.map(|word| Some(word == pattern(number, index)))
            }
            How::Write => {
                // SAFETY: the same, mapped for writing too; nothing in Rust refers to it.
                unsafe { touch::write(addr, pattern(number, index)) }.map(|()| None)
            }
            How::Spin => loop {
                // SAFETY: as for a read.
                match unsafe { touch::spin(addr) } {
                    Ok(()) if begun.elapsed() < SPIN => {}
                    ended => break ended.map(|()| None),
                }
            },
            How::KernelCopy => {
                let copied = copy_by_kernel(page.mapping.va(), number, offset)?;
                copied.map(|copied| copied.map_err(|error| errno = Some(error)).ok())
            }
        };
        let nanos = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let (outcome, intact, sigbus) = match result {
            Ok(_) if errno.is_some() => (Outcome::Errno, None, None),
            Ok(intact) => (Outcome::Ok, intact, None),
            Err(fault) => (Outcome::Sigbus, None, Some(fault.into())),
        };
        page.bad |= outcome != Outcome::Ok;
        Ok(Body::Touch { page: number, how, result: outcome, errno, intact, sigbus, nanos })
    }

    /// Takes those pages for bad that the kernel's log names.
    pub fn learn(&mut self, failures: &Failures) {
        for page in self.pages.values_mut() {
            let frames = (page.kind.bytes() / FRAME) as u64;
            page.bad |= page.gpa.is_some_and(|gpa| failures.holds(gpa / FRAME as u64, frames));
        }
    }

    /// Reads all pages in full but those in `except` and those known to be bad.
    pub fn check(&mut self, except: &[RangeInclusive<u32>]) -> Body {
        let (mut intact, mut bad, mut changed) = (0, vec![], vec![]);
        let mut skipped: Vec<(u32, u32)> = Vec::new();
        let mut words = Vec::new();
        for (&number, page) in &mut self.pages {
            if page.bad || except.iter().any(|pages| pages.contains(&number)) {
                match skipped.last_mut() {
                    Some((first, count)) if *first + *count == number => *count += 1,
                    _ => skipped.push((number, 1)),
                }
                continue;
            }
            words.resize(page.kind.bytes() / 8, 0u64);
            let to = words.as_mut_ptr().expose_provenance();
            // SAFETY: `words` is as long as the page, and both are ours alone.
            match unsafe { touch::copy(to, page.mapping.va(), words.len()) } {
                Ok(()) if is_pattern(number, 0, &words) => intact += 1,
                Ok(()) => {
                    changed.push(number);
                    bad.push(number);
                }
                Err(_) => {
                    page.bad = true;
                    bad.push(number);
                }
            }
        }
        Body::Check { intact, bad, changed, skipped }
    }

    /// Gives a page back to the kernel.
    ///
    /// # Errors
    /// An unknown page.
    pub fn free(&mut self, number: u32) -> Result<Body, String> {
        self.get(number)?;
        self.pages.remove(&number);
        Ok(Body::None {})
    }

    /// The page at an address that a signal named, which is known to be bad from now on.
    pub fn hit(&mut self, addr: u64) -> Option<u32> {
        let (number, page) = self.pages.iter_mut().find(|(_, page)| page.holds(addr))?;
        page.bad = true;
        Some(*number)
    }

    /// Whether this address of the agent's lies in one of them.
    pub fn owns(&self, addr: u64) -> bool {
        self.pages.values().any(|page| page.holds(addr))
    }
}

/// Whether `words` are those of page `page` from the word `first` on.
pub fn is_pattern(page: u32, first: usize, words: &[u64]) -> bool {
    words.iter().enumerate().all(|(index, word)| *word == pattern(page, first + index))
}

fn as_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The kernel copies the 4 KiB around `offset` into a pipe, whose write side copies from user
/// memory and cannot take the page itself. Inner result: whether they hold the pattern, or the
/// errno.
fn copy_by_kernel(
    va: usize,
    number: u32,
    offset: usize,
) -> Result<Result<Result<bool, String>, Fault>, String> {
    let (mut from, to) = io::pipe().map_err(|e| format!("pipe: {e}"))?;
    let inside = offset / FRAME * FRAME;
    // SAFETY: the descriptor is open; an empty pipe holds 4096 bytes without blocking.
    let result = unsafe { touch::kernel_copy(to.as_raw_fd(), va + inside, FRAME) };
    drop(to);
    Ok(result.map(|count| {
        if count < 0 {
            return Err(errno_name(count));
        }
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).map_err(|e| e.to_string())?;
        if bytes.len() != FRAME {
            return Err(format!("short copy of {} bytes", bytes.len()));
        }
        let expected = (0..FRAME / 8).map(|index| pattern(number, inside / 8 + index));
        Ok(bytes == as_bytes(&expected.collect::<Vec<_>>()))
    }))
}

/// What a system call that returned `negative` failed with, by name where a test looks for it.
pub fn errno_name(negative: isize) -> String {
    let number = i32::try_from(-negative).unwrap_or(0);
    match number {
        libc::EFAULT => "EFAULT".into(),
        libc::EIO => "EIO".into(),
        libc::EHWPOISON => "EHWPOISON".into(),
        _ => io::Error::from_raw_os_error(number).to_string(),
    }
}

fn make(kind: Kind, number: u32) -> Result<Page, String> {
    let bytes = kind.bytes();
    let words: Vec<u64> = (0..bytes / 8).map(|index| pattern(number, index)).collect();
    let mapping = map(kind, number, &words)?;
    let va = mapping.va();
    // SAFETY: the mapping is as long as `words`, and ours alone. A page that only reads (clean)
    // was filled through its file.
    let filled = unsafe {
        match kind {
            Kind::FileClean => touch::read(va).map(|_| ()),
            _ => touch::copy(va, words.as_ptr().expose_provenance(), words.len()),
        }
    };
    filled.map_err(|fault| format!("SIGBUS (code {}) while it was filled", fault.code))?;
    let frames = frames(va, bytes)?;
    // Frames are hidden (all zero) from users other than root.
    let known = frames[0] != 0;
    let whole = frames.windows(2).all(|pair| pair[1] == pair[0] + 1);
    if known && (!whole || !frames[0].is_multiple_of(frames.len() as u64)) {
        return Err(format!(
            "the kernel gave 4 KiB pages in place of a huge one; look at {THP_ENABLED} or \
             ask for fewer"
        ));
    }
    Ok(Page { kind, mapping, gpa: known.then(|| frames[0] * FRAME as u64), bad: false })
}

fn map(kind: Kind, number: u32, words: &[u64]) -> Result<Mapping, String> {
    let anon = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let mapped = || -> io::Result<Mapping> {
        let mapping = Mapping::reserve(kind.bytes())?;
        match kind {
            Kind::Anon | Kind::Mlocked | Kind::Thp => mapping.map(anon, -1)?,
            Kind::Shared => mapping.map(libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1)?,
            Kind::Hugetlb => {
                mapping.map(anon | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB, -1)?;
            }
            Kind::FileClean | Kind::FileDirty => {
                let file = page_file(number, words)?;
                mapping.map(libc::MAP_SHARED, file.as_raw_fd())?;
            }
        }
        match kind {
            Kind::Thp => mapping.advise(libc::MADV_HUGEPAGE)?,
            Kind::Hugetlb => {}
            // EINVAL: a kernel that has no huge pages needs no such advice.
            _ => mapping
                .advise(libc::MADV_NOHUGEPAGE)
                .or_else(|e| (e.raw_os_error() == Some(libc::EINVAL)).then_some(()).ok_or(e))?,
        }
        if kind == Kind::Mlocked {
            mapping.lock()?;
        }
        Ok(mapping)
    };
    mapped().map_err(|e| format!("cannot be made: {e}"))
}

/// A file of one page under /tmp, holding the pattern; its name is gone at once, so nothing is
/// left behind. On a file system without a disk (the usual one here) nothing is ever really
/// clean for the kernel: "clean" is then only "not written through the mapping".
fn page_file(number: u32, words: &[u64]) -> io::Result<File> {
    fs::create_dir_all("/tmp")?;
    let path = format!("/tmp/agent-{}-page-{number}", std::process::id());
    let mut file =
        File::options().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    fs::remove_file(&path)?;
    file.write_all(&as_bytes(words))?;
    file.sync_all()?;
    Ok(file)
}

fn pool(file: &str) -> Result<u64, String> {
    let path = format!("{POOL}/{file}");
    let text = fs::read_to_string(&path).map_err(|e| format!("{path}: {e}; is /sys mounted?"))?;
    text.trim().parse().map_err(|_| format!("{path}: got {text:?}, expected a number"))
}

/// Sees to `count` free pages in the hugetlb pool.
fn fill_pool(count: u64) -> Result<(), String> {
    let free = || Ok::<_, String>(pool("free_hugepages")?.saturating_sub(pool("resv_hugepages")?));
    let missing = count.saturating_sub(free()?);
    if missing == 0 {
        return Ok(());
    }
    let path = format!("{POOL}/nr_hugepages");
    let wanted = pool("nr_hugepages")? + missing;
    fs::write(&path, wanted.to_string()).map_err(|e| format!("{path}: {e}"))?;
    match free()? {
        enough if enough >= count => Ok(()),
        few => Err(format!(
            "{count} huge pages wanted, the kernel could make {few}; ask for fewer or give the \
             guest more memory"
        )),
    }
}

/// A kernel told "never" ignores MADV_HUGEPAGE. Whether it worked is seen by the frames.
fn allow_thp() {
    if fs::read_to_string(THP_ENABLED).is_ok_and(|text| text.contains("[never]")) {
        let _ = fs::write(THP_ENABLED, "madvise");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_pattern_differs_everywhere() {
        let mut seen = HashSet::new();
        for page in 0..20 {
            assert!((0..512).all(|index| seen.insert(pattern(page, index))));
        }
    }

    #[test]
    fn pagemap_entries_are_decoded() {
        assert_eq!(decode(0), Entry::Absent);
        // Bit 55 is soft-dirty, bit 56 exclusive: no part of the frame.
        let flags = 1 << 63 | 1 << 56 | 1 << 55;
        assert_eq!(decode(flags | 0x12345), Entry::Present(0x12345));
        assert_eq!(decode(1 << 62 | 0x12345 << 5 | 23), Entry::Swap(23, 0x12345));
    }

    fn check(pages: &mut Pages, except: &[RangeInclusive<u32>]) -> String {
        serde_json::to_string(&pages.check(except)).unwrap()
    }

    #[test]
    fn pages_are_made_touched_checked_and_freed() {
        touch::install(2).unwrap();
        let mut pages = Pages::default();
        let kinds = [Kind::Anon, Kind::Shared, Kind::Mlocked, Kind::FileClean, Kind::FileDirty];
        for kind in kinds {
            pages.alloc(kind, 2, false).unwrap();
        }
        for page in 0..10 {
            for how in [How::Read, How::Write, How::KernelCopy] {
                let Body::Touch { result, intact, .. } = pages.touch(page, how, 4095).unwrap()
                else {
                    panic!("no touch")
                };
                assert_eq!(result, Outcome::Ok);
                assert_eq!(intact, (how != How::Write).then_some(true));
            }
            let Body::Gpa { state, .. } = pages.gpa(page, 0).unwrap() else { panic!("no gpa") };
            assert_eq!(state, State::Present);
        }
        assert_eq!(check(&mut pages, &[]), r#"{"intact":10,"bad":[],"skipped":[]}"#);
        let va = pages.pages[&3].mapping.va();
        // SAFETY: a word of a page of ours.
        unsafe { touch::write(va + 800, 1) }.unwrap();
        assert_eq!(pages.hit((va + 5) as u64), Some(3));
        assert_eq!(pages.hit(16), None);
        pages.pages.get_mut(&3).unwrap().bad = false;
        assert_eq!(
            check(&mut pages, &[5..=5, 7..=8]),
            r#"{"intact":6,"bad":[3],"changed":[3],"skipped":[[5,1],[7,2]]}"#
        );
        pages.free(3).unwrap();
        assert!(pages.free(3).unwrap_err().contains("no page 3"));
        assert!(pages.touch(0, How::Read, 4096).unwrap_err().contains("4095"));
        let Body::Alloc { pages: next } = pages.alloc(Kind::Anon, 1, false).unwrap() else {
            panic!("no alloc")
        };
        assert_eq!(next[0].page, 10);
    }

    #[test]
    fn a_page_that_is_lost_is_found_by_touch_and_check() {
        touch::install(2).unwrap();
        let mut pages = Pages::default();
        pages.alloc(Kind::Anon, 3, false).unwrap();
        for lost in 0..2 {
            // An empty file mapped in place of the page: SIGBUS, as poison would give.
            let file = page_file(1000 + lost, &[]).unwrap();
            let mapping = &pages.pages[&lost].mapping;
            mapping.map(libc::MAP_SHARED, file.as_raw_fd()).unwrap();
        }
        let reply = pages.touch(0, How::Read, 0).unwrap();
        let json = serde_json::to_string(&reply).unwrap();
        assert!(json.contains(r#""result":"sigbus","sigbus":{"code":2,"#), "{json}");
        let reply = pages.touch(0, How::Spin, 0).unwrap();
        let json = serde_json::to_string(&reply).unwrap();
        assert!(json.contains(r#""how":"spin","result":"sigbus","sigbus":{"code":2,"#), "{json}");
        let reply = pages.touch(0, How::KernelCopy, 0).unwrap();
        let json = serde_json::to_string(&reply).unwrap();
        assert!(json.contains(r#""result":"errno","errno":"EFAULT","nanos":"#), "{json}");
        assert_eq!(check(&mut pages, &[]), r#"{"intact":1,"bad":[1],"skipped":[[0,1]]}"#);
    }

    #[test]
    fn what_the_kernels_log_calls_bad_is_not_touched() {
        touch::install(2).unwrap();
        let mut pages = Pages::default();
        let Body::AllocRuns { first, .. } = pages.alloc(Kind::Anon, 4, true).unwrap() else {
            panic!("no runs")
        };
        assert_eq!(first, 0);
        // Frames of our own choice: who is not root does not see the real ones.
        for (number, page) in &mut pages.pages {
            page.gpa = Some(0x7000_0000 + u64::from(*number) * FRAME as u64);
        }
        let mut failures = Failures::default();
        failures.line("Memory failure: 0x70001: recovery action for dirty LRU page: Recovered", 1);
        failures.line("Memory failure: 0x70002: recovery action for dirty LRU page: Recovered", 1);
        pages.learn(&failures);
        assert_eq!(check(&mut pages, &[]), r#"{"intact":2,"bad":[],"skipped":[[1,2]]}"#);
    }
}
