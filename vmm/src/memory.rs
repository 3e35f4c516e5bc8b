//! Guest RAM: one memfd, mapped shared, shown to the guest on both sides of the 32-bit hole.
//!
//! One file for all of RAM, because a page that went bad is put back (and a helper process can
//! reach it) by its offset in that file.

use std::{
    ffi::CStr,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd},
    sync::Arc,
};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use procfs::Current;
use thiserror::Error;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, mmap::MmapRegion};

use crate::config::PageSize;

/// RAM is a whole number of these.
pub const PAGE_SIZE: u64 = 4096;
/// Below this a Linux kernel, its page tables and an initramfs do not fit.
pub const MIN_RAM: u64 = 32 << 20;
/// Where the hole for devices begins: RAM below it, the rest above [`HOLE_END`].
pub const HOLE_START: u64 = 3 << 30;
/// Where the hole for devices ends.
pub const HOLE_END: u64 = 4 << 30;

/// Why there is no guest RAM.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The size is zero or too small to boot in.
    #[error("{bytes} bytes of guest memory are too few, a kernel needs at least {MIN_RAM}")]
    TooSmall {
        /// What was asked for.
        bytes: u64,
    },
    /// The size is not a whole number of pages.
    #[error("guest memory of {bytes} bytes is not a multiple of its page size, {page} bytes")]
    Unaligned {
        /// What was asked for.
        bytes: u64,
        /// The page size.
        page: u64,
    },
    /// The host is smaller than the guest.
    #[error(
        "{bytes} bytes of guest memory asked for, but this host has {host} bytes in all; ask for less"
    )]
    LargerThanHost {
        /// What was asked for.
        bytes: u64,
        /// MemTotal of the host.
        host: u64,
    },
    /// The host's memory size could not be read.
    #[error("cannot read the host's memory size from /proc/meminfo")]
    HostSize(#[source] procfs::ProcError),
    /// memfd_create failed.
    #[error("cannot create a memfd for guest memory ({page}-byte pages)")]
    MemFd {
        /// The page size.
        page: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The memfd could not be given its size.
    #[error("cannot size the guest memory file to {bytes} bytes")]
    Resize {
        /// What was asked for.
        bytes: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// mmap failed.
    #[error(
        "cannot map {bytes} bytes of guest memory in {page}-byte pages (for huge pages, see /proc/sys/vm/nr_hugepages)"
    )]
    Map {
        /// The size of the mapping.
        bytes: u64,
        /// The page size.
        page: u64,
        /// The cause.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The pieces do not make one address space.
    #[error("guest memory at {gpa:#x} does not fit the address space")]
    Layout {
        /// The guest-physical address of the piece.
        gpa: u64,
    },
    /// KVM refused a memory slot.
    #[error("KVM refused guest memory at {gpa:#x}, {bytes} bytes")]
    Slot {
        /// The guest-physical address of the slot.
        gpa: u64,
        /// Its length.
        bytes: u64,
        /// The cause.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// A contiguous piece of guest RAM, in the three ways it can be named. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// Guest-physical address.
    pub gpa: u64,
    /// Length.
    pub len: u64,
    /// Address in this process.
    pub hva: u64,
    /// Offset in the memfd.
    pub fd_offset: u64,
}

impl RamBlock {
    /// Whether the guest-physical address lies in this block.
    #[must_use]
    pub const fn contains_gpa(&self, gpa: u64) -> bool {
        gpa >= self.gpa && gpa - self.gpa < self.len
    }
}

/// The guest-physical pieces, as (address, length), of RAM of this size in bytes.
#[must_use]
pub fn split(bytes: u64) -> Vec<(u64, u64)> {
    if bytes <= HOLE_START {
        vec![(0, bytes)]
    } else {
        vec![(0, HOLE_START), (HOLE_END, bytes - HOLE_START)]
    }
}

/// Checks the size of guest RAM against its page size and the host's memory, all in bytes.
///
/// # Errors
/// See [`MemoryError`]: too small, not whole pages, larger than the host.
pub fn check_size(bytes: u64, page_size: PageSize, host: u64) -> Result<(), MemoryError> {
    if bytes < MIN_RAM {
        return Err(MemoryError::TooSmall { bytes });
    }
    if !bytes.is_multiple_of(page_size.bytes()) {
        return Err(MemoryError::Unaligned { bytes, page: page_size.bytes() });
    }
    if bytes > host {
        return Err(MemoryError::LargerThanHost { bytes, host });
    }
    Ok(())
}

/// All RAM of one guest.
#[derive(Debug)]
pub struct GuestRam {
    memory: GuestMemoryMmap,
    blocks: Vec<RamBlock>,
    file: Arc<File>,
}

impl GuestRam {
    /// Maps RAM of this size.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn new(bytes: u64, page_size: PageSize) -> Result<Self, MemoryError> {
        let host = procfs::Meminfo::current().map_err(MemoryError::HostSize)?.mem_total;
        check_size(bytes, page_size, host)?;

        let file = Arc::new(memfd(c"guest-ram", page_size)?);
        file.set_len(bytes).map_err(|source| MemoryError::Resize { bytes, source })?;

        let mut regions = Vec::new();
        let mut blocks = Vec::new();
        let mut fd_offset = 0;
        for (gpa, len) in split(bytes) {
            let size = usize::try_from(len).map_err(|_| MemoryError::Layout { gpa })?;
            // No MAP_NORESERVE: with huge pages it turns an empty pool into a SIGBUS later.
            let mapping = MmapRegion::build(
                Some(FileOffset::from_arc(Arc::clone(&file), fd_offset)),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
            )
            .map_err(|source| MemoryError::Map {
                bytes: len,
                page: page_size.bytes(),
                source,
            })?;
            blocks.push(RamBlock { gpa, len, hva: mapping.as_ptr().addr() as u64, fd_offset });
            regions.push(
                GuestRegionMmap::new(mapping, GuestAddress(gpa))
                    .ok_or(MemoryError::Layout { gpa })?,
            );
            fd_offset += len;
        }
        let memory = GuestMemoryMmap::from_regions(regions)
            .map_err(|_| MemoryError::Layout { gpa: HOLE_END })?;
        Ok(Self { memory, blocks, file })
    }

    /// The memory as vm-memory sees it.
    #[must_use]
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The pieces, in rising order of every one of their addresses but the HVA.
    #[must_use]
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// The end of RAM below the hole, as a guest-physical address.
    #[must_use]
    pub fn low_end(&self) -> u64 {
        self.blocks.first().map_or(0, |block| block.len)
    }

    /// Gives the VM its memory slots, one per piece.
    ///
    /// # Errors
    /// What KVM refused.
    pub fn register(&self, vm: &VmFd) -> Result<(), MemoryError> {
        for (slot, block) in (0..).zip(&self.blocks) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: block.gpa,
                memory_size: block.len,
                userspace_addr: block.hva,
            };
            // SAFETY: the block is a live mapping of that length, which this struct owns; whoever
            // owns the VM drops the vCPUs before it (see `vm::Vm`), and slots do not overlap.
            unsafe { vm.set_user_memory_region(region) }.map_err(|source| MemoryError::Slot {
                gpa: block.gpa,
                bytes: block.len,
                source,
            })?;
        }
        Ok(())
    }
}

impl AsFd for GuestRam {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for GuestRam {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn memfd(name: &CStr, page_size: PageSize) -> Result<File, MemoryError> {
    let huge = match page_size {
        PageSize::Size4K => 0,
        PageSize::Size2M => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
        PageSize::Size1G => libc::MFD_HUGETLB | libc::MFD_HUGE_1GB,
    };
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | huge) };
    if fd < 0 {
        let source = io::Error::last_os_error();
        return Err(MemoryError::MemFd { page: page_size.bytes(), source });
    }
    // SAFETY: the descriptor was just made and nobody else has it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::Bytes;

    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn ram_is_split_around_the_hole() {
        assert_eq!(split(512 << 20), [(0, 512 << 20)]);
        assert_eq!(split(3 * GIB), [(0, 3 * GIB)]);
        assert_eq!(split(3 * GIB + PAGE_SIZE), [(0, 3 * GIB), (4 * GIB, PAGE_SIZE)]);
        assert_eq!(split(8 * GIB), [(0, 3 * GIB), (4 * GIB, 5 * GIB)]);
    }

    #[test]
    fn sizes_are_checked_and_named() {
        let check = |bytes| check_size(bytes, PageSize::Size4K, GIB).map_err(|e| e.to_string());
        assert!(check(0).unwrap_err().contains("0 bytes"));
        assert!(check(MIN_RAM - PAGE_SIZE).unwrap_err().contains("too few"));
        assert!(check(MIN_RAM + 1).unwrap_err().contains("33554433"));
        let error = check(2 * GIB).unwrap_err();
        assert!(error.contains("2147483648") && error.contains("1073741824"), "{error}");
        assert_eq!(check(MIN_RAM), Ok(()));
        assert_eq!(check(GIB), Ok(()));
        assert!(check_size(33 << 20, PageSize::Size2M, GIB).is_err());
    }

    #[test]
    fn all_names_of_a_byte_agree() {
        // 3 GiB and a bit are only reserved, not touched: this is cheap.
        let bytes = HOLE_START + (2 << 20);
        let ram = match GuestRam::new(bytes, PageSize::Size4K) {
            Err(MemoryError::LargerThanHost { .. }) => {
                println!("skipped: this host has less than {bytes} bytes");
                return;
            }
            other => other.unwrap(),
        };
        assert_eq!(ram.blocks().len(), 2);
        let high = ram.blocks()[1];
        assert_eq!((high.gpa, high.fd_offset), (HOLE_END, HOLE_START));
        ram.memory().write_slice(b"here", GuestAddress(HOLE_END + 64)).unwrap();
        let mut back = [0; 4];
        ram.file.read_exact_at(&mut back, high.fd_offset + 64).unwrap();
        assert_eq!(&back, b"here");
        // SAFETY: the address is 64 bytes into a live mapping of 2 MiB.
        let seen = unsafe { std::ptr::read_volatile((high.hva + 64) as *const [u8; 4]) };
        assert_eq!(&seen, b"here");
        assert!(high.contains_gpa(HOLE_END) && !high.contains_gpa(HOLE_END + high.len));
    }
}
