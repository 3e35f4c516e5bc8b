//! A virtual machine monitor on bare kvm-ioctls that has its guest told of memory errors.
//!
//! The guest is a few instructions in real mode, on two vCPUs: one idles, the other loads from one page again and again;
//! both have a machine-check handler that takes what is in the banks and goes on with the next page. What the adoption
//! takes stands between `// relay:` and `// :relay`; all else is there without it. Run it:
//! `cargo run -p mce-relay --example embed --features kvm,forge` (x86-64). With `--outside` it does not forge two failures but waits
//! for two real ones; with `--late` it hears of what the guest touches only.

use std::error::Error;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::{io, thread};

use kvm_bindings::{kvm_mp_state, kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
// relay:
use libc::{c_int, c_void, siginfo_t};
use mce_relay::kvm::MceSetup;
use mce_relay::mca::Vendor;
use mce_relay::{ExitByte, Handle, KillPolicy, RamMap, RamRegion, Relay, Verdict, signal};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};
// :relay

std::arch::global_asm!(
    ".pushsection .rodata.embed_guest, \"a\"",
    ".code16",
    ".global embed_guest, embed_guest_end",
    "embed_guest:",
    "mov eax, cr4", // open the machine-check handler
    "or eax, 0x40",
    "mov cr4, eax",
    "sti", // an AO waits for a vCPU that takes none
    "test bl, bl",
    "jnz 1f",
    "5: hlt", // the first vCPU idles
    "jmp 5b",
    "1: mov si, 0x8000",
    "2: mov al, [si]", // the other one loads from a page, and says so
    "out 0x10, al",
    "jmp 2b",
    ".org embed_guest + 0xa0", // #MC
    "mov ecx, 0x401",
    "3: rdmsr",
    "test edx, edx",
    "jns 4f",
    "inc ecx",
    "rdmsr", // MCi_ADDR of a bank that is valid; a bystander's is 0
    "test eax, eax",
    "jz 6f",
    "out 0x20, eax",
    "6: dec ecx",
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
    "out 0x30, al",
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
const MC_HANDLER: u16 = CODE + 0xa0;
const VCPUS: u8 = 2;

/// What the guest does.
enum Guest {
    /// It loads from a page.
    Loads,
    /// It was told of this page.
    Told(u32),
    /// The vCPU that loads is done with a machine check.
    Done,
    /// The VMM cannot go on.
    Failed(String),
}

// relay:
/// KVM_RUN ends, or the next one at once.
extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    signal::request_exit();
}
// :relay

fn main() -> Result<(), Box<dyn Error>> {
    let given = |option: &str| std::env::args().any(|argument| argument == option);
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    vm.create_irq_chip()?;
    let ram = memory()?;
    let hva = ram as u64;
    let region = kvm_userspace_memory_region {
        memory_size: RAM as u64,
        userspace_addr: hva,
        ..Default::default()
    };
    // SAFETY: the mapping outlives the VM.
    unsafe { vm.set_user_memory_region(region)? };

    let policy = if given("--late") { KillPolicy::Late } else { KillPolicy::Early };
    // relay:
    let setup = MceSetup::new(&kvm, Vendor::Intel, false, false)?;
    setup.prepare_vm(&vm)?;
    register_signal_handler(SIGRTMIN(), on_kick)?;
    // SAFETY: the mapping is the guest's, and outlives the relay.
    let ram = RamMap::new(&[unsafe { RamRegion::new(hva, 0, RAM as u64) }])?;
    let relay = Relay::builder(ram).vcpus(VCPUS.into()).machine_checks(setup.caps()).policy(policy);
    let relay = relay.observer(|event| println!("relay: {event}")).start()?;
    // :relay
    let (send, guest) = channel();
    for index in 0..VCPUS {
        let vcpu = vm.create_vcpu(index.into())?;
        start_at_code(&vcpu, index)?;
        let (handle, send) = (relay.handle(), send.clone());
        thread::spawn(move || {
            if let Err(error) = run(vcpu, index, setup, &handle, &send) {
                let _ = send.send(Guest::Failed(error.to_string()));
            }
        });
    }
    while !matches!(next(&guest)?, Guest::Loads) {}
    println!("ready: process {}, guest RAM at {hva:#x}", std::process::id());
    // What goes bad if nobody else sees to it: a page that nobody touches (AO), and the one that the guest touches by
    // then (AR).
    let mut told = Vec::new();
    for (gpa, vcpu) in [(0xd000, None), (0x9000, Some(1))] {
        if !given("--outside") {
            relay.handle().forge(gpa, vcpu)?;
        }
        // In whichever order: two threads say it.
        let (mut named, mut done) = (None, false);
        while named.is_none() || !done {
            match next(&guest)? {
                Guest::Told(gpa) => named = Some(gpa),
                Guest::Done => done = true,
                _ => {}
            }
        }
        if let Some(gpa) = named {
            println!("guest: machine check for {gpa:#x}, going on with the next page");
            told.push(gpa);
        }
    }
    println!("the guest lives, and was told of {told:#x?}");
    Ok(())
}

/// Guest RAM, with the code and the vector of machine checks in it.
fn memory() -> io::Result<usize> {
    // SAFETY: a new private mapping at an address of the kernel's choice.
    let ram = unsafe {
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        libc::mmap(std::ptr::null_mut(), RAM, prot, flags, -1, 0)
    };
    if ram == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let (start, end) = (&raw const embed_guest, &raw const embed_guest_end);
    let vector = 18 * 4;
    // SAFETY: the code lies between the two symbols, and all places are inside the new mapping.
    unsafe {
        // There is memory behind all of it: what is not there cannot go bad.
        ram.cast::<u8>().write_bytes(1, RAM);
        start.copy_to(ram.cast::<u8>().add(CODE.into()), end.addr() - start.addr());
        ram.cast::<u8>().add(vector).cast::<u32>().write(MC_HANDLER.into());
    }
    Ok(ram.expose_provenance())
}

/// The vCPU begins at the code, with its index in BL.
fn start_at_code(vcpu: &VcpuFd, index: u8) -> Result<(), Box<dyn Error>> {
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    let (rip, rsp) = (CODE.into(), 0x7000 - 0x800 * u64::from(index));
    vcpu.set_regs(&kvm_regs { rip, rsp, rbx: index.into(), rflags: 2, ..Default::default() })?;
    vcpu.set_mp_state(kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE })?;
    Ok(())
}

fn run(
    mut vcpu: VcpuFd,
    index: u8,
    setup: MceSetup,
    handle: &Handle,
    send: &Sender<Guest>,
) -> Result<(), Box<dyn Error>> {
    // relay:
    let guest = setup.prepare_vcpu(&vcpu)?;
    // SAFETY: the byte is mapped as long as the vCPU is there, which the port does not outlive.
    let exit = unsafe { ExitByte::new(&raw mut vcpu.get_kvm_run().immediate_exit) };
    // SAFETY: has no preconditions.
    let this = unsafe { libc::pthread_self() };
    let kick = move || {
        // SAFETY: nobody is kicked when the port has gone, which this thread drops.
        unsafe { libc::pthread_kill(this, SIGRTMIN()) };
    };
    let mut port = handle.attach(index.into(), exit, kick)?;
    // :relay
    loop {
        // relay:
        port.clear_exit();
        let verdict = port.before_run(&mut guest.on(&vcpu));
        if let Verdict::Undeliverable { gpa, why, .. } = verdict {
            return Err(format!("{gpa:#x}: {why}").into());
        }
        // :relay
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0x10, _)) => send.send(Guest::Loads)?,
            Ok(VcpuExit::IoOut(0x30, _)) if index == 0 => {}
            Ok(VcpuExit::IoOut(0x30, _)) => send.send(Guest::Done)?,
            Ok(VcpuExit::IoOut(0x20, data)) => {
                send.send(Guest::Told(u32::from_le_bytes(data.try_into()?)))?;
            }
            Ok(other) => return Err(format!("the guest: {other:?}").into()),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// What the guest does next.
fn next(guest: &Receiver<Guest>) -> Result<Guest, Box<dyn Error>> {
    match guest.recv()? {
        Guest::Failed(error) => Err(error.into()),
        seen => Ok(seen),
    }
}
