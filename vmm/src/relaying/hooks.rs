//! The VM's hooks that connect it to the relay.

use std::path::Path;
use std::sync::Arc;

use kvm_ioctls::VcpuFd;
use log::debug;
use mce_relay::mca::Vendor;
use mce_relay::{
    AccessError, ExitByte, Handle, Ledger, RamError, RamMap, Relay, Rescue, StartError, VcpuPort,
    Verdict,
};

use crate::api::types::pause::{Panic, PauseReason, Undeliverable};
use crate::api::types::policy::OnUndeliverable;
use crate::api::types::vm_event::VmEvent;
use crate::config::{RescuePolicy, VmConfig};
use crate::events::monitor::Monitor;
use crate::machine::acpi::Table;
use crate::machine::devices::power_button::PowerButton;
use crate::machine::devices::serial::HostSides;
use crate::machine::lifecycle::VmControl;
use crate::machine::lifecycle::reasons::{Change, ExitReason};
use crate::machine::memory::block::PAGE_SIZE;
use crate::machine::memory::guest_ram::GuestRam;
use crate::machine::vcpu::hooks::{
    HookError, HookVerdict, RamAccess, RunFailure, VcpuHook, VcpuSetup,
};
use crate::machine::vm::hooks::{VmHooks, VmView};
use crate::mce_inject::{ExitRegisters, GuestMca, MceError, MceSetup, VcpuMca};
use crate::relaying::error_source;
use crate::relaying::manual_mce::injector::Injector;
use crate::relaying::rescue::Owner;
use crate::sandbox::role::Role;
use crate::sandbox::seccomp::Filters;
use crate::session::config::RunConfig;
use crate::words;

/// Why a VM could not be given a relay.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RelayError {
    #[error(transparent)]
    Mce(#[from] MceError),
    #[error(transparent)]
    Ram(#[from] RamError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("cannot set up the interrupt of the ACPI error source; --ao-channel mce needs none")]
    Source(#[source] std::io::Error),
    #[error("the VM has no relay yet")]
    Early,
}

/// What a user can do about a paused VM.
pub(crate) fn way_on(reason: &PauseReason, socket: Option<&Path>) -> String {
    let Some(path) = socket else {
        return "there is no --api-socket, so it can only be ended (SIGTERM)".to_owned();
    };
    let again = match reason {
        PauseReason::Marking => return "it goes on by itself".to_owned(),
        PauseReason::Request => "",
        PauseReason::Undeliverable(_) => {
            " (the vCPU touches the page again, and if the guest still cannot be told, it is paused again)"
        }
    };
    let path = path.display();
    format!(
        "`mce-relay resume --api-socket path={path}` lets it go on{again}, \
         PUT /api/v1/vm.shutdown there or SIGTERM ends it"
    )
}

/// What a user can do about a guest that has panicked.
pub(crate) fn way_on_from_panic(socket: Option<&Path>) -> String {
    let Some(path) = socket else {
        return "if it stands still, SIGTERM ends it".to_owned();
    };
    let path = path.display();
    format!(
        "if it stands still, `mce-relay reset --api-socket path={path}` starts it over and \
         `mce-relay shutdown --now --api-socket path={path}` ends it"
    )
}

/// Opens the serial lines of a configuration.
pub(crate) type OpenLines<'a> = dyn FnMut(&VmConfig) -> Result<HostSides, HookError> + 'a;

/// What building a VM with a relay needs.
pub(crate) struct RelayHooks<'a> {
    pub(crate) config: &'a RunConfig,
    pub(crate) filters: &'a Filters,
    pub(crate) socket: Option<&'a Path>,
    pub(crate) monitor: &'a Monitor,
    /// Opens the serial lines and other outputs, when everything else is made.
    pub(crate) lines: &'a mut OpenLines<'a>,
    pub(crate) ledger: Ledger,
    pub(crate) made: Option<Made>,
}

/// Dropped in this order: the relay before the memory whose addresses it has.
pub(crate) struct Made {
    pub(crate) setup: MceSetup,
    pub(crate) exits_have_registers: bool,
    pub(crate) relay: Arc<Relay>,
    pub(crate) control: VmControl,
    pub(crate) injector: Injector,
    pub(crate) button: PowerButton,
    pub(crate) _ram: Arc<GuestRam>,
}

impl RelayHooks<'_> {
    fn make(&self, vm: &VmView<'_>) -> Result<Made, RelayError> {
        // An AMD-style guest's CPUID always shows SUCCOR: see `cpuid`.
        let lmce = self.config.lmce;
        let setup = MceSetup::new(vm.kvm, vm.vendor, lmce, vm.vendor == Vendor::Amd)?;
        setup.prepare_vm(vm.vm)?;
        // Without them everything works, with a few system calls more.
        let exits_have_registers = ExitRegisters::are_offered(vm.vm).unwrap_or(false);
        let filters = self.filters.clone();
        let mut relay = Relay::builder(RamMap::new(&vm.ram.regions())?)
            .vcpus(usize::from(vm.cpus))
            .machine_checks(setup.caps())
            .policy(self.config.mce_kill)
            .pace(self.config.ao_pace)
            .ao_channel(self.config.ao_channel)
            .ledger(self.ledger.clone())
            .on_thread(move || Ok(filters.apply(Role::Relay)?))
            .observer(self.monitor.for_relay());
        if let Some(notify) = self.config.ghes {
            let source = error_source::source(vm.vm, notify).map_err(RelayError::Source)?;
            relay = relay.error_source(source);
        }
        let has_huge_pages = vm.ram.blocks().iter().any(|block| block.page_size > PAGE_SIZE);
        if let (RescuePolicy::On { reserve }, true) = (self.config.rescue, has_huge_pages) {
            let owner = Owner(Arc::clone(vm.ram));
            relay = relay.rescue(Rescue::new(owner).reserve(reserve));
        }
        let relay = relay.start()?;
        let (emit, socket) = (self.monitor.for_vm(), self.socket.map(Path::to_owned));
        vm.control.observe(move |change| {
            let socket = socket.as_deref();
            emit(match change {
                Change::Resumed => VmEvent::Resumed {},
                Change::Paused(reason) => {
                    VmEvent::Paused { reason: reason.clone(), way_on: way_on(reason, socket) }
                }
                Change::Panicked(Panic::Panicked) => {
                    VmEvent::Panicked { way_on: way_on_from_panic(socket) }
                }
                Change::Panicked(Panic::CrashLoaded) => VmEvent::CrashLoaded {},
            });
        });
        let (relay, control) = (Arc::new(relay), vm.control.clone());
        let injector = Injector::new(vm.cpus, setup.caps());
        let button = PowerButton::new(vm.vm);
        let ram = Arc::clone(vm.ram);
        Ok(Made { setup, exits_have_registers, relay, control, injector, button, _ram: ram })
    }
}

impl VmHooks for RelayHooks<'_> {
    fn filters(&self) -> Filters {
        self.filters.clone()
    }

    fn vm_created(&mut self, vm: &VmView<'_>) -> Result<(), HookError> {
        self.made = Some(self.make(vm)?);
        Ok(())
    }

    fn acpi_tables(&mut self) -> Result<Vec<Table>, HookError> {
        Ok(self.config.ghes.map(error_source::table).transpose()?.into_iter().collect())
    }

    fn serial_lines(&mut self, config: &VmConfig) -> Result<HostSides, HookError> {
        (self.lines)(config)
    }

    fn vcpu(&mut self, index: u8) -> Result<Box<dyn VcpuSetup>, HookError> {
        let made = self.made.as_ref().ok_or(RelayError::Early)?;
        Ok(Box::new(RelaySetup {
            index,
            setup: made.setup,
            exits_have_registers: made.exits_have_registers,
            relay: Arc::clone(&made.relay),
            control: made.control.clone(),
            injector: made.injector.clone(),
            on_undeliverable: self.config.on_undeliverable,
            filters: self.filters.clone(),
            guest: None,
        }))
    }
}

/// A vCPU's hook before it is on its thread.
struct RelaySetup {
    index: u8,
    setup: MceSetup,
    exits_have_registers: bool,
    relay: Arc<Relay>,
    control: VmControl,
    injector: Injector,
    on_undeliverable: OnUndeliverable,
    filters: Filters,
    guest: Option<GuestMca>,
}

impl VcpuSetup for RelaySetup {
    fn setup(&mut self, vcpu: &VcpuFd) -> Result<(), HookError> {
        self.guest = Some(self.setup.prepare_vcpu(vcpu)?);
        Ok(())
    }

    fn start(self: Box<Self>, vcpu: &mut VcpuFd) -> Result<Box<dyn VcpuHook>, HookError> {
        let guest = self.guest.ok_or(RelayError::Early)?;
        let run = &raw mut *vcpu.get_kvm_run();
        let (control, index, on_undeliverable) = (self.control, self.index, self.on_undeliverable);
        // SAFETY: the vCPU's owner drops the hook, with these registers and with the port that has the kick, before the
        // vCPU (see `Vcpu::run`), and nothing else here uses registers that come with an exit.
        let registers =
            self.exits_have_registers.then(|| unsafe { ExitRegisters::new(run.cast()) });
        let request = registers.as_ref().map(ExitRegisters::request);
        let kick = move || {
            if let Some(request) = &request {
                request.ask();
            }
            control.kick(index);
        };
        // SAFETY: the byte lies in the vCPU's kvm_run mapping, and the vCPU's owner drops the hook
        // with the port in it before the vCPU (see `Vcpu::run`).
        let exit = unsafe { ExitByte::new(&raw mut (*run).immediate_exit) };
        let port = self.relay.attach(usize::from(index), exit, kick)?;
        let injector = self.injector;
        self.filters.apply(Role::Vcpu)?;
        let handle = self.relay.handle();
        let has_asked = false;
        Ok(Box::new(RelayHook {
            index,
            on_undeliverable,
            guest,
            port,
            registers,
            has_asked,
            handle,
            injector,
        }))
    }
}

/// A vCPU's hook on its thread.
struct RelayHook {
    index: u8,
    on_undeliverable: OnUndeliverable,
    guest: GuestMca,
    port: VcpuPort,
    registers: Option<ExitRegisters>,
    /// Before this call of `before_run`.
    has_asked: bool,
    handle: Handle,
    injector: Injector,
}

impl VcpuHook for RelayHook {
    fn wants_attention(&self) -> bool {
        let wants = self.port.wants_attention() || self.injector.wants(self.index);
        if !wants {
            // A kick came for something that was seen to before.
            self.registers_changed();
        }
        wants
    }

    fn asks_for_registers(&mut self) -> bool {
        // After a touch of bad memory, which nobody kicks for. One call gives what takes three otherwise.
        let asks = self.port.wants_attention()
            && !std::mem::replace(&mut self.has_asked, true)
            && self.registers.as_ref().is_some_and(|registers| !registers.are_asked_for());
        if asks && let Some(registers) = &self.registers {
            registers.request().ask();
        }
        asks
    }

    fn registers_changed(&self) {
        if let Some(registers) = &self.registers {
            registers.take();
        }
    }

    fn before_run(&mut self, vcpu: &mut VcpuFd) -> HookVerdict {
        // First, so that the relay sees the bank as the guest will.
        if self.injector.wants(self.index) {
            self.registers_changed();
            self.injector.serve(self.index, &mut VcpuMca::new(&self.guest, vcpu));
        }
        let exit = self.registers.as_ref().and_then(ExitRegisters::take);
        self.has_asked = false;
        match self.port.before_run(&mut VcpuMca::new(&self.guest, vcpu).after_exit(exit)) {
            Verdict::Run => HookVerdict::Run,
            Verdict::Undeliverable { gpa, why, rip } => {
                let what = Undeliverable { vcpu: self.index, gpa, why: why.to_string(), rip };
                match self.on_undeliverable {
                    OnUndeliverable::Pause => HookVerdict::Pause(PauseReason::Undeliverable(what)),
                    // The session decides between the two: see `starts_again`.
                    OnUndeliverable::Stop | OnUndeliverable::Reset => {
                        HookVerdict::Stop(ExitReason::Undeliverable(what))
                    }
                }
            }
        }
    }

    fn park(&mut self, wait: &mut dyn FnMut()) {
        self.port.park(wait);
    }

    fn mmio_in_ram(&mut self, vcpu: &mut VcpuFd, access: RamAccess) -> HookVerdict {
        if let Err(error @ AccessError::NoMemory { .. }) = self.port.probe(access.gpa) {
            // The page is not poisoned, so there is nothing to tell the guest; but it cannot go on either.
            let rip = vcpu.get_regs().map_or(0, |regs| regs.rip);
            let what = format!("{} (RIP {rip:#x})", words::with_causes(&error));
            return HookVerdict::Stop(ExitReason::KvmError { vcpu: self.index, what });
        }
        // A store is made in any case: the page may be part of a huge page that is being rescued, and good in a moment. The
        // guest does not make it again.
        self.port.mmio_hit(access.gpa);
        if let Some(bytes) = access.store
            && let Err(error) = self.handle.write(access.gpa, &bytes[..access.len])
        {
            // The page went bad just now, and is in the ledger.
            debug!("vCPU {}: a store to GPA {:#x} is lost: {error}", self.index, access.gpa);
        }
        HookVerdict::Run
    }

    fn run_failed(&mut self, _: &mut VcpuFd, failure: RunFailure) -> Option<HookVerdict> {
        // KVM reports poison in this way where it raises no SIGBUS. Other failures are left to the caller.
        let RunFailure::MemoryFault { gpa, size, errno } = failure else { return None };
        self.port.memory_fault(gpa, size, errno).then_some(HookVerdict::Run)
    }

    fn rdmsr(&mut self, index: u32) -> Option<u64> {
        self.guest.read_msr(index)
    }

    fn wrmsr(&mut self, index: u32, data: u64) -> bool {
        self.guest.write_msr(index, data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_on_is_one_that_exists() {
        let what = Undeliverable { vcpu: 0, gpa: 0x1000, why: "test".into(), rip: None };
        let untold = PauseReason::Undeliverable(what);
        let socket = Path::new("/x");
        let words = way_on(&untold, Some(socket));
        assert!(
            words.contains("resume --api-socket path=/x") && words.contains("again"),
            "{words}"
        );
        assert!(!way_on(&PauseReason::Request, Some(socket)).contains("again"));
        assert!(way_on(&untold, None).contains("no --api-socket"));
        assert!(way_on_from_panic(Some(socket)).contains("reset --api-socket path=/x"));
        assert!(way_on_from_panic(None).contains("SIGTERM"));
    }
}
