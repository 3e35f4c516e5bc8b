//! The hooks of a vCPU, by which a relay plugs in.

use kvm_ioctls::VcpuFd;

use crate::api::types::pause::PauseReason;
use crate::machine::lifecycle::reasons::ExitReason;

/// The error type of hooks.
pub type HookError = Box<dyn std::error::Error + Send + Sync>;

/// What a hook wants the vCPU to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HookVerdict {
    /// Go on.
    Run,
    /// Pause the VM, this vCPU included.
    Pause(PauseReason),
    /// End the VM.
    Stop(ExitReason),
}

/// A guest's access to RAM that KVM could not make itself and reports as MMIO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamAccess {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Length in bytes, 1 to 8.
    pub len: usize,
    /// What the guest stores, in the first `len` bytes; `None` where it loads.
    pub store: Option<[u8; 8]>,
}

impl RamAccess {
    pub(crate) fn load(gpa: u64, len: usize) -> Self {
        Self { gpa, len, store: None }
    }

    pub(crate) fn store(gpa: u64, data: &[u8]) -> Self {
        let mut bytes = [0; 8];
        // KVM has no more in an exit.
        let len = data.len().min(bytes.len());
        bytes[..len].copy_from_slice(&data[..len]);
        Self { gpa, len, store: Some(bytes) }
    }
}

/// A KVM_RUN that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunFailure {
    /// The call failed with this errno, say EFAULT or EHWPOISON.
    Errno(i32),
    /// KVM_EXIT_MEMORY_FAULT at this guest-physical address.
    MemoryFault {
        /// Address of the first byte.
        gpa: u64,
        /// Length in bytes.
        size: u64,
        /// EFAULT, or EHWPOISON where the memory is bad.
        errno: i32,
    },
    /// KVM_EXIT_INTERNAL_ERROR; 1 is an instruction that KVM could not emulate.
    Internal {
        /// The sub-error.
        suberror: u32,
    },
}

/// A vCPU's hook before it has a thread.
pub trait VcpuSetup: Send {
    /// Called when the vCPU has its CPUID and nothing else yet, on the thread that builds the VM.
    ///
    /// # Errors
    /// Whatever makes this VM impossible.
    fn setup(&mut self, _vcpu: &VcpuFd) -> Result<(), HookError> {
        Ok(())
    }

    /// Called on the vCPU's own thread, before it runs the guest. The hook stays on that thread and
    /// is dropped there, before the vCPU.
    ///
    /// # Errors
    /// Whatever makes this VM impossible.
    fn start(self: Box<Self>, vcpu: &mut VcpuFd) -> Result<Box<dyn VcpuHook>, HookError>;
}

/// A vCPU's hook on its thread, called around its runs.
pub trait VcpuHook {
    /// Whether [`VcpuHook::before_run`] has something to do. Asked before every entry: keep it cheap.
    fn wants_attention(&self) -> bool {
        true
    }

    /// Called before [`VcpuHook::before_run`]; true asks for one KVM_RUN first that does not run the guest.
    fn asks_for_registers(&mut self) -> bool {
        false
    }

    /// The vCPU's registers are not those of its last exit any more.
    fn registers_changed(&self) {}

    /// Called before an entry, with the last exit completed and `immediate_exit` cleared: a kick that comes from here
    /// on makes the entry return at once, and the loop begins anew.
    fn before_run(&mut self, _vcpu: &mut VcpuFd) -> HookVerdict {
        HookVerdict::Run
    }

    /// The guest's access to RAM was reported as MMIO. A load gets all-ones, unless it is executed again; a store is
    /// lost, unless the hook carries it out. The next KVM_RUN completes the instruction first.
    fn mmio_in_ram(&mut self, _vcpu: &mut VcpuFd, _access: RamAccess) -> HookVerdict {
        HookVerdict::Run
    }

    /// KVM_RUN failed; `None` leaves it to the caller, which ends the VM.
    fn run_failed(&mut self, _vcpu: &mut VcpuFd, _failure: RunFailure) -> Option<HookVerdict> {
        None
    }

    /// The VM is paused: call `wait`, which returns when this vCPU may run again (or has to end). A relay notes here
    /// that this vCPU takes no part in a gathering.
    fn park(&mut self, wait: &mut dyn FnMut()) {
        wait();
    }

    /// The guest reads an MSR that KVM sends to user space; `None` raises #GP.
    fn rdmsr(&mut self, _index: u32) -> Option<u64> {
        None
    }

    /// The guest writes an MSR that KVM sends to user space; false raises #GP.
    fn wrmsr(&mut self, _index: u32, _data: u64) -> bool {
        false
    }
}

/// A hook that does nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHook;

impl VcpuHook for NoHook {
    fn wants_attention(&self) -> bool {
        false
    }
}

/// The setup of a hook that needs none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ready<H>(pub H);

impl<H: VcpuHook + Send + 'static> VcpuSetup for Ready<H> {
    fn start(self: Box<Self>, _: &mut VcpuFd) -> Result<Box<dyn VcpuHook>, HookError> {
        Ok(Box::new(self.0))
    }
}
