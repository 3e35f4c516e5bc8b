//! Guest memory that is KVM's own file (guest_memfd, Linux 6.18 for a kind that can be mapped).
//!
//! KVM finds the guest's pages in the file and not by this process's page tables. Of a page that goes bad the kernel signals
//! those who have it mapped; the guest's touch ends KVM_RUN with KVM_EXIT_MEMORY_FAULT and EHWPOISON, without a signal. A
//! file belongs to the VM that it was made for, so each boot has one of its own.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};

use kvm_bindings::{KVM_MEM_GUEST_MEMFD, kvm_create_guest_memfd, kvm_userspace_memory_region2};
use kvm_ioctls::VmFd;

use super::block::RamBlock;
use super::error::MemoryError;

/// Its answer is the flags that a guest_memfd may have (include/uapi/linux/kvm.h).
const KVM_CAP_GUEST_MEMFD_FLAGS: libc::c_ulong = 244;
/// It can be mapped (include/uapi/linux/kvm.h).
const GUEST_MEMFD_FLAG_MMAP: u64 = 1 << 0;
/// All of it begins as shared with this process.
const GUEST_MEMFD_FLAG_INIT_SHARED: u64 = 1 << 1;

/// Makes one of `bytes` for `vm`.
pub(super) fn create(vm: &VmFd, bytes: u64) -> Result<File, MemoryError> {
    let flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;
    let found = vm.check_extension_raw(KVM_CAP_GUEST_MEMFD_FLAGS);
    let found = u64::try_from(found).unwrap_or(0);
    if found & flags != flags {
        return Err(MemoryError::NoGuestMemfd { found, expected: flags });
    }
    let wanted = kvm_create_guest_memfd { size: bytes, flags, reserved: [0; 6] };
    let fd = vm.create_guest_memfd(wanted);
    let fd = fd.map_err(|source| MemoryError::GuestMemfd { bytes, source })?;
    // SAFETY: the descriptor was just made and nobody else has it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Makes `file`, which is mapped as `block`, the memory of slot `slot`.
pub(super) fn register(
    vm: &VmFd,
    slot: u32,
    block: &RamBlock,
    file: &File,
) -> Result<(), MemoryError> {
    let region = kvm_userspace_memory_region2 {
        slot,
        flags: KVM_MEM_GUEST_MEMFD,
        guest_phys_addr: block.gpa,
        memory_size: block.len,
        userspace_addr: block.hva,
        guest_memfd_offset: 0,
        guest_memfd: file.as_raw_fd().cast_unsigned(),
        ..Default::default()
    };
    // SAFETY: as in `GuestRam::register`; the file is as long as the block.
    unsafe { vm.set_user_memory_region2(region) }.map_err(|source| MemoryError::Slot {
        gpa: block.gpa,
        bytes: block.len,
        source,
    })
}
