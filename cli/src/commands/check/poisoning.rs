//! The means by which pages can be made to go bad. None of them is tried for real.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use mce_relay_vmm::relaying::uffd::Uffd;

use super::gap::{Found, Gap, read, sysctl, there};
use super::section::{Section, Standing};
use super::{failure, privileges};
use crate::poison::host::{einj, filter, host_mce_injector, hwpoison_inject};

const MCELOG: &str = "/dev/mcelog";
const MCE_INJECT: &str = "/sys/kernel/debug/mce-inject";
/// The switch of hwpoison-inject's filters, and the filter that needs CONFIG_MEMCG.
const FILTER_SWITCH: &str = "/sys/kernel/debug/hwpoison/corrupt-filter-enable";
const MEMCG_FILTER: &str = "/sys/kernel/debug/hwpoison/corrupt-filter-memcg";

/// How to load `module`, whose files are in debugfs, if the kernel was built with `config`.
fn load(module: &str, config: &str) -> String {
    let load = format!("as root: modprobe {module} ({config})");
    match privileges::has_debugfs() {
        true => load,
        false => format!("{}; then {load}", privileges::debugfs_mend()),
    }
}

pub(super) fn look(section: &mut Section<'_>) {
    use Standing::Missing;

    let inject = there(hwpoison_inject::CORRUPT_PFN);
    // Without the module this says that the module is missing; without the kernel's part that that is.
    let is_loaded = inject.is_ok();
    let handles = sysctl("memory_failure_early_kill");
    let load_hwpoison = match handles {
        Ok(_) => load("hwpoison-inject", "CONFIG_HWPOISON_INJECT"),
        Err(_) => "boot a kernel with CONFIG_MEMORY_FAILURE and CONFIG_HWPOISON_INJECT".to_owned(),
    };
    let mend = |mend: &str| if is_loaded { mend.to_owned() } else { load_hwpoison.clone() };
    section.add("hwpoison-inject", inject, Missing, load_hwpoison.clone());
    section.add(
        "hwpoison filter",
        filter_in_force(),
        Missing,
        mend("as root: echo 0 > /sys/kernel/debug/hwpoison/corrupt-filter-enable"),
    );
    section.add(
        "memcg filter",
        there(MEMCG_FILTER),
        Missing,
        mend("use a host kernel with CONFIG_MEMCG to hold back other processes' pages"),
    );
    section.add("unpoison", unpoison(), Missing, load_hwpoison.clone());
    let survives =
        host_mce_injector::check_processor().map_err(|error| Gap::of("mce-inject", &error));
    let mend = match survives {
        Ok(()) => load("mce-inject", "CONFIG_X86_MCE_INJECT"),
        Err(_) => {
            "optional: use hwpoison-inject, or a host with processors of AMD's make".to_owned()
        }
    };
    section.add("mce-inject", survives.and_then(|()| there(MCE_INJECT)), Missing, mend);
    let offers = |dir| match einj::check(Path::new(einj::DIR)) {
        Ok(()) => Ok(dir),
        Err(error) => Err(Gap::of("einj", &error)),
    };
    section.add(
        "einj",
        there(einj::DIR).and_then(offers),
        Missing,
        "optional: a host whose firmware has ACPI's EINJ; as root: modprobe einj",
    );
    section.add(
        MCELOG,
        there(MCELOG),
        Missing,
        "optional, for the mce-inject tool: a host kernel with CONFIG_X86_MCELOG_LEGACY",
    );
    section.add(
        "madvise",
        madvise(),
        Missing,
        match handles {
            Ok(_) => "be root of the host itself (CAP_SYS_ADMIN)",
            Err(_) => "boot a kernel with CONFIG_MEMORY_FAILURE",
        },
    );
    let faults = Uffd::with_features(0).map(drop);
    let faults_mend = faults.as_ref().err().map_or("", uffd_mend);
    section.add("userfaultfd", user_faults(faults), Missing, faults_mend);
    section.add(
        "UFFDIO_POISON",
        uffd_poison(),
        Missing,
        match faults_mend {
            "" => "use Linux 6.6 or newer",
            mend => mend,
        },
    );
    section.add(
        "uffd of kernel faults",
        kernel_faults(),
        Missing,
        match sysctl("unprivileged_userfaultfd") {
            Ok(_) => {
                "optional, nothing here needs it; as root: sysctl vm.unprivileged_userfaultfd=1"
            }
            Err(_) => "optional, nothing here needs it",
        },
    );
}

/// What to do about the error of userfaultfd(2).
fn uffd_mend(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => "use a host kernel with CONFIG_USERFAULTFD",
        Some(libc::EPERM | libc::EACCES) => {
            "allow userfaultfd in the seccomp filter (of a container: --security-opt seccomp=PROFILE)"
        }
        _ => "use Linux 5.11 or newer",
    }
}

/// Whether poisoned pages can be taken back into use. The kernel does not say whether it still does that.
fn unpoison() -> Found {
    let words = there(hwpoison_inject::UNPOISON_PFN)?;
    let meminfo = read("/proc/meminfo").unwrap_or_default();
    still_unpoisons(&words, failure::hardware_corrupted(&meminfo).unwrap_or("0 kB"))
}

/// The same, when `lost` memory is out of use.
fn still_unpoisons(words: &str, lost: &str) -> Found {
    const REFUSED: &str =
        "refused from the first hardware error on, and mce-inject's count as such";
    match lost {
        "0 kB" => Ok(format!("{words}; {REFUSED}")),
        lost => Err(Gap::Unknown {
            found: format!(
                "{words}; {REFUSED}: {lost} are out of use, and the kernel does not say by what"
            ),
            mend: "try it on one page (mce-relay unpoison); where it is refused, only a boot of the host makes it \
                   possible again",
        }),
    }
}

/// The filter that is in force in hwpoison-inject now: it silently ignores the pages that do not pass.
fn filter_in_force() -> Found {
    there(FILTER_SWITCH)?;
    match filter::left_over() {
        Ok(None) => Ok("none in force".to_owned()),
        Ok(Some(set)) => Err(Gap::InTheWay(format!("in force: {set}; no other pages go bad"))),
        Err(error) => Err(Gap::of(FILTER_SWITCH, &error)),
    }
}

/// MADV_HWPOISON and MADV_SOFT_OFFLINE. They are not tried, as that would cost a page.
fn madvise() -> Found {
    privileges::cap_sys_admin()?;
    sysctl("memory_failure_early_kill").map(|_| "allowed: CAP_SYS_ADMIN is effective".to_owned())
}

fn user_faults(tried: io::Result<()>) -> Found {
    tried
        .map(|()| "usable for faults of user space (UFFD_USER_MODE_ONLY)".to_owned())
        .map_err(|error| Gap::Missing(error.to_string()))
}

fn uffd_poison() -> Found {
    Uffd::open()
        .map(|_| "pages of one's own can be marked as bad".to_owned())
        .map_err(|error| Gap::Missing(error.to_string()))
}

/// Whether this user may have a userfaultfd that handles the kernel's own faults, too.
fn kernel_faults() -> Found {
    // SAFETY: takes flags only.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    let result = match RawFd::try_from(fd) {
        Ok(fd) if fd >= 0 => {
            // SAFETY: a descriptor that the kernel has just made, owned by nobody else.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
            Ok(())
        }
        _ => Err(io::Error::last_os_error()),
    };
    let setting = match sysctl("unprivileged_userfaultfd") {
        Ok(value) => format!("vm.unprivileged_userfaultfd = {value}"),
        Err(_) => "no vm.unprivileged_userfaultfd".to_owned(),
    };
    match result {
        Ok(()) => Ok(format!("usable ({setting})")),
        Err(error) => Err(Gap::Missing(format!("{error} ({setting})"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whether_pages_can_be_given_back_is_known_while_none_is_lost() {
        let words = still_unpoisons("unpoison-pfn", "0 kB").unwrap();
        assert!(words.contains("refused from the first hardware error on"), "{words}");
        let Err(Gap::Unknown { found, mend }) = still_unpoisons("unpoison-pfn", "4 kB") else {
            panic!("it is known");
        };
        assert!(
            found.contains("4 kB are out of use") && mend.contains("boot of the host"),
            "{found}"
        );
    }

    #[test]
    fn a_userfaultfd_that_is_refused_is_not_one_that_is_too_old() {
        let mend = |errno| uffd_mend(&io::Error::from_raw_os_error(errno));
        assert!(mend(libc::ENOSYS).contains("CONFIG_USERFAULTFD"));
        assert!(mend(libc::EPERM).contains("seccomp"));
        assert!(mend(libc::EINVAL).contains("5.11"));
    }
}
