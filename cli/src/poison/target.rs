//! Pages as a user names them, and what the VM says of each.

use std::collections::HashSet;

use mce_relay_vmm::api::types::vm::{MemoryBlock, VmInfo};

use super::error::PoisonError;
use crate::poison::targets::PAGE_SHIFT;

/// Some 4 KiB pages in a row, at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRange {
    /// Number of the first page: its guest-physical address in units of 4 KiB.
    pub(super) first: u64,
    /// Number of the page behind the last.
    pub(super) end: u64,
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

/// A page to be poisoned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) gpa: u64,
    pub(crate) hva: u64,
    /// The VMM's descriptor of the file that other processes can map; `None` where there is none.
    pub(super) fd: Option<i32>,
    /// Offset in that file.
    pub(super) offset: u64,
    /// The pages that the host keeps it in, and loses as a whole, in bytes.
    pub(super) page_size: u64,
    /// A file lies behind it, and what is written here does not get there.
    pub(super) is_private_file: bool,
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
    let target = |gpa| vm.block(gpa).map(|block| target_in(block, gpa));
    Ok(new.filter_map(target).collect())
}

/// The page at `gpa`, which is in `block`.
pub(crate) fn target_in(block: &MemoryBlock, gpa: u64) -> Target {
    let inside = gpa - block.gpa;
    Target {
        gpa,
        hva: block.hva + inside,
        fd: block.fd.filter(|_| block.shared),
        offset: block.fd_offset + inside,
        page_size: block.page_size,
        is_private_file: block.fd.is_some() && !block.shared,
    }
}
