//! Preloaded into a QEMU with an Intel-style guest on an AMD host (LD_PRELOAD): shows the guest the
//! MCG_CAP that QEMU asked for. KVM on AMD hosts drops SER_P from it, and an Intel-style guest without
//! SER_P panics at its first error, which says nothing about QEMU: on an Intel host it has SER_P.
//! `mce-relay` does the same for its own guests.
//!
//! Reads of MCG_CAP are sent to user space and answered here, so that QEMU does not see them.
#![allow(missing_docs, reason = "the one thing it exports is ioctl")]

use std::collections::BTreeMap;
use std::ffi::{c_int, c_long, c_ulong};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, KVM_EXIT_X86_RDMSR, KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_FILTER_READ, kvm_enable_cap, kvm_msr_filter, kvm_msr_filter_range, kvm_run,
};

/// IA32_MCG_CAP, Intel SDM volume 3, 17.3.1.1.
const MCG_CAP: u32 = 0x179;
// include/uapi/linux/kvm.h
const KVM_CREATE_VCPU: c_ulong = 0xae41;
const KVM_RUN: c_ulong = 0xae80;
const KVM_ENABLE_CAP: c_ulong = 0x4068_aea3;
const KVM_X86_SETUP_MCE: c_ulong = 0x4008_ae9c;
const KVM_X86_SET_MSR_FILTER: c_ulong = 0x4188_aec6;

/// What is known of a vCPU.
#[derive(Clone, Copy)]
struct Vcpu {
    /// Address of its kvm_run.
    run: usize,
    /// What QEMU wants MCG_CAP to be.
    cap: u64,
}

/// By file descriptor. QEMU opens them once and keeps them.
static VCPUS: Mutex<BTreeMap<c_int, Vcpu>> = Mutex::new(BTreeMap::new());

fn vcpus() -> MutexGuard<'static, BTreeMap<c_int, Vcpu>> {
    VCPUS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The kernel's ioctl.
///
/// # Safety
/// As for ioctl.
unsafe fn kernel(fd: c_int, request: c_ulong, argument: usize) -> c_int {
    // SAFETY: the caller's promise; an ioctl takes three words and returns an int.
    let result: c_long = unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) };
    c_int::try_from(result).unwrap_or(-1)
}

/// QEMU's filter (or none), and reads of MCG_CAP refused.
///
/// # Safety
/// `vm` is a VM, and the bitmaps of `filter` are as long as it says.
unsafe fn filter(vm: c_int, mut filter: kvm_msr_filter) -> c_int {
    let mut none = 0u8;
    let Some(free) = filter.ranges.iter_mut().find(|range| range.nmsrs == 0) else { return -1 };
    *free = kvm_msr_filter_range {
        flags: KVM_MSR_FILTER_READ,
        nmsrs: 1,
        base: MCG_CAP,
        bitmap: &raw mut none,
    };
    // SAFETY: both structures outlive the calls, and the kernel copies them; the caller's promise
    // for the rest.
    unsafe {
        let cap = kvm_enable_cap {
            cap: KVM_CAP_X86_USER_SPACE_MSR,
            args: [u64::from(KVM_MSR_EXIT_REASON_FILTER), 0, 0, 0],
            ..Default::default()
        };
        if kernel(vm, KVM_ENABLE_CAP, (&raw const cap).addr()) < 0 {
            return -1;
        }
        kernel(vm, KVM_X86_SET_MSR_FILTER, (&raw const filter).addr())
    }
}

/// In place of the C library's, for QEMU.
///
/// # Safety
/// As for ioctl.
// A C function with a variable number of arguments is called like any other on x86-64.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: usize) -> c_int {
    // SAFETY: the caller's promise, for each call that is handed on and each structure that the
    // request says `argument` points to.
    unsafe {
        match request {
            KVM_CREATE_VCPU => {
                // Before the first vCPU runs, and again if QEMU sets a filter of its own.
                if vcpus().is_empty() && filter(fd, kvm_msr_filter::default()) < 0 {
                    eprintln!("ser_p: MCG_CAP cannot be shown to the guest: {}", errno());
                }
                let vcpu = kernel(fd, request, argument);
                if vcpu >= 0 {
                    watch(vcpu);
                }
                vcpu
            }
            KVM_X86_SET_MSR_FILTER => filter(fd, *(argument as *const kvm_msr_filter)),
            KVM_X86_SETUP_MCE => {
                if let Some(vcpu) = vcpus().get_mut(&fd) {
                    vcpu.cap = *(argument as *const u64);
                }
                kernel(fd, request, argument)
            }
            KVM_RUN => run(fd),
            _ => kernel(fd, request, argument),
        }
    }
}

fn errno() -> std::io::Error {
    std::io::Error::last_os_error()
}

/// Maps the kvm_run of a new vCPU once more.
fn watch(vcpu: c_int) {
    // SAFETY: a new mapping at an address of the kernel's choice; it is never unmapped.
    let run = unsafe {
        let (bytes, prot) = (size_of::<kvm_run>(), libc::PROT_READ | libc::PROT_WRITE);
        libc::mmap(std::ptr::null_mut(), bytes, prot, libc::MAP_SHARED, vcpu, 0)
    };
    if run == libc::MAP_FAILED {
        eprintln!("ser_p: kvm_run cannot be mapped: {}", errno());
    } else {
        vcpus().insert(vcpu, Vcpu { run: run.expose_provenance(), cap: 0 });
    }
}

/// KVM_RUN, until it ends with something for QEMU.
///
/// # Safety
/// `fd` is a vCPU.
unsafe fn run(fd: c_int) -> c_int {
    let vcpu = vcpus().get(&fd).copied();
    loop {
        // SAFETY: the caller's promise.
        let result = unsafe { kernel(fd, KVM_RUN, 0) };
        let Some(vcpu) = vcpu.filter(|_| result == 0) else { return result };
        // SAFETY: `watch` mapped it for good, and the kernel has filled it in; only this thread
        // runs the vCPU.
        unsafe {
            let run = std::ptr::with_exposed_provenance_mut::<kvm_run>(vcpu.run);
            if (*run).exit_reason != KVM_EXIT_X86_RDMSR
                || (*run).__bindgen_anon_1.msr.index != MCG_CAP
            {
                return result;
            }
            (*run).__bindgen_anon_1.msr.data = vcpu.cap;
            (*run).__bindgen_anon_1.msr.error = 0;
        }
    }
}
