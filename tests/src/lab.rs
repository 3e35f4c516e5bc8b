//! The lab as seen from inside, and what tests ask of the host they run on.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;

/// Whether this runs in the lab (or on a host that was given over to it by MCE_RELAY_NATIVE=1).
pub fn may_poison() -> Result<(), String> {
    let set = |name| std::env::var(name).is_ok_and(|value| value == "1");
    if set("MCE_RELAY_LAB") || set("MCE_RELAY_NATIVE") {
        Ok(())
    } else {
        Err("poisons real memory: runs in the lab only (make test, or make lab CMD=…)".to_owned())
    }
}

/// Whether /dev/kvm is usable here.
pub fn has_kvm() -> Result<(), String> {
    kvm_ioctls::Kvm::new().map(drop).map_err(|error| format!("needs /dev/kvm: {error}"))
}

/// Whether the lab's emulated hardware can be asked for machine checks.
pub fn has_hardware() -> Result<(), String> {
    match std::env::var_os("MCE_RELAY_LAB_MONITOR") {
        Some(_) => Ok(()),
        None => Err("needs the lab's emulated hardware (MCE_RELAY_LAB_MONITOR)".to_owned()),
    }
}

/// Puts an error into a bank of the emulated host's own CPU 0. All values as the hardware has them.
pub fn hardware_error(bank: u8, status: u64, mcg_status: u64, addr: u64, misc: u64) {
    let path = std::env::var_os("MCE_RELAY_LAB_MONITOR").expect("the lab's monitor");
    let mut monitor = OpenOptions::new().write(true).open(path).unwrap();
    writeln!(monitor, "mce 0 {bank} {status:#x} {mcg_status:#x} {addr:#x} {misc:#x}").unwrap();
}

/// Makes this host's kernel poll its machine-check banks every `seconds`.
pub fn poll_banks(seconds: u32) {
    let path = "/sys/devices/system/machinecheck/machinecheck0/check_interval";
    std::fs::write(path, seconds.to_string()).unwrap();
}

/// The page tables of a process, as the kernel shows them.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Those of `pid`.
    pub fn of(pid: u32) -> Self {
        let path = format!("/proc/{pid}/pagemap");
        Self(File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}")))
    }

    /// The host-physical address behind `hva`.
    pub fn physical(&self, hva: u64) -> u64 {
        // Documentation/admin-guide/mm/pagemap.rst: bit 63 present, bits 54:0 page frame number.
        let mut entry = [0; 8];
        self.0.read_exact_at(&mut entry, (hva >> 12) * 8).unwrap();
        let entry = u64::from_ne_bytes(entry);
        let pfn = entry & ((1 << 55) - 1);
        assert!(entry >> 63 == 1 && pfn != 0, "no page behind HVA {hva:#x}: {entry:#x}");
        pfn << 12
    }
}

/// The host-physical address behind `hva` of process `pid`.
pub fn host_physical(pid: u32, hva: u64) -> u64 {
    Pagemap::of(pid).physical(hva)
}
