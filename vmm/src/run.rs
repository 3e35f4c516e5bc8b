//! `mce-relay run`: boots the guest with the relay in it, and starts it again when it resets itself.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use kvm_ioctls::VcpuFd;
use log::{error, warn};
use mce_relay::mca::Vendor;
use mce_relay::{
    Config, KillPolicy, RamError, RamMap, RamRegion, Relay, StartError, VcpuPort, Verdict,
};

use crate::api::{Api, ApiError, Current, MemoryBlock, Running, VmInfo};
use crate::cli::{RunArgs, Switch};
use crate::config::VmConfig;
use crate::control::{ExitReason, StopCause, VmControl};
use crate::events::{Monitor, MonitorError, VmEvent};
use crate::host;
use crate::mce_inject::{GuestMca, MceError, MceSetup};
use crate::vcpu::{HookError, HookVerdict, RamAccess, VcpuHook, VcpuSetup};
use crate::vm::{Vm, VmError, VmHooks, VmView};

/// Why a guest could not be run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The event monitor.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// The API.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The VM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The memory-failure policy.
    #[error("cannot set the memory-failure policy (prctl PR_MCE_KILL)")]
    Policy(#[source] std::io::Error),
}

/// Why a VM could not be given a relay.
#[derive(Debug, thiserror::Error)]
enum RelayError {
    #[error(transparent)]
    Mce(#[from] MceError),
    #[error(transparent)]
    Ram(#[from] RamError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("the VM has no relay yet")]
    Early,
}

/// Boots the guest, and again after each reset; returns the exit status that says how it ended.
///
/// # Errors
/// The guest could not be started.
pub fn run(args: &RunArgs) -> Result<u8, RunError> {
    // Before any thread is started: they inherit it, and only the relay's own takes AOs.
    KillPolicy::Late.set().map_err(RunError::Policy)?;
    let monitor = Monitor::start(args.event_monitor.as_ref().map(|path| path.0.as_path()))?;
    let current = Current::default();
    let api = args.api_socket.as_ref().map(|path| Api::start(&path.0, current.clone()));
    let _api = api.transpose()?;
    if !Path::new(host::EARLY_KILL_SYSCTL).exists() {
        warn!(
            "this host's kernel has no memory failure handling (CONFIG_MEMORY_FAILURE): \
             there will be nothing to relay; `mce-relay check` says more"
        );
    }
    let config = VmConfig {
        kernel: args.kernel.clone(),
        initramfs: args.initramfs.clone(),
        cmdline: args.cmdline.clone(),
        cpus: args.cpus.0,
        memory_bytes: args.memory.0,
        page_size: crate::config::PageSize::Size4K,
        serial: [args.serial.0.clone(), args.serial2.0.clone()],
        cpu_vendor: args.cpu_vendor.into(),
    };
    let mut boot = 0;
    loop {
        boot += 1;
        let reason = boot_once(args, &config, boot, &monitor, &current)?;
        if reason == ExitReason::Reset && !args.no_reboot {
            monitor.emit(VmEvent::Reset);
            continue;
        }
        let status = exit_status(&reason);
        if !matches!(reason, ExitReason::PowerOff | ExitReason::Stopped(_)) {
            error!("{reason}");
        }
        monitor.emit(VmEvent::Ended { how: reason.to_string(), status });
        return Ok(status);
    }
}

fn boot_once(
    args: &RunArgs,
    config: &VmConfig,
    boot: u32,
    monitor: &Monitor,
    current: &Current,
) -> Result<ExitReason, RunError> {
    let mut hooks = RelayHooks {
        lmce: args.lmce == Switch::On,
        policy: args.mce_kill.into(),
        monitor,
        made: None,
    };
    let vm = Vm::new(config, &mut hooks)?;
    let made = hooks.made.take().ok_or_else(|| VmError::Hook(RelayError::Early.into()))?;
    let caps = made.setup.caps();
    let mcg_cap = format!("{:#x}", caps.mcg_cap);
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    monitor.emit(VmEvent::Booting {
        boot,
        unix_time: since_1970.unwrap_or(Duration::ZERO).as_secs_f64(),
        mcg_cap: mcg_cap.clone(),
        vendor: caps.vendor,
    });
    let blocks = vm.ram_blocks().iter();
    let control = vm.control().clone();
    current.set(Some(Running {
        info: VmInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: vm.pid(),
            boot,
            vcpus: usize::from(config.cpus),
            vendor: caps.vendor,
            mcg_cap,
            mce_kill: args.mce_kill.into(),
            memory: blocks
                .map(|b| MemoryBlock { gpa: b.gpa, len: b.len, hva: b.hva, fd_offset: b.fd_offset })
                .collect(),
            memory_fd: vm.memfd(),
        },
        ledger: made.relay.reader(),
        stop: Arc::new(move || {
            control.stop(ExitReason::Stopped(StopCause::Request("the API".to_owned())));
        }),
    }));
    let reason = vm.run();
    current.set(None);
    // Here the relay goes, and with it its thread; the vCPU threads are gone already.
    drop(made);
    Ok(reason)
}

/// The exit status of `mce-relay run` for `reason`; the help of the command lists them.
fn exit_status(reason: &ExitReason) -> u8 {
    match reason {
        ExitReason::PowerOff | ExitReason::Stopped(StopCause::Console | StopCause::Request(_)) => 0,
        ExitReason::Fatal(_) => 1,
        ExitReason::Reset => 3,
        ExitReason::TripleFault { .. } => 4,
        ExitReason::KvmError { .. } => 5,
        ExitReason::Undeliverable { .. } => 6,
        // As a shell would say it; signals are 1 to 64.
        ExitReason::Stopped(StopCause::Signal(signal)) => {
            128 + u8::try_from(*signal).unwrap_or_default()
        }
    }
}

/// What the relay needs of a VM while it is built.
struct RelayHooks<'a> {
    lmce: bool,
    policy: KillPolicy,
    monitor: &'a Monitor,
    made: Option<Made>,
}

struct Made {
    setup: MceSetup,
    relay: Arc<Relay>,
    control: VmControl,
}

impl RelayHooks<'_> {
    fn make(&self, vm: &VmView<'_>) -> Result<Made, RelayError> {
        // An AMD-style guest's CPUID always shows SUCCOR: see `cpuid`.
        let setup = MceSetup::new(vm.kvm, vm.vendor, self.lmce, vm.vendor == Vendor::Amd)?;
        setup.prepare_vm(vm.vm)?;
        let regions: Vec<RamRegion> = vm
            .ram
            .blocks()
            .iter()
            .map(|block| RamRegion { hva: block.hva, gpa: block.gpa, len: block.len })
            .collect();
        let relay = Relay::start(Config {
            vcpus: usize::from(vm.cpus),
            caps: setup.caps(),
            ram: RamMap::new(&regions)?,
            policy: self.policy,
            pace: mce_relay::Pace::default(),
            observer: self.monitor.for_relay(),
        })?;
        Ok(Made { setup, relay: Arc::new(relay), control: vm.control.clone() })
    }
}

impl VmHooks for RelayHooks<'_> {
    fn vm_created(&mut self, vm: &VmView<'_>) -> Result<(), HookError> {
        self.made = Some(self.make(vm)?);
        Ok(())
    }

    fn vcpu(&mut self, index: u8) -> Result<Box<dyn VcpuSetup>, HookError> {
        let made = self.made.as_ref().ok_or(RelayError::Early)?;
        Ok(Box::new(RelaySetup {
            index,
            setup: made.setup,
            relay: Arc::clone(&made.relay),
            control: made.control.clone(),
            guest: None,
        }))
    }
}

/// One vCPU on its way to its thread.
struct RelaySetup {
    index: u8,
    setup: MceSetup,
    relay: Arc<Relay>,
    control: VmControl,
    guest: Option<GuestMca>,
}

impl VcpuSetup for RelaySetup {
    fn setup(&mut self, vcpu: &VcpuFd) -> Result<(), HookError> {
        self.guest = Some(self.setup.prepare_vcpu(vcpu)?);
        Ok(())
    }

    fn start(self: Box<Self>, vcpu: &mut VcpuFd) -> Result<Box<dyn VcpuHook>, HookError> {
        let guest = self.guest.ok_or(RelayError::Early)?;
        let immediate_exit = &raw mut vcpu.get_kvm_run().immediate_exit;
        let (control, index) = (self.control, self.index);
        let kick = Box::new(move || control.kick(index));
        // SAFETY: the byte lies in the vCPU's kvm_run mapping, and the vCPU's owner drops the hook
        // with the port in it before the vCPU (see `Vcpu::run`).
        let port = unsafe { self.relay.attach(usize::from(index), immediate_exit, kick)? };
        Ok(Box::new(RelayHook { index, guest, port }))
    }
}

/// One vCPU on its thread.
struct RelayHook {
    index: u8,
    guest: GuestMca,
    port: VcpuPort,
}

impl VcpuHook for RelayHook {
    fn wants_attention(&self) -> bool {
        self.port.wants_attention()
    }

    fn before_run(&mut self, vcpu: &mut VcpuFd) -> HookVerdict {
        match self.port.before_run(&mut self.guest.on(vcpu)) {
            Verdict::Run => HookVerdict::Run,
            Verdict::Undeliverable { gpa, why } => HookVerdict::Stop(ExitReason::Undeliverable {
                vcpu: self.index,
                gpa,
                why: why.to_string(),
            }),
        }
    }

    fn mmio_in_ram(&mut self, _: &mut VcpuFd, access: RamAccess) -> HookVerdict {
        self.port.mmio_hit(access.gpa);
        HookVerdict::Run
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
    fn every_end_has_its_status() {
        let why = String::new;
        let ends = [
            (ExitReason::PowerOff, 0),
            (ExitReason::Stopped(StopCause::Request(why())), 0),
            (ExitReason::Fatal(why()), 1),
            (ExitReason::Reset, 3),
            (ExitReason::TripleFault { vcpu: 0 }, 4),
            (ExitReason::KvmError { vcpu: 0, what: why() }, 5),
            (ExitReason::Undeliverable { vcpu: 0, gpa: 0, why: why() }, 6),
            (ExitReason::Stopped(StopCause::Signal(15)), 143),
        ];
        for (reason, status) in ends {
            assert_eq!(exit_status(&reason), status, "{reason:?}");
        }
    }
}
