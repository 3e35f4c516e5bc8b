//! Which of the host's page frames may be poisoned: only the VM's own memory, and no frame that other users need.
//!
//! The kernel does not ask whose a page frame is. If the guest, or the VMM for it, has only read from a page, its frame
//! may be the zero page of the whole host.

use mce_relay_vmm::host::error::HostError;
use mce_relay_vmm::host::flags::{
    ANON, BUDDY, HUGE, HWPOISON, KSM, MMAP, NOPAGE, OFFLINE, PGTABLE, RESERVED, SLAB, THP,
    ZERO_PAGE,
};
use mce_relay_vmm::host::page_frames::{PageCounts, PageFlags};
use mce_relay_vmm::host::pagemap::{Entry, Pagemap};

use super::target::Target;

const PAGE_SHIFT: u32 = 12;
/// How often a page may move while it is looked up.
const LOOKS: usize = 5;

/// Why a page frame is not poisoned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfit {
    /// It is bad.
    Bad,
    /// The zero page, which is mapped wherever a process has only read unwritten memory.
    ZeroPage,
    /// The zero page of 2 MiB.
    HugeZeroPage,
    /// One page that KSM shares between several with the same contents.
    Ksm,
    /// The kernel's own or the firmware's.
    Reserved,
    /// Memory that the kernel does not manage.
    NoPage,
    /// Taken from this kernel (by a balloon, say).
    Offline,
    /// A page table.
    PageTable,
    /// The kernel's own objects.
    Slab,
    /// Free memory.
    Free,
    /// Mapped by no process.
    Unmapped,
}

impl std::fmt::Display for Unfit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Bad => "is bad already",
            Self::ZeroPage => {
                "is the zero page, which all processes of this host share: the guest has only read from there, or the \
                 host has split a transparent huge page and keeps what was all zeros in it so; the guest has to write \
                 to the page first (--via uffd and signal do without), or to be run with --memory ...,thp=off"
            }
            Self::HugeZeroPage => {
                "is of the huge zero page, which all processes of this host share: the guest has only read from \
                 there; it has to write to the page first (--via uffd and signal do without)"
            }
            Self::Ksm => {
                "is shared with others who have the same in a page of theirs (KSM has joined them), and they would \
                 lose it, too; have the guest write to it, or as root: echo 2 > /sys/kernel/mm/ksm/run"
            }
            Self::Reserved => "is reserved (the kernel's own, the firmware's or a device's), so it is not poisoned",
            Self::NoPage => {
                "is no memory that the host's kernel manages (a device's, such as a DAX file's), so it is not poisoned"
            }
            Self::Offline => "is offline (a balloon of this host's has it, say), so it is not poisoned",
            Self::PageTable => "is a page table of this host's, so it is not poisoned",
            Self::Slab => "holds objects of this host's kernel, so it is not poisoned",
            Self::Free => "is free memory of this host's, so it is not poisoned",
            Self::Unmapped => "is mapped by no process at this moment, so it is not poisoned",
        })
    }
}

/// Whether a page frame with these flags in /proc/kpageflags may be poisoned, given that a VMM has it mapped as guest
/// RAM. `exclusive`: the VMM's page table says that no other mapping exists.
///
/// Some kernels (Linux 6.12 is one) set KSM for all anonymous memory, since their test of two bits accepts one
/// (`stable_page_flags` in `fs/proc/page.c`). So KSM counts only for a page that is mapped elsewhere, too; a KSM page
/// without another mapping is as good as the VM's own.
///
/// # Errors
/// Why not.
pub fn judge(flags: u64, exclusive: bool) -> Result<(), Unfit> {
    let is = |flag: u64| flags & flag != 0;
    // First: the kernel leaves other flags of a bad page as they are.
    let why = if is(HWPOISON) {
        Unfit::Bad
    } else if is(NOPAGE) {
        Unfit::NoPage
    } else if is(ZERO_PAGE) && is(THP) {
        Unfit::HugeZeroPage
    } else if is(ZERO_PAGE) {
        Unfit::ZeroPage
    } else if is(KSM) && !exclusive {
        Unfit::Ksm
    } else if is(RESERVED) {
        Unfit::Reserved
    } else if is(OFFLINE) {
        Unfit::Offline
    } else if is(PGTABLE) {
        Unfit::PageTable
    } else if is(SLAB) {
        Unfit::Slab
    } else if is(BUDDY) {
        Unfit::Free
    } else if !is(MMAP) && !is(HUGE) {
        // Neither anonymous nor mapped: no memory of a process.
        Unfit::Unmapped
    } else {
        return Ok(());
    };
    Err(why)
}

/// Why a page is not poisoned.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// It cannot be looked up.
    #[error(transparent)]
    Host(#[from] HostError),
    /// It must not be poisoned.
    #[error("host pfn {pfn:#x} {why}")]
    Unfit {
        /// The page frame.
        pfn: u64,
        /// Why not.
        why: Unfit,
    },
    /// The host keeps moving it.
    #[error("the host moves the page at HVA {hva:#x} from frame to frame; try again")]
    Moves {
        /// The address in the VMM.
        hva: u64,
    },
}

/// The page frame behind a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// The page frame number.
    pub pfn: u64,
    /// Its flags.
    pub flags: u64,
}

/// Access to the host's page frames of a VM.
pub struct Frames {
    pub(super) pagemap: Pagemap,
    pub(super) flags: PageFlags,
    counts: Option<PageCounts>,
}

impl Frames {
    /// For the VMM's process `pid`.
    ///
    /// # Errors
    /// This user is not shown them, or this kernel does not have them.
    pub fn open(pid: u32) -> Result<Self, HostError> {
        let (pagemap, flags) = (Pagemap::open(pid)?, PageFlags::open()?);
        Ok(Self { pagemap, flags, counts: PageCounts::open().ok() })
    }

    /// The page frame behind `target`, which may be poisoned.
    ///
    /// It was behind the page before its flags were read, and still is afterwards. Between this and the poisoning only
    /// the host itself can change that, by moving the page.
    ///
    /// # Errors
    /// See [`FrameError`].
    pub(crate) fn fit(&self, target: &Target) -> Result<Frame, FrameError> {
        for _ in 0..LOOKS {
            let pfn = self.pagemap.pfn(target.hva)?;
            let flags = self.flags_of(pfn, target.page_size)?;
            let exclusive = match self.pagemap.entry(target.hva)? {
                Entry::Present { pfn: now, exclusive } if now == Some(pfn) => exclusive,
                _ => continue,
            };
            return match judge(flags, exclusive) {
                Ok(()) => Ok(Frame { pfn, flags }),
                Err(why) => Err(FrameError::Unfit { pfn, why }),
            };
        }
        Err(FrameError::Moves { hva: target.hva })
    }

    /// The flags of page frame `pfn`, which is part of a page of `page_size` bytes. Before Linux 6.2 only the first
    /// frame of a hugetlb page shows that the page is bad.
    ///
    /// # Errors
    /// They cannot be read.
    pub(super) fn flags_of(&self, pfn: u64, page_size: u64) -> Result<u64, HostError> {
        let flags = self.flags.get(pfn)?;
        let head = pfn - pfn % (page_size >> PAGE_SHIFT).max(1);
        if flags & HUGE == 0 || head == pfn {
            return Ok(flags);
        }
        Ok(flags | self.flags.get(head)? & HWPOISON)
    }

    /// How often page frame `pfn` is mapped; `None` where it is not known.
    pub(super) fn mapped(&self, pfn: u64) -> Option<u64> {
        let count = self.counts.as_ref()?.get(pfn).ok()?;
        Some(count).filter(|count| *count != u64::MAX)
    }
}

impl Frame {
    /// Whether it is a page of a file, not a private copy.
    pub(super) fn is_of_file(&self) -> bool {
        self.flags & (ANON | HUGE) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mce_relay_vmm::host::flags::{LRU, mask};

    #[test]
    fn what_may_be_poisoned_and_what_may_not() {
        for (flags, verdict) in [
            // As Linux 6.1 and 6.12 show them: anonymous memory, fresh and on a list; of a transparent huge
            // page; of hugetlb; of a memfd; of a file.
            ("mmap+anon+swapbacked+uptodate", Ok(())),
            ("referenced+uptodate+dirty+lru+active+mmap+anon+swapbacked", Ok(())),
            ("mmap+anon+swapbacked+compound_head+thp+lru", Ok(())),
            ("mmap+anon+swapbacked+compound_tail+thp+lru", Ok(())),
            ("mmap+anon+compound_tail+huge+uptodate", Ok(())),
            ("compound_head+huge+uptodate", Ok(())),
            ("referenced+uptodate+dirty+mmap+swapbacked", Ok(())),
            ("referenced+uptodate+lru+mmap+mappedtodisk", Ok(())),
            ("mmap+anon+swapbacked+swapcache+mlocked+unevictable+softdirty", Ok(())),
            // The two zero pages.
            ("zero_page+reserved", Err(Unfit::ZeroPage)),
            ("zero_page", Err(Unfit::ZeroPage)),
            ("zero_page+thp+compound_head", Err(Unfit::HugeZeroPage)),
            ("zero_page+thp+compound_tail+uptodate", Err(Unfit::HugeZeroPage)),
            // As Linux 6.12 shows every page of anonymous memory.
            ("referenced+uptodate+dirty+lru+mmap+anon+swapbacked+ksm+mappedtodisk", Ok(())),
            // A bad page, which looks like one of KSM.
            ("anon+swapbacked+hwpoison+ksm+mappedtodisk", Err(Unfit::Bad)),
            ("huge+hwpoison", Err(Unfit::Bad)),
            ("reserved", Err(Unfit::Reserved)),
            ("mmap+reserved", Err(Unfit::Reserved)),
            ("nopage", Err(Unfit::NoPage)),
            ("offline", Err(Unfit::Offline)),
            ("mmap+pgtable", Err(Unfit::PageTable)),
            ("slab", Err(Unfit::Slab)),
            ("buddy", Err(Unfit::Free)),
            ("0", Err(Unfit::Unmapped)),
            ("lru+uptodate+anon+swapbacked", Err(Unfit::Unmapped)),
            ("compound_head", Err(Unfit::Unmapped)),
        ] {
            assert_eq!(judge(mask(flags).unwrap(), true), verdict, "{flags}");
        }
        // Mapped more than once: KSM's page, one of a memfd, and the zero page.
        for (flags, verdict) in [
            ("mmap+anon+ksm+uptodate+swapbacked", Err(Unfit::Ksm)),
            ("uptodate+lru+mmap+swapbacked", Ok(())),
            ("mmap+anon+swapbacked", Ok(())),
            ("zero_page", Err(Unfit::ZeroPage)),
        ] {
            assert_eq!(judge(mask(flags).unwrap(), false), verdict, "{flags}");
        }
    }

    /// Whatever else a frame's flags say, each of these is enough.
    #[test]
    fn one_flag_is_enough_to_refuse() {
        let own = MMAP | ANON | LRU;
        assert_eq!(judge(own, false), Ok(()));
        for flag in [HWPOISON, NOPAGE, ZERO_PAGE, KSM, RESERVED, OFFLINE, PGTABLE, SLAB, BUDDY] {
            let why = judge(own | flag, false).unwrap_err();
            assert_eq!(judge(HUGE | flag, false), Err(why), "{flag:#x}");
            assert!(why.to_string().starts_with("is ") || why == Unfit::Slab, "{why}");
        }
    }
}
