//! Builds a VM from its configuration, runs it, and takes it down again.
//!
//! A VM is used for one boot. For the next boot another one is built in the same process.

pub mod end;
pub mod error;
pub mod hooks;
pub mod kvm;

use std::ops::Range;
use std::sync::Arc;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, VmFd};

use crate::config::{ConfigError, MAX_CPUS, VmConfig};
use crate::machine::acpi::{self, AcpiError};
use crate::machine::boot;
use crate::machine::boot::load::{self, Boot};
use crate::machine::cpu::cpuid::{self, CpuSpec, Vendor};
use crate::machine::devices::ports::{PortBus, UARTS};
use crate::machine::devices::serial::SerialLine;
use crate::machine::devices::serial::port::SerialPort;
use crate::machine::devices::virtio::build::build;
use crate::machine::devices::virtio::bus::MmioBus;
use crate::machine::devices::virtio::registers::Registers;
use crate::machine::devices::virtio::vsock::host::VsockLine;
use crate::machine::lifecycle::VmControl;
use crate::machine::lifecycle::reasons::ExitReason;
use crate::machine::memory::block::RamBlock;
use crate::machine::memory::guest_ram::GuestRam;
use crate::machine::vcpu::{Buses, Vcpu, install_kick_handler};
use crate::machine::vm::end::{termination_pipes, wait_for_end};
use crate::machine::vm::error::{VmError, kvm_error, os_error};
use crate::machine::vm::hooks::{VmHooks, VmView};
use crate::machine::vm::kvm::{create_vm, irq_line, open_kvm, prepare_vcpu};

/// A VM that is ready to run.
///
/// The fields are dropped in this order: vCPUs before the VM, the VM before the memory that it maps.
#[derive(Debug)]
pub struct Vm {
    vcpus: Vec<Vcpu>,
    /// Kept so that the serial ports are dropped on the main thread, after the vCPUs that share them.
    _bus: Arc<PortBus>,
    /// The same for the virtio devices, whose threads use the memory below.
    _mmio: Arc<MmioBus>,
    devices: Vec<Arc<Registers>>,
    /// The same for the console's line, which its device's thread may not close.
    _console: Option<Arc<SerialLine>>,
    /// The same for vsock's socket.
    _vsock: Option<Arc<VsockLine>>,
    fd: Arc<VmFd>,
    ram: Arc<GuestRam>,
    control: VmControl,
    vendor: Vendor,
    kernel: Range<u64>,
}

impl Vm {
    /// Builds everything up to the first instruction, in `ram`, which no other VM uses at the time.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn new(
        config: &VmConfig,
        ram: &Arc<GuestRam>,
        hooks: &mut dyn VmHooks,
    ) -> Result<Self, VmError> {
        config.validate()?;
        let kvm = open_kvm()?;
        let max = u8::try_from(kvm.get_max_vcpus()).unwrap_or(MAX_CPUS).min(MAX_CPUS);
        if config.cpus > max {
            return Err(ConfigError::Cpus { asked: config.cpus, max }.into());
        }
        install_kick_handler();
        termination_pipes().map_err(os_error("watch for termination signals"))?;

        let ram = Arc::clone(ram);
        let fd = Arc::new(create_vm(&kvm)?);
        ram.register(&fd)?;
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm_error("read the supported CPUID"))?;
        let vendor = cpuid::guest_vendor(config.cpu_vendor, supported.as_slice());
        let control = VmControl::new(config.cpus).map_err(os_error("create an eventfd"))?;
        hooks
            .vm_created(&VmView {
                kvm: &kvm,
                vm: &fd,
                ram: &ram,
                vendor,
                cpus: config.cpus,
                control: &control,
            })
            .map_err(VmError::Hook)?;

        let tables = hooks.acpi_tables().map_err(VmError::Hook)?;
        let [com1, com2] = &config.serial;
        let uarts = [com1, com2].map(|mode| *mode != crate::config::SerialMode::Off);
        boot::mp_table::write(&ram, config.cpus).map_err(AcpiError::Write)?;
        let rsdp = acpi::write(&ram, config.cpus, uarts, config.devices.len(), &tables)?;
        let Boot { entry, kernel } =
            load::load(&ram, &config.kernel, config.initramfs.as_deref(), &config.cmdline, rsdp)?;

        let lines = hooks.serial_lines(config).map_err(VmError::Hook)?;
        let mut ports = [None, None];
        for ((line, at), port) in lines.ports.iter().zip(&UARTS).zip(&mut ports) {
            let irq = irq_line(&fd, at.irq);
            *port = line.as_ref().map(|line| Arc::new(SerialPort::on(line, &control, irq)));
        }
        let bus = Arc::new(PortBus::new(ports));
        let filters = hooks.filters();
        let devices = build(&config.devices, &lines, &control, ram.devices(), &filters)?;
        let mmio = MmioBus::new(devices, &fd, ram.devices(), &control, &filters)?;
        let devices = mmio.registers().collect();
        let mmio = Arc::new(mmio);

        let leaves = cpuid::guest_leaves(
            supported.as_slice(),
            CpuSpec {
                vendor: config.cpu_vendor,
                cpus: config.cpus,
                tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
                brand: cpuid::host_brand(),
            },
        );
        let blocks: Arc<[RamBlock]> = ram.blocks().into();
        let mut vcpus = Vec::new();
        for index in 0..config.cpus {
            let vcpu = fd.create_vcpu(u64::from(index)).map_err(|source| VmError::Vcpu {
                vcpu: index,
                what: "be created",
                source,
            })?;
            let mut setup = hooks.vcpu(index).map_err(VmError::Hook)?;
            prepare_vcpu(&vcpu, index, &leaves, setup.as_mut(), entry)?;
            vcpus.push(Vcpu::new(
                vcpu,
                index,
                setup,
                Buses { ports: Arc::clone(&bus), mmio: Arc::clone(&mmio) },
                Arc::clone(&blocks),
                control.clone(),
            ));
        }
        Ok(Self {
            vcpus,
            _bus: bus,
            _mmio: mmio,
            devices,
            _console: lines.console,
            _vsock: lines.vsock,
            fd,
            ram,
            control,
            vendor,
            kernel,
        })
    }

    /// Its control, which may be given to other threads.
    #[must_use]
    pub fn control(&self) -> &VmControl {
        &self.control
    }

    /// Its virtio devices.
    #[must_use]
    pub fn devices(&self) -> &[Arc<Registers>] {
        &self.devices
    }

    /// The guest's RAM.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The pieces of the guest's RAM.
    #[must_use]
    pub fn ram_blocks(&self) -> &[RamBlock] {
        self.ram.blocks()
    }

    /// Where the guest's kernel was loaded: guest-physical addresses.
    #[must_use]
    pub fn kernel(&self) -> Range<u64> {
        self.kernel.clone()
    }

    /// The process that the VM lives in.
    #[must_use]
    pub fn pid(&self) -> u32 {
        std::process::id()
    }

    /// The vendor of the processor that the guest sees.
    #[must_use]
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// The VM's descriptor, for ioctls.
    #[must_use]
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Runs the guest until it ends or is stopped. When this returns every thread is joined and every file closed,
    /// except those of serial lines that the caller keeps.
    #[must_use]
    pub fn run(mut self) -> ExitReason {
        let mut threads = Vec::new();
        for (index, vcpu) in self.vcpus.drain(..).enumerate() {
            let thread =
                std::thread::Builder::new().name(format!("vcpu{index}")).spawn(|| vcpu.run());
            match thread {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    self.control.stop(ExitReason::Fatal(format!(
                        "cannot start the thread of vCPU {index}: {error}"
                    )));
                    break;
                }
            }
        }
        wait_for_end(&self.control);
        for thread in threads {
            // A thread that panicked has set the reason already.
            let _ = thread.join();
        }
        let reason = self.control.exit_reason();
        // Drops the bus, and with it the serial ports; also their lines, once their output is written, unless the
        // caller keeps them.
        drop(self);
        reason.unwrap_or_else(|| ExitReason::Fatal("the VM ended without a reason".into()))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::api::types::pause::{PauseReason, Undeliverable};
    use crate::config::{CpuVendor, MemoryZone, SerialMode};
    use crate::machine::boot::tiny::elf;
    use crate::machine::lifecycle::reasons::{Parked, StopCause};
    use crate::machine::vcpu::hooks::{HookError, Ready, VcpuSetup};
    use crate::machine::vcpu::hooks::{HookVerdict, VcpuHook};
    use crate::machine::vm::hooks::NoHooks;
    use crate::machine::vm::kvm::{
        LAPIC_LVT_LINT0, LAPIC_LVT_LINT1, LVT_EXTINT, LVT_NMI, set_delivery_mode,
    };
    use kvm_bindings::kvm_lapic_state;
    use kvm_ioctls::VcpuFd;

    /// mov dx, 0x600; mov al, S5 and SLP_EN; out dx, al; hlt.
    const POWER_OFF: [u8; 8] = [0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4];
    /// jmp to itself.
    const SPIN: [u8; 2] = [0xeb, 0xfe];

    struct Payload {
        dir: tempfile::TempDir,
        config: VmConfig,
        ram: Arc<GuestRam>,
    }

    impl Payload {
        /// `None`, with a word about it, where there is no KVM.
        fn new(code: &[u8], cpus: u8) -> Option<Self> {
            if let Err(error) = open_kvm() {
                println!("skipped: {error}");
                return None;
            }
            let dir = tempfile::tempdir().unwrap();
            let kernel = dir.path().join("kernel");
            std::fs::write(&kernel, elf(code)).unwrap();
            let config = VmConfig {
                kernel,
                initramfs: None,
                cmdline: "test".into(),
                cpus,
                serial: [SerialMode::File(dir.path().join("com1").into()), SerialMode::Off],
                devices: Vec::new(),
                cpu_vendor: CpuVendor::Host,
            };
            let ram = Arc::new(GuestRam::new(&[MemoryZone::new(32 << 20)]).unwrap());
            Some(Self { dir, config, ram })
        }

        fn run(&self) -> ExitReason {
            Vm::new(&self.config, &self.ram, &mut NoHooks).unwrap().run()
        }

        fn serial(&self) -> Vec<u8> {
            std::fs::read(self.dir.path().join("com1")).unwrap()
        }
    }

    #[test]
    fn payload_prints_and_powers_off() {
        // mov dx, 0x3f8; mov al, 'K'; out dx, al.
        let mut code = vec![0x66, 0xba, 0xf8, 0x03, 0xb0, b'K', 0xee];
        code.extend(POWER_OFF);
        let Some(payload) = Payload::new(&code, 1) else { return };
        assert_eq!(payload.run(), ExitReason::PowerOff);
        assert_eq!(payload.serial(), b"K");
    }

    #[test]
    fn payload_resets_again_and_again_without_leaks() {
        // mov dx, 0x602; mov al, 1; out dx, al.
        let code = [0x66, 0xba, 0x02, 0x06, 0xb0, 0x01, 0xee, 0xf4];
        let Some(payload) = Payload::new(&code, 2) else { return };
        // Other tests make and drop VMs at the same time.
        let mapped =
            || std::fs::read_to_string("/proc/self/maps").unwrap().matches("kvm-vcpu").count();
        assert_eq!(payload.run(), ExitReason::Reset);
        for _ in 0..20 {
            payload.ram.heal(&[]);
            assert_eq!(payload.run(), ExitReason::Reset);
        }
        assert!(mapped() < 40, "vCPUs of VMs that ended are still mapped");
    }

    #[test]
    fn payload_reads_all_ones_where_nothing_is() {
        // mov al, [0xd0000000]; mov dx, 0x3f8; out dx, al; mov [0xd0000000], al.
        let mut code = vec![0xa0, 0, 0, 0, 0xd0, 0x66, 0xba, 0xf8, 0x03, 0xee, 0xa2, 0, 0, 0, 0xd0];
        code.extend(POWER_OFF);
        let Some(payload) = Payload::new(&code, 1) else { return };
        assert_eq!(payload.run(), ExitReason::PowerOff);
        assert_eq!(payload.serial(), [0xff]);
    }

    #[test]
    fn payload_triple_faults() {
        // ud2, with no interrupt table.
        let Some(payload) = Payload::new(&[0x0f, 0x0b], 1) else { return };
        assert_eq!(payload.run(), ExitReason::TripleFault { vcpu: 0 });
    }

    struct Counting {
        entries: Arc<AtomicU32>,
        stop_at: u32,
    }

    impl VcpuHook for Counting {
        fn before_run(&mut self, _: &mut VcpuFd) -> HookVerdict {
            if self.entries.fetch_add(1, Ordering::SeqCst) + 1 >= self.stop_at {
                return HookVerdict::Stop(ExitReason::Fatal("enough".into()));
            }
            HookVerdict::Run
        }
    }

    struct CountingFactory(Arc<AtomicU32>, u32);

    impl VmHooks for CountingFactory {
        fn vcpu(&mut self, index: u8) -> Result<Box<dyn VcpuSetup>, HookError> {
            // Only vCPU 0 runs code.
            let stop_at = if index == 0 { self.1 } else { u32::MAX };
            let entries = if index == 0 { Arc::clone(&self.0) } else { Arc::default() };
            Ok(Box::new(Ready(Counting { entries, stop_at })))
        }
    }

    fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !condition() {
            assert!(Instant::now() < end, "{what} did not happen");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn kicks_pass_the_hook_and_the_hook_can_stop() {
        let Some(payload) = Payload::new(&SPIN, 2) else { return };
        let entries = Arc::new(AtomicU32::new(0));
        let vm =
            Vm::new(&payload.config, &payload.ram, &mut CountingFactory(Arc::clone(&entries), 30))
                .unwrap();
        let control = vm.control().clone();
        let runner = std::thread::spawn(|| vm.run());
        for kick in 1..30 {
            eventually("an entry", || entries.load(Ordering::SeqCst) >= kick);
            control.kick(0);
        }
        assert_eq!(runner.join().unwrap(), ExitReason::Fatal("enough".into()));
    }

    #[test]
    fn pause_holds_the_guest_and_a_stop_ends_it() {
        let Some(payload) = Payload::new(&SPIN, 2) else { return };
        let entries = Arc::new(AtomicU32::new(0));
        let mut hooks = CountingFactory(Arc::clone(&entries), u32::MAX);
        let vm = Vm::new(&payload.config, &payload.ram, &mut hooks).unwrap();
        let control = vm.control().clone();
        let runner = std::thread::spawn(|| vm.run());
        eventually("a start", || entries.load(Ordering::SeqCst) > 0);
        for _ in 0..5 {
            control.pause();
            let before = entries.load(Ordering::SeqCst);
            control.kick_all();
            std::thread::sleep(Duration::from_millis(10));
            assert_eq!(entries.load(Ordering::SeqCst), before, "no entry while paused");
            control.resume();
            eventually("going on", || entries.load(Ordering::SeqCst) > before);
        }
        control.pause();
        let why = ExitReason::Stopped(StopCause::Request("test".into()));
        control.stop(why.clone());
        assert_eq!(runner.join().unwrap(), why);
    }

    /// Pauses the VM at its first entry and at the first after each time it was parked.
    struct Pausing {
        index: u8,
        pause: bool,
        parked: Arc<AtomicU32>,
        entries: Arc<AtomicU32>,
    }

    impl VcpuHook for Pausing {
        fn before_run(&mut self, _: &mut VcpuFd) -> HookVerdict {
            if std::mem::take(&mut self.pause) {
                let why = "test".into();
                let what = Undeliverable { vcpu: self.index, gpa: 0x1000, why, rip: Some(0) };
                return HookVerdict::Pause(PauseReason::Undeliverable(what));
            }
            self.entries.fetch_add(1, Ordering::SeqCst);
            HookVerdict::Run
        }

        fn park(&mut self, wait: &mut dyn FnMut()) {
            self.parked.fetch_add(1, Ordering::SeqCst);
            wait();
            self.pause = true;
        }
    }

    #[derive(Default)]
    struct PausingFactory {
        parked: Arc<AtomicU32>,
        entries: Arc<AtomicU32>,
    }

    impl VmHooks for PausingFactory {
        fn vcpu(&mut self, index: u8) -> Result<Box<dyn VcpuSetup>, HookError> {
            let (parked, entries) = (Arc::clone(&self.parked), Arc::clone(&self.entries));
            Ok(Box::new(Ready(Pausing { index, pause: true, parked, entries })))
        }
    }

    #[test]
    fn hooks_pause_the_vm_again_and_again_and_a_stop_ends_it() {
        let Some(payload) = Payload::new(&SPIN, 3) else { return };
        let mut hooks = PausingFactory::default();
        let vm = Vm::new(&payload.config, &payload.ram, &mut hooks).unwrap();
        let control = vm.control().clone();
        let runner = std::thread::spawn(|| vm.run());
        for _ in 0..20 {
            eventually("a pause", || control.paused().is_some());
            assert_eq!(control.wait_parked(Duration::from_secs(20)), Parked::All);
            assert!(matches!(control.paused(), Some(PauseReason::Undeliverable(_))));
            control.resume();
        }
        // Each has to pause first, and again whenever it was parked.
        assert_eq!(hooks.entries.load(Ordering::SeqCst), 0);
        assert!(hooks.parked.load(Ordering::SeqCst) >= 20, "by the hook");
        eventually("a pause", || control.paused().is_some());
        control.stop(ExitReason::PowerOff);
        assert_eq!(runner.join().unwrap(), ExitReason::PowerOff);
    }

    struct Refusing;

    impl VmHooks for Refusing {
        fn vcpu(&mut self, _: u8) -> Result<Box<dyn VcpuSetup>, HookError> {
            Err("not today".into())
        }
    }

    #[test]
    fn a_hook_that_refuses_is_an_error() {
        let Some(payload) = Payload::new(&SPIN, 1) else { return };
        let error = Vm::new(&payload.config, &payload.ram, &mut Refusing).unwrap_err();
        assert!(matches!(error, VmError::Hook(_)));
        assert_eq!(error.to_string(), "not today");
    }

    #[test]
    fn a_bad_kernel_does_not_touch_the_serial_file() {
        let Some(mut payload) = Payload::new(&SPIN, 1) else { return };
        let com1 = payload.dir.path().join("com1");
        std::fs::write(&com1, "precious").unwrap();
        payload.config.kernel = Path::new("/nonexistent/kernel").into();
        let error = Vm::new(&payload.config, &payload.ram, &mut NoHooks).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/kernel"));
        assert_eq!(std::fs::read(com1).unwrap(), b"precious");
    }

    #[test]
    fn delivery_mode_is_set_and_unmasked() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[LAPIC_LVT_LINT0 + 2] = 1;
        lapic.regs[LAPIC_LVT_LINT0] = -1;
        set_delivery_mode(&mut lapic, LAPIC_LVT_LINT0, LVT_EXTINT);
        assert_eq!(lapic.regs[LAPIC_LVT_LINT0..LAPIC_LVT_LINT0 + 4], [-1, 7, 0, 0]);
        set_delivery_mode(&mut lapic, LAPIC_LVT_LINT1, LVT_NMI);
        assert_eq!(lapic.regs[LAPIC_LVT_LINT1..LAPIC_LVT_LINT1 + 4], [0, 4, 0, 0]);
    }
}
