//! Why there is no guest RAM, or not as it was asked for.

use std::io;
use std::path::PathBuf;

use mce_relay::RamError;
use thiserror::Error;

use crate::machine::memory::block::MIN_RAM;

/// Why there is no guest RAM.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The size is zero or too small to boot in.
    #[error(
        "{bytes} bytes of guest memory are too few, a kernel needs at least {} MiB; a size without a unit is in bytes \
         (256M are 256 MiB)", MIN_RAM >> 20
    )]
    TooSmall {
        /// What was asked for.
        bytes: u64,
    },
    /// The size is not a whole number of pages.
    #[error(
        "guest memory of {bytes} bytes is not a multiple of its page size, {page} bytes; a size without a unit is in \
         bytes (256M are 256 MiB)"
    )]
    Unaligned {
        /// What was asked for.
        bytes: u64,
        /// The page size.
        page: u64,
    },
    /// The host is smaller than the guest.
    #[error(
        "{} MiB of guest memory asked for, but this host has {} MiB in all; ask for less", bytes >> 20, host >> 20
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
    /// KVM has no guest_memfd that can be mapped.
    #[error(
        "guest_memfd=on needs KVM of Linux 6.18 or newer, which gives guest memory that can be mapped and begins as \
         shared: KVM_CAP_GUEST_MEMFD_FLAGS says {found:#x}, expected the bits {expected:#x}; guest memory without \
         guest_memfd=on needs none"
    )]
    NoGuestMemfd {
        /// What KVM says.
        found: u64,
        /// The flags that it should have.
        expected: u64,
    },
    /// KVM refused a guest_memfd.
    #[error("KVM_CREATE_GUEST_MEMFD of {bytes} bytes")]
    GuestMemfd {
        /// What was asked for.
        bytes: u64,
        /// The cause.
        #[source]
        source: kvm_ioctls::Error,
    },
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
    /// The file to be guest RAM cannot be used.
    #[error("cannot open the file for guest memory {path}", path = .path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The path leads to something that is not a file.
    #[error("{path} is not a regular file, so it cannot be guest memory", path = .path.display())]
    NotAFile {
        /// Its path.
        path: PathBuf,
    },
    /// The file to be guest RAM is one of which the host loses bad pages without a word.
    #[error(
        "the file for guest memory {path} is on neither tmpfs, hugetlbfs nor DAX, and shared=on has the guest write to it: \
         when a page of it goes bad the host drops what was written, reads the page from the disk again as it once \
         was, and tells nobody. Take a file on tmpfs (/dev/shm), leave out shared=on, or accept that with lossy=on",
        path = .path.display()
    )]
    Lossy {
        /// Its path.
        path: PathBuf,
    },
    /// The file to be guest RAM is too short.
    #[error(
        "the file for guest memory {path} has {found} bytes, {wanted} are needed; \
         truncate -s {wanted} {path} makes it so long",
        path = .path.display()
    )]
    ShortFile {
        /// Its path.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// What was asked for.
        wanted: u64,
    },
    /// Two zones are the same memory.
    #[error(
        "memory zones {first} ({first_path}) and {second} ({second_path}), counted from 1, are the same file with \
         shared=on, so the guest would have the same memory twice (each zone is the file from its \
         beginning); give each zone a file of its own",
        first_path = .first_path.display(),
        second_path = .second_path.display()
    )]
    SameFile {
        /// The number of one of them, from 1 on.
        first: usize,
        /// Its path.
        first_path: PathBuf,
        /// The number of the other.
        second: usize,
        /// Its path, which may be another one.
        second_path: PathBuf,
    },
    /// The pool of huge pages has too few.
    #[error(
        "guest memory needs {wanted} free huge pages of {kib} KiB, the host's pool has {free}; as root: \
         echo {total} > /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages"
    )]
    EmptyPool {
        /// How many are needed.
        wanted: u64,
        /// Their size in KiB.
        kib: u64,
        /// How many are free and not promised to anybody.
        free: u64,
        /// How many the pool has to have for it.
        total: u64,
    },
    /// The host has no huge pages of that size.
    #[error(
        "this host has no huge pages of {kib} KiB (/sys/kernel/mm/hugepages has no hugepages-{kib}kB); \
         take another hugepage_size, or leave hugepages out"
    )]
    NoPool {
        /// Their size in KiB.
        kib: u64,
    },
    /// mmap failed.
    #[error("cannot map {bytes} bytes of guest memory in {page}-byte pages")]
    Map {
        /// The size of the mapping.
        bytes: u64,
        /// The page size.
        page: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// There is not enough memory to fill the guest's now.
    #[error("cannot fill guest memory at {gpa:#x} ({bytes} bytes, prefault=on)")]
    Prefault {
        /// Guest-physical address of the piece.
        gpa: u64,
        /// Its length.
        bytes: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The pieces do not make one address space.
    #[error("guest memory at {gpa:#x} does not fit the address space")]
    Layout {
        /// The guest-physical address of the piece.
        gpa: u64,
    },
    /// The same, as the relay sees it.
    #[error(transparent)]
    Regions(#[from] RamError),
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
