//! The host kernel's handling of memory failures.

use std::thread;

use mce_relay::KillPolicy;

use super::gap::{Found, Gap, read, sysctl};
use super::section::{Section, Standing};

/// There only in kernels with CONFIG_MEMORY_FAILURE.
const EARLY_KILL: &str = "memory_failure_early_kill";
const NO_KERNEL: &str = "boot a kernel with CONFIG_MEMORY_FAILURE";

pub(super) fn look(section: &mut Section<'_>) {
    use Standing::{Missing, Needed};

    let early_kill = sysctl(EARLY_KILL);
    section.add(
        "memory failure handling",
        early_kill.clone().map(|_| "the kernel handles memory failures".to_owned()),
        Needed,
        "boot a kernel with CONFIG_MEMORY_FAILURE, or use the lab (make lab)",
    );
    let has_it = early_kill.is_ok();
    let mend = |mend: &'static str| if has_it { mend } else { NO_KERNEL };
    section.add(
        "recovery",
        sysctl("memory_failure_recovery").and_then(|value| recovery(&value)),
        Needed,
        mend("as root: sysctl vm.memory_failure_recovery=1"),
    );
    section.add(
        "early kill by default",
        early_kill.and_then(|value| by_default(&value)),
        Missing,
        mend("as root: sysctl vm.memory_failure_early_kill=0"),
    );
    section.add(
        "PR_MCE_KILL",
        pr_mce_kill(),
        Missing,
        "allow prctl(PR_MCE_KILL) in the seccomp filter; without it only AR arrive",
    );
    section.add(
        "soft offline",
        soft_offline(),
        Missing,
        mend("optional; as root: sysctl vm.enable_soft_offline=1"),
    );
    section.add("memory lost", lost(), Missing, NO_KERNEL);
}

fn recovery(value: &str) -> Found {
    match value {
        "1" => Ok("vm.memory_failure_recovery = 1".to_owned()),
        _ => Err(Gap::Missing(format!(
            "vm.memory_failure_recovery = {value}: the host panics instead"
        ))),
    }
}

/// What the sysctl means. The VMM works with either value, as its threads have policies of their own.
fn by_default(value: &str) -> Found {
    let meaning = match value {
        "0" => "AOs go to threads that ask for them, as the VMM's does",
        "1" => "AOs go to all processes, also to those that only die of them",
        _ => {
            let found = format!("vm.{EARLY_KILL} = {value}: neither 0 nor 1");
            return Err(Gap::Unknown { found, mend: "the kernel's documentation may know it" });
        }
    };
    Ok(format!("vm.{EARLY_KILL} = {value}: {meaning}"))
}

/// Tries it on a separate thread, so that this one keeps its policy.
fn pr_mce_kill() -> Found {
    // `set` also reads back what the kernel holds.
    let tried = thread::Builder::new().spawn(|| KillPolicy::Early.set());
    match tried.map(thread::JoinHandle::join) {
        Ok(Ok(Ok(()))) => Ok("a thread can ask for early kill".to_owned()),
        Ok(Ok(Err(error))) => Err(Gap::Missing(error.to_string())),
        Ok(Err(_)) => Err(Gap::Missing("the thread that tried it panicked".to_owned())),
        Err(error) => Err(Gap::Missing(format!("no thread to try it on: {error}"))),
    }
}

fn soft_offline() -> Found {
    match sysctl("enable_soft_offline") {
        Ok(value) if value == "0" => {
            Err(Gap::Missing("vm.enable_soft_offline = 0: the host refuses it".to_owned()))
        }
        Ok(value) => Ok(format!("vm.enable_soft_offline = {value}")),
        // Before Linux 6.11 it had no switch.
        Err(Gap::Missing(_)) if sysctl(EARLY_KILL).is_ok() => Ok("always on".to_owned()),
        Err(gap) => Err(gap),
    }
}

/// How much of this host's memory is out of use. Unknown where the kernel does not count it.
fn lost() -> Found {
    let meminfo = read("/proc/meminfo")?;
    let amount = hardware_corrupted(&meminfo)
        .ok_or(Gap::Unknown { found: "not counted by this kernel".to_owned(), mend: NO_KERNEL })?;
    Ok(format!("{amount} of this host out of use"))
}

/// How much memory the kernel says is lost, with its unit.
pub(super) fn hardware_corrupted(meminfo: &str) -> Option<&str> {
    meminfo.lines().find_map(|line| line.strip_prefix("HardwareCorrupted:")).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_lost_is_told_with_its_unit() {
        let meminfo = "Percpu:   1 kB\nHardwareCorrupted:    16 kB\nAnonHugePages:  0 kB";
        assert_eq!(hardware_corrupted(meminfo), Some("16 kB"));
        assert_eq!(hardware_corrupted("Percpu:   1 kB"), None);
    }

    #[test]
    fn a_host_that_panics_does_not_relay() {
        assert!(recovery("1").is_ok());
        let Err(Gap::Missing(words)) = recovery("0") else { panic!("it recovers") };
        assert!(words.contains("panics"), "{words}");
    }

    #[test]
    fn early_kill_is_explained() {
        let words = by_default("0").unwrap();
        assert!(
            words.starts_with("vm.memory_failure_early_kill = 0: AOs go to threads"),
            "{words}"
        );
        assert!(by_default("1").unwrap().contains("all processes"));
        assert!(matches!(by_default("2"), Err(Gap::Unknown { .. })));
    }
}
