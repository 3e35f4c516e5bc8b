//! Where a vCPU enters, where the initramfs is, and how boot data is written to guest RAM.

use crate::machine::boot::error::BootError;
use crate::machine::memory::guest_ram::GuestRam;

/// How vCPU 0 enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode, EBX holds the address of the start info.
    Pvh {
        /// Where to start.
        rip: u64,
    },
    /// Long mode, RSI holds the address of boot_params.
    Linux64 {
        /// Where to start.
        rip: u64,
    },
}

/// Where the initramfs lies, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initramfs {
    /// Guest-physical address.
    pub addr: u64,
    /// Length.
    pub size: u64,
}

pub(crate) fn write(
    ram: &GuestRam,
    bytes: &[u8],
    gpa: u64,
    what: &'static str,
) -> Result<(), BootError> {
    ram.write(gpa, bytes).map_err(|source| BootError::Write { what, gpa, source })
}
