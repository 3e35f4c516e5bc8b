//! Huge pages that went bad and in whose place there is ordinary memory: `relaying::rescue`.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{MutexGuard, PoisonError};

use mce_relay::RescueRefusal;

use super::backing::Backing;
use super::block::{PAGE_SIZE, RamBlock};
use super::guest_ram::GuestRam;

impl GuestRam {
    /// The file that the huge page at the host address `hva` is in, and where.
    ///
    /// # Errors
    /// It has none, or one that does not have what the guest wrote, or one that others map, too.
    pub(crate) fn file_of(&self, hva: u64) -> Result<(BorrowedFd<'_>, u64), RescueRefusal> {
        if self.lock_stand_ins().contains(&hva) {
            return Err(RescueRefusal::Mapped);
        }
        let within =
            |backing: &&Backing| hva >= backing.hva() && hva - backing.hva() < backing.len();
        let backing = self.backings.iter().find(within).ok_or(RescueRefusal::Forbidden)?;
        let (file, offset) = backing.file().ok_or(RescueRefusal::NoFile)?;
        match (backing.is_shared(), backing.is_for_others()) {
            (false, _) => Err(RescueRefusal::Private),
            (true, true) => Err(RescueRefusal::Shared),
            (true, false) => Ok((file.as_fd(), offset + (hva - backing.hva()))),
        }
    }

    /// Ordinary memory lies in the place of the huge page at `hva`.
    pub(crate) fn has_stand_in(&self, hva: u64) {
        self.lock_stand_ins().insert(hva);
    }

    /// The pieces, each of pages of one size, as they are now, by guest-physical address.
    #[must_use]
    pub fn pieces(&self) -> Vec<RamBlock> {
        let stand_ins = self.lock_stand_ins();
        let mut pieces = Vec::new();
        for block in &self.blocks {
            let piece = |from: u64, to: u64, page_size: u64| RamBlock {
                gpa: block.gpa + (from - block.hva),
                len: to - from,
                hva: from,
                fd_offset: block.fd_offset + (from - block.hva),
                page_size,
                ..*block
            };
            let (mut at, end) = (block.hva, block.hva + block.len);
            for &hva in stand_ins.range(block.hva..end) {
                if at < hva {
                    pieces.push(piece(at, hva, block.page_size));
                }
                at = hva + block.page_size;
                // Anonymous memory.
                let stand_in = piece(hva, at, PAGE_SIZE);
                pieces.push(RamBlock { fd: None, fd_offset: 0, shared: false, ..stand_in });
            }
            if at < end {
                pieces.push(piece(at, end, block.page_size));
            }
        }
        pieces
    }

    pub(super) fn lock_stand_ins(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        // Whole elements come and go.
        self.stand_ins.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{MemoryZone, PageSize};
    use crate::machine::memory::error::MemoryError;

    #[test]
    fn the_pieces_are_cut_where_a_stand_in_is() {
        let ram = GuestRam::new(&[MemoryZone::new(32 << 20)]).unwrap();
        assert_eq!(ram.pieces(), ram.blocks(), "no huge pages, no stand-ins");
        assert!(matches!(ram.file_of(ram.blocks()[0].hva), Err(RescueRefusal::NoFile)));
        assert!(matches!(ram.file_of(0), Err(RescueRefusal::Forbidden)));
        let huge = PageSize::Size2M.bytes();
        let zone = MemoryZone { page_size: PageSize::Size2M, ..MemoryZone::new(32 << 20) };
        let ram = match GuestRam::new(&[zone]) {
            Err(error @ (MemoryError::EmptyPool { .. } | MemoryError::NoPool { .. })) => {
                return println!("SKIPPED: needs 16 huge pages of 2 MiB: {error}");
            }
            other => other.unwrap(),
        };
        let hva = ram.blocks()[0].hva;
        assert_eq!(ram.file_of(hva + 3 * huge).unwrap().1, 3 * huge);
        for at in [0, 3, 4, 15] {
            ram.has_stand_in(hva + at * huge);
        }
        let pieces: Vec<(u64, u64, u64)> = ram
            .pieces()
            .iter()
            .map(|piece| (piece.gpa / huge, piece.len / huge, piece.page_size))
            .collect();
        let (small, large) = (4096, huge);
        let expected = [(0, 1, small), (1, 2, large), (3, 1, small), (4, 1, small)];
        assert_eq!(pieces[..4], expected);
        assert_eq!(pieces[4..], [(5, 10, large), (15, 1, small)]);
    }
}
