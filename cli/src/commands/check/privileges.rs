//! What this user may do and see.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use mce_relay_vmm::host::accounts;
use mce_relay_vmm::host::credentials::Credentials;
use mce_relay_vmm::host::dev_kvm::{self, KVM};

use super::gap::{DEBUGFS, Found, Gap, read, there};
use super::kvm::without_kvm;
use super::section::{Section, Standing};

/// The tracepoint of memory failures: among those of RAS in older kernels, on its own in newer ones.
const EVENTS: [&str; 2] = [
    "/sys/kernel/tracing/events/memory_failure/memory_failure_event",
    "/sys/kernel/tracing/events/ras/memory_failure_event",
];

const CAP_SYS_ADMIN: u32 = 21;

pub(super) fn look(section: &mut Section<'_>) {
    use Standing::Missing;

    section.add("user", user(), Missing, "mount -t proc proc /proc");
    section.add(
        "CAP_SYS_ADMIN",
        cap_sys_admin(),
        Missing,
        match credentials() {
            Ok(Credentials { uid: 0, .. }) => {
                "to poison the host's pages, be root of the host itself: outside of containers and user namespaces"
            }
            _ => "to poison the host's pages, run as root: sudo mce-relay poison",
        },
    );
    section.add("access to /dev/kvm", dev_kvm(), Missing, dev_kvm::advice_now());
    section.add("debugfs", debugfs(), Missing, debugfs_mend());
    section.add("tracepoint", tracepoint(), Missing, tracepoint_mend());
}

fn credentials() -> Result<Credentials, Gap> {
    Credentials::parse(&read("/proc/self/status")?)
        .ok_or_else(|| Gap::Missing("/proc/self/status does not say".to_owned()))
}

fn user() -> Found {
    let me = credentials()?;
    Ok(match me.uid {
        0 => "root (uid 0)".to_owned(),
        uid => format!("uid {uid}"),
    })
}

/// Whether this process is an administrator for the kernel.
pub(super) fn cap_sys_admin() -> Found {
    let me = credentials()?;
    if !me.has(CAP_SYS_ADMIN) {
        return Err(Gap::Missing(format!("CAP_SYS_ADMIN is not in CapEff {:#x}", me.caps)));
    }
    // A kernel without user namespaces does not have this file.
    if let Ok(map) = read("/proc/self/uid_map")
        && !is_of_the_host(&map)
    {
        return Err(Gap::Missing("CAP_SYS_ADMIN counts only in a user namespace".to_owned()));
    }
    Ok(format!("in CapEff {:#x}", me.caps))
}

/// Whether `uid_map` is that of the first user namespace, whose root is the host's.
fn is_of_the_host(uid_map: &str) -> bool {
    uid_map.split_whitespace().eq(["0", "0", "4294967295"])
}

fn dev_kvm() -> Found {
    let file = fs::metadata(KVM).map_err(|_| without_kvm())?;
    let me = credentials()?;
    let group = accounts::group(file.gid()).unwrap_or_else(|| file.gid().to_string());
    let mode = file.mode() & 0o777;
    let file_in_words = format!("mode {mode:o}, group {group}");
    match (
        File::options().read(true).write(true).open(KVM),
        me.way_in(mode, file.uid(), file.gid()),
    ) {
        (Ok(_), Some(way)) => Ok(format!("{way} ({file_in_words})")),
        (Ok(_), None) => Ok(format!("by its access control list ({file_in_words})")),
        (Err(error), _) => Err(Gap::Missing(format!("{error} ({file_in_words})"))),
    }
}

fn debugfs() -> Found {
    if !is_mounted(&read("/proc/self/mounts")?, DEBUGFS, "debugfs") {
        return Err(Gap::Missing(format!("not mounted at {DEBUGFS}")));
    }
    match fs::read_dir(DEBUGFS) {
        Ok(_) => Ok("mounted and readable".to_owned()),
        Err(error) => Err(Gap::io(DEBUGFS, &error)),
    }
}

/// Whether a file system of type `kind` is mounted at `path`.
fn is_mounted(mounts: &str, path: &str, kind: &str) -> bool {
    mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some(path) && fields.next() == Some(kind)
    })
}

/// How debugfs is mounted, where this kernel has it.
pub(super) fn debugfs_mend() -> &'static str {
    match read("/proc/filesystems") {
        Ok(known) if !known.split_whitespace().any(|word| word == "debugfs") => {
            "boot a kernel with CONFIG_DEBUG_FS"
        }
        _ => "as root: mount -t debugfs none /sys/kernel/debug",
    }
}

/// Whether debugfs is where it belongs.
pub(super) fn has_debugfs() -> bool {
    read("/proc/self/mounts").is_ok_and(|mounts| is_mounted(&mounts, DEBUGFS, "debugfs"))
}

fn tracepoint_mend() -> &'static str {
    match there("/sys/kernel/tracing/events") {
        Ok(_) => "optional: a kernel with CONFIG_MEMORY_FAILURE and CONFIG_RAS has it",
        Err(_) => "optional; as root: mount -t tracefs none /sys/kernel/tracing",
    }
}

fn tracepoint() -> Found {
    let [newer, older] = EVENTS;
    there(newer).or_else(|_| there(older))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mce_relay_vmm::host::credentials::CAP_DAC_OVERRIDE;

    const STATUS: &str = "Name:\tx\nUid:\t1000\t1001\t1000\t1000\nGid:\t100\t100\t100\t100\n\
                          Groups:\t100 108 \nCapInh:\t0000000000000000\n\
                          CapEff:\t0000000000200002\n";

    #[test]
    fn credentials_are_the_effective_ones() {
        let me = Credentials::parse(STATUS).unwrap();
        let expected = Credentials { uid: 1001, gid: 100, groups: vec![100, 108], caps: 0x20_0002 };
        assert_eq!(me, expected);
        assert!(me.has(CAP_SYS_ADMIN) && me.has(CAP_DAC_OVERRIDE) && !me.has(0));
        for broken in ["", "Uid:\t1\nGid:\t1\nGroups:\nCapEff:\t0", "CapEff:\tx"] {
            assert_eq!(Credentials::parse(broken), None, "{broken:?}");
        }
        let alone = STATUS.replace("100 108 ", "");
        assert!(Credentials::parse(&alone).unwrap().groups.is_empty());
    }

    #[test]
    fn the_first_that_fits_lets_in() {
        let me = Credentials { caps: 0, ..Credentials::parse(STATUS).unwrap() };
        assert_eq!(me.way_in(0o660, 0, 108), Some("as a member of its group"));
        assert_eq!(me.way_in(0o600, 1001, 0), Some("as its owner"));
        assert_eq!(me.way_in(0o666, 0, 0), Some("as everybody"));
        assert_eq!(me.way_in(0o660, 0, 109), None);
        assert_eq!(me.way_in(0o606, 0, 108), None, "others may, its group may not");
        let root = Credentials { caps: 1 << CAP_DAC_OVERRIDE, ..me };
        assert_eq!(root.way_in(0o600, 0, 0), Some("by CAP_DAC_OVERRIDE"));
    }

    #[test]
    fn a_user_namespace_is_not_the_host() {
        assert!(is_of_the_host("         0          0 4294967295\n"));
        assert!(!is_of_the_host("         0       1000          1\n"));
        assert!(!is_of_the_host("0 100000 65536\n65536 0 1\n"));
    }

    #[test]
    fn a_mount_is_a_path_and_a_type() {
        let mounts = "sysfs /sys sysfs rw 0 0\ndebugfs /sys/kernel/debug debugfs rw 0 0";
        assert!(is_mounted(mounts, DEBUGFS, "debugfs"));
        assert!(!is_mounted(mounts, "/sys", "debugfs"));
        assert!(!is_mounted(mounts, "/sys/kernel", "debugfs"));
    }
}
