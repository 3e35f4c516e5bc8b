//! What to do about a /dev/kvm that this user cannot open.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;

use super::credentials::Credentials;
use crate::host::accounts;

/// The device.
pub const KVM: &str = "/dev/kvm";
/// Has the device's numbers, once KVM is loaded.
const NUMBERS: &str = "/sys/class/misc/kvm/dev";
const CPUINFO: &str = "/proc/cpuinfo";

/// What the advice depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    /// errno of opening it.
    errno: i32,
    /// The device numbers (`10:232`), where KVM is loaded.
    numbers: Option<String>,
    /// The processor's flags: AMD's and Intel's virtualization.
    svm: bool,
    vmx: bool,
    /// This host is itself a virtual machine.
    hypervisor: bool,
    node: Option<Node>,
    user: String,
}

/// The device's node.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    mode: u32,
    gid: u32,
    /// The name of its group, where it has one.
    group: Option<String>,
    /// The user is listed as a member of that group.
    is_member: bool,
    /// Mode, owner and group allow this process to open it.
    is_accessible: bool,
}

/// What to do about the `error` of opening /dev/kvm.
pub fn advice_for(error: &io::Error) -> String {
    advice(&inspect(error.raw_os_error().unwrap_or(0)))
}

/// What to do so that this user can open /dev/kvm; empty if it can already.
#[must_use]
pub fn advice_now() -> String {
    match File::options().read(true).write(true).open(KVM) {
        Ok(_) => String::new(),
        Err(error) => advice_for(&error),
    }
}

fn inspect(errno: i32) -> Seen {
    let cpuinfo = fs::read_to_string(CPUINFO).unwrap_or_default();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag| flags.split_whitespace().any(|word| word == flag);
    let me = Credentials::of_this_process();
    let user = accounts::user(me.as_ref().map_or(0, |me| me.uid));
    let node = fs::metadata(KVM).ok().map(|file| {
        let group = accounts::group(file.gid());
        let is_member = group.as_ref().is_some_and(|group| accounts::is_member(&user, group));
        let mode = file.mode() & 0o777;
        let is_accessible =
            me.as_ref().is_some_and(|me| me.way_in(mode, file.uid(), file.gid()).is_some());
        Node { mode, gid: file.gid(), group, is_member, is_accessible }
    });
    let numbers = fs::read_to_string(NUMBERS).ok().map(|text| text.trim().to_owned());
    let (svm, vmx, hypervisor) = (has("svm"), has("vmx"), has("hypervisor"));
    Seen { errno, numbers, svm, vmx, hypervisor, node, user }
}

fn advice(seen: &Seen) -> String {
    match (seen.errno, &seen.node) {
        (libc::EACCES | libc::EPERM, Some(node)) => no_permission(node, &seen.user),
        (libc::ENOENT, _) => match &seen.numbers {
            Some(numbers) => no_node(numbers),
            None => not_loaded(seen),
        },
        (libc::ENODEV | libc::ENXIO, _) => not_loaded(seen),
        (libc::EACCES | libc::EPERM, None) => "see that this user may look into /dev".to_owned(),
        _ => "see what the error says; the kernel's log may say more".to_owned(),
    }
}

fn no_node(numbers: &str) -> String {
    format!(
        "KVM is loaded, and this /dev has no node of it: start a container with --device {KVM}; elsewhere, as \
         root: mknod -m 600 {KVM} c {}",
        numbers.replace(':', " ")
    )
}

fn not_loaded(seen: &Seen) -> String {
    let load = |module, what| {
        format!(
            "as root: modprobe {module}; where that is refused (Operation not supported), {what} is switched off \
             in the firmware's setup (BIOS). Or use the lab (make lab)"
        )
    };
    match seen {
        Seen { svm: true, .. } => load("kvm-amd", "SVM"),
        Seen { vmx: true, .. } => load("kvm-intel", "VT-x"),
        Seen { hypervisor: true, .. } => {
            "this is a virtual machine whose processor has no SVM or VT-x: have its host show them (nested=1 for \
             kvm-amd or kvm-intel there, the host's processor for the guest), or use the lab (make lab)"
                .to_owned()
        }
        _ => "switch SVM or VT-x on in the firmware's setup (BIOS); a processor without them has the lab only \
              (make lab)"
            .to_owned(),
    }
}

fn no_permission(node: &Node, user: &str) -> String {
    let Node { mode, gid, group, is_member, is_accessible } = node;
    // Users are not added to the group root.
    let group_may = mode & 0o060 == 0o060 && *gid != 0;
    match group {
        _ if *is_accessible => format!(
            "its mode lets this process in, and something else does not: start a container with --device {KVM}; \
             elsewhere look for a security module (SELinux, AppArmor) and a mount of /dev with nodev"
        ),
        Some(group) if group_may && *is_member => {
            format!(
                "log in anew: {user} is in the group {group}, and this session is older (newgrp {group})"
            )
        }
        Some(group) if group_may => {
            format!("as root: usermod -aG {group} {user}; then log in anew")
        }
        None if group_may => format!(
            "no group here has its number {gid}: start a container with --group-add {gid}; elsewhere, as root: \
             setfacl -m u:{user}:rw {KVM}"
        ),
        _ => format!(
            "joining a group does not help (mode {mode:o}, group {}); as root: setfacl -m u:{user}:rw {KVM} \
             (until the node is made anew), or for good a line KERNEL==\"kvm\", GROUP=\"kvm\", MODE=\"0660\" in \
             /etc/udev/rules.d/65-kvm.rules, and usermod -aG kvm {user}",
            group.as_deref().unwrap_or("without a name")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(errno: i32) -> Seen {
        Seen {
            errno,
            numbers: None,
            svm: false,
            vmx: false,
            hypervisor: false,
            node: None,
            user: "alice".to_owned(),
        }
    }

    fn denied(mode: u32, gid: u32, group: Option<&str>) -> Seen {
        let group = group.map(str::to_owned);
        let node = Node { mode, gid, group, is_member: false, is_accessible: false };
        Seen { node: Some(node), ..seen(libc::EACCES) }
    }

    #[track_caller]
    fn advises(seen: &Seen, this: &[&str], not: &[&str]) {
        let words = advice(seen);
        for part in this {
            assert!(words.contains(part), "no {part:?}: {words}");
        }
        for part in not {
            assert!(!words.contains(part), "{part:?}: {words}");
        }
    }

    #[test]
    fn a_group_is_joined_where_it_lets_in() {
        advises(&denied(0o660, 108, Some("kvm")), &["usermod -aG kvm alice"], &["setfacl"]);
        advises(&denied(0o660, 36, Some("qemu")), &["usermod -aG qemu alice"], &[]);
        for (mode, gid, group) in
            [(0o600, 0, Some("root")), (0o600, 108, Some("kvm")), (0o660, 0, Some("root"))]
        {
            let helps = ["setfacl -m u:alice:rw", "udev", "MODE=\"0660\""];
            advises(&denied(mode, gid, group), &helps, &["usermod -aG root"]);
        }
        advises(&denied(0o660, 999, None), &["--group-add 999", "setfacl"], &["usermod"]);
    }

    #[test]
    fn what_is_done_already_is_not_advised() {
        let mut member = denied(0o660, 108, Some("kvm"));
        member.node.as_mut().unwrap().is_member = true;
        advises(&member, &["log in anew", "newgrp kvm"], &["usermod"]);
        member.node.as_mut().unwrap().is_accessible = true;
        advises(&member, &["--device /dev/kvm", "SELinux"], &["usermod", "newgrp"]);
    }

    #[test]
    fn what_is_not_there_is_loaded_shown_or_switched_on() {
        let gone = seen(libc::ENOENT);
        let loaded = Seen { numbers: Some("10:232".to_owned()), svm: true, ..gone.clone() };
        advises(&loaded, &["--device /dev/kvm", "c 10 232"], &["modprobe"]);
        advises(&Seen { svm: true, ..gone.clone() }, &["modprobe kvm-amd", "BIOS"], &["intel"]);
        advises(&Seen { vmx: true, ..gone.clone() }, &["modprobe kvm-intel", "BIOS"], &["amd"]);
        advises(&Seen { hypervisor: true, ..gone.clone() }, &["nested"], &["modprobe", "BIOS"]);
        advises(&gone, &["BIOS"], &["modprobe"]);
        let without = denied(0o600, 0, None);
        advises(&Seen { errno: libc::ENODEV, vmx: true, ..without }, &["modprobe kvm-intel"], &[]);
    }
}
