//! Pages as a user names them, and the VM's data on each.

/// Pages of the guest are of 4 KiB.
pub(super) const PAGE_SHIFT: u32 = 12;

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
    /// Size in bytes of the host's pages there, each of which is lost as a whole.
    pub(super) page_size: u64,
    /// It is a private mapping of a file: what is written there does not get to the file.
    pub(super) is_private_file: bool,
}
