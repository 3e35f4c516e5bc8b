//! Good memory that takes the place of a huge page of which a part is bad.
//!
//! The kernel takes the whole of a hugetlb page out of the page tables when a line of it goes bad, and still knows which
//! frames of 4 KiB it was: the file gives all others (`adjust_range_hwpoison`, fs/hugetlbfs/inode.c, Linux 6.6). They are
//! read into ordinary memory, which is then moved to where the huge page was. While it is not mapped nobody changes it: who
//! touches it is stopped.
//!
//! The kernel reads the file by its own mapping of the huge page. A second line of it that has gone bad without the
//! kernel's knowing it is a machine check there from which the kernel does not recover, where the guest's own load would
//! have been one AR more. Nothing in user space can read the page otherwise.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use super::mapping::{address, advise, size};
use super::uffd::Uffd;
use crate::types::PAGE_SIZE;

/// Read at once. As much as can be: with each call the kernel goes through all frames that follow, whether they are bad.
const CHUNK: u64 = 1 << 30;
/// A mapping that begins at a multiple of this can be in the host's transparent huge pages.
const ALIGNMENT: u64 = 2 << 20;

/// Whether it can be mapped more than once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// It cannot.
    Private,
    /// Devices have views of guest memory, and are to have one of it, too.
    Views,
}

/// Ordinary memory of this process's own. It goes when this is dropped.
#[derive(Debug)]
pub(crate) struct StandIn {
    hva: u64,
    len: u64,
}

/// What the file gave of a huge page.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Filled {
    /// Where the pages of 4 KiB are that it did not give, from the huge page's first byte, ascending.
    pub(crate) gone: Vec<u64>,
}

impl StandIn {
    /// `len` bytes, a multiple of 2 MiB, which are there. The kernel joins them to transparent huge pages where it is set
    /// to and where there will be any left: of one of 2 MiB a part is bad, and it would be split.
    ///
    /// # Errors
    /// There is no memory to be had.
    pub(crate) fn new(len: u64, sharing: Sharing) -> io::Result<Self> {
        let stand_in = Self::map(len, sharing)?;
        let joined = if len > ALIGNMENT { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        // A kernel without huge pages needs no advice.
        let _ = advise(stand_in.hva, len, joined);
        advise(stand_in.hva, len, libc::MADV_POPULATE_WRITE)?;
        Ok(stand_in)
    }

    /// Host virtual address of its first byte.
    #[cfg(test)]
    pub(crate) fn hva(&self) -> u64 {
        self.hva
    }

    /// The addresses.
    fn map(len: u64, sharing: Sharing) -> io::Result<Self> {
        let room = len.checked_add(ALIGNMENT).ok_or(libc::ENOMEM);
        let room = room.map_err(io::Error::from_raw_os_error)?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_ANONYMOUS
            | match sharing {
                Sharing::Private => libc::MAP_PRIVATE,
                Sharing::Views => libc::MAP_SHARED,
            };
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(ptr::null_mut(), size(room)?, prot, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = at.expose_provenance() as u64;
        let hva = start.next_multiple_of(ALIGNMENT);
        for (from, to) in [(start, hva), (hva + len, start + room)] {
            drop(Self { hva: from, len: to - from });
        }
        Ok(Self { hva, len })
    }

    /// Parts the first `len` bytes, a multiple of 2 MiB, from the rest; `None` where there are not as many.
    pub(crate) fn take(&mut self, len: u64) -> Option<Self> {
        if len == 0 || self.len < len {
            return None;
        }
        let taken = Self { hva: self.hva, len };
        self.hva += len;
        self.len -= len;
        Some(taken)
    }

    /// Reads as much as it has from `file`, from `offset` on; page by page where the kernel says that one is bad.
    ///
    /// # Errors
    /// Any but EIO, or the file ends.
    pub(crate) fn fill(&self, file: &impl Pages, offset: u64) -> io::Result<Filled> {
        let (mut at, mut gone) = (0, Vec::new());
        while at < self.len {
            let want = CHUNK.min(self.len - at);
            match file.read(self.hva + at, want, offset + at) {
                // A bad page ends it, where it begins.
                Ok(read) if read >= PAGE_SIZE => at += read / PAGE_SIZE * PAGE_SIZE,
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                // Half a page is none.
                Ok(_) => {
                    gone.push(at);
                    at += PAGE_SIZE;
                }
                Err(error) if error.raw_os_error() == Some(libc::EIO) => {
                    gone.push(at);
                    at += PAGE_SIZE;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Filled { gone })
    }

    /// Marks the pages at `gone`, from the first byte on.
    ///
    /// # Errors
    /// The kernel does not do it.
    pub(crate) fn mark(&self, marker: &Uffd, gone: &[u64]) -> io::Result<()> {
        gone.iter().try_for_each(|at| marker.poison(self.hva + at, PAGE_SIZE))
    }

    /// Takes the marks away again: there is memory at `gone`.
    ///
    /// # Errors
    /// There is none to be had.
    pub(crate) fn unmark(&self, gone: &[u64]) -> io::Result<()> {
        gone.iter().try_for_each(|at| {
            advise(self.hva + at, PAGE_SIZE, libc::MADV_DONTNEED)?;
            advise(self.hva + at, PAGE_SIZE, libc::MADV_POPULATE_WRITE)
        })
    }

    /// Gives it back to the host.
    pub(crate) fn give_up(&mut self) {
        drop(Self { hva: self.hva, len: std::mem::take(&mut self.len) });
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Takes `part` back, which [`Self::take`] parted from it last; gives it back where it does not lie right before.
    pub(crate) fn rejoin(&mut self, mut part: Self) -> Result<(), Self> {
        if part.hva + part.len != self.hva {
            return Err(part);
        }
        self.hva = part.hva;
        self.len += std::mem::take(&mut part.len);
        Ok(())
    }

    /// Moves it to `hva`, where whatever was mapped is no longer: in one step for all who look.
    ///
    /// # Errors
    /// The kernel does not do it; what was there may be no longer mapped then (see [`plug`]).
    pub(crate) fn move_to(&mut self, hva: u64) -> io::Result<()> {
        let (len, flags) = (size(self.len)?, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
        // SAFETY: moves memory of our own, to which no reference leads, over guest memory, to which none leads either
        // (the contract of `RamRegion`).
        let moved = unsafe { libc::mremap(address(self.hva)?, len, len, flags, address(hva)?) };
        if moved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.len = 0;
        Ok(())
    }
}

/// Maps memory at `hva` where nothing is mapped, each page of it marked as bad: the kernel would map something else there
/// sooner or later, and the guest would have it. False where something is mapped.
///
/// # Errors
/// The kernel does not mark it; nobody can touch it then.
pub(crate) fn plug(hva: u64, len: u64, marker: &Uffd) -> io::Result<bool> {
    let flags =
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: a new mapping, where there is none.
    let at = unsafe { libc::mmap(address(hva)?, size(len)?, libc::PROT_NONE, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::EEXIST) { Ok(false) } else { Err(error) };
    }
    marker.poison(hva, len)?;
    // SAFETY: the mapping that was just made, of which no byte is used.
    match unsafe { libc::mprotect(at, size(len)?, libc::PROT_READ | libc::PROT_WRITE) } {
        0 => Ok(true),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        if let (Ok(at), Ok(len)) = (address(self.hva), size(self.len))
            && len > 0
        {
            // SAFETY: memory of our own, to which no reference leads.
            unsafe { libc::munmap(at, len) };
        }
    }
}

/// What a huge page is read from.
pub(crate) trait Pages {
    /// Reads up to `len` bytes at `offset` to `hva`, which is memory of the caller's own; how many.
    ///
    /// # Errors
    /// EIO where the page is bad.
    fn read(&self, hva: u64, len: u64, offset: u64) -> io::Result<u64>;
}

impl Pages for BorrowedFd<'_> {
    fn read(&self, hva: u64, len: u64, offset: u64) -> io::Result<u64> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: the kernel writes at most `len` bytes to memory of the caller's own, to which no reference leads.
        let read = unsafe { libc::pread(self.as_raw_fd(), address(hva)?, size(len)?, offset) };
        u64::try_from(read).map_err(|_| io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, FromRawFd};

    use super::*;
    use crate::memory::scan::is_poisoned;

    /// A file of which some pages are bad: each page holds its number.
    struct Model {
        bad: Vec<u64>,
        end: u64,
    }

    impl Pages for Model {
        fn read(&self, hva: u64, len: u64, offset: u64) -> io::Result<u64> {
            let (mut done, end) = (0, self.end.saturating_sub(offset).min(len));
            while done < end {
                let page = (offset + done) / PAGE_SIZE;
                if self.bad.contains(&page) {
                    break;
                }
                crate::memory::access::write(hva + done, &page.to_le_bytes())?;
                done += PAGE_SIZE;
            }
            match done {
                0 if end > 0 => Err(io::Error::from_raw_os_error(libc::EIO)),
                _ => Ok(done),
            }
        }
    }

    const LEN: u64 = 4 << 20;
    const OFFSET: u64 = 16 << 20;
    const FIRST: u64 = OFFSET / PAGE_SIZE;

    /// `None`, after a word, where the kernel has none.
    fn marker() -> Option<Uffd> {
        let marker = Uffd::open();
        marker
            .inspect_err(|error| println!("SKIPPED: needs UFFDIO_POISON (Linux 6.6): {error}"))
            .ok()
    }

    #[test]
    fn a_hole_is_plugged_and_nothing_else_is() {
        let Some(marker) = marker() else { return };
        let place = StandIn::new(2 * LEN, Sharing::Private).unwrap();
        crate::memory::access::write(place.hva, &[7]).unwrap();
        assert!(!plug(place.hva, place.len, &marker).unwrap(), "it is no hole");
        let mut byte = [0];
        crate::memory::access::read(place.hva, &mut byte).unwrap();
        assert_eq!(byte, [7]);
        // SAFETY: the upper half of this test's own mapping, to which no reference leads.
        assert_eq!(0, unsafe { libc::munmap(address(place.hva + LEN).unwrap(), 4 << 20) });
        assert!(plug(place.hva + LEN, LEN, &marker).unwrap());
        for at in (0..LEN).step_by(4096) {
            assert!(is_poisoned(place.hva + LEN + at), "{at:#x}");
        }
    }

    #[test]
    fn marks_are_taken_away_and_a_part_is_given_back() {
        let Some(marker) = marker() else { return };
        let mut reserve = StandIn::new(2 * LEN, Sharing::Private).unwrap();
        let part = reserve.take(LEN).unwrap();
        let (hva, gone) = (part.hva, [0x3000, LEN - 4096]);
        part.mark(&marker, &gone).unwrap();
        assert!(is_poisoned(hva + 0x3000));
        part.unmark(&gone).unwrap();
        crate::memory::access::write(hva + 0x3000, &[1]).unwrap();
        reserve.rejoin(part).unwrap();
        assert_eq!((reserve.hva, reserve.len), (hva, 2 * LEN));
        let elsewhere = StandIn::new(LEN, Sharing::Private).unwrap();
        assert!(reserve.rejoin(elsewhere).is_err());
    }

    fn filled(bad: &[u64]) -> (StandIn, Vec<u64>) {
        let stand_in = StandIn::new(LEN, Sharing::Private).unwrap();
        let bad: Vec<u64> = bad.iter().map(|page| FIRST + page).collect();
        let filled = stand_in.fill(&Model { bad, end: 1 << 30 }, OFFSET).unwrap();
        (stand_in, filled.gone.iter().map(|at| at / PAGE_SIZE).collect())
    }

    #[test]
    fn all_but_the_bad_pages_are_read() {
        for bad in [&[][..], &[0], &[1023], &[0, 1, 2, 700], &[511, 512]] {
            assert_eq!(filled(bad).1, bad, "{bad:?}");
        }
        let all: Vec<u64> = (0..LEN / PAGE_SIZE).collect();
        assert_eq!(filled(&all).1, all);
    }

    #[test]
    fn a_file_that_ends_is_an_error() {
        let stand_in = StandIn::new(LEN, Sharing::Private).unwrap();
        let short = Model { bad: Vec::new(), end: OFFSET + LEN / 2 };
        let error = stand_in.fill(&short, OFFSET).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn it_takes_the_place_of_what_was_there_and_what_is_gone_stays_gone() {
        let Some(marker) = marker() else { return };
        let place = StandIn::new(3 * LEN, Sharing::Private).unwrap();
        advise(place.hva, place.len, libc::MADV_NOHUGEPAGE).unwrap();
        let (mut stand_in, gone) = filled(&[0, 5, 1023]);
        let gone: Vec<u64> = gone.iter().map(|page| page * PAGE_SIZE).collect();
        stand_in.mark(&marker, &gone).unwrap();
        let hva = place.hva + LEN;
        stand_in.move_to(hva).unwrap();
        for page in 0..LEN / PAGE_SIZE {
            let at = hva + page * PAGE_SIZE;
            let mut number = [0; 8];
            let read = crate::memory::access::read(at, &mut number);
            match gone.contains(&(page * PAGE_SIZE)) {
                true => assert!(read.is_err() && is_poisoned(at), "page {page}"),
                false => assert_eq!(u64::from_le_bytes(number), FIRST + page),
            }
        }
        let mut byte = [1];
        crate::memory::access::read(hva - 1, &mut byte).unwrap();
        crate::memory::access::read(hva + LEN, &mut byte).unwrap();
    }

    /// What a vCPU that touches the page waits for, but for the kernel's look at each frame: the file has no bad one.
    #[test]
    fn it_takes_not_much_more_than_a_plain_copy() {
        const HUGE: u64 = 2 << 20;
        let Some(marker) = marker() else { return };
        // SAFETY: takes a string; the descriptor is nobody else's.
        let file = unsafe { std::fs::File::from_raw_fd(libc::memfd_create(c"huge".as_ptr(), 0)) };
        let from = vec![7_u8; 2 << 20];
        std::os::unix::fs::FileExt::write_all_at(&file, &from, 0).unwrap();
        let best = |once: &dyn Fn() -> std::time::Duration| {
            std::iter::repeat_with(once).take(50).min().unwrap()
        };
        // Into memory that nobody has used yet, as any copy of it would be.
        let plain = best(&|| {
            let to = StandIn::map(HUGE, Sharing::Private).unwrap();
            let start = std::time::Instant::now();
            // SAFETY: both have 2 MiB, and nobody else has `to`.
            unsafe {
                ptr::copy_nonoverlapping(from.as_ptr(), address(to.hva).unwrap().cast(), 2 << 20)
            };
            start.elapsed()
        });
        let place = StandIn::new(HUGE, Sharing::Private).unwrap();
        let rescue = best(&|| {
            let mut stand_in = StandIn::new(HUGE, Sharing::Private).unwrap();
            let start = std::time::Instant::now();
            stand_in.fill(&file.as_fd(), 0).unwrap();
            stand_in.mark(&marker, &[0x5000]).unwrap();
            stand_in.move_to(place.hva).unwrap();
            start.elapsed()
        });
        let times = rescue.as_secs_f64() / plain.as_secs_f64();
        println!("{rescue:?}, {times:.2} times the {plain:?} of a plain copy");
        assert!(times < 4.0, "{times}");
    }

    #[test]
    fn a_reserve_is_used_up() {
        let mut reserve = StandIn::new(3 * ALIGNMENT, Sharing::Private).unwrap();
        let first = reserve.take(ALIGNMENT).unwrap();
        assert_eq!((first.hva + ALIGNMENT, reserve.len), (reserve.hva, 2 * ALIGNMENT));
        assert!(reserve.take(3 * ALIGNMENT).is_none());
        assert!(reserve.take(2 * ALIGNMENT).is_some() && reserve.take(ALIGNMENT).is_none());
    }
}
