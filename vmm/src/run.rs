//! `mce-relay run`: boots the guest with the relay in it, and starts it again when it resets itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use kvm_ioctls::VcpuFd;
use log::{debug, error, warn};
use mce_relay::mca::Vendor;
use mce_relay::{
    AccessError, AoChannel, Event, ExitByte, FailureKind, FoundBy, Handle, KillPolicy, Ledger,
    PAGE_SHIFT, RamError, RamMap, Relay, StartError, State, VcpuPort, Verdict,
};

use crate::acpi::{AcpiError, Table};
use crate::allocator;
use crate::api::{Api, ApiError, Current, Running, VmInfo};
use crate::boot::BootError;
use crate::button::PowerButton;
use crate::by_hand::Injector;
use crate::cli::{ApiPath, LogPath, RunArgs, Serial, Switch};
use crate::config::{OnUndeliverable, SerialMode, VmConfig};
use crate::control::{Change, ExitReason, Panic, PauseReason, StopCause, Undeliverable, VmControl};
use crate::events::{self, Monitor, MonitorError, VmEvent};
use crate::files::{self, Appended, LogFile};
use crate::ghes::{self, Notify};
use crate::host;
use crate::mce_inject::{GuestMca, MceError, MceSetup, VcpuMca};
use crate::memory::{GuestRam, MemoryError, PAGE_SIZE, RamBlock};
use crate::names::{self, NameError, VmName};
use crate::records;
use crate::seccomp::{Filters, SeccompError, Thread};
use crate::serial::{self, SerialLines};
use crate::show;
use crate::sockets::BindError;
use crate::vcpu::{HookError, HookVerdict, RamAccess, RunFailure, VcpuHook, VcpuSetup};
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
    /// Its name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The VM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A file that is to be written to.
    #[error("cannot write to {}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The filters of system calls.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
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
    #[error("cannot set up the interrupt of the ACPI error source; --ao-channel mce needs none")]
    Source(#[source] std::io::Error),
    #[error("the VM has no relay yet")]
    Early,
}

/// Boots the guest, and again after each reset; returns the exit status that says how it ended.
///
/// # Errors
/// The guest could not be started.
pub fn run(args: &RunArgs) -> Result<u8, RunError> {
    // Before any thread is started, as is what follows.
    allocator::keep_small();
    // They inherit it, and only the relay's own takes AOs.
    KillPolicy::Late.set().map_err(RunError::Policy)?;
    let filters = Filters::new(args.seccomp.into())?;
    filters.apply(Thread::Main)?;
    files::survive_limits();
    check_files(args)?;
    let monitor_file = open_pipe(args)?;
    let ram = Arc::new(GuestRam::new(&args.zones())?);
    let monitor = Monitor::start(&filters)?;
    let current = Current::new(args.name.as_ref().map(VmName::as_str));
    let socket = match (&args.api_socket, &args.name) {
        (Some(ApiPath(path)), _) => Some(path.clone()),
        (None, Some(name)) => Some(names::claim(name)?),
        (None, None) => None,
    };
    // Dropped behind the API, which takes the socket away.
    let mut leaving = socket.as_deref().and_then(names::Leaving::of);
    let api = socket
        .as_ref()
        .map(|path| Api::start(path, current.clone(), monitor.hub().clone(), &filters));
    let _api = api.transpose().map_err(|error| whose(error, args))?;
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
        serial: [args.serial.0.clone(), args.serial2.0.clone()],
        cpu_vendor: args.cpu_vendor.into(),
    };
    // Whoever follows events is told that there are no more before the API goes.
    let _end = EndOfEvents(&monitor);
    let (outlets, ledger) = (Outlets { monitor_file, ..Outlets::default() }, Ledger::default());
    let mut machine =
        Machine { args, config, filters, socket, ram, monitor: &monitor, outlets, ledger };
    let ended = machine.run_to_its_end(&current);
    // What the guest said comes before what is said of it.
    machine.outlets = Outlets::default();
    let (status, how) = match &ended {
        Ok(reason) => (exit_status(reason), reason.to_string()),
        Err(error) => (1, show::with_causes(error)),
    };
    records::end(status, &how);
    monitor.emit(VmEvent::Ended { how, status });
    let reason = ended?;
    if matches!(reason, ExitReason::Stopped(StopCause::Console)) {
        // The guest has left the cursor somewhere, and the shell's prompt comes next.
        eprint!("\r\nmce-relay: {reason}\r\n");
    }
    if !matches!(reason, ExitReason::PowerOff | ExitReason::Stopped(_)) {
        error!("{reason}");
        if let Some(name) = args.name.as_ref().filter(|_| records::are_kept()) {
            eprintln!("mce-relay: {}", records::where_to_look(name.as_str()));
        }
    } else if let (Some(leaving), Some(name)) = (leaving.as_mut(), &args.name)
        && records::are_kept()
    {
        leaving.forget(name);
    }
    Ok(status)
}

/// Sees early that what is to be written to can be; it is touched when nothing else can go wrong.
fn check_files(args: &RunArgs) -> Result<(), RunError> {
    let of = |serial: &Serial| match &serial.0 {
        SerialMode::File(to) => Some(to.clone()),
        _ => None,
    };
    let monitor = args.event_monitor.as_ref().map(|path| path.0.clone());
    for LogFile { path, max_size } in
        [of(&args.serial), of(&args.serial2), monitor].into_iter().flatten()
    {
        let to = LogFile { path: path.clone(), max_size };
        to.check().map_err(|source| RunError::File { path, source })?;
    }
    Ok(())
}

/// Opens the event monitor's file if it is a FIFO or a device, which there is no harm in. A FIFO is waited for,
/// while a signal still ends this process.
fn open_pipe(args: &RunArgs) -> Result<Option<Appended>, MonitorError> {
    let Some(LogPath(to)) = &args.event_monitor else { return Ok(None) };
    match to.path.metadata() {
        Ok(found) if !found.is_file() => events::open(to).map(Some),
        _ => Ok(None),
    }
}

/// An API socket at which somebody answers is another VM of that name.
fn whose(error: ApiError, args: &RunArgs) -> RunError {
    match (&error, &args.name) {
        (ApiError::Bind { source: BindError::Answers, .. }, Some(name)) => {
            NameError::Taken(name.as_str().to_owned()).into()
        }
        (ApiError::Bind { source: BindError::Silent(peer), .. }, Some(name)) => {
            NameError::Silent { name: name.as_str().to_owned(), peer: peer.clone() }.into()
        }
        _ => error.into(),
    }
}

/// Ends the events when dropped.
struct EndOfEvents<'a>(&'a Monitor);

impl Drop for EndOfEvents<'_> {
    fn drop(&mut self) {
        self.0.hub().end();
    }
}

/// A guest that dies of a triple fault so soon after its start has not come up.
const QUICK: Duration = Duration::from_secs(1);
/// So many of them in a row: it will not come up.
const HOPELESS: u32 = 3;
/// How often the making of a VM is tried again after pages that were in its way have been replaced.
const TRIES: u32 = 3;

/// What stays when the guest starts over.
struct Machine<'a> {
    args: &'a RunArgs,
    config: VmConfig,
    filters: Filters,
    /// Of the API.
    socket: Option<PathBuf>,
    ram: Arc<GuestRam>,
    monitor: &'a Monitor,
    outlets: Outlets,
    ledger: Ledger,
}

/// What leads out of this process; opened when the first VM is all but made, and then kept.
#[derive(Default)]
struct Outlets {
    lines: Option<SerialLines>,
    /// Of the event monitor, if it had to be opened before.
    monitor_file: Option<Appended>,
    boot: u32,
}

impl Outlets {
    /// Opens what is not open yet, and notes the boot.
    fn open(
        &mut self,
        config: &VmConfig,
        hooks: &RelayHooks<'_>,
    ) -> Result<SerialLines, HookError> {
        let lines = match &self.lines {
            Some(lines) => lines.clone(),
            None => {
                let lines = serial::open_lines(&config.serial, hooks.filters)?;
                match (self.monitor_file.take(), &hooks.args.event_monitor) {
                    (Some(file), _) => hooks.monitor.write_on("file", file)?,
                    (None, Some(path)) => hooks.monitor.write_to(&path.0)?,
                    (None, None) => {}
                }
                hooks.keep_a_record();
                self.lines.insert(lines).clone()
            }
        };
        lines.iter().flatten().for_each(|line| line.note_boot(self.boot));
        Ok(lines)
    }
}

impl Machine<'_> {
    /// Boots the guest, and again after each reset; how it ended.
    fn run_to_its_end(&mut self, current: &Current) -> Result<ExitReason, VmError> {
        let (policy, no_reboot) = (self.args.on_undeliverable, self.args.no_reboot);
        let (mut boot, mut quick_faults) = (0, 0);
        loop {
            boot += 1;
            let (reason, ran) = self.boot(boot, current)?;
            let quick = ran < QUICK && matches!(reason, ExitReason::TripleFault { .. });
            quick_faults = if quick { quick_faults + 1 } else { 0 };
            if !starts_again(&reason, policy, no_reboot) || quick_faults >= HOPELESS {
                return Ok(reason);
            }
            let by_policy = matches!(reason, ExitReason::Undeliverable(_));
            if matches!(reason, ExitReason::TripleFault { .. }) {
                warn!("{reason}");
            }
            self.monitor.emit(VmEvent::Reset { reason: reason.to_string(), by_policy });
            self.renew();
        }
    }

    /// Boots the guest once and runs it to its end; how it ended, and after how long.
    fn boot(&mut self, boot: u32, current: &Current) -> Result<(ExitReason, Duration), VmError> {
        let args = self.args;
        self.outlets.boot = boot;
        let (vm, made) = self.make(current)?;
        let caps = made.setup.caps();
        let mcg_cap = format!("{:#x}", caps.mcg_cap);
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        self.monitor.emit(VmEvent::Booting {
            boot,
            unix_time: since_1970.unwrap_or(Duration::ZERO).as_secs_f64(),
            mcg_cap: mcg_cap.clone(),
            vendor: caps.vendor,
        });
        let relay = made.relay.handle();
        current.set(Some(Running {
            info: VmInfo {
                name: current.name(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                pid: vm.pid(),
                boot,
                vcpus: usize::from(self.config.cpus),
                vendor: caps.vendor,
                mcg_cap,
                mce_kill: args.mce_kill.into(),
                memory: vm.ram_blocks().iter().map(Into::into).collect(),
                ao_channel: args.ao_channel,
                ghes: notify(args),
                ao_pace: args.ao_pace.0,
                on_undeliverable: args.on_undeliverable,
                paused: false,
                pause_reason: None,
                panic: None,
                relay_alive: true,
                kernel: vm.kernel().into(),
            },
            relay: relay.clone(),
            control: vm.control().clone(),
            ram: Arc::clone(&self.ram),
            injector: made.injector.clone(),
            button: made.button.clone(),
        }));
        let begun = Instant::now();
        let reason = vm.run();
        let ran = begun.elapsed();
        current.set(None);
        // Here the relay goes, and with it its thread; the vCPU threads are gone already. What its
        // thread entered until then is in the ledger.
        drop(made);
        self.ledger = relay.ledger();
        Ok((reason, ran))
    }

    /// Builds the VM. A bad page in its way is entered, replaced, and it is tried again.
    fn make(&mut self, current: &Current) -> Result<(Vm, Made), VmError> {
        let mut tries = 0;
        loop {
            tries += 1;
            let mut hooks = RelayHooks {
                args: self.args,
                filters: &self.filters,
                socket: self.socket.as_deref(),
                monitor: self.monitor,
                current,
                outlets: &mut self.outlets,
                ledger: self.ledger.clone(),
                made: None,
            };
            match Vm::new(&self.config, &self.ram, &mut hooks) {
                Ok(vm) => {
                    let made = hooks.made.take();
                    return Ok((vm, made.ok_or_else(|| VmError::Hook(RelayError::Early.into()))?));
                }
                Err(error) => {
                    if let Some(made) = hooks.made.take() {
                        let relay = made.relay.handle();
                        drop(made);
                        self.ledger = relay.ledger();
                    }
                    let bad = self.ram.find_poison();
                    // Of huge pages an older kernel does not say it; they are asked one by one then.
                    let huge = self.ram.blocks().iter().any(|block| block.page_size > PAGE_SIZE);
                    let suspected = !bad.is_empty() || (huge && by_memory(&error));
                    if tries == TRIES || !suspected || !self.renew() {
                        return Err(error);
                    }
                    warn!("{error}; bad pages in guest memory have been replaced, trying again");
                }
            }
        }
    }

    /// Has the guest find good memory when it starts over, and writes down what came of it. Whether
    /// anything was bad.
    fn renew(&mut self) -> bool {
        let emit = self.monitor.for_relay();
        // With late kill, say, there are pages that nobody has heard of; they go the same way.
        enter(&mut self.ledger, self.ram.blocks(), &self.ram.find_poison(), &emit);
        let bad: Vec<u64> = self.ledger.pages().map(|page| page.gpa).collect();
        let renewed = self.ram.renew(&bad);
        enter(&mut self.ledger, self.ram.blocks(), &renewed.found, &emit);
        let was_bad = !renewed.healed.is_empty() || !renewed.removed.is_empty();
        let now = SystemTime::now();
        for gpa in renewed.healed {
            let forged = self.ledger.get(gpa).is_some_and(|page| page.is_forged());
            if self.ledger.heal(gpa, now) {
                emit(&Event::Healed { gpa, forged });
            }
        }
        for (gpa, len) in renewed.removed {
            let within: Vec<u64> =
                self.ledger.within(gpa..gpa + len).map(|page| page.gpa).collect();
            for gpa in within {
                self.ledger.set(gpa, State::Removed, now);
            }
            emit(&Event::Removed { gpa, len });
        }
        self.ledger.forget_predictions();
        was_bad
    }
}

/// Enters the `bad` pages, which no signal named, into the ledger, and with each what the host has lost with
/// it: one event for all of that.
fn enter(ledger: &mut Ledger, blocks: &[RamBlock], bad: &[u64], emit: &dyn Fn(&Event)) {
    let (kind, found_by, now) = (FailureKind::ActionOptional, FoundBy::Scan, SystemTime::now());
    for &named in bad {
        // The other pages of a huge page came with the first.
        if ledger.contains(named) {
            continue;
        }
        // What is no longer guest RAM is nobody's matter.
        let Some(block) = blocks.iter().find(|block| block.contains_gpa(named)) else { continue };
        let extent = block.page_size;
        let lsb = u8::try_from(extent.trailing_zeros()).unwrap_or(PAGE_SHIFT);
        let (start, hva) =
            ((named - block.gpa) / extent * extent, |gpa| block.hva + (gpa - block.gpa));
        let all = (0..extent / PAGE_SIZE).map(|page| block.gpa + start + page * PAGE_SIZE);
        let pages =
            all.filter(|gpa| ledger.enter(*gpa, hva(*gpa), lsb, kind, found_by, now)).count();
        let (gpa, hva) = (named, hva(named));
        emit(&Event::Seen { gpa, hva, kind, found_by, extent, pages });
    }
}

/// Whether it may be bad memory that a VM could not be made for.
fn by_memory(error: &VmError) -> bool {
    matches!(
        error,
        VmError::Boot(
            BootError::Load { .. } | BootError::CopyInitramfs { .. } | BootError::Write { .. }
        ) | VmError::Acpi(AcpiError::Write(_))
    )
}

/// Whether a guest that ended so is to be started again.
fn starts_again(reason: &ExitReason, policy: OnUndeliverable, no_reboot: bool) -> bool {
    let wanted = match reason {
        ExitReason::Reset | ExitReason::ResetBy(_) | ExitReason::TripleFault { .. } => true,
        ExitReason::Undeliverable(_) => policy == OnUndeliverable::Reset,
        _ => false,
    };
    wanted && !no_reboot
}

/// How the guest is notified by its error source; `None` when it is given none.
fn notify(args: &RunArgs) -> Option<Notify> {
    if args.ao_channel == AoChannel::Mce {
        return None;
    }
    Some(args.ghes_poll.map_or(Notify::Interrupt, |millis| Notify::Poll { millis }))
}

/// What a user can do about a paused VM.
fn way_on(reason: &PauseReason, socket: Option<&Path>) -> String {
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
fn way_on_from_panic(socket: Option<&Path>) -> String {
    let Some(path) = socket else {
        return "if it stands still, SIGTERM ends it".to_owned();
    };
    let path = path.display();
    format!(
        "if it stands still, `mce-relay reset --api-socket path={path}` starts it over and \
         `mce-relay shutdown --now --api-socket path={path}` ends it"
    )
}

/// The exit status of `mce-relay run` for `reason`; the help of the command lists them.
fn exit_status(reason: &ExitReason) -> u8 {
    match reason {
        ExitReason::PowerOff | ExitReason::Stopped(StopCause::Console | StopCause::Request(_)) => 0,
        ExitReason::Fatal(_) => 1,
        ExitReason::Reset | ExitReason::ResetBy(_) => 3,
        ExitReason::TripleFault { .. } => 4,
        ExitReason::KvmError { .. } => 5,
        ExitReason::Undeliverable(_) => 6,
        // As a shell would say it; signals are 1 to 64.
        ExitReason::Stopped(StopCause::Signal(signal)) => {
            128 + u8::try_from(*signal).unwrap_or_default()
        }
    }
}

/// What the relay needs of a VM while it is built.
struct RelayHooks<'a> {
    args: &'a RunArgs,
    filters: &'a Filters,
    socket: Option<&'a Path>,
    monitor: &'a Monitor,
    current: &'a Current,
    outlets: &'a mut Outlets,
    ledger: Ledger,
    made: Option<Made>,
}

/// The fields go in this order: the relay before the memory that it knows the addresses of.
struct Made {
    setup: MceSetup,
    relay: Arc<Relay>,
    control: VmControl,
    injector: Injector,
    button: PowerButton,
    _ram: Arc<GuestRam>,
}

impl RelayHooks<'_> {
    /// Writes down what a named VM is to leave. It runs without, too.
    fn keep_a_record(&self) {
        let Some(name) = &self.args.name else { return };
        let dir = names::record_dir(name);
        if let Err(error) = records::begin(&dir, name.as_str(), self.monitor, self.current) {
            warn!(
                "cannot keep the events and the ledger in {}: {error}; they go with the VM",
                dir.display()
            );
        }
    }

    fn make(&self, vm: &VmView<'_>) -> Result<Made, RelayError> {
        // An AMD-style guest's CPUID always shows SUCCOR: see `cpuid`.
        let lmce = self.args.lmce == Switch::On;
        let setup = MceSetup::new(vm.kvm, vm.vendor, lmce, vm.vendor == Vendor::Amd)?;
        setup.prepare_vm(vm.vm)?;
        let filters = self.filters.clone();
        let mut relay = Relay::builder(RamMap::new(vm.ram.regions())?)
            .vcpus(usize::from(vm.cpus))
            .machine_checks(setup.caps())
            .policy(self.args.mce_kill.into())
            .pace(self.args.ao_pace.0)
            .ao_channel(self.args.ao_channel)
            .ledger(self.ledger.clone())
            .on_thread(move || Ok(filters.apply(Thread::Relay)?))
            .observer(self.monitor.for_relay());
        if let Some(notify) = notify(self.args) {
            relay = relay.error_source(ghes::source(vm.vm, notify).map_err(RelayError::Source)?);
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
        Ok(Made { setup, relay, control, injector, button, _ram: Arc::clone(vm.ram) })
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
        Ok(notify(self.args).map(ghes::table).transpose()?.into_iter().collect())
    }

    fn serial_lines(&mut self, config: &VmConfig) -> Result<SerialLines, HookError> {
        let mut outlets = std::mem::take(self.outlets);
        let lines = outlets.open(config, self);
        *self.outlets = outlets;
        lines
    }

    fn vcpu(&mut self, index: u8) -> Result<Box<dyn VcpuSetup>, HookError> {
        let made = self.made.as_ref().ok_or(RelayError::Early)?;
        Ok(Box::new(RelaySetup {
            index,
            setup: made.setup,
            relay: Arc::clone(&made.relay),
            control: made.control.clone(),
            injector: made.injector.clone(),
            on_undeliverable: self.args.on_undeliverable,
            filters: self.filters.clone(),
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
        let immediate_exit = &raw mut vcpu.get_kvm_run().immediate_exit;
        let (control, index, on_undeliverable) = (self.control, self.index, self.on_undeliverable);
        let kick = move || control.kick(index);
        // SAFETY: the byte lies in the vCPU's kvm_run mapping, and the vCPU's owner drops the hook
        // with the port in it before the vCPU (see `Vcpu::run`).
        let exit = unsafe { ExitByte::new(immediate_exit) };
        let port = self.relay.attach(usize::from(index), exit, kick)?;
        let injector = self.injector;
        self.filters.apply(Thread::Vcpu)?;
        let handle = self.relay.handle();
        Ok(Box::new(RelayHook { index, on_undeliverable, guest, port, handle, injector }))
    }
}

/// One vCPU on its thread.
struct RelayHook {
    index: u8,
    on_undeliverable: OnUndeliverable,
    guest: GuestMca,
    port: VcpuPort,
    handle: Handle,
    injector: Injector,
}

impl VcpuHook for RelayHook {
    fn wants_attention(&self) -> bool {
        self.port.wants_attention() || self.injector.wants(self.index)
    }

    fn before_run(&mut self, vcpu: &mut VcpuFd) -> HookVerdict {
        // First, so that the relay finds the bank as the guest will.
        if self.injector.wants(self.index) {
            self.injector.serve(self.index, &mut VcpuMca::new(&self.guest, vcpu));
        }
        match self.port.before_run(&mut VcpuMca::new(&self.guest, vcpu)) {
            Verdict::Run => HookVerdict::Run,
            Verdict::Undeliverable { gpa, why, rip } => {
                let what = Undeliverable { vcpu: self.index, gpa, why: why.to_string(), rip };
                match self.on_undeliverable {
                    OnUndeliverable::Pause => HookVerdict::Pause(PauseReason::Undeliverable(what)),
                    // Whoever runs the VM knows which: see `starts_again`.
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
            // Not poison, so there is nothing to tell the guest of; and nothing for it to go on with.
            let rip = vcpu.get_regs().map_or(0, |regs| regs.rip);
            let what = format!("{} (RIP {rip:#x})", show::with_causes(&error));
            return HookVerdict::Stop(ExitReason::KvmError { vcpu: self.index, what });
        }
        if !self.port.mmio_hit(access.gpa)
            && let Some(bytes) = access.store
            && let Err(error) = self.handle.write(access.gpa, &bytes[..access.len])
        {
            // It went bad just now, and is in the ledger.
            debug!("vCPU {}: a store to GPA {:#x} is lost: {error}", self.index, access.gpa);
        }
        HookVerdict::Run
    }

    fn run_failed(&mut self, _: &mut VcpuFd, failure: RunFailure) -> Option<HookVerdict> {
        // A KVM that says it so instead of by SIGBUS. What is not bad is somebody else's matter.
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

    fn untold() -> ExitReason {
        ExitReason::Undeliverable(Undeliverable {
            vcpu: 0,
            gpa: 0x1000,
            why: "test".into(),
            rip: None,
        })
    }

    #[test]
    fn a_huge_page_is_entered_as_a_whole_and_said_once() {
        let huge = 2 << 20;
        // The block does not begin at a multiple of its pages in the guest.
        let (small, gpa) = (RamBlock::new(0, 0x3000, 0x7000_0000), 0x3000);
        let large = RamBlock { page_size: huge, ..RamBlock::new(gpa, 4 * huge, 0x7e00_0000_0000) };
        let blocks = [small, large];
        let seen = std::cell::RefCell::new(Vec::new());
        let emit = |event: &Event| match event {
            Event::Seen { gpa, hva, extent, pages, found_by: FoundBy::Scan, .. } => {
                seen.borrow_mut().push((*gpa, *hva, *extent, *pages));
            }
            other => panic!("{other}"),
        };
        let mut ledger = Ledger::default();
        let within = gpa + huge;
        let bad: Vec<u64> = (0..512).map(|page| within + page * PAGE_SIZE).collect();
        enter(&mut ledger, &blocks, &[&[0x1000], &bad[..]].concat(), &emit);
        let hva = large.hva + huge;
        assert_eq!(*seen.borrow(), [(0x1000, 0x7000_1000, 4096, 1), (within, hva, huge, 512)]);
        assert_eq!(ledger.len(), 513);
        assert!(
            ledger
                .pages()
                .skip(1)
                .all(|page| page.lsb == 21 && page.hva - page.gpa == hva - within)
        );
        enter(&mut ledger, &blocks, &bad, &emit);
        assert_eq!(seen.borrow().len(), 2, "known already");
    }

    #[test]
    fn what_may_be_for_bad_memory() {
        let boot = |error: BootError| by_memory(&VmError::Boot(error));
        // A file that is damaged looks the same; then nothing is found bad, and it is not tried again.
        let cause = "invalid kernel start address".to_owned();
        assert!(boot(BootError::Load { path: "x".into(), ram: 1 << 20, cause }));
        let source = AccessError::Poisoned { gpa: 0x1000 };
        assert!(boot(BootError::Write { what: "command line", gpa: 0x1000, source }));
        assert!(!boot(BootError::EmptyInitramfs { path: "x".into() }));
        assert!(!boot(BootError::Hole { gpa: 0x1000 }));
    }

    #[test]
    fn who_starts_again() {
        use OnUndeliverable::{Pause, Reset, Stop};
        for policy in [Stop, Pause, Reset] {
            assert!(starts_again(&ExitReason::Reset, policy, false));
            let by_the_user = || ExitReason::ResetBy(StopCause::Request("test".to_owned()));
            assert!(starts_again(&by_the_user(), policy, false));
            assert_eq!(starts_again(&untold(), policy, false), policy == Reset);
            let triple_fault = ExitReason::TripleFault { vcpu: 0 };
            assert!(starts_again(&triple_fault, policy, false));
            assert!(!starts_again(&ExitReason::PowerOff, policy, false));
            for reason in [ExitReason::Reset, by_the_user(), triple_fault, untold()] {
                assert!(!starts_again(&reason, policy, true), "{reason:?} with --no-reboot");
            }
        }
    }

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

    #[test]
    fn every_end_has_its_status() {
        let why = String::new;
        let ends = [
            (ExitReason::PowerOff, 0),
            (ExitReason::Stopped(StopCause::Request(why())), 0),
            (ExitReason::Fatal(why()), 1),
            (ExitReason::Reset, 3),
            (ExitReason::ResetBy(StopCause::Request(why())), 3),
            (ExitReason::TripleFault { vcpu: 0 }, 4),
            (ExitReason::KvmError { vcpu: 0, what: why() }, 5),
            (untold(), 6),
            (ExitReason::Stopped(StopCause::Signal(15)), 143),
        ];
        for (reason, status) in ends {
            assert_eq!(exit_status(&reason), status, "{reason:?}");
        }
    }
}
