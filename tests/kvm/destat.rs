//! A guest with Linux 6.19 or newer looks for deferred errors in registers of AMD's scalable MCA, and
//! panics where they do not exist. This is the same access by a payload, with the filter that
//! `mce_inject` sets and the answers that it gives.

use kvm_bindings::kvm_regs;
use kvm_ioctls::VcpuExit;
use mce_relay_vmm::mce_inject::MceSetup;

use crate::payload::{Payload, Start};
use crate::whole::{POWER_OFF, Vmm};

/// MCA_DESTAT and MCA_DEADDR of bank 9, as msr-index.h of the guest has them.
const DESTAT: u32 = 0xc000_2098;
const DEADDR: u32 = 0xc000_2099;
/// MCA_STATUS of bank 9 and MCA_DESTAT of bank 10, which are nobody's.
const STATUS: u32 = 0xc000_2091;
const DESTAT_10: u32 = 0xc000_20a8;

/// Where the code goes: a page that the payload uses for nothing else.
const CODE: u64 = 0x4_0000;
const STACK: u64 = 0x4_2000;

// Each is entered with the MSR's number in ecx.
std::arch::global_asm!(
    ".pushsection .rodata.destat_payload, \"a\"",
    ".global destat_write",
    ".global destat_read",
    ".global destat_end",
    // Write 0, as the guest's poll does, then read.
    "destat_write:",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "destat_read:",
    "rdmsr",
    "or eax, edx",
    "out 0x30, eax",
    "hlt",
    "destat_end:",
    ".popsection",
);

unsafe extern "C" {
    static destat_write: u8;
    static destat_read: u8;
    static destat_end: u8;
}

/// What came of it.
#[derive(Debug, PartialEq, Eq)]
enum Came {
    /// Every access was taken; what was read.
    Through(u32),
    /// A #GP, for which the payload has no handler.
    Fault,
}

/// Has the guest write `msr` and read it, or only read it. `ours` counts accesses that came here.
fn access(msr: u32, write: bool, ours: &mut u32) -> Came {
    let kvm = kvm_ioctls::Kvm::new().unwrap();
    let mut payload = Payload::new(Start::Beat, true);
    let setup =
        MceSetup::new(&kvm, payload.guest.caps().vendor, false, payload.guest.caps().succor)
            .unwrap();
    setup.prepare_vm(&payload.vm).unwrap();
    // SAFETY: the symbols delimit the read-only bytes assembled above.
    let (code, read) = unsafe {
        let start = &raw const destat_write;
        let len = (&raw const destat_end).addr() - start.addr();
        (std::slice::from_raw_parts(start, len), (&raw const destat_read).addr() - start.addr())
    };
    payload.ram.write(usize::try_from(CODE).unwrap(), code);
    let rip = if write { CODE } else { CODE + read as u64 };
    let rcx = u64::from(msr);
    let regs = kvm_regs { rip, rcx, rsp: STACK, rflags: 2, ..Default::default() };
    payload.vcpu.set_regs(&regs).unwrap();
    loop {
        // What `vcpu::Runner::enter` does.
        match payload.vcpu.run() {
            Ok(VcpuExit::X86Wrmsr(exit)) => {
                *ours += 1;
                *exit.error = u8::from(!payload.guest.write_msr(exit.index, exit.data));
            }
            Ok(VcpuExit::X86Rdmsr(exit)) => {
                *ours += 1;
                match payload.guest.read_msr(exit.index) {
                    Some(data) => *exit.data = data,
                    None => *exit.error = 1,
                }
            }
            Ok(VcpuExit::IoOut(0x30, data)) => {
                return Came::Through(u32::from_le_bytes(data.try_into().unwrap()));
            }
            Ok(VcpuExit::Shutdown) => return Came::Fault,
            other => panic!("KVM_RUN: {other:?}"),
        }
    }
}

pub fn a_guest_that_clears_destat_survives() {
    for msr in [DESTAT, DEADDR] {
        let mut ours = 0;
        assert_eq!(access(msr, true, &mut ours), Came::Through(0), "{msr:#x}");
        assert_eq!(ours, 2, "a write and a read of {msr:#x}");
    }
}

pub fn the_other_registers_of_scalable_mca_stay_faults() {
    for msr in [STATUS, DESTAT_10] {
        for write in [true, false] {
            let mut ours = 0;
            assert_eq!(access(msr, write, &mut ours), Came::Fault, "{msr:#x}, write {write}");
            assert_eq!(ours, 0, "{msr:#x} is KVM's own business");
        }
    }
}

/// mov ecx, DESTAT; xor eax, eax; xor edx, edx; wrmsr; rdmsr; or al, dl; add al, '0';
/// mov dx, 0x3f8; out dx, al.
const CLEAR_AND_PRINT: [u8; 22] = [
    0xb9, 0x98, 0x20, 0x00, 0xc0, 0x31, 0xc0, 0x31, 0xd2, 0x0f, 0x30, 0x0f, 0x32, 0x08, 0xd0, 0x04,
    b'0', 0x66, 0xba, 0xf8, 0x03, 0xee,
];

pub fn a_guest_of_mce_relay_run_survives() {
    let code = [CLEAR_AND_PRINT.as_slice(), &POWER_OFF].concat();
    let mut vmm = Vmm::start(&code, &["--cpu-vendor", "amd"]);
    vmm.ends_with(0);
    assert_eq!(vmm.serial(), b"0");
    let mut vmm = Vmm::start(&code, &["--cpu-vendor", "intel"]);
    vmm.ends_with(4);
}
