//! The KVM ioctls that the component makes, each on a descriptor that the caller passes. On a descriptor of another
//! kind KVM, or the driver it belongs to, fails the call.

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVMIO, kvm_enable_cap, kvm_mp_state, kvm_msr_entry, kvm_msr_filter, kvm_msrs, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_x86_mce,
};

use crate::x86::mca::{MAX_BANKS, Record};

// include/uapi/linux/kvm.h
const CREATE_VM: libc::Ioctl = libc::_IO(KVMIO, 0x01);
const CHECK_EXTENSION: libc::Ioctl = libc::_IO(KVMIO, 0x03);
const CREATE_VCPU: libc::Ioctl = libc::_IO(KVMIO, 0x41);
const GET_REGS: libc::Ioctl = libc::_IOR::<kvm_regs>(KVMIO, 0x81);
const GET_SREGS: libc::Ioctl = libc::_IOR::<kvm_sregs>(KVMIO, 0x83);
const GET_MSRS: libc::Ioctl = libc::_IOWR::<kvm_msrs>(KVMIO, 0x88);
const SET_MSRS: libc::Ioctl = libc::_IOW::<kvm_msrs>(KVMIO, 0x89);
const GET_MP_STATE: libc::Ioctl = libc::_IOR::<kvm_mp_state>(KVMIO, 0x98);
const X86_SETUP_MCE: libc::Ioctl = libc::_IOW::<u64>(KVMIO, 0x9c);
const X86_GET_MCE_CAP_SUPPORTED: libc::Ioctl = libc::_IOR::<u64>(KVMIO, 0x9d);
const X86_SET_MCE: libc::Ioctl = libc::_IOW::<kvm_x86_mce>(KVMIO, 0x9e);
const GET_VCPU_EVENTS: libc::Ioctl = libc::_IOR::<kvm_vcpu_events>(KVMIO, 0x9f);
const ENABLE_CAP: libc::Ioctl = libc::_IOW::<kvm_enable_cap>(KVMIO, 0xa3);
const X86_SET_MSR_FILTER: libc::Ioctl = libc::_IOW::<kvm_msr_filter>(KVMIO, 0xc6);

/// As many MSRs as reading a vCPU's state takes at most: MCG_STATUS, MCG_CTL, MCG_EXT_CTL and two of each bank.
const MOST_MSRS: usize = 3 + 2 * MAX_BANKS;

/// `struct kvm_msrs` with its entries.
#[repr(C)]
struct MsrBuffer {
    header: kvm_msrs,
    entries: [kvm_msr_entry; MOST_MSRS],
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// An ioctl whose argument is a number.
fn by_value(
    fd: &impl AsRawFd,
    request: libc::Ioctl,
    value: libc::c_ulong,
) -> io::Result<libc::c_int> {
    // SAFETY: an argument that is a number leads the kernel to no memory of ours.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), request, value) })
}

/// An ioctl that reads a `T`.
fn with_ref<T>(fd: &impl AsRawFd, request: libc::Ioctl, value: &T) -> io::Result<libc::c_int> {
    // SAFETY: `request` has the size of `T` in it, and the kernel reads no more from the reference.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_ref(value)) })
}

/// An ioctl that fills a `T`.
fn filled<T: Default>(fd: &impl AsRawFd, request: libc::Ioctl) -> io::Result<T> {
    let mut value = T::default();
    // SAFETY: `request` has the size of `T` in it, and the kernel writes no more to the reference. Every `T` here is
    // plain data of the kernel's, of which any value is valid.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut value) })?;
    Ok(value)
}

pub(super) fn check_extension(fd: &impl AsRawFd, extension: u32) -> io::Result<libc::c_int> {
    by_value(fd, CHECK_EXTENSION, extension.into())
}

/// A throw-away VM, to try on it what KVM makes of a setup.
pub(super) fn create_vm(kvm: &impl AsRawFd) -> io::Result<std::os::fd::OwnedFd> {
    owned(by_value(kvm, CREATE_VM, 0)?)
}

pub(super) fn create_vcpu(vm: &impl AsRawFd) -> io::Result<std::os::fd::OwnedFd> {
    owned(by_value(vm, CREATE_VCPU, 0)?)
}

#[allow(clippy::unnecessary_wraps, reason = "as its callers return it")]
fn owned(fd: libc::c_int) -> io::Result<std::os::fd::OwnedFd> {
    // SAFETY: a descriptor that KVM has just made, owned by nobody else.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) })
}

pub(super) fn get_regs(vcpu: &impl AsRawFd) -> io::Result<kvm_regs> {
    filled(vcpu, GET_REGS)
}

pub(super) fn get_sregs(vcpu: &impl AsRawFd) -> io::Result<kvm_sregs> {
    filled(vcpu, GET_SREGS)
}

pub(super) fn get_mp_state(vcpu: &impl AsRawFd) -> io::Result<u32> {
    filled::<kvm_mp_state>(vcpu, GET_MP_STATE).map(|state| state.mp_state)
}

pub(super) fn get_vcpu_events(vcpu: &impl AsRawFd) -> io::Result<kvm_vcpu_events> {
    filled(vcpu, GET_VCPU_EVENTS)
}

pub(super) fn enable_cap(vm: &impl AsRawFd, cap: &kvm_enable_cap) -> io::Result<()> {
    with_ref(vm, ENABLE_CAP, cap).map(drop)
}

/// # Safety
/// Every bitmap that `filter` points to is as long as its range says, in units of eight bytes.
pub(super) unsafe fn set_msr_filter(vm: &impl AsRawFd, filter: &kvm_msr_filter) -> io::Result<()> {
    with_ref(vm, X86_SET_MSR_FILTER, filter).map(drop)
}

pub(super) fn setup_mce(vcpu: &impl AsRawFd, mcg_cap: u64) -> io::Result<()> {
    with_ref(vcpu, X86_SETUP_MCE, &mcg_cap).map(drop)
}

pub(super) fn supported_mce(kvm: &impl AsRawFd) -> io::Result<u64> {
    filled(kvm, X86_GET_MCE_CAP_SUPPORTED)
}

/// `KVM_X86_SET_MCE` without any check: `Ok` says only that KVM took the call, not that the guest was told.
///
/// # Errors
/// EINVAL for a bank the vCPU does not have or a record without VAL.
pub fn set_mce(vcpu: &impl AsRawFd, record: &Record) -> io::Result<()> {
    let Record { bank, status, addr, misc, mcg_status } = *record;
    let mce = kvm_x86_mce { bank, status, addr, misc, mcg_status, ..Default::default() };
    with_ref(vcpu, X86_SET_MCE, &mce).map(drop)
}

fn buffer(entries: impl ExactSizeIterator<Item = kvm_msr_entry>) -> io::Result<MsrBuffer> {
    let count = entries.len();
    if count > MOST_MSRS {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let header = kvm_msrs { nmsrs: u32::try_from(count).unwrap_or_default(), ..Default::default() };
    let mut buffer = MsrBuffer { header, entries: [kvm_msr_entry::default(); MOST_MSRS] };
    buffer.entries.iter_mut().zip(entries).for_each(|(place, entry)| *place = entry);
    Ok(buffer)
}

/// The values of `indices`, in their order.
///
/// # Errors
/// The first register that cannot be read, and why.
pub(super) fn read_msrs(
    vcpu: &impl AsRawFd,
    indices: &[u32],
) -> Result<Vec<u64>, (u32, io::Error)> {
    let first = indices.first().copied().unwrap_or_default();
    let entry = |index: &u32| kvm_msr_entry { index: *index, ..Default::default() };
    let mut msrs = buffer(indices.iter().map(entry)).map_err(|error| (first, error))?;
    // SAFETY: the kernel reads and writes as many entries as the header says, and the buffer has them.
    let read = checked(unsafe { libc::ioctl(vcpu.as_raw_fd(), GET_MSRS, &raw mut msrs) })
        .map_err(|error| (first, error))?;
    // KVM stops at the first one that it does not know, and returns how many it read.
    match indices.get(usize::try_from(read).unwrap_or_default()) {
        Some(index) => Err((*index, io::Error::from_raw_os_error(libc::EINVAL))),
        None => Ok(msrs.entries[..indices.len()].iter().map(|entry| entry.data).collect()),
    }
}

pub(super) fn write_msr(vcpu: &impl AsRawFd, index: u32, data: u64) -> io::Result<()> {
    let msrs = buffer([kvm_msr_entry { index, data, ..Default::default() }].into_iter())?;
    // SAFETY: the kernel reads as many entries as the header says, and the buffer has them.
    let written = checked(unsafe { libc::ioctl(vcpu.as_raw_fd(), SET_MSRS, &raw const msrs) })?;
    if written == 1 { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EINVAL)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers of include/uapi/linux/kvm.h, as literals on purpose.
    #[test]
    fn ioctl_numbers() {
        let numbers = [
            (CREATE_VM, 0xae01),
            (CHECK_EXTENSION, 0xae03),
            (CREATE_VCPU, 0xae41),
            (GET_REGS, 0x8090_ae81),
            (GET_SREGS, 0x8138_ae83),
            (GET_MSRS, 0xc008_ae88),
            (SET_MSRS, 0x4008_ae89),
            (GET_MP_STATE, 0x8004_ae98),
            (X86_SETUP_MCE, 0x4008_ae9c),
            (X86_GET_MCE_CAP_SUPPORTED, 0x8008_ae9d),
            (X86_SET_MCE, 0x4040_ae9e),
            (GET_VCPU_EVENTS, 0x8040_ae9f),
            (ENABLE_CAP, 0x4068_aea3),
            (X86_SET_MSR_FILTER, 0x4188_aec6),
        ];
        for (number, expected) in numbers {
            assert_eq!(number, expected, "{expected:#x}");
        }
    }

    #[test]
    fn what_is_no_vcpu_refuses() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(get_regs(&file).is_err() && write_msr(&file, 0, 0).is_err());
        assert_eq!(read_msrs(&file, &[7, 8]).unwrap_err().0, 7);
        assert!(read_msrs(&file, &[0; MOST_MSRS + 1]).is_err());
    }
}
