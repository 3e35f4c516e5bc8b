//! The kernel's mce-inject module: an error in a machine-check bank of the host itself.
//!
//! The module writes the bank's registers on one processor and raises a machine check there (`do_inject` in
//! `arch/x86/kernel/cpu/mce/inject.c`, flags "hw"). The record is a deferred error, which the handler leaves to the
//! poll (`machine_check_poll` in `core.c`), as it would one of a memory controller. The poll grades it
//! (`mce_severity_amd`) and calls `memory_failure` for the page. So everything the host does is real, except for the
//! origin of the registers' contents. The module's "sw" mode does not work: it logs a record without a severity, which
//! never gets to `memory_failure`.
//!
//! Intel processors do not let software write a bank, and their machine checks go to all processors. When one comes on
//! a single processor without MCG_STATUS.LMCES, as the module raises it (`int $18`), the handler waits one second for
//! all others (`mce_start` in `core.c`) and then panics the host. So this needs an AMD processor, or a compatible one.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mce_relay::mca::record;
use mce_relay::{Form, PAGE_SHIFT};
use mce_relay_vmm::host::error::{HostError, file_error};
use mce_relay_vmm::host::page_frames::PageFlags;

/// Its files, each of which takes one value; writing `bank` triggers the injection.
const DIR: &str = "/sys/kernel/debug/mce-inject";
/// How often the host polls its banks, in seconds; there is one file for all processors.
const CHECK_INTERVAL: &str = "/sys/devices/system/machinecheck/machinecheck0/check_interval";
/// Has the vendor of the host's processors.
const CPUINFO: &str = "/proc/cpuinfo";
/// Vendors whose machine checks are local to one processor, and whose banks can be written by software
/// (`monarch_timeout` in `core.c`, `prepare_msrs` in `inject.c`).
const VENDORS: [&str; 2] = ["AuthenticAMD", "HygonGenuine"];
/// The kind of injection, into the hardware; the kernel takes the last character for a line feed.
const HARDWARE: &str = "hw\n";
/// The processor whose bank is written; this one always exists.
const CPU: &str = "0";
/// The poll comes within a second, and the handling of the page right after it.
const PATIENCE: Duration = Duration::from_secs(10);

/// The module, with the host polling its banks every second until this is dropped.
#[derive(Debug)]
pub struct X86Injector {
    flags: PageFlags,
    /// How many banks the host has.
    banks: u8,
    interval: String,
}

fn put(path: &Path, value: &str) -> Result<(), HostError> {
    let mend = "as root: modprobe mce-inject, and mount debugfs at /sys/kernel/debug \
                (CONFIG_X86_MCE_INJECT)";
    std::fs::write(path, value).map_err(file_error("write to", path, mend))
}

/// The vendor of the processors in `cpuinfo`.
fn vendor(cpuinfo: &str) -> &str {
    let mut lines = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    lines.find(|(name, _)| name.trim() == "vendor_id").map_or("(unknown)", |(_, id)| id.trim())
}

fn check_vendor(cpuinfo: &str) -> Result<(), HostError> {
    match vendor(cpuinfo) {
        vendor if VENDORS.contains(&vendor) => Ok(()),
        vendor => Err(HostError::Processor { vendor: vendor.to_owned() }),
    }
}

/// Checks that this host survives a machine check raised by the module.
///
/// # Errors
/// It would not, or that is not known.
pub fn check_processor() -> Result<(), HostError> {
    let mend = "it says whether this host's processors are AMD's; mount procfs at /proc";
    let cpuinfo =
        std::fs::read_to_string(CPUINFO).map_err(file_error("read", Path::new(CPUINFO), mend))?;
    check_vendor(&cpuinfo)
}

impl X86Injector {
    /// Prepares the module.
    ///
    /// # Errors
    /// It is not there, this user may not use it, or the host would not survive it.
    pub fn open() -> Result<Self, HostError> {
        check_processor()?;
        put(&Path::new(DIR).join("flags"), HARDWARE)?;
        let flags = PageFlags::open()?;
        let interval = Path::new(CHECK_INTERVAL);
        let mend = "run it as root on a kernel with CONFIG_X86_MCE";
        let before = std::fs::read_to_string(interval)
            .map_err(file_error("read", interval, mend))?
            .trim()
            .to_owned();
        let dir = interval.parent().unwrap_or(interval);
        let banks =
            (0..u8::MAX).take_while(|bank| dir.join(format!("bank{bank}")).exists()).count();
        let banks = u8::try_from(banks).unwrap_or(u8::MAX);
        put(interval, "1")?;
        Ok(Self { flags, banks, interval: before })
    }

    /// Makes the host find page frame `pfn` bad, and waits until it has. One at a time: a bank holds one record.
    ///
    /// # Errors
    /// The module refuses. If the host does not take the page out of use, only its flags show it.
    pub fn inject(&self, pfn: u64) -> Result<(), HostError> {
        let file = |name: &str| -> PathBuf { Path::new(DIR).join(name) };
        let mut refused = None;
        // Some banks of scalable MCA do not exist (ENODEV). The last ones belong to the memory controllers.
        for bank in (0..self.banks).rev() {
            let error = record(Form::Deferred, pfn << PAGE_SHIFT, bank, false);
            put(&file("flags"), HARDWARE)?;
            put(&file("cpu"), CPU)?;
            put(&file("status"), &format!("{:#x}", error.status))?;
            put(&file("addr"), &format!("{:#x}", error.addr))?;
            put(&file("misc"), &format!("{:#x}", error.misc))?;
            match put(&file("bank"), &bank.to_string()) {
                Ok(()) => {
                    let start = Instant::now();
                    while !self.flags.is_poisoned(pfn)? && start.elapsed() < PATIENCE {
                        std::thread::sleep(Duration::from_millis(20));
                    }
                    return Ok(());
                }
                Err(error) => refused = Some(error),
            }
        }
        let none = || HostError::File {
            what: "find a bank with",
            path: CHECK_INTERVAL.into(),
            mend: "this host shows no machine-check banks",
            source: std::io::Error::from_raw_os_error(libc::ENODEV),
        };
        Err(refused.unwrap_or_else(none))
    }
}

impl Drop for X86Injector {
    fn drop(&mut self) {
        if let Err(error) = put(Path::new(CHECK_INTERVAL), &self.interval) {
            log::error!("the host's check_interval is not as it was ({}): {error}", self.interval);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hosts_that_survive_it() {
        for (cpuinfo, goes) in [
            ("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n", true),
            ("vendor_id\t: HygonGenuine\n", true),
            ("processor\t: 0\nvendor_id\t: GenuineIntel\n", false),
            // Only the vendor counts, not the model name.
            ("vendor_id\t: GenuineIntel\nmodel name\t: not AuthenticAMD\n", false),
            ("vendor_id\t: CentaurHauls\n", false),
            ("processor\t: 0\n", false),
            ("", false),
        ] {
            let checked = check_vendor(cpuinfo);
            assert_eq!(checked.is_ok(), goes, "{cpuinfo:?}: {checked:?}");
            let Err(error) = checked else { continue };
            let words = error.to_string();
            for word in [vendor(cpuinfo), "AuthenticAMD", "hwpoison-inject"] {
                assert!(words.contains(word), "{word}: {words}");
            }
        }
    }
}
