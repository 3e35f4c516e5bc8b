//! KVM, and what it supports of a guest's machine checks.

use std::fs::File;
use std::io::{BufRead, BufReader};

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Cap, Kvm};
use mce_relay::mca::{BANKS, cap};
use mce_relay_vmm::host::dev_kvm;
use mce_relay_vmm::mce_inject::{self, MceError};
use mce_relay_vmm::words::with_causes;

use super::gap::{Found, Gap};
use super::section::{Section, Standing};

const CPUINFO: &str = "/proc/cpuinfo";

pub(super) fn look(section: &mut Section<'_>) {
    use Standing::{Missing, Needed};

    let kvm = Kvm::new();
    let usable =
        kvm.as_ref().map(|_| "usable".to_owned()).map_err(|error| Gap::Missing(error.to_string()));
    let mend = kvm.as_ref().err().map(|error| dev_kvm::advice_for(&(*error).into()));
    section.add("/dev/kvm", usable, Needed, mend.unwrap_or_default());
    let kvm = kvm.map_err(|_| without_kvm());
    section.add("KVM API", ask(&kvm, api), Needed, "use a host kernel with CONFIG_KVM");
    section.add(
        "machine-check banks",
        ask(&kvm, banks),
        Needed,
        "use a host kernel with CONFIG_X86_MCE",
    );
    let offered = ask(&kvm, |kvm| mce_inject::supported(kvm).map_err(failed));
    section.add(
        "MCG_CAP offered",
        offered.clone().map(|caps| format!("{caps:#x}: {}", bits(caps))),
        Needed,
        "use a host kernel with CONFIG_KVM and CONFIG_X86_MCE",
    );
    section.add(
        "MCG_CAP held",
        offered.clone().and_then(|offered| ask(&kvm, |kvm| held(kvm, offered))),
        Needed,
        "end what else uses the processor's virtualisation (VirtualBox, VMware) where the error is EBUSY; else use a \
         host kernel with CONFIG_X86_MCE",
    );
    let exits = ask(&kvm, msr_exits);
    section.add(
        "LMCE",
        offered.and_then(|offered| lmce(offered, exits.is_ok())),
        Missing,
        "use Linux 5.10 or newer, or run --lmce off: every vCPU is called for each error",
    );
    section.add(
        "MSR exits",
        exits,
        Missing,
        "use Linux 5.10 or newer for guests that see another vendor's processor than the host's",
    );
    section.add("machine", machine(), Missing, "mount -t proc proc /proc");
}

/// The gap of every check that needs /dev/kvm, if this user cannot open it.
pub(super) fn without_kvm() -> Gap {
    Gap::Unknown { found: "not known without /dev/kvm".to_owned(), mend: "see /dev/kvm" }
}

fn ask<T>(kvm: &Result<Kvm, Gap>, what: impl FnOnce(&Kvm) -> Result<T, Gap>) -> Result<T, Gap> {
    what(kvm.as_ref().map_err(Clone::clone)?)
}

fn failed(error: MceError) -> Gap {
    Gap::Missing(with_causes(&error))
}

fn api(kvm: &Kvm) -> Found {
    let version = kvm.get_api_version();
    if u32::try_from(version) == Ok(KVM_API_VERSION) {
        Ok(format!("version {version}"))
    } else {
        Err(Gap::Missing(format!("version {version}, not {KVM_API_VERSION}")))
    }
}

fn banks(kvm: &Kvm) -> Found {
    let banks = kvm.check_extension_int(Cap::Mce).max(0);
    if banks >= i32::from(BANKS) {
        Ok(format!("{banks}; a guest is given {BANKS}"))
    } else {
        Err(Gap::Missing(format!("{banks}, and a guest is to be given {BANKS} (KVM_CAP_MCE)")))
    }
}

/// Which of the capabilities that the VMM asks for KVM keeps. KVM does not say which it drops.
fn held(kvm: &Kvm, offered: u64) -> Found {
    let asked = (offered & (cap::CTL_P | cap::SER_P | cap::LMCE_P)) | u64::from(BANKS);
    let held = mce_inject::held(kvm, asked).map_err(failed)?;
    let left_out = match asked & !held & !cap::COUNT_MASK {
        0 => String::new(),
        left_out => format!("; leaves out {}", bits(left_out)),
    };
    Ok(format!("asked {asked:#x}, holds {held:#x}: {}{left_out}", bits(held)))
}

/// Where KVM has no LMCE, the VMM can show it to a guest and answer for its registers.
fn lmce(offered: u64, msr_exits: bool) -> Found {
    if offered & cap::LMCE_P != 0 {
        Ok("offered by KVM".to_owned())
    } else if msr_exits {
        Ok("not offered by KVM; the VMM itself shows it to Intel-style guests".to_owned())
    } else {
        Err(Gap::Missing("not offered by KVM, and cannot be shown without MSR exits".to_owned()))
    }
}

fn msr_exits(kvm: &Kvm) -> Found {
    let caps = [
        (Cap::X86UserSpaceMsr, "KVM_CAP_X86_USER_SPACE_MSR"),
        (Cap::X86MsrFilter, "KVM_CAP_X86_MSR_FILTER"),
    ];
    match caps.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        None => Ok("the VMM can show guests what KVM does not hold".to_owned()),
        Some((_, name)) => Err(Gap::Missing(format!("no {name}"))),
    }
}

fn machine() -> Found {
    let file = File::open(CPUINFO).map_err(|error| Gap::io(CPUINFO, &error))?;
    // The first processor is enough; there may be hundreds.
    let lines = BufReader::new(file).lines().map_while(Result::ok);
    match lines.take(64).find_map(|line| has_flag(&line, "hypervisor")) {
        Some(true) => {
            Ok("virtual: it learns of bad memory only if its own host relays that".to_owned())
        }
        Some(false) => Ok("not virtual".to_owned()),
        None => Err(Gap::Unknown {
            found: format!("{CPUINFO} does not say whether it is virtual"),
            mend: "systemd-detect-virt may say it",
        }),
    }
}

/// Whether `line` of /proc/cpuinfo has `flag`; `None` when it is not the line with the flags.
fn has_flag(line: &str, flag: &str) -> Option<bool> {
    let (name, flags) = line.split_once(':')?;
    (name.trim_end() == "flags").then(|| flags.split_whitespace().any(|word| word == flag))
}

/// The names of the MCG_CAP bits that concern memory errors.
fn bits(caps: u64) -> String {
    let names = [
        (cap::CTL_P, "CTL_P"),
        (cap::CMCI_P, "CMCI_P"),
        (cap::SER_P, "SER_P"),
        (cap::LMCE_P, "LMCE_P"),
    ];
    let set: Vec<&str> =
        names.iter().filter(|(bit, _)| caps & bit != 0).map(|(_, name)| *name).collect();
    if set.is_empty() { "none".to_owned() } else { set.join(" ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hypervisor_is_a_flag_of_its_own() {
        let flags = "flags\t\t: fpu vme hypervisor lahf_lm";
        assert_eq!(has_flag(flags, "hypervisor"), Some(true));
        assert_eq!(has_flag(flags, "hyper"), Some(false));
        assert_eq!(has_flag("vmx flags\t: hypervisor", "hypervisor"), None);
        assert_eq!(has_flag("", "hypervisor"), None);
    }

    #[test]
    fn lmce_is_a_gap_only_where_nobody_can_show_it() {
        assert!(lmce(cap::LMCE_P, false).is_ok());
        assert!(lmce(cap::SER_P, true).unwrap().contains("the VMM itself"));
        assert!(lmce(cap::SER_P, false).is_err());
    }

    #[test]
    fn bits_have_names() {
        assert_eq!(bits(0x20), "none");
        assert_eq!(bits(0x0900_010a), "CTL_P SER_P LMCE_P");
    }
}
