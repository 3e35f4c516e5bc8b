//! Which stretches of guest RAM have memory behind them, without giving memory to the others.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::backing::Backing;
use super::{GuestRam, PAGE_SIZE};

/// What the page tables of this process hold.
pub(super) const PAGEMAP: &str = "/proc/self/pagemap";
// Documentation/admin-guide/mm/pagemap.rst
const PM_ENTRY: u64 = 8;
const PM_PRESENT: u64 = 1 << 63;
const PM_SWAP: u64 = 1 << 62;
/// Entries that are read at once.
const BATCH: usize = 8192;

impl GuestRam {
    /// The stretches (guest-physical address and length in bytes) that have memory behind them,
    /// ascending. The rest was never written, and reads as zeros.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn extents(&self) -> io::Result<Vec<(u64, u64)>> {
        let mut all: Vec<(u64, u64)> = Vec::new();
        for (block, backing) in self.blocks.iter().zip(&self.backings) {
            let within = match backing.file() {
                // A page of tmpfs may be in memory or in swap without being mapped here.
                Some((file, offset)) if backing.is_shared() && backing.page_size() == PAGE_SIZE => {
                    data_of(file, offset, backing.len())?
                }
                // A private copy hides what is in the file, and a file of huge pages does not say where
                // it has holes. Its pages are promised anyway.
                Some(_) => vec![(0, backing.len())],
                None => mapped(backing, self.pagemap()?)?,
            };
            for (start, len) in within {
                let gpa = block.gpa + start;
                match all.last_mut() {
                    Some((at, before)) if *at + *before == gpa => *before += len,
                    _ => all.push((gpa, len)),
                }
            }
        }
        Ok(all)
    }

    fn pagemap(&self) -> io::Result<&File> {
        let failed =
            |error: &io::Error| io::Error::new(error.kind(), format!("{PAGEMAP}: {error}"));
        self.pagemap.as_ref().map_err(failed)
    }
}

/// What of `len` bytes of `file` from `offset` on is no hole, from there.
fn data_of(file: &File, offset: u64, len: u64) -> io::Result<Vec<(u64, u64)>> {
    let seek = |to: u64, whence| {
        let to = libc::off_t::try_from(to).map_err(io::Error::other)?;
        // SAFETY: takes integers only. Nobody uses the file's own position.
        let at = unsafe { libc::lseek(file.as_raw_fd(), to, whence) };
        u64::try_from(at).map_err(|_| io::Error::last_os_error())
    };
    let (mut stretches, end, mut at) = (Vec::new(), offset + len, offset);
    while at < end {
        let start = match seek(at, libc::SEEK_DATA) {
            Ok(start) if start < end => start,
            Ok(_) => break,
            // There is none from here on.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => break,
            Err(error) => return Err(error),
        };
        at = seek(start, libc::SEEK_HOLE)?.min(end);
        stretches.push((start - offset, at - start));
    }
    Ok(stretches)
}

/// What the page tables of this process have entries for, from the mapping's beginning: memory, swap,
/// and what has gone bad.
fn mapped(backing: &Backing, pagemap: &File) -> io::Result<Vec<(u64, u64)>> {
    let mut entries = vec![0; BATCH * 8];
    let mut stretches: Vec<(u64, u64)> = Vec::new();
    let (first, pages) = (backing.hva() / PAGE_SIZE, backing.len() / PAGE_SIZE);
    let mut page = 0;
    while page < pages {
        let left = usize::try_from((pages - page) * PM_ENTRY).unwrap_or(usize::MAX);
        let batch = entries.len().min(left);
        pagemap.read_exact_at(&mut entries[..batch], (first + page) * PM_ENTRY)?;
        let (words, _) = entries[..batch].as_chunks::<8>();
        for word in words {
            if u64::from_ne_bytes(*word) & (PM_PRESENT | PM_SWAP) != 0 {
                let start = page * PAGE_SIZE;
                match stretches.last_mut() {
                    Some((at, len)) if *at + *len == start => *len += PAGE_SIZE,
                    _ => stretches.push((start, PAGE_SIZE)),
                }
            }
            page += 1;
        }
    }
    Ok(stretches)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemoryZone;

    #[test]
    fn prefaulted_memory_is_all_there() {
        for (shared, thp) in [(false, false), (false, true), (true, false)] {
            let zone = MemoryZone { shared, thp, prefault: true, ..MemoryZone::new(32 << 20) };
            let ram = GuestRam::new(&[zone]).unwrap();
            assert_eq!(ram.extents().unwrap(), [(0, 32 << 20)], "shared: {shared}, thp: {thp}");
            // A memfd says what is in the file; it is in the page tables as well.
            let mapped = mapped(&ram.backings[0], ram.pagemap().unwrap()).unwrap();
            assert_eq!(mapped, [(0, 32 << 20)], "shared: {shared}");
            // It is so after a reboot.
            ram.renew(&[]);
            assert_eq!(ram.extents().unwrap(), [(0, 32 << 20)], "shared: {shared}, thp: {thp}");
        }
    }

    #[test]
    fn what_was_written_is_there_and_nothing_else() {
        for shared in [false, true] {
            // One page at a time, not two mebibytes.
            let zone = MemoryZone { shared, thp: false, ..MemoryZone::new(64 << 20) };
            let ram = GuestRam::new(&[zone]).unwrap();
            assert_eq!(ram.extents().unwrap(), []);
            for gpa in [0x5000, 0x6fff, (64 << 20) - 1] {
                ram.write(gpa, b"x").unwrap();
            }
            let expected = [(0x5000, 0x2000), ((64 << 20) - 0x1000, 0x1000)];
            assert_eq!(ram.extents().unwrap(), expected, "shared: {shared}");
        }
    }
}
