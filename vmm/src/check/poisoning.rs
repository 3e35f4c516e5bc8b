//! The means by which pages can be made to go bad. None of them is tried for real.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use super::gap::{Found, Gap, sysctl, there};
use super::{Section, Standing, privileges};
use crate::host::{self, filter, x86_injector};
use crate::poison::uffd::Uffd;

const MCELOG: &str = "/dev/mcelog";
const MCE_INJECT: &str = "/sys/kernel/debug/mce-inject";
/// The switch of hwpoison-inject's filters, and the one of them that needs CONFIG_MEMCG.
const FILTER_SWITCH: &str = "/sys/kernel/debug/hwpoison/corrupt-filter-enable";
const MEMCG_FILTER: &str = "/sys/kernel/debug/hwpoison/corrupt-filter-memcg";

const LOAD_HWPOISON: &str = "as root: mount -t debugfs none /sys/kernel/debug; \
                             modprobe hwpoison-inject (CONFIG_HWPOISON_INJECT)";

const LOAD_MCE_INJECT: &str = "as root: mount -t debugfs none /sys/kernel/debug; \
                               modprobe mce-inject (CONFIG_X86_MCE_INJECT)";

pub(super) fn look(section: &mut Section<'_>) {
    use Standing::Missing;

    let inject = there(host::CORRUPT_PFN);
    // Without the module it is the module that is missing.
    let is_loaded = inject.is_ok();
    let mend = |mend: &'static str| if is_loaded { mend } else { LOAD_HWPOISON };
    section.add("hwpoison-inject", inject, Missing, LOAD_HWPOISON);
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
    section.add("unpoison", there(host::UNPOISON_PFN), Missing, LOAD_HWPOISON);
    let survives = x86_injector::check_processor().map_err(|error| Gap::of("mce-inject", &error));
    let mend = match survives {
        Ok(()) => LOAD_MCE_INJECT,
        Err(_) => "optional: use hwpoison-inject, or a host with processors of AMD's make",
    };
    section.add("mce-inject", survives.and_then(|()| there(MCE_INJECT)), Missing, mend);
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
        "run as root, on a host kernel with CONFIG_MEMORY_FAILURE",
    );
    section.add(
        "userfaultfd",
        user_faults(),
        Missing,
        "use Linux 5.11 or newer with CONFIG_USERFAULTFD; allow userfaultfd in the seccomp filter",
    );
    section.add(
        "UFFDIO_POISON",
        uffd_poison(),
        Missing,
        "use Linux 6.6 or newer with CONFIG_USERFAULTFD",
    );
    section.add(
        "uffd of kernel faults",
        kernel_faults(),
        Missing,
        "optional, nothing here needs it: sysctl vm.unprivileged_userfaultfd=1",
    );
}

/// What holds pages back from hwpoison-inject now: it leaves those as they are, without a word.
fn filter_in_force() -> Found {
    there(FILTER_SWITCH)?;
    match filter::left_over() {
        Ok(None) => Ok("none in force".to_owned()),
        Ok(Some(set)) => Err(Gap::Missing(format!("in force: {set}; no other pages go bad"))),
        Err(error) => Err(Gap::of(FILTER_SWITCH, &error)),
    }
}

/// MADV_HWPOISON and MADV_SOFT_OFFLINE: to try them is to lose a page.
fn madvise() -> Found {
    privileges::cap_sys_admin()?;
    sysctl("memory_failure_early_kill").map(|_| "allowed: CAP_SYS_ADMIN is effective".to_owned())
}

fn user_faults() -> Found {
    Uffd::with_features(0)
        .map(|_| "usable for faults of user space (UFFD_USER_MODE_ONLY)".to_owned())
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
