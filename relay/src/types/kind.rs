//! What a memory failure is, on any architecture.

/// Bytes in the unit of memory in which a guest is told of errors. Linux uses no record whose address is coarser
/// (`mce_usable_address`), so larger extents are told page by page.
pub const PAGE_SIZE: u64 = 4096;
/// `log2` of [`PAGE_SIZE`], the `si_addr_lsb` of one 4 KiB page.
pub const PAGE_SHIFT: u8 = 12;

/// What a memory error asks of the program or guest that uses the page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum FailureKind {
    /// Action optional: the page's contents are lost, and nothing has touched it yet.
    #[cfg_attr(feature = "serde", serde(rename = "AO"))]
    ActionOptional,
    /// Action required: a vCPU touched the page and cannot go on.
    #[cfg_attr(feature = "serde", serde(rename = "AR"))]
    ActionRequired,
}

impl std::fmt::Display for FailureKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::ActionOptional => "AO",
            Self::ActionRequired => "AR",
        })
    }
}

/// A memory failure as the kernel signalled it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caught {
    /// AO or AR.
    pub kind: FailureKind,
    /// `si_addr`, a host virtual address; not necessarily page-aligned.
    pub hva: u64,
    /// `si_addr_lsb`, `log2` of the bytes that are lost.
    pub lsb: u8,
}
