//! Which stretches of guest RAM have memory behind them, without giving memory to the others.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::backing::Backing;
use super::block::PAGE_SIZE;
use super::block::PAGEMAP;
use super::guest_ram::GuestRam;
use crate::host::pagemap::{Entries, Entry};

impl GuestRam {
    /// The stretches (guest-physical address and length in bytes) that may hold something, ascending. The rest
    /// was never written, and reads as zeros.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn extents(&self) -> io::Result<Vec<(u64, u64)>> {
        self.stretches(|backing| {
            let Some((file, offset)) = backing.file() else { return self.mapped(backing) };
            if backing.page_size() != PAGE_SIZE {
                // A file of huge pages does not say where it has holes.
                return Ok(vec![(0, backing.len())]);
            }
            // A page of tmpfs may be in memory or in swap without being mapped here.
            let mut all = data_of(file, offset, backing.len())?;
            if !backing.is_shared() {
                // What was written to such a mapping is not in the file.
                all.extend(self.mapped(backing)?);
                all.sort_unstable();
            }
            Ok(all)
        })
    }

    /// The stretches that have memory now, or had it and are swapped out, ascending. A page of a file that this process
    /// has not touched is not this VM's memory, and neither is a hugetlb page that is only reserved.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn in_use(&self) -> io::Result<Vec<(u64, u64)>> {
        self.stretches(|backing| match backing.file() {
            // As above.
            Some((file, offset)) if backing.is_memfd() && backing.page_size() == PAGE_SIZE => {
                data_of(file, offset, backing.len())
            }
            _ => self.mapped(backing),
        })
    }

    /// Joins what `within` says of each backing: stretches from its beginning, ascending, which may overlap.
    fn stretches(
        &self,
        within: impl Fn(&Backing) -> io::Result<Vec<(u64, u64)>>,
    ) -> io::Result<Vec<(u64, u64)>> {
        let mut all: Vec<(u64, u64)> = Vec::new();
        for (block, backing) in self.blocks.iter().zip(&self.backings) {
            for (start, len) in within(backing)? {
                let gpa = block.gpa + start;
                match all.last_mut() {
                    Some((at, before)) if *at + *before >= gpa => {
                        *before = (*before).max(gpa + len - *at);
                    }
                    _ => all.push((gpa, len)),
                }
            }
        }
        Ok(all)
    }

    pub(super) fn pagemap(&self) -> io::Result<&File> {
        let failed =
            |error: &io::Error| io::Error::new(error.kind(), format!("{PAGEMAP}: {error}"));
        self.pagemap.as_ref().map_err(failed)
    }

    /// What the page tables of this process have entries for, from the mapping's beginning: memory, swap,
    /// and what has gone bad.
    fn mapped(&self, backing: &Backing) -> io::Result<Vec<(u64, u64)>> {
        let mut entries = Entries::of(self.pagemap()?);
        let mut stretches: Vec<(u64, u64)> = Vec::new();
        for page in 0..backing.len() / PAGE_SIZE {
            let start = page * PAGE_SIZE;
            if entries.at(backing.hva() + start)? == Entry::Empty {
                continue;
            }
            match stretches.last_mut() {
                Some((at, len)) if *at + *len == start => *len += PAGE_SIZE,
                _ => stretches.push((start, PAGE_SIZE)),
            }
        }
        Ok(stretches)
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
            let mapped = ram.mapped(&ram.backings[0]).unwrap();
            assert_eq!(mapped, [(0, 32 << 20)], "shared: {shared}");
            assert_eq!(ram.in_use().unwrap(), [(0, 32 << 20)], "shared: {shared}, thp: {thp}");
            // It is so after a reboot.
            ram.heal(&[]);
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

    const SIZE: u64 = 64 << 20;

    /// A file of so many bytes that holds something in its second page.
    fn file(dir: &tempfile::TempDir) -> std::path::PathBuf {
        use std::os::unix::fs::FileExt;
        let path = dir.path().join("ram");
        let file = File::create(&path).unwrap();
        file.set_len(SIZE).unwrap();
        file.write_all_at(b"x", PAGE_SIZE).unwrap();
        path
    }

    #[test]
    fn a_file_that_nobody_has_touched_is_no_memory() {
        for shared in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let (path, zone) = (
                file(&dir),
                MemoryZone { shared, thp: false, lossy: true, ..MemoryZone::new(SIZE) },
            );
            let ram = GuestRam::new(&[MemoryZone { file: Some(path), ..zone }]).unwrap();
            // What it holds is to be dumped all the same.
            assert_eq!(ram.in_use().unwrap(), [], "shared: {shared}");
            assert_eq!(ram.extents().unwrap(), [(PAGE_SIZE, PAGE_SIZE)], "shared: {shared}");
            ram.write(0x2000, b"x").unwrap();
            ram.write(0x9000, b"x").unwrap();
            // The kernel may map what of the file is in memory around a page that is touched.
            let in_use = ram.in_use().unwrap();
            let has = |gpa| in_use.iter().any(|(at, len)| (*at..at + len).contains(&gpa));
            assert!(has(0x2000) && has(0x9000) && !has(32 << 20), "shared: {shared}: {in_use:x?}");
            let extents = ram.extents().unwrap();
            let bytes: u64 = extents.iter().map(|(_, len)| len).sum();
            assert!(bytes < SIZE / 2, "shared: {shared}: {extents:x?}");
            let holds = |gpa| extents.iter().any(|(at, len)| (*at..at + len).contains(&gpa));
            assert!(
                [PAGE_SIZE, 0x2000, 0x9000].into_iter().all(holds),
                "shared: {shared}: {extents:x?}"
            );
        }
    }

    #[test]
    fn a_huge_page_that_was_only_promised_is_no_memory() {
        use crate::config::PageSize;
        use crate::machine::memory::error::MemoryError;
        let huge = PageSize::Size2M.bytes();
        for shared in [false, true] {
            let page_size = PageSize::Size2M;
            let zone = MemoryZone { shared, page_size, ..MemoryZone::new(32 << 20) };
            let ram = match GuestRam::new(&[zone]) {
                Err(error @ (MemoryError::EmptyPool { .. } | MemoryError::NoPool { .. })) => {
                    return println!("SKIPPED: needs 16 huge pages of 2 MiB: {error}");
                }
                other => other.unwrap(),
            };
            assert_eq!(ram.in_use().unwrap(), [], "shared: {shared}");
            ram.write(3 * huge + 5, b"x").unwrap();
            assert_eq!(ram.in_use().unwrap(), [(3 * huge, huge)], "shared: {shared}");
            let holds = |(at, len): &(u64, u64)| (*at..at + len).contains(&(3 * huge));
            assert!(ram.extents().unwrap().iter().any(holds), "shared: {shared}");
        }
    }
}
