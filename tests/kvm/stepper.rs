//! Virtual machines whose guest does what it is told, one instruction at a time: registers are read
//! and written by real RDMSR and WRMSR, and the handler is entered by a real #MC and left by IRETQ.

use std::rc::Rc;

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_vcpu_events,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use mce_relay::Mca;
use mce_relay::mca::{CR4_MCE, McaState, Record};
use mce_relay_tests::history::Vcpu;
use mce_relay_vmm::mce_inject::{GuestMca, MceSetup};

use crate::payload::{CODE, Ram, VECTOR_MC, code_between, fill, finish_io, long_mode};

// Ports the guest writes to; each write is an exit.
/// It is ready for the next command.
const READY: u16 = 0x30;
/// It has entered its machine-check handler.
const ENTERED: u16 = 0x31;
/// The interrupt that [`Vcpu::interrupt`] delivers.
const VECTOR: u8 = 0x20;

// rbx is the vCPU's mailbox: the command, ECX, EAX, EDX. A command is taken out of it as it is read,
// so that a handler that is left does not have it done a second time.
std::arch::global_asm!(
    ".pushsection .rodata.kvm_stepper, \"a\"",
    ".global kvm_stepper_start",
    ".global kvm_stepper_end",
    "kvm_stepper_start:",
    "2: out 0x30, al",
    "xor eax, eax",
    "xchg eax, [rbx]",
    "cmp eax, 1",
    "je 3f",
    "cmp eax, 2",
    "je 4f",
    "cmp eax, 3",
    "je 5f",
    "cmp eax, 4",
    "je 6f",
    "cmp eax, 5",
    "je 7f",
    "cmp eax, 6",
    "je 8f",
    "jmp 2b",
    // 1: RDMSR
    "3: mov ecx, [rbx + 4]",
    "rdmsr",
    "mov [rbx + 8], eax",
    "mov [rbx + 12], edx",
    "jmp 2b",
    // 2: WRMSR
    "4: mov ecx, [rbx + 4]",
    "mov eax, [rbx + 8]",
    "mov edx, [rbx + 12]",
    "wrmsr",
    "jmp 2b",
    // 3: CR4.MCE as in EAX
    "5: mov eax, [rbx + 8]",
    "mov rcx, cr4",
    "and rcx, 0xffffffffffffffbf",
    "or rcx, rax",
    "mov cr4, rcx",
    "jmp 2b",
    // 4: IRETQ
    "6: iretq",
    // 5: STI
    "7: sti",
    "jmp 2b",
    // 6: CLI
    "8: cli",
    "jmp 2b",
    ".org kvm_stepper_start + 0x80",
    // +0x80: #MC. Nothing is saved: it comes only where the guest is READY.
    "out 0x31, al",
    "jmp 2b",
    ".org kvm_stepper_start + 0x90",
    // +0x90: an interrupt
    "iretq",
    "kvm_stepper_end:",
    ".popsection",
);

unsafe extern "C" {
    static kvm_stepper_start: u8;
    static kvm_stepper_end: u8;
}

const MC_HANDLER: u64 = 0x80;
const INTERRUPT_HANDLER: u64 = 0x90;
/// The first vCPU's mailbox; the others' are in the pages after it.
const MAILBOX: usize = 0x4_0000;
/// The end of the first vCPU's stack.
const STACK: u64 = 0x6_0000;
const PAGE: usize = 0x1000;

#[derive(Debug, Clone, Copy)]
#[repr(u32)]
enum Command {
    Nothing = 0,
    Rdmsr = 1,
    Wrmsr = 2,
    Cr4Mce = 3,
    Iret = 4,
    Sti = 5,
    Cli = 6,
}

/// One of the vCPUs of a virtual machine; all are driven from one thread.
pub struct Stepper {
    vcpu: VcpuFd,
    guest: GuestMca,
    index: usize,
    handlers: u32,
    /// Shared by all vCPUs; the last one takes it along.
    machine: Rc<Machine>,
}

struct Machine {
    _vm: VmFd,
    ram: Ram,
}

/// The vCPUs of a new virtual machine.
pub fn steppers(kvm: &Kvm, setup: &MceSetup, count: usize) -> Vec<Stepper> {
    let vm = kvm.create_vm().unwrap();
    // Wait-for-SIPI exists only where the local APICs are KVM's.
    vm.create_irq_chip().unwrap();
    setup.prepare_vm(&vm).unwrap();
    let ram = Ram::new();
    // SAFETY: a vCPU is dropped before its share of the machine, and the VM before its memory.
    unsafe { ram.give_to(&vm) };
    // SAFETY: the two symbols delimit the read-only bytes assembled above.
    let code = unsafe { code_between(&raw const kvm_stepper_start, &raw const kvm_stepper_end) };
    fill(&ram, code, &[(VECTOR_MC, MC_HANDLER), (VECTOR.into(), INTERRUPT_HANDLER)]);
    let vcpus: Vec<_> = (0..count).map(|index| vm.create_vcpu(index as u64).unwrap()).collect();
    let machine = Rc::new(Machine { _vm: vm, ram });
    let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
    let stepper = |(index, vcpu): (usize, VcpuFd)| {
        vcpu.set_cpuid2(&cpuid).unwrap();
        let guest = setup.prepare_vcpu(&vcpu).unwrap();
        let stepper = Stepper { vcpu, guest, index, handlers: 0, machine: Rc::clone(&machine) };
        stepper.to_the_start();
        stepper
    };
    vcpus.into_iter().enumerate().map(stepper).collect()
}

impl Stepper {
    fn to_the_start(&self) {
        self.vcpu.set_sregs(&long_mode(self.vcpu.get_sregs().unwrap(), false)).unwrap();
        let offset = (self.index * PAGE) as u64;
        let (rsp, rbx) = (STACK + offset, MAILBOX as u64 + offset);
        let regs = kvm_regs { rip: CODE as u64, rsp, rbx, rflags: 2, ..Default::default() };
        self.vcpu.set_regs(&regs).unwrap();
    }

    /// Has the guest do `command`, unless a machine check is queued: it enters its handler then, and
    /// is ready for a command there. What it left in EDX:EAX; `None` when it shut down.
    fn command(&mut self, command: Command, ecx: u32, value: u64) -> Option<u64> {
        let ram = &self.machine.ram;
        let mailbox = MAILBOX + self.index * PAGE;
        ram.write(mailbox, &(command as u32).to_le_bytes());
        ram.write(mailbox + 4, &ecx.to_le_bytes());
        ram.write(mailbox + 8, &value.to_le_bytes());
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(ENTERED, _)) => self.handlers += 1,
                Ok(VcpuExit::IoOut(READY, _)) => break,
                Ok(VcpuExit::X86Wrmsr(exit)) => {
                    *exit.error = u8::from(!self.guest.write_msr(exit.index, exit.data));
                }
                Ok(VcpuExit::Shutdown) => return None,
                other => panic!("KVM_RUN of vCPU {} for {command:?}: {other:?}", self.index),
            }
        }
        finish_io(&mut self.vcpu);
        Some(u64::from_le_bytes(self.machine.ram.read(mailbox + 8)))
    }

    fn done(&mut self, command: Command, ecx: u32, value: u64) -> u64 {
        let done = self.command(command, ecx, value);
        done.unwrap_or_else(|| panic!("{command:?} {ecx:#x} {value:#x} shuts the guest down"))
    }
}

impl Vcpu for Stepper {
    fn state(&mut self) -> McaState {
        self.guest.on(&self.vcpu).state().unwrap()
    }

    fn inject(&mut self, record: &Record) -> bool {
        self.guest.on(&self.vcpu).inject(record).is_ok()
    }

    fn start(&mut self) {
        self.vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
    }

    fn init(&mut self) {
        self.vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_UNINITIALIZED }).unwrap();
        self.vcpu.set_vcpu_events(&kvm_vcpu_events::default()).unwrap();
        self.to_the_start();
        self.handlers = 0;
    }

    fn interrupt(&mut self) {
        let mut events = self.vcpu.get_vcpu_events().unwrap();
        (events.interrupt.injected, events.interrupt.nr) = (1, VECTOR);
        self.vcpu.set_vcpu_events(&events).unwrap();
    }

    fn resume(&mut self) -> bool {
        self.command(Command::Nothing, 0, 0).is_some()
    }

    fn handlers(&self) -> u32 {
        self.handlers
    }

    fn rdmsr(&mut self, index: u32) -> u64 {
        self.done(Command::Rdmsr, index, 0)
    }

    fn wrmsr(&mut self, index: u32, value: u64) {
        self.done(Command::Wrmsr, index, value);
    }

    fn host_wrmsr(&mut self, index: u32, data: u64) {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        let msrs = Msrs::from_entries(&[entry]).unwrap();
        assert_eq!(self.vcpu.set_msrs(&msrs).unwrap(), 1, "MSR {index:#x}");
    }

    fn set_cr4_mce(&mut self, set: bool) {
        self.done(Command::Cr4Mce, 0, if set { CR4_MCE } else { 0 });
    }

    fn set_interrupts(&mut self, on: bool) {
        self.done(if on { Command::Sti } else { Command::Cli }, 0, 0);
    }

    fn set_halted(&mut self, on: bool) {
        let mp_state = if on { KVM_MP_STATE_HALTED } else { KVM_MP_STATE_RUNNABLE };
        self.vcpu.set_mp_state(kvm_mp_state { mp_state }).unwrap();
    }

    fn iret(&mut self) {
        self.done(Command::Iret, 0, 0);
        self.handlers -= 1;
    }
}
