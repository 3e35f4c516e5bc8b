//! Why a kernel could not be loaded.

use std::io::{self};
use std::path::PathBuf;

use thiserror::Error;

/// A number of bytes in MiB, for people; rounded up.
fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

/// Why a kernel could not be put into guest RAM.
#[derive(Debug, Error)]
pub enum BootError {
    /// A file could not be opened or read.
    #[error("cannot read the {what} {}", path.display())]
    Read {
        /// "kernel" or "initramfs".
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A path leads to something that is not a file.
    #[error("the {what} {} is not a regular file", path.display())]
    NotAFile {
        /// "kernel" or "initramfs".
        what: &'static str,
        /// Its path.
        path: PathBuf,
    },
    /// The file is not a kernel.
    #[error(
        "{} is not a kernel: expected a vmlinux (ELF, x86-64) or a bzImage with a 64-bit entry, found {found}",
        path.display()
    )]
    NotAKernel {
        /// Its path.
        path: PathBuf,
        /// What it looks like.
        found: String,
    },
    /// The kernel's file is damaged or does not fit.
    #[error(
        "cannot load the kernel {} into {} of memory (is the file complete, is the memory large enough?): {cause}",
        path.display(), mib(*ram)
    )]
    Load {
        /// Its path.
        path: PathBuf,
        /// RAM below the hole, in bytes.
        ram: u64,
        /// The cause, in words.
        cause: String,
    },
    /// The kernel alone fills the memory.
    #[error(
        "the kernel {} needs memory up to {}, the guest has {}; give it more memory",
        path.display(), mib(*end), mib(*ram)
    )]
    KernelTooLarge {
        /// Its path.
        path: PathBuf,
        /// The end of the kernel.
        end: u64,
        /// RAM below the hole, in bytes.
        ram: u64,
    },
    /// The initramfs is empty.
    #[error("the initramfs {} is empty", path.display())]
    EmptyInitramfs {
        /// Its path.
        path: PathBuf,
    },
    /// Kernel and initramfs do not fit together.
    #[error(
        "the initramfs {} of {} does not fit between the kernel's end at {} and {}; give the guest more memory",
        path.display(), mib(*bytes), mib(*from), mib(*to)
    )]
    InitramfsTooLarge {
        /// Its path.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// The end of the kernel.
        from: u64,
        /// The end of the memory that it may be in.
        to: u64,
    },
    /// The command line is too long.
    #[error("the kernel command line has {bytes} bytes, the kernel takes at most {max} bytes")]
    CmdlineTooLong {
        /// Its length.
        bytes: usize,
        /// The most.
        max: usize,
    },
    /// The command line has bytes that a kernel cannot take.
    #[error("the kernel command line has the control character {found:?} at byte {at}")]
    CmdlineControl {
        /// The character.
        found: char,
        /// Where.
        at: usize,
    },
    /// Guest memory could not be written.
    #[error("cannot write the {what} to guest memory at {gpa:#x}")]
    Write {
        /// What was to be written.
        what: &'static str,
        /// Where.
        gpa: u64,
        /// The cause.
        #[source]
        source: mce_relay::AccessError,
    },
    /// The initramfs could not be copied to guest memory.
    #[error("cannot copy the initramfs {} to guest memory at {gpa:#x}", path.display())]
    CopyInitramfs {
        /// Its path.
        path: PathBuf,
        /// Where.
        gpa: u64,
        /// The cause.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// Memory that the kernel or its boot data has to lie in was removed from the guest.
    #[error(
        "guest memory at {gpa:#x} went bad, there is no good memory for it on this host, and the \
         guest cannot start without it; start it anew"
    )]
    Hole {
        /// Guest-physical address.
        gpa: u64,
    },
}
