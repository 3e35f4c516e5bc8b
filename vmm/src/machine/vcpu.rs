//! A vCPU's thread: runs the guest, answers its exits, and calls a hook before every entry.
//!
//! A kick is never lost. The signal's handler sets `immediate_exit` of the vCPU whose thread it interrupts. The loop
//! clears the byte first and then looks at everything that a kick may be for. So a kick either comes before that look,
//! or makes the next KVM_RUN return at once.

pub mod hooks;

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{Ordering, compiler_fence};
use std::sync::{Arc, Once};

use kvm_bindings::kvm_regs;
use kvm_ioctls::{VcpuExit, VcpuFd};
use log::warn;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

use crate::machine::devices::ports::{PortBus, PowerEvent};
use crate::machine::devices::virtio::bus::MmioBus;
use crate::machine::lifecycle::reasons::ExitReason;
use crate::machine::lifecycle::{State, VmControl};
use crate::machine::memory::block::RamBlock;
use crate::machine::vcpu::hooks::{HookVerdict, RamAccess, RunFailure, VcpuHook, VcpuSetup};

/// KVM_EXIT_SYSTEM_EVENT: the guest powered off.
const SYSTEM_EVENT_SHUTDOWN: u32 = 1;
/// KVM_EXIT_SYSTEM_EVENT: the guest wants to be reset.
const SYSTEM_EVENT_RESET: u32 = 2;
/// How many times an exit is completed at most. An instruction may make several accesses, but not more than this.
const MAX_COMPLETIONS: usize = 512;

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs. Without destructor and lazy initialisation, as the signal
    /// handler reads it.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: points into the kvm_run of this thread's vCPU, which is mapped as long as the
        // pointer is set (see `Enrolment`).
        unsafe { flag.write_volatile(1) };
    }
}

/// Installs the handler of the signal by which vCPUs are kicked, once per process.
pub(crate) fn install_kick_handler() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        if let Err(error) = register_signal_handler(SIGRTMIN(), on_kick) {
            log::error!("cannot install the handler of signal {}: {error}", SIGRTMIN());
        }
    });
}

/// The ways from a vCPU to the devices.
#[derive(Clone, Debug, Default)]
pub(crate) struct Buses {
    pub(crate) ports: Arc<PortBus>,
    pub(crate) mmio: Arc<MmioBus>,
}

/// One vCPU, ready to run.
pub struct Vcpu {
    fd: VcpuFd,
    index: u8,
    setup: Box<dyn VcpuSetup>,
    buses: Buses,
    ram: Arc<[RamBlock]>,
    control: VmControl,
}

impl std::fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vcpu").field("index", &self.index).finish_non_exhaustive()
    }
}

/// A vCPU on its thread.
struct Runner<'a> {
    hook: Box<dyn VcpuHook>,
    fd: &'a mut VcpuFd,
    index: u8,
    buses: &'a Buses,
    ram: &'a [RamBlock],
    control: &'a VmControl,
    /// The last exit still has to be completed by a KVM_RUN.
    incomplete: bool,
    /// The registers before a load that touched poison. KVM would finish the instruction with data that it never read.
    /// With these registers put back the load has not begun: a guest that is told of the page and goes on executes it
    /// again, as on a real processor.
    undo: Option<kvm_regs>,
}

enum AfterExit {
    Continue,
    Interrupted,
    End(ExitReason),
}

/// Work for an exit that can be done only when the exit is no longer borrowed.
enum Then {
    AfterExit(AfterExit),
    RamAccess(RamAccess),
    Failed(RunFailure),
}

/// While this lives, the thread can be kicked.
struct Enrolment<'a>(&'a VmControl, u8);

impl<'a> Enrolment<'a> {
    fn new(control: &'a VmControl, index: u8, flag: *mut u8) -> Self {
        IMMEDIATE_EXIT.set(flag);
        control.enrol(index);
        Self(control, index)
    }
}

impl Drop for Enrolment<'_> {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
        self.0.leave(self.1);
        if std::thread::panicking() {
            self.0.stop(ExitReason::Fatal(format!("the thread of vCPU {} panicked", self.1)));
        }
    }
}

impl Vcpu {
    pub(crate) fn new(
        fd: VcpuFd,
        index: u8,
        setup: Box<dyn VcpuSetup>,
        buses: Buses,
        ram: Arc<[RamBlock]>,
        control: VmControl,
    ) -> Self {
        Self { fd, index, setup, buses, ram, control }
    }

    /// Runs the guest on this thread until the VM ends.
    pub(crate) fn run(self) {
        // The order matters, also when a panic unwinds: the hook is dropped first, then the signal handler loses its
        // pointer into the vCPU, and then the vCPU is dropped.
        let Self { mut fd, index, setup, buses, ram, control } = self;
        let flag = &raw mut fd.get_kvm_run().immediate_exit;
        let _enrolment = Enrolment::new(&control, index, flag);
        // The thread may have inherited a mask that blocks the signal; an error means that it did not.
        let _ = unblock_signal(SIGRTMIN());
        let hook = match setup.start(&mut fd) {
            Ok(hook) => hook,
            Err(error) => {
                control.stop(ExitReason::Fatal(format!("vCPU {index}: {error}")));
                return;
            }
        };
        let mut runner = Runner {
            hook,
            fd: &mut fd,
            index,
            buses: &buses,
            ram: &ram,
            control: &control,
            incomplete: false,
            undo: None,
        };
        if let Some(reason) = runner.run_loop() {
            control.stop(reason);
        }
    }
}

impl Runner<'_> {
    /// Returns why the VM is to end; `None` when it was ended elsewhere.
    fn run_loop(&mut self) -> Option<ExitReason> {
        loop {
            self.set_immediate_exit(0);
            match self.control.state() {
                State::Running => {}
                State::Paused => {
                    self.complete();
                    self.publish_registers();
                    let control = self.control;
                    self.hook.park(&mut || control.park());
                    continue;
                }
                State::Ending => {
                    self.complete();
                    return None;
                }
            }
            if self.hook.wants_attention() {
                // They come with the KVM_RUN that completes the exit, if there is one.
                let asks = self.hook.asks_for_registers();
                if self.incomplete || asks {
                    self.incomplete = true;
                    self.complete();
                    // Completing the exit set and used the byte, so a kick may have been lost with it: look at
                    // everything again.
                    continue;
                }
                match self.hook.before_run(self.fd) {
                    HookVerdict::Run => {}
                    HookVerdict::Pause(reason) => {
                        self.control.request_pause(reason);
                        continue;
                    }
                    HookVerdict::Stop(reason) => return Some(reason),
                }
            }
            if let AfterExit::End(reason) = self.enter() {
                return Some(reason);
            }
        }
    }

    fn set_immediate_exit(&mut self, value: u8) {
        let flag = &raw mut self.fd.get_kvm_run().immediate_exit;
        // SAFETY: a byte of this vCPU's mapped kvm_run. Volatile, because a signal handler of this
        // thread writes it too.
        unsafe { flag.write_volatile(value) };
        // The reasons of a kick are looked at only after the byte is cleared.
        compiler_fence(Ordering::SeqCst);
    }

    /// Lets KVM complete the instruction whose access was answered, without running the guest.
    fn complete(&mut self) {
        for _ in 0..MAX_COMPLETIONS {
            if !self.incomplete {
                self.undo();
                return;
            }
            self.set_immediate_exit(1);
            if let AfterExit::End(reason) = self.enter() {
                self.control.stop(reason);
                return;
            }
        }
    }

    /// Stores the registers, for requests while the VM is paused.
    fn publish_registers(&self) {
        let registers = match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(regs), Ok(sregs)) => {
                Some(crate::machine::cpu::registers::registers(self.index, &regs, &sregs))
            }
            (Err(error), _) | (_, Err(error)) => {
                warn!("vCPU {}: its registers cannot be read: {error}", self.index);
                None
            }
        };
        self.control.set_registers(self.index, registers);
    }

    /// Restores the registers from before a load that touched poison.
    fn undo(&mut self) {
        let Some(regs) = self.undo.take() else { return };
        self.hook.registers_changed();
        if let Err(error) = self.fd.set_regs(&regs) {
            warn!("vCPU {}: goes on behind a load that met poison: {error}", self.index);
        }
    }

    /// One KVM_RUN, and the answer to its exit.
    fn enter(&mut self) -> AfterExit {
        self.incomplete = false;
        let then = match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                self.incomplete = true;
                Then::AfterExit(match self.buses.ports.write(port, data) {
                    None => AfterExit::Continue,
                    Some(PowerEvent::Reset) => AfterExit::End(ExitReason::Reset),
                    Some(PowerEvent::PowerOff) => AfterExit::End(ExitReason::PowerOff),
                    Some(PowerEvent::Panicked(panic)) => {
                        self.control.note_panic(panic);
                        AfterExit::Continue
                    }
                })
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                self.incomplete = true;
                self.buses.ports.read(port, data);
                Then::AfterExit(AfterExit::Continue)
            }
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                self.incomplete = true;
                data.fill(0xff);
                match self.buses.mmio.at(gpa) {
                    Some((window, offset)) => {
                        window.read(offset, data);
                        Then::AfterExit(AfterExit::Continue)
                    }
                    None => mmio(self.ram, RamAccess::load(gpa, data.len())),
                }
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                self.incomplete = true;
                match self.buses.mmio.at(gpa) {
                    Some((window, offset)) => {
                        window.write(offset, data);
                        Then::AfterExit(AfterExit::Continue)
                    }
                    None => mmio(self.ram, RamAccess::store(gpa, data)),
                }
            }
            Ok(VcpuExit::X86Rdmsr(exit)) => {
                self.incomplete = true;
                match self.hook.rdmsr(exit.index) {
                    Some(data) => *exit.data = data,
                    None => *exit.error = 1,
                }
                Then::AfterExit(AfterExit::Continue)
            }
            Ok(VcpuExit::X86Wrmsr(exit)) => {
                self.incomplete = true;
                if !self.hook.wrmsr(exit.index, exit.data) {
                    *exit.error = 1;
                }
                Then::AfterExit(AfterExit::Continue)
            }
            Ok(VcpuExit::Shutdown) => {
                Then::AfterExit(AfterExit::End(ExitReason::TripleFault { vcpu: self.index }))
            }
            Ok(VcpuExit::SystemEvent(SYSTEM_EVENT_SHUTDOWN, _)) => {
                Then::AfterExit(AfterExit::End(ExitReason::PowerOff))
            }
            Ok(VcpuExit::SystemEvent(SYSTEM_EVENT_RESET, _)) => {
                Then::AfterExit(AfterExit::End(ExitReason::Reset))
            }
            Ok(VcpuExit::Intr) => Then::AfterExit(AfterExit::Interrupted),
            Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_)) => {
                Then::AfterExit(AfterExit::Continue)
            }
            Ok(VcpuExit::MemoryFault { gpa, size, .. }) => {
                // KVM returns it with an error, whose value kvm-ioctls drops.
                let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EFAULT);
                Then::Failed(RunFailure::MemoryFault { gpa, size, errno })
            }
            Ok(VcpuExit::InternalError) => {
                // SAFETY: KVM said which member of the union it filled.
                let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
                Then::Failed(RunFailure::Internal { suberror: internal.suberror })
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                Then::AfterExit(AfterExit::End(ExitReason::KvmError {
                    vcpu: self.index,
                    what: format!(
                        "the processor refused to enter the guest, reason {reason:#x} on CPU {cpu}"
                    ),
                }))
            }
            Ok(other) => Then::AfterExit(AfterExit::End(ExitReason::KvmError {
                vcpu: self.index,
                what: format!("unexpected exit {other:?}"),
            })),
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {
                Then::AfterExit(AfterExit::Interrupted)
            }
            Err(error) => Then::Failed(RunFailure::Errno(error.errno())),
        };
        match then {
            Then::AfterExit(step) => step,
            Then::RamAccess(access) => {
                // The registers are already behind a store: the hook carries it out, or it is lost with the page.
                if access.store.is_none() && self.undo.is_none() {
                    self.undo = self.fd.get_regs().ok();
                }
                let verdict = self.hook.mmio_in_ram(self.fd, access);
                let step = self.obey(verdict);
                if matches!(step, AfterExit::Continue) && !self.hook.wants_attention() {
                    // The page is not bad; a slot is being changed, say. The load is executed again.
                    self.complete();
                }
                step
            }
            Then::Failed(failure) => match self.hook.run_failed(self.fd, failure) {
                Some(verdict) => self.obey(verdict),
                None => AfterExit::End(self.describe(failure)),
            },
        }
    }

    fn obey(&self, verdict: HookVerdict) -> AfterExit {
        match verdict {
            HookVerdict::Run => AfterExit::Continue,
            HookVerdict::Pause(reason) => {
                // The loop acts on it before the next entry.
                self.control.request_pause(reason);
                AfterExit::Continue
            }
            HookVerdict::Stop(reason) => AfterExit::End(reason),
        }
    }

    fn describe(&self, failure: RunFailure) -> ExitReason {
        let what = match failure {
            RunFailure::Errno(errno) => {
                format!("KVM_RUN: {}", std::io::Error::from_raw_os_error(errno))
            }
            RunFailure::MemoryFault { gpa, size, .. } => {
                format!("no access to guest memory at {gpa:#x}, {size} bytes")
            }
            RunFailure::Internal { suberror: 1 } => "an instruction cannot be emulated".to_owned(),
            RunFailure::Internal { suberror } => format!("internal error {suberror}"),
        };
        let rip = self.fd.get_regs().map_or_else(|_| "unknown".into(), |r| format!("{:#x}", r.rip));
        ExitReason::KvmError { vcpu: self.index, what: format!("{what} (RIP {rip})") }
    }
}

fn mmio(ram: &[RamBlock], access: RamAccess) -> Then {
    if ram.iter().any(|block| block.contains_gpa(access.gpa)) {
        Then::RamAccess(access)
    } else {
        Then::AfterExit(AfterExit::Continue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mmio_in_ram_is_told_from_an_empty_bus() {
        let ram = [RamBlock::new(0, 0x1000, 0)];
        let access = |gpa| RamAccess::load(gpa, 4);
        assert!(matches!(mmio(&ram, access(0xfff)), Then::RamAccess(_)));
        assert!(matches!(mmio(&ram, access(0x1000)), Then::AfterExit(AfterExit::Continue)));
    }

    #[test]
    fn a_kick_sets_the_flag_of_this_thread_only() {
        install_kick_handler();
        let control = VmControl::new(1).unwrap();
        let mut flag = 0_u8;
        let flag = &raw mut flag;
        let enrolment = Enrolment::new(&control, 0, flag);
        control.kick(0);
        // SAFETY: a local of this function. A signal to oneself is there when the call returns.
        assert_eq!(unsafe { flag.read_volatile() }, 1);
        drop(enrolment);
        // SAFETY: as above.
        unsafe { flag.write_volatile(0) };
        control.kick(0);
        // SAFETY: as above.
        assert_eq!(unsafe { flag.read_volatile() }, 0, "no kick after the end");
    }
}
