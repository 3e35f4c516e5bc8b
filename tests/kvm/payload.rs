//! A virtual machine of one vCPU and a few instructions, with a machine-check handler that reports
//! what it finds by port I/O.
//!
//! No kernel, no firmware: it starts in long mode with 2 MiB of identity-mapped RAM, and exits to
//! the test at every step, so that a test sees exactly what the guest saw, in what order.

use std::io;
use std::ptr;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use mce_relay::mca::{BANKS, CR4_MCE, Record, Vendor};
use mce_relay_vmm::mce_inject::{GuestMca, MceSetup};

// Ports the payload writes to; each write is an exit.
const BEAT: u16 = 0x10;
const USER_DONE: u16 = 0x11;
const MCG_STATUS: u16 = 0x20;
const BANK: u16 = 0x21;
const STATUS: u16 = 0x22;
const ADDR: u16 = 0x23;
const HANDLED: u16 = 0x24;

// The handler goes through the banks as a kernel does: takes what is valid, clears it, and clears
// MCG_STATUS last. From user mode it returns behind the instruction that met the error.
std::arch::global_asm!(
    ".pushsection .rodata.kvm_payload, \"a\"",
    ".global kvm_payload_start",
    ".global kvm_payload_end",
    "kvm_payload_start:",
    // +0: beat for ever
    "2: mov al, 1",
    "out 0x10, al",
    "jmp 2b",
    ".org kvm_payload_start + 0x40",
    // +0x40: switch off reporting in bank 9 and beat
    "xor eax, eax",
    "xor edx, edx",
    "mov ecx, 0x424",
    "wrmsr",
    "jmp 2b",
    ".org kvm_payload_start + 0x80",
    // +0x80: open the machine-check handler (CR4.MCE) and beat
    "mov rax, cr4",
    "or rax, 0x40",
    "mov cr4, rax",
    "jmp 2b",
    ".org kvm_payload_start + 0xc0",
    // +0xc0: go to user mode and load from the target page there
    "push 0x1b",
    "push 0x28000",
    "push 2",
    "push 0x23",
    "lea rax, [rip + 3f]",
    "push rax",
    "iretq",
    "3: mov rdi, 0x30000",
    "mov rbx, [rdi]",
    "4: ud2",
    ".org kvm_payload_start + 0xf0",
    // +0xf0: load from the target page in kernel mode, for ever
    "8: mov rbx, [0x30000]",
    "jmp 8b",
    ".org kvm_payload_start + 0x100",
    // +0x100: #UD, by which user mode says that it is done
    "mov al, 1",
    "out 0x11, al",
    "jmp 2b",
    ".org kvm_payload_start + 0x140",
    // +0x140: #MC
    "push rax",
    "push rcx",
    "push rdx",
    "push rsi",
    "mov ecx, 0x17a",
    "rdmsr",
    "out 0x20, eax",
    "xor esi, esi",
    "5: lea ecx, [esi * 4 + 0x401]",
    "rdmsr",
    "test edx, edx",
    "jns 6f",
    "push rax",
    "mov eax, esi",
    "out 0x21, eax",
    "pop rax",
    "out 0x22, eax",
    "mov eax, edx",
    "out 0x22, eax",
    "lea ecx, [esi * 4 + 0x402]",
    "rdmsr",
    "out 0x23, eax",
    "mov eax, edx",
    "out 0x23, eax",
    "lea ecx, [esi * 4 + 0x401]",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "6: inc esi",
    "cmp esi, 10",
    "jb 5b",
    "mov ecx, 0x17a",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "out 0x24, eax",
    // The interrupted CS is above the four saved registers and RIP.
    "test qword ptr [rsp + 40], 3",
    "jz 7f",
    "lea rax, [rip + 4b]",
    "mov [rsp + 32], rax",
    "7: pop rsi",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "iretq",
    "kvm_payload_end:",
    ".popsection",
);

unsafe extern "C" {
    static kvm_payload_start: u8;
    static kvm_payload_end: u8;
}

const RAM: usize = 2 << 20;
const PML4: usize = 0x1000;
const PDPT: usize = 0x2000;
const PD: usize = 0x3000;
const PT: usize = 0x4000;
const GDT: usize = 0x5000;
const TSS: usize = 0x5800;
const IDT: usize = 0x6000;
/// Where the code lies.
pub const CODE: usize = 0x8000;
const STACK: u64 = 0x2_0000;
/// The page that [`Start::LoadAsUser`] loads from.
pub const TARGET: u64 = 0x3_0000;

const PRESENT_WRITABLE_USER: u64 = 7;
const VECTOR_UD: usize = 6;
/// Machine check.
pub const VECTOR_MC: usize = 18;

/// Where the payload starts: offsets into the assembly above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Start {
    /// Beat for ever.
    Beat = 0,
    /// Switch bank 9 off, then beat.
    DisableBank9 = 0x40,
    /// Set CR4.MCE, then beat.
    OpenHandler = 0x80,
    /// Load from [`TARGET`] in user mode.
    LoadAsUser = 0xc0,
    /// Load from [`TARGET`] in kernel mode, for ever.
    LoadAsKernel = 0xf0,
}

const UD_HANDLER: u64 = 0x100;
const MC_HANDLER: u64 = 0x140;

/// What the payload did next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Did {
    /// It went round its loop.
    Beat,
    /// It came through its machine-check handler: MCG_STATUS, and the last valid bank it found.
    Handled { mcg_status: u64, bank: u8, status: u64, addr: u64 },
    /// Its user mode is done.
    UserDone,
    /// It shut down (triple fault).
    Shutdown,
    /// KVM_RUN was interrupted by a signal.
    Interrupted,
    /// KVM could not make its access to RAM at this address, and handed it over as a device's.
    Ram(u64),
}

/// Guest RAM: anonymous memory.
pub struct Ram(pub *mut u8);

impl Ram {
    /// [`Ram::LEN`] bytes that nobody has touched.
    pub fn new() -> Self {
        // SAFETY: a new private mapping at an address of the kernel's choice.
        let ram = unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(ptr::null_mut(), RAM, prot, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        assert_ne!(ram, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        // A page that is one of a huge page could not go bad alone.
        // SAFETY: the mapping made above.
        unsafe { libc::madvise(ram, RAM, libc::MADV_NOHUGEPAGE) };
        Self(ram.cast())
    }

    /// Writes guest memory.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= RAM);
        // SAFETY: inside the mapping, as just checked; no vCPU runs while a test writes.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.add(at), bytes.len()) };
    }

    fn write_u64(&self, at: usize, value: u64) {
        self.write(at, &value.to_le_bytes());
    }

    /// Reads guest memory.
    pub fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        assert!(at + N <= RAM);
        let mut bytes = [0; N];
        // SAFETY: inside the mapping, as just checked; no vCPU runs while a test reads.
        unsafe { ptr::copy_nonoverlapping(self.0.add(at), bytes.as_mut_ptr(), N) };
        bytes
    }

    /// Makes it the memory of `vm`, from guest-physical address 0.
    ///
    /// # Safety
    /// It outlives `vm` and its vCPUs.
    pub unsafe fn give_to(&self, vm: &VmFd) {
        let region = kvm_userspace_memory_region {
            slot: 0,
            guest_phys_addr: 0,
            memory_size: RAM as u64,
            userspace_addr: self.hva(),
            flags: 0,
        };
        // SAFETY: the mapping outlives the VM, by this function's contract.
        unsafe { vm.set_user_memory_region(region).unwrap() };
    }

    /// Its first byte's host virtual address.
    pub fn hva(&self) -> u64 {
        self.0.addr() as u64
    }

    pub const LEN: u64 = RAM as u64;
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; the VM that used it is dropped before (field order).
        unsafe { libc::munmap(self.0.cast(), RAM) };
    }
}

/// The virtual machine.
pub struct Payload {
    pub vcpu: VcpuFd,
    pub guest: GuestMca,
    pub vm: VmFd,
    pub ram: Ram,
    /// The registers at a load that showed as MMIO.
    undo: Option<kvm_regs>,
}

impl Payload {
    /// A vCPU that will begin at `start`, with its machine-check handler open or (`cr4_mce` false)
    /// not. Its banks are an AMD guest's, which every host has.
    pub fn new(start: Start, cr4_mce: bool) -> Self {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        let ram = Ram::new();
        // SAFETY: it outlives the VM (field order).
        unsafe { ram.give_to(&vm) };
        // SAFETY: the two symbols delimit the read-only bytes assembled above.
        let code =
            unsafe { code_between(&raw const kvm_payload_start, &raw const kvm_payload_end) };
        fill(&ram, code, &[(VECTOR_UD, UD_HANDLER), (VECTOR_MC, MC_HANDLER)]);
        ram.write_u64(usize::try_from(TARGET).unwrap(), 0x600d);

        let vcpu = vm.create_vcpu(0).unwrap();
        let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
        vcpu.set_cpuid2(&cpuid).unwrap();
        let guest =
            MceSetup::new(&kvm, Vendor::Amd, false, true).unwrap().prepare_vcpu(&vcpu).unwrap();
        vcpu.set_sregs(&long_mode(vcpu.get_sregs().unwrap(), cr4_mce)).unwrap();
        let rip = CODE as u64 + start as u64;
        vcpu.set_regs(&kvm_regs { rip, rsp: STACK, rflags: 2, ..Default::default() }).unwrap();
        Self { vcpu, guest, vm, ram, undo: None }
    }

    /// Goes on at `start`.
    pub fn restart(&mut self, start: Start) {
        self.finish_io();
        let regs = self.vcpu.get_regs().unwrap();
        self.vcpu
            .set_regs(&kvm_regs { rip: CODE as u64 + start as u64, rsp: STACK, ..regs })
            .unwrap();
    }

    /// Has KVM finish the last exit's I/O, without running the guest.
    pub fn finish_io(&mut self) {
        finish_io(&mut self.vcpu);
        // As the VMM does, see vmm/src/machine/vcpu.rs.
        if let Some(regs) = self.undo.take() {
            self.vcpu.set_regs(&regs).unwrap();
        }
    }

    /// Runs to the payload's next word.
    pub fn run(&mut self) -> Did {
        let (mut mcg_status, mut bank) = (0, 0);
        let (mut status, mut addr) = (0u64, 0u64);
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, data)) => {
                    let mut word = [0; 8];
                    word[..data.len()].copy_from_slice(data);
                    let word = u64::from_le_bytes(word);
                    match port {
                        BEAT => return Did::Beat,
                        USER_DONE => return Did::UserDone,
                        MCG_STATUS => mcg_status = word,
                        BANK => bank = u8::try_from(word).unwrap(),
                        // Two halves, low first.
                        STATUS => status = status >> 32 | word << 32,
                        ADDR => addr = addr >> 32 | word << 32,
                        HANDLED => return Did::Handled { mcg_status, bank, status, addr },
                        _ => panic!("the payload wrote {word:#x} to port {port:#x}"),
                    }
                }
                Ok(VcpuExit::MmioRead(gpa, data)) if gpa < Ram::LEN => {
                    data.fill(0xff);
                    self.undo = Some(self.vcpu.get_regs().unwrap());
                    return Did::Ram(gpa);
                }
                Ok(VcpuExit::MmioWrite(gpa, _)) if gpa < Ram::LEN => return Did::Ram(gpa),
                Ok(VcpuExit::Shutdown) => return Did::Shutdown,
                Err(error) if error.errno() == libc::EINTR => return Did::Interrupted,
                other => panic!("KVM_RUN: {other:?}"),
            }
        }
    }
}

/// Has KVM finish the I/O of `vcpu`'s last exit, without running the guest.
pub fn finish_io(vcpu: &mut VcpuFd) {
    vcpu.set_kvm_immediate_exit(1);
    let interrupted = vcpu.run().is_err_and(|error| error.errno() == libc::EINTR);
    assert!(interrupted, "KVM_RUN with immediate_exit set");
    vcpu.set_kvm_immediate_exit(0);
}

/// What the payload reports of `record` when it has come through its handler.
pub fn handled(record: &Record) -> Did {
    let Record { bank, status, addr, mcg_status, .. } = *record;
    Did::Handled { mcg_status, bank, status, addr }
}

/// The bytes from `start` to `end`.
///
/// # Safety
/// They delimit memory that is never written.
pub unsafe fn code_between(start: *const u8, end: *const u8) -> &'static [u8] {
    // SAFETY: by this function's contract.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// Page tables, descriptor tables, and `code` at [`CODE`] with the offsets of its handlers by vector.
pub fn fill(ram: &Ram, code: &[u8], handlers: &[(usize, u64)]) {
    ram.write_u64(PML4, PDPT as u64 | PRESENT_WRITABLE_USER);
    ram.write_u64(PDPT, PD as u64 | PRESENT_WRITABLE_USER);
    ram.write_u64(PD, PT as u64 | PRESENT_WRITABLE_USER);
    for page in 0..512 {
        ram.write_u64(PT + page * 8, (page as u64) << 12 | PRESENT_WRITABLE_USER);
    }
    // SDM vol. 3A, 3.4.5: null, kernel code, kernel data, user data, user code, TSS (two slots).
    let gdt = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x0000_8b00_0000_0067 | (TSS as u64) << 16,
        0,
    ];
    for (index, entry) in gdt.into_iter().enumerate() {
        ram.write_u64(GDT + index * 8, entry);
    }
    // SDM vol. 3A, 8.7: RSP0, the stack for handlers that interrupt user mode.
    ram.write_u64(TSS + 4, STACK);
    for (vector, offset) in handlers {
        let handler = CODE as u64 + offset;
        // SDM vol. 3A, 6.14.1: an interrupt gate to the kernel's code segment.
        let gate = handler & 0xffff | 0x8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        ram.write_u64(IDT + vector * 16, gate);
    }
    ram.write(CODE, code);
}

/// In long mode on the tables that [`fill`] writes.
pub fn long_mode(mut sregs: kvm_sregs, cr4_mce: bool) -> kvm_sregs {
    let segment = |selector, type_| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { l: 1, ..segment(0x8, 0xb) };
    let data = kvm_segment { db: 1, ..segment(0x10, 0x3) };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.tr = kvm_segment {
        base: TSS as u64,
        limit: 0x67,
        selector: 0x28,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    (sregs.gdt.base, sregs.gdt.limit) = (GDT as u64, 7 * 8 - 1);
    (sregs.idt.base, sregs.idt.limit) = (IDT as u64, 256 * 16 - 1);
    sregs.cr0 = 0x8000_0031; // PG, NE, ET, PE (SDM vol. 3A, 2.5)
    sregs.cr3 = PML4 as u64;
    sregs.cr4 = 0x20 | if cr4_mce { CR4_MCE } else { 0 }; // PAE
    sregs.efer = 0x500; // LMA, LME (SDM vol. 4)
    sregs
}

const _: () = assert!(BANKS == 10, "the payload's handler goes through ten banks");
