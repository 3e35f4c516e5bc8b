//! Builds a VM from its configuration, runs it, and takes all of it down again.
//!
//! A VM is used once. Starting the guest over means building another one, in the same process.

use std::{
    io,
    ops::Range,
    os::fd::{AsRawFd, IntoRawFd, RawFd},
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, PoisonError},
};

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES,
    KVM_PIT_SPEAKER_DUMMY, kvm_cpuid_entry2, kvm_irqchip, kvm_lapic_state, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use thiserror::Error;

use crate::{
    acpi::{self, AcpiError, Table},
    boot::{self, Boot, BootError, Entry, layout, regs},
    check,
    config::{ConfigError, MAX_CPUS, VmConfig},
    control::{ExitReason, StopCause, VmControl},
    cpuid::{self, CpuSpec, Vendor},
    devices::{PortBus, UARTS},
    files, hangup, last_resort,
    memory::{GuestRam, MemoryError, RamBlock},
    msr::{self, MsrError},
    seccomp::Filters,
    serial::{self, IrqLine, SerialLines, SerialPort},
    vcpu::{HookError, NoHook, Ready, Vcpu, VcpuSetup, install_kick_handler},
};

/// Where KVM is.
const KVM_PATH: &str = "/dev/kvm";
/// The version of KVM's interface since it is stable.
const KVM_API: i32 = 12;
/// Local APIC register offsets (SDM vol. 3, 11.4.1).
const LAPIC_LVT_LINT0: usize = 0x350;
const LAPIC_LVT_LINT1: usize = 0x360;
/// Delivery modes of a local vector table entry.
const LVT_EXTINT: u32 = 7 << 8;
const LVT_NMI: u32 = 4 << 8;

/// Why there is no VM.
#[derive(Debug, Error)]
pub enum VmError {
    /// The configuration is impossible.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is no KVM.
    #[error("there is no {KVM_PATH} that works: {}", check::advice_now())]
    NoKvm,
    /// KVM is not ours to use.
    #[error("no permission to open {KVM_PATH}: {}", check::advice_now())]
    KvmPermission,
    /// KVM could not be opened.
    #[error("cannot open {KVM_PATH}")]
    OpenKvm(#[source] kvm_ioctls::Error),
    /// KVM speaks another language.
    #[error("{KVM_PATH} has API version {found}, expected {KVM_API}")]
    KvmVersion {
        /// The version found.
        found: i32,
    },
    /// This KVM is too old.
    #[error("this KVM lacks {0}; use a newer host kernel")]
    MissingCap(&'static str),
    /// A call on the VM failed.
    #[error("KVM: cannot {what}")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// No guest RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// No kernel in it.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// No ACPI tables in it.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// A vCPU could not be made ready.
    #[error("vCPU {vcpu}: cannot {what}")]
    Vcpu {
        /// Its index.
        vcpu: u8,
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The registers of vCPU 0 were refused.
    #[error("vCPU 0: entry state")]
    Regs(#[from] regs::RegsError),
    /// The MSRs of a vCPU were refused.
    #[error("vCPU {vcpu}: MSRs")]
    Msr {
        /// Its index.
        vcpu: u8,
        /// The cause.
        #[source]
        source: MsrError,
    },
    /// The CPUID list could not be built.
    #[error("the CPUID list has {0} entries, more than KVM takes")]
    CpuidList(usize),
    /// A hook refused.
    #[error(transparent)]
    Hook(HookError),
    /// Out of file descriptors, or the like.
    #[error("cannot {what}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn kvm_error(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Kvm { what, source }
}

fn os_error(what: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Os { what, source }
}

/// A VM as hooks see it while it is built.
#[derive(Debug)]
pub struct VmView<'a> {
    /// KVM itself.
    pub kvm: &'a Kvm,
    /// The VM.
    pub vm: &'a Arc<VmFd>,
    /// Its RAM, with its memfd. Whoever keeps addresses of it keeps it, too.
    pub ram: &'a Arc<GuestRam>,
    /// Whose processor the guest sees.
    pub vendor: Vendor,
    /// Number of vCPUs.
    pub cpus: u8,
    /// The reins.
    pub control: &'a VmControl,
}

/// What can be done around the making of a VM. Called once each, in the order given here.
pub trait VmHooks {
    /// Which system calls the threads of the devices may make.
    fn filters(&self) -> Filters {
        Filters::default()
    }

    /// The VM has RAM and interrupt controllers, and no vCPU yet.
    ///
    /// # Errors
    /// Whatever makes this VM impossible.
    fn vm_created(&mut self, _vm: &VmView<'_>) -> Result<(), HookError> {
        Ok(())
    }

    /// More ACPI tables.
    ///
    /// # Errors
    /// Whatever makes this VM impossible.
    fn acpi_tables(&mut self) -> Result<Vec<Table>, HookError> {
        Ok(Vec::new())
    }

    /// The ways out for the serial ports, when all else that can be wrong with the VM has been looked at. Those
    /// of the VM before may be given again; by default they are this VM's own.
    ///
    /// # Errors
    /// They cannot be opened.
    fn serial_lines(&mut self, config: &VmConfig) -> Result<SerialLines, HookError> {
        Ok(serial::open_lines(&config.serial, &self.filters())?)
    }

    /// The hook of this vCPU; once per vCPU.
    ///
    /// # Errors
    /// Whatever makes this VM impossible.
    fn vcpu(&mut self, index: u8) -> Result<Box<dyn VcpuSetup>, HookError>;
}

/// Does nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHooks;

impl VmHooks for NoHooks {
    fn vcpu(&mut self, _: u8) -> Result<Box<dyn VcpuSetup>, HookError> {
        Ok(Box::new(Ready(NoHook)))
    }
}

/// A VM that is ready to run.
///
/// The order of the fields is the order in which they go: vCPUs before the VM, the VM before the
/// memory that it has mapped.
#[derive(Debug)]
pub struct Vm {
    vcpus: Vec<Vcpu>,
    /// Kept so that the serial ports go on the main thread, after the vCPUs that share them.
    _bus: Arc<PortBus>,
    fd: Arc<VmFd>,
    ram: Arc<GuestRam>,
    control: VmControl,
    vendor: Vendor,
    kernel: Range<u64>,
}

impl Vm {
    /// Builds everything up to the first instruction, in `ram`, which is of no other VM at the time.
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
        let rsdp = acpi::write(&ram, config.cpus, uarts, &tables)?;
        let Boot { entry, kernel } =
            boot::load(&ram, &config.kernel, config.initramfs.as_deref(), &config.cmdline, rsdp)?;

        let lines = hooks.serial_lines(config).map_err(VmError::Hook)?;
        let mut ports = [None, None];
        for ((line, at), port) in lines.iter().zip(&UARTS).zip(&mut ports) {
            let irq = irq_line(&fd, at.irq);
            *port = line.as_ref().map(|line| Arc::new(SerialPort::on(line, &control, irq)));
        }
        let bus = Arc::new(PortBus::new(ports));

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
                Arc::clone(&bus),
                Arc::clone(&blocks),
                control.clone(),
            ));
        }
        Ok(Self { vcpus, _bus: bus, fd, ram, control, vendor, kernel })
    }

    /// The reins; they may be given to other threads.
    #[must_use]
    pub fn control(&self) -> &VmControl {
        &self.control
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

    /// Whose processor the guest sees.
    #[must_use]
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// The VM, for ioctls.
    #[must_use]
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Runs the guest until it ends or is stopped. Every thread is joined and every file closed when this
    /// returns, but for those of serial lines that somebody else keeps, too.
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
            // Whoever panicked has said so through the reins.
            let _ = thread.join();
        }
        let reason = self.control.exit_reason();
        // The bus goes here, and with it the serial ports; their lines, too, once their output is written, if
        // nobody else has them.
        drop(self);
        reason.unwrap_or_else(|| ExitReason::Fatal("the VM ended without a reason".into()))
    }
}

fn open_kvm() -> Result<Kvm, VmError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => VmError::NoKvm,
        libc::EACCES | libc::EPERM => VmError::KvmPermission,
        _ => VmError::OpenKvm(error),
    })?;
    let found = kvm.get_api_version();
    if found != KVM_API {
        return Err(VmError::KvmVersion { found });
    }
    let needed = [
        (Cap::Irqchip, "an in-kernel interrupt controller (KVM_CAP_IRQCHIP)"),
        (Cap::Pit2, "an in-kernel timer (KVM_CAP_PIT2)"),
        (Cap::ImmediateExit, "immediate exits (KVM_CAP_IMMEDIATE_EXIT)"),
    ];
    match needed.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(VmError::MissingCap(name)),
        None => Ok(kvm),
    }
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, VmError> {
    let vm = loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            other => break other.map_err(kvm_error("create a VM"))?,
        }
    };
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(kvm_error("set the identity map address"))?;
    vm.set_tss_address(layout::KVM_TSS).map_err(kvm_error("set the TSS address"))?;
    vm.create_irq_chip().map_err(kvm_error("create the interrupt controllers"))?;
    mask_pics(&vm).map_err(kvm_error("mask the legacy interrupt controllers"))?;
    // The speaker's port is read in delay loops; KVM answers it itself.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(kvm_error("create the timer"))?;
    Ok(vm)
}

/// A line of the interrupt controllers, raised as an edge by the thread that calls.
fn irq_line(vm: &Arc<VmFd>, gsi: u32) -> IrqLine {
    let vm = Arc::clone(vm);
    Arc::new(move || {
        let edge = vm.set_irq_line(gsi, true).and_then(|()| vm.set_irq_line(gsi, false));
        if let Err(error) = edge {
            log::warn!("cannot raise interrupt {gsi}: {error}");
        }
    })
}

/// Masks every line of the two 8259s, as firmware does. KVM starts them unmasked and with vector
/// base 0, and every ISA interrupt reaches them as well as the I/O APIC: a guest that is described
/// by hardware-reduced ACPI, and so never looks at them, would take interrupts as exceptions.
fn mask_pics(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip)?;
        chip.chip.pic.imr = 0xff;
        vm.set_irqchip(&chip)?;
    }
    Ok(())
}

fn prepare_vcpu(
    vcpu: &VcpuFd,
    index: u8,
    leaves: &[kvm_cpuid_entry2],
    setup: &mut dyn VcpuSetup,
    entry: Entry,
) -> Result<(), VmError> {
    let error = |what| move |source| VmError::Vcpu { vcpu: index, what, source };
    let own = cpuid::for_vcpu(leaves, index);
    let list = CpuId::from_entries(&own).map_err(|_| VmError::CpuidList(own.len()))?;
    vcpu.set_cpuid2(&list).map_err(error("set its CPUID"))?;
    setup.setup(vcpu).map_err(VmError::Hook)?;
    msr::set_boot_msrs(vcpu).map_err(|source| VmError::Msr { vcpu: index, source })?;
    let mut lapic = vcpu.get_lapic().map_err(error("read its local APIC"))?;
    set_delivery_mode(&mut lapic, LAPIC_LVT_LINT0, LVT_EXTINT);
    set_delivery_mode(&mut lapic, LAPIC_LVT_LINT1, LVT_NMI);
    vcpu.set_lapic(&lapic).map_err(error("set its local APIC"))?;
    if index == 0 {
        regs::set(vcpu, entry)?;
    }
    Ok(())
}

/// Virtual wire mode, as firmware leaves it: a kernel without ACPI gets its interrupts this way.
fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    const LVT_DELIVERY_MODE: u32 = 7 << 8;
    const LVT_MASKED: u32 = 1 << 16;
    let Some(bytes) = lapic.regs.get_mut(register..register + 4) else {
        return;
    };
    let mut value = 0_u32;
    for byte in bytes.iter().rev() {
        value = value << 8 | u32::from(byte.to_le_bytes()[0]);
    }
    value = value & !(LVT_DELIVERY_MODE | LVT_MASKED) | mode;
    for (to, from) in bytes.iter_mut().zip(value.to_le_bytes()) {
        *to = i8::from_le_bytes([from]);
    }
}

/// Reading ends of pipes that a signal's handler writes to. Made once and kept: a signal that
/// comes between two VMs is met by the second.
fn termination_pipes() -> io::Result<[(i32, RawFd); 3]> {
    static PIPES: Mutex<Option<[(i32, RawFd); 3]>> = Mutex::new(None);
    let mut pipes = PIPES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pipes) = *pipes {
        return Ok(pipes);
    }
    let pipe = |signal| -> io::Result<(i32, RawFd)> {
        // nohup(1), or a shell without job control: whoever had it ignored means it to be. poll skips -1.
        let ignored = if signal == SIGHUP { hangup::is_ignored() } else { hangup::ignores(signal) };
        if ignored {
            return Ok((signal, -1));
        }
        let (read, write) = UnixStream::pair()?;
        read.set_nonblocking(true)?;
        signal_hook::low_level::pipe::register(signal, write)?;
        Ok((signal, read.into_raw_fd()))
    };
    let made = [pipe(SIGTERM)?, pipe(SIGINT)?, pipe(SIGHUP)?];
    *pipes = Some(made);
    Ok(made)
}

/// Returns when the VM ends, for which a termination signal is a reason.
fn wait_for_end(control: &VmControl) {
    let pipes = match termination_pipes() {
        Ok(pipes) => pipes,
        Err(error) => {
            let what = format!("cannot watch for termination signals: {error}");
            control.stop(ExitReason::Fatal(what));
            return;
        }
    };
    let pollfd = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    while control.exit_reason().is_none() {
        let mut fds = [
            pollfd(control.ended().as_raw_fd()),
            pollfd(pipes[0].1),
            pollfd(pipes[1].1),
            pollfd(pipes[2].1),
            pollfd(files::wanted().unwrap_or(-1)),
        ];
        last_resort::while_waiting(|| {
            // SAFETY: the array is valid and as long as said.
            unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        });
        for (signal, fd) in pipes {
            let mut byte = [0_u8; 16];
            // SAFETY: the buffer is valid for writes of its length; the descriptor is ours for
            // the life of the process and does not block.
            let n = unsafe { libc::read(fd, byte.as_mut_ptr().cast(), byte.len()) };
            match signal {
                _ if n <= 0 => {}
                SIGHUP if !hangup::is_the_end() => files::reopen(),
                _ => control.stop(ExitReason::Stopped(StopCause::Signal(signal))),
            }
        }
        if fds[4].revents != 0 {
            files::attend();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        path::Path,
        sync::atomic::{AtomicU32, Ordering},
        time::{Duration, Instant},
    };

    use super::*;
    use crate::{
        boot::tiny::elf,
        config::{CpuVendor, MemoryZone, SerialMode},
        control::{Parked, PauseReason, StopCause, Undeliverable},
        vcpu::{HookVerdict, VcpuHook},
    };

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
            payload.ram.renew(&[]);
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
