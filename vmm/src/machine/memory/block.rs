//! The blocks of guest RAM: where each is in the guest and in this process.

use mce_relay::RamRegion;

use crate::api::types::vm::MemoryBlock;

/// RAM is a whole number of these.
pub const PAGE_SIZE: u64 = 4096;
/// Below this a Linux kernel, its page tables and an initramfs do not fit.
pub const MIN_RAM: u64 = 32 << 20;
/// Where the hole for devices begins: RAM below it, the rest above [`HOLE_END`].
pub const HOLE_START: u64 = 3 << 30;
/// Where the hole for devices ends.
pub const HOLE_END: u64 = 4 << 30;

/// A contiguous piece of guest RAM, in the ways it can be named. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// Guest-physical address.
    pub gpa: u64,
    /// Length.
    pub len: u64,
    /// Address in this process.
    pub hva: u64,
    /// Offset in its file.
    pub fd_offset: u64,
    /// The descriptor of its file in this process; `None` for anonymous memory.
    pub fd: Option<i32>,
    /// Whether another process that maps the file has the same memory.
    pub shared: bool,
    /// The pages that the host keeps it in, and loses as a whole: 4 KiB, 2 MiB or 1 GiB.
    pub page_size: u64,
}

impl RamBlock {
    /// Anonymous memory in pages of 4 KiB.
    #[must_use]
    pub const fn new(gpa: u64, len: u64, hva: u64) -> Self {
        Self { gpa, len, hva, fd_offset: 0, fd: None, shared: false, page_size: PAGE_SIZE }
    }

    /// Whether the guest-physical address lies in this block.
    #[must_use]
    pub const fn contains_gpa(&self, gpa: u64) -> bool {
        gpa >= self.gpa && gpa - self.gpa < self.len
    }
}

/// The guest-physical pieces of RAM in zones of these sizes and page sizes, in bytes: zone, offset in
/// the zone, address, length. Pieces are whole pages, so a zone is cut at the last page boundary
/// before the hole.
#[must_use]
pub fn split(zones: &[(u64, u64)]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut gpa = 0;
    for (zone, &(bytes, page)) in zones.iter().enumerate() {
        let below = HOLE_START.saturating_sub(gpa) / page * page;
        let low = bytes.min(below);
        if low > 0 {
            pieces.push(Piece { zone, offset: 0, gpa, len: low });
            gpa += low;
        }
        if bytes > low {
            let at = gpa.max(HOLE_END);
            pieces.push(Piece { zone, offset: low, gpa: at, len: bytes - low });
            gpa = at + (bytes - low);
        }
    }
    pieces
}

/// One piece of [`split`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Number of its zone.
    pub zone: usize,
    /// Where in the zone it begins.
    pub offset: u64,
    /// Guest-physical address.
    pub gpa: u64,
    /// Length.
    pub len: u64,
}

pub(crate) fn region(block: &RamBlock) -> RamRegion {
    let page_shift = u8::try_from(block.page_size.trailing_zeros()).unwrap_or(12);
    // SAFETY: the block is a mapping of `GuestRam`'s, to which no reference leads; the relay is dropped before it at
    // the guest's end (`session::boots`).
    unsafe { RamRegion::new(block.hva, block.gpa, block.len) }.in_pages_of(page_shift)
}

impl From<&RamBlock> for MemoryBlock {
    fn from(block: &RamBlock) -> Self {
        let RamBlock { gpa, len, hva, fd_offset, fd, shared, page_size } = *block;
        Self { gpa, len, hva, fd, fd_offset, shared, page_size }
    }
}

/// What the page tables of this process hold.
pub(super) const PAGEMAP: &str = "/proc/self/pagemap";
