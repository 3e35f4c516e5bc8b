//! Boots a kernel with nothing else around it: `boot KERNEL INITRAMFS [CPUS [MIB [VENDOR [CMDLINE [COM2]]]]]`.
//!
//! VENDOR is host, intel or amd; COM2 is the path of a socket to make. A guest that resets itself is started over, as often as it likes.

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use mce_relay_vmm::config::{CpuVendor, MemoryZone, SerialMode, VmConfig};
use mce_relay_vmm::machine::lifecycle::reasons::ExitReason;
use mce_relay_vmm::machine::memory::guest_ram::GuestRam;
use mce_relay_vmm::machine::vm::Vm;
use mce_relay_vmm::machine::vm::hooks::NoHooks;

fn main() -> ExitCode {
    env_logger::init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprintln!("  caused by: {error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let kernel =
        args.next().ok_or("usage: boot KERNEL INITRAMFS [CPUS [MIB [VENDOR [CMDLINE [COM2]]]]]")?;
    let initramfs = args.next();
    let cpus = args.next().map_or(Ok(2), |text| text.parse())?;
    let mib: u64 = args.next().map_or(Ok(512), |text| text.parse())?;
    let cpu_vendor = match args.next().as_deref() {
        None | Some("host") => CpuVendor::Host,
        Some("intel") => CpuVendor::Intel,
        Some("amd") => CpuVendor::Amd,
        Some(other) => return Err(format!("vendor {other:?} is not host, intel or amd").into()),
    };
    let cmdline = args.next().unwrap_or_else(|| "console=ttyS0 reboot=a panic=-1".into());
    let com2 = args.next().map_or(SerialMode::Off, |path| SerialMode::Socket(path.into()));
    let config = VmConfig {
        kernel: kernel.into(),
        initramfs: initramfs.filter(|path| path != "-").map(Into::into),
        cmdline,
        cpus,
        serial: [SerialMode::Tty, com2],
        devices: Vec::new(),
        cpu_vendor,
    };
    let ram = Arc::new(GuestRam::new(&[MemoryZone::new(mib << 20)])?);
    loop {
        let start = Instant::now();
        let vm = Vm::new(&config, &ram, &mut NoHooks)?;
        eprintln!("[boot] built in {:?}, guest vendor {:?}", start.elapsed(), vm.vendor());
        let reason = vm.run();
        eprintln!("[boot] {reason} after {:?}", start.elapsed());
        match reason {
            ExitReason::Reset => drop(ram.heal(&[])),
            ExitReason::PowerOff => return Ok(()),
            other => return Err(other.to_string().into()),
        }
    }
}
