//! The firmware's own way to inject an error (ACPI's EINJ table, by the kernel's module einj): a real one, in the memory
//! controller, for hosts whose firmware offers it.
//!
//! The error is an uncorrected one that is not fatal. The firmware triggers it, and reports it as it reports any such error
//! that nobody has touched yet, so that the kernel calls `memory_failure` for the page (Documentation/firmware-guide/acpi/
//! apei/einj.rst in the kernel's sources). For the kernel it is a hardware error: `unpoison` is refused from then on.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mce_relay::PAGE_SHIFT;
use mce_relay_vmm::host::error::{HostError, file_error};
use mce_relay_vmm::host::page_frames::PageFlags;

/// Its files, each of which takes one value; writing `error_inject` injects.
pub const DIR: &str = "/sys/kernel/debug/apei/einj";
/// "Memory Uncorrectable non-fatal" among the types of errors (ACPI 6.5, 18.6.4).
const MEMORY_UNCORRECTABLE: u32 = 1 << 4;
/// `param1` is an address and `param2` its mask (ACPI 6.5, 18.6.5: flags of SET_ERROR_TYPE_WITH_ADDRESS).
const MEMORY_ADDRESS: u32 = 1 << 1;
/// The firmware may take a while to report the error.
const PATIENCE: Duration = Duration::from_secs(10);

/// The module, ready to inject.
#[derive(Debug)]
pub struct Injector {
    dir: PathBuf,
    flags: PageFlags,
}

fn mend(path: &Path, what: &'static str) -> impl FnOnce(std::io::Error) -> HostError {
    let mend = "as root: modprobe einj (CONFIG_ACPI_APEI_EINJ), and mount debugfs at /sys/kernel/debug; it takes a host \
                whose firmware has an EINJ table (often a switch in its set-up) and a kernel that is not locked down";
    file_error(what, path, mend)
}

/// Checks that the firmware whose files are in `dir` injects errors of memory.
///
/// # Errors
/// It does not, or there are no such files.
pub fn check(dir: &Path) -> Result<(), HostError> {
    let path = dir.join("available_error_type");
    let types = std::fs::read_to_string(&path).map_err(mend(&path, "read"))?;
    let is_it = |line: &str| {
        let number = line.split_whitespace().next().and_then(|word| word.strip_prefix("0x"));
        number.is_some_and(|digits| u32::from_str_radix(digits, 16) == Ok(MEMORY_UNCORRECTABLE))
    };
    match types.lines().any(is_it) {
        true => Ok(()),
        false => Err(HostError::ErrorTypes { path }),
    }
}

impl Injector {
    /// Prepares the module.
    ///
    /// # Errors
    /// It is not there, this user may not use it, or the firmware does not inject errors of memory.
    pub fn open() -> Result<Self, HostError> {
        Self::at(DIR.into(), PageFlags::open()?)
    }

    fn at(dir: PathBuf, flags: PageFlags) -> Result<Self, HostError> {
        check(&dir)?;
        Ok(Self { dir, flags })
    }

    /// Has the firmware make page frame `pfn` go bad, and waits until the host has found it.
    ///
    /// # Errors
    /// The firmware or the kernel refuses. If the host does not take the page out of use, only its flags show it.
    pub fn inject(&self, pfn: u64) -> Result<(), HostError> {
        self.ask(pfn)?;
        let start = Instant::now();
        while !self.flags.is_poisoned(pfn)? && start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn ask(&self, pfn: u64) -> Result<(), HostError> {
        let page = pfn << PAGE_SHIFT;
        let mask = u64::MAX << PAGE_SHIFT;
        for (name, value) in [
            ("error_type", format!("{MEMORY_UNCORRECTABLE:#x}")),
            ("flags", format!("{MEMORY_ADDRESS:#x}")),
            ("param1", format!("{page:#x}")),
            ("param2", format!("{mask:#x}")),
            // The firmware is to trigger it as well: nobody has touched the page.
            ("notrigger", "0".into()),
            ("error_inject", "1".into()),
        ] {
            let path = self.dir.join(name);
            let refused = "the firmware or the kernel refuses it (the kernel's log may say why)";
            std::fs::write(&path, value).map_err(file_error("write to", &path, refused))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(types: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("available_error_type"), types).unwrap();
        dir
    }

    #[test]
    fn only_firmware_that_injects_errors_of_memory() {
        let all = "0x00000008\tMemory Correctable\n0x00000010\tMemory Uncorrectable non-fatal\n";
        check(dir(all).path()).unwrap();
        for types in ["", "0x00000008\tMemory Correctable\n", "0x00000100\tx\n", "16\tx\n"] {
            let error = check(dir(types).path()).unwrap_err().to_string();
            assert!(error.contains("hwpoison-inject"), "{types:?}: {error}");
        }
        let error = check(Path::new("/nowhere")).unwrap_err().to_string();
        assert!(error.contains("/nowhere/available_error_type"), "{error}");
        assert!(error.contains("modprobe einj"), "{error}");
    }

    #[test]
    fn the_page_alone_is_named() {
        let Ok(flags) = PageFlags::open() else {
            println!("SKIPPED: needs /proc/kpageflags");
            return;
        };
        let dir = dir("0x00000010\tMemory Uncorrectable non-fatal\n");
        let injector = Injector::at(dir.path().into(), flags).unwrap();
        injector.ask(0x1_2345).unwrap();
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let all = ["error_type", "flags", "param1", "param2", "notrigger", "error_inject"];
        let expected = ["0x10", "0x2", "0x12345000", "0xfffffffffffff000", "0", "1"];
        assert_eq!(all.map(read), expected);
    }
}
