//! A virtual machine monitor on bare kvm-ioctls that has its guest told of memory errors.
//!
//! The guest is a few instructions in real mode: it loads from one page again and again, and has a
//! machine-check handler that takes what is in the banks and goes on with the next page. What the adoption
//! takes stands between `// relay:` and `// :relay`; all else is there without it. Run it:
//! `cargo run -p mce-relay --example embed`. With `--outside` it does not forge two failures but waits for two
//! real ones; with `--late` it hears of what the guest touches only.

use std::error::Error;
use std::io;

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_userspace_memory_region, kvm_x86_mce};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
// relay:
use mce_relay::mca::{BANKS, CR4_MCE, Caps, McaState, Record, Vendor, cap};
use mce_relay::{Config, ExitByte, KillPolicy, Mca, RamMap, RamRegion, Relay, Verdict};
use vmm_sys_util::ioctl::ioctl_with_ref;
// :relay

std::arch::global_asm!(
    ".pushsection .rodata.embed_guest, \"a\"",
    ".code16",
    ".global embed_guest, embed_guest_end",
    "embed_guest:",
    "mov eax, cr4", // open the machine-check handler
    "or eax, 0x40",
    "mov cr4, eax",
    "mov si, 0x8000",
    "2: mov al, [si]", // load from a page, and say so
    "out 0x10, al",
    "jmp 2b",
    ".org embed_guest + 0x80", // #MC
    "mov ecx, 0x401",
    "3: rdmsr",
    "test edx, edx",
    "jns 4f",
    "inc ecx",
    "rdmsr", // MCi_ADDR of a bank that is valid
    "out 0x20, eax",
    "dec ecx",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "4: add ecx, 4",
    "cmp ecx, 0x401 + 4 * 10",
    "jb 3b",
    "xor eax, eax",
    "xor edx, edx",
    "mov ecx, 0x17a", // and MCG_STATUS last
    "wrmsr",
    "add si, 0x1000", // do without that page
    "iret",
    "embed_guest_end:",
    ".code64",
    ".popsection",
);

unsafe extern "C" {
    static embed_guest: u8;
    static embed_guest_end: u8;
}

const RAM: usize = 1 << 20;
const CODE: u16 = 0x1000;
const MC_HANDLER: u16 = CODE + 0x80;

// relay:
/// `include/uapi/linux/kvm.h`: `_IOW(KVMIO, 0x9c, __u64)`, and `_IOW(KVMIO, 0x9e, struct kvm_x86_mce)`.
const KVM_X86_SETUP_MCE: u64 = 0x4008_ae9c;
const KVM_X86_SET_MCE: u64 = 0x4040_ae9e;
const MCG_CAP: u64 = cap::CTL_P | cap::SER_P | BANKS as u64;
const CAPS: Caps = Caps { vendor: Vendor::Intel, mcg_cap: MCG_CAP, succor: false };

struct Vcpu<'a>(&'a VcpuFd);

impl Mca for Vcpu<'_> {
    fn state(&mut self) -> io::Result<McaState> {
        let entry = |index| kvm_msr_entry { index, ..Default::default() };
        let wanted: Vec<_> = CAPS.state_msrs().into_iter().map(entry).collect();
        let mut msrs = Msrs::from_entries(&wanted).map_err(|_| io::ErrorKind::InvalidInput)?;
        if self.0.get_msrs(&mut msrs)? != wanted.len() {
            return Err(io::Error::other("an MSR cannot be read"));
        }
        let value: Vec<u64> = msrs.as_slice().iter().map(|entry| entry.data).collect();
        let (events, regs) = (self.0.get_vcpu_events()?, self.0.get_regs()?);
        Ok(McaState {
            cr4_mce: self.0.get_sregs()?.cr4 & CR4_MCE != 0,
            event_in_flight: events.interrupt.injected | events.exception.injected != 0,
            interrupts_on: regs.rflags & 1 << 9 != 0,
            rip: regs.rip,
            ..CAPS.state(&value)
        })
    }

    fn inject(&mut self, record: &Record) -> io::Result<()> {
        let Record { bank, status, addr, misc, mcg_status } = *record;
        let mce = kvm_x86_mce { bank, status, addr, misc, mcg_status, ..Default::default() };
        // SAFETY: the ioctl reads one kvm_x86_mce.
        match unsafe { ioctl_with_ref(self.0, KVM_X86_SET_MCE, &mce) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
// :relay

fn main() -> Result<(), Box<dyn Error>> {
    let given = |option: &str| std::env::args().any(|argument| argument == option);
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    // SAFETY: a new private mapping at an address of the kernel's choice.
    let ram = unsafe {
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        libc::mmap(std::ptr::null_mut(), RAM, prot, flags, -1, 0)
    };
    if ram == libc::MAP_FAILED {
        return Err(io::Error::last_os_error().into());
    }
    let hva = ram.expose_provenance() as u64;
    let (start, end) = (&raw const embed_guest, &raw const embed_guest_end);
    let vector = 18 * 4;
    // SAFETY: the code lies between the two symbols, and all places are inside the new mapping.
    unsafe {
        // There is memory behind all of it: what is not there cannot go bad.
        ram.cast::<u8>().write_bytes(1, RAM);
        start.copy_to(ram.cast::<u8>().add(CODE.into()), end.addr() - start.addr());
        ram.cast::<u8>().add(vector).cast::<u32>().write(MC_HANDLER.into());
    }
    let region = kvm_userspace_memory_region {
        memory_size: RAM as u64,
        userspace_addr: hva,
        ..Default::default()
    };
    // SAFETY: the mapping outlives the VM.
    unsafe { vm.set_user_memory_region(region)? };

    let policy = if given("--late") { KillPolicy::Late } else { KillPolicy::Early };
    // relay:
    // SAFETY: the mapping is the guest's, and outlives the relay.
    let ram = RamMap::new(&[unsafe { RamRegion::new(hva, 0, RAM as u64) }])?;
    let config = Config::new(1, CAPS, ram, |event| println!("relay: {event}"));
    let relay = Relay::start(Config { policy, ..config })?;
    // :relay

    let mut vcpu = vm.create_vcpu(0)?;
    // relay:
    // SAFETY: the ioctl reads one u64.
    if unsafe { ioctl_with_ref(&vcpu, KVM_X86_SETUP_MCE, &MCG_CAP) } != 0 {
        return Err(io::Error::last_os_error().into());
    }
    // :relay
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: CODE.into(), rsp: 0x7000, rflags: 2, ..Default::default() })?;
    // relay:
    let exit = &raw mut vcpu.get_kvm_run().immediate_exit;
    // SAFETY: the byte is mapped as long as the vCPU is there, which the port does not outlive.
    let exit = unsafe { ExitByte::new(exit) };
    let mut port = relay.attach(0, exit, Box::new(|| {}))?;
    // :relay
    println!("ready: process {}, guest RAM at {hva:#x}", std::process::id());
    // What goes bad if nobody else sees to it: a page that nobody touches (AO), and the one that the guest
    // touches by then (AR).
    let bad = [(0xd000, None), (0x9000, Some(0))];
    let mut bad = bad.into_iter().filter(|_| !given("--outside"));
    let mut told = Vec::new();
    while told.len() < 2 {
        vcpu.set_kvm_immediate_exit(0);
        // relay:
        match port.before_run(&mut Vcpu(&vcpu)) {
            Verdict::Run => {}
            Verdict::Undeliverable { gpa, why, .. } => {
                return Err(format!("{gpa:#x}: {why}").into());
            }
        }
        // :relay
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0x10, _)) => {
                if let Some((gpa, vcpu)) = bad.next() {
                    relay.handle().forge(gpa, vcpu)?;
                }
            }
            Ok(VcpuExit::IoOut(0x20, data)) => {
                let gpa = u32::from_le_bytes(data.try_into()?);
                println!("guest: machine check for {gpa:#x}, going on with the next page");
                if !told.contains(&gpa) {
                    told.push(gpa);
                }
            }
            Ok(other) => return Err(format!("the guest: {other:?}").into()),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error.into()),
        }
    }
    println!("the guest lives, and was told of {told:#x?}");
    Ok(())
}
