//! What this host and its kernel offer, line by line, each with what to do about it.

use std::path::Path;

use comfy_table::{Cell, Color};
use kvm_ioctls::Kvm;
use mce_relay::KillPolicy;
use mce_relay::mca::{BANKS, cap};
use mce_relay::scan::{FailureCounter, Scanner};
use serde::Serialize;

use crate::{host, mce_inject, show};

/// How a thing stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// It is there.
    Ok,
    /// It is not there, and something else has to do.
    Missing,
    /// It is not there, and no error can be relayed without it.
    Needed,
}

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// What.
    pub name: &'static str,
    /// How it stands.
    pub standing: Standing,
    /// What was seen.
    pub found: String,
    /// What to do about it; empty where nothing has to be done.
    pub mend: &'static str,
}

/// All that was looked at.
#[derive(Debug, Serialize)]
pub struct Report {
    /// One line for each thing.
    pub lines: Vec<Line>,
}

impl Report {
    /// Whether nothing is missing without which no error can be relayed.
    pub fn relays(&self) -> bool {
        self.lines.iter().all(|line| line.standing != Standing::Needed)
    }

    fn add(
        &mut self,
        name: &'static str,
        found: Result<String, String>,
        missing: Standing,
        mend: &'static str,
    ) {
        self.lines.push(match found {
            Ok(found) => Line { name, standing: Standing::Ok, found, mend: "" },
            Err(found) => Line { name, standing: missing, found, mend },
        });
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut table = show::table(&["", "what", "found", "what to do"]);
        for line in &self.lines {
            let (word, colour) = match line.standing {
                Standing::Ok => ("ok", Color::Green),
                Standing::Missing => ("missing", Color::Yellow),
                Standing::Needed => ("NEEDED", Color::Red),
            };
            table.add_row([
                Cell::new(word).fg(colour),
                Cell::new(line.name),
                Cell::new(&line.found),
                Cell::new(line.mend),
            ]);
        }
        writeln!(f, "{table}")?;
        f.write_str(if self.relays() {
            "memory errors of this host can be relayed to guests"
        } else {
            "memory errors of this host cannot be relayed to guests: see the lines marked NEEDED"
        })
    }
}

/// Looks at everything. It changes nothing on the host.
pub fn check() -> Report {
    use Standing::{Missing, Needed};
    let mut report = Report { lines: Vec::new() };

    let kvm = Kvm::new();
    report.add(
        "/dev/kvm",
        kvm.as_ref().map(|_| "usable".to_owned()).map_err(ToString::to_string),
        Needed,
        "modprobe kvm-amd or kvm-intel; join the kvm group (usermod -aG kvm USER)",
    );
    let no_kvm = || Err("not known without /dev/kvm".to_owned());
    let supported = match &kvm {
        Ok(kvm) => mce_inject::supported(kvm).map_err(|error| error.to_string()),
        Err(_) => Err("not known without /dev/kvm".to_owned()),
    };
    report.add(
        "KVM machine checks",
        supported.clone().map(|caps| format!("MCG_CAP bits offered: {}", bits(caps))),
        Needed,
        "use a host kernel with CONFIG_KVM and CONFIG_X86_MCE",
    );
    report.add(
        "MCG_CAP as KVM holds it",
        match (&kvm, supported) {
            (Ok(kvm), Ok(supported)) => {
                let asked =
                    (supported & (cap::CTL_P | cap::SER_P | cap::LMCE_P)) | u64::from(BANKS);
                mce_inject::held(kvm, asked)
                    .map(|held| format!("asked {asked:#x}, holds {held:#x}: {}", bits(held)))
                    .map_err(|error| error.to_string())
            }
            _ => no_kvm(),
        },
        Needed,
        "use a host kernel with CONFIG_X86_MCE",
    );
    report.add(
        "memory failure handling",
        sysctl("memory_failure_early_kill")
            .map(|value| format!("there (vm.memory_failure_early_kill = {value})")),
        Needed,
        "boot a kernel with CONFIG_MEMORY_FAILURE, or use the lab (make lab)",
    );
    report.add(
        "recovery",
        sysctl("memory_failure_recovery").and_then(|value| match value.as_str() {
            "1" => Ok("vm.memory_failure_recovery = 1".to_owned()),
            _ => Err(format!("vm.memory_failure_recovery = {value}: the host panics instead")),
        }),
        Needed,
        "sysctl vm.memory_failure_recovery=1",
    );
    report.add(
        "early kill (PR_MCE_KILL)",
        early_kill().map(|()| "a thread can ask for it".to_owned()),
        Missing,
        "allow prctl(PR_MCE_KILL) in the seccomp filter; without it only AR arrive",
    );
    report.add(
        "poison without a signal",
        match (Scanner::new(), FailureCounter::new()) {
            (Ok(scanner), Some(counter)) => {
                Ok(format!("found by {}, noticed by {}", scanner.method(), counter.source()))
            }
            (Ok(scanner), None) => Err(format!(
                "found by {}, but there is no count of failures to notice it by",
                scanner.method()
            )),
            (Err(error), _) => Err(error.to_string()),
        },
        Missing,
        "use Linux 5.14 or newer with CONFIG_MEMORY_FAILURE and CONFIG_PROC_PAGE_MONITOR",
    );
    report.add(
        "page frame numbers",
        host::pfn(std::process::id(), (&raw const report).addr() as u64)
            .map(|_| "shown to this user".to_owned())
            .map_err(|error| error.to_string()),
        Missing,
        "run as root to poison pages",
    );
    report.add(
        "poison flag of a page",
        host::is_poisoned(0)
            .map(|_| "/proc/kpageflags is readable".to_owned())
            .map_err(|error| error.to_string()),
        Missing,
        "run as root to poison pages (CONFIG_PROC_PAGE_MONITOR)",
    );
    report.add(
        "hwpoison-inject",
        there(host::CORRUPT_PFN),
        Missing,
        "as root: modprobe hwpoison-inject; mount -t debugfs none /sys/kernel/debug",
    );
    report.add(
        "unpoison",
        there(host::UNPOISON_PFN),
        Missing,
        "as root: modprobe hwpoison-inject; mount -t debugfs none /sys/kernel/debug",
    );
    report.add(
        "mce-inject",
        there("/sys/kernel/debug/mce-inject"),
        Missing,
        "as root: modprobe mce-inject",
    );
    report
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

fn sysctl(name: &str) -> Result<String, String> {
    let path = format!("/proc/sys/vm/{name}");
    std::fs::read_to_string(&path)
        .map(|value| value.trim().to_owned())
        .map_err(|error| format!("{path}: {error}"))
}

/// Tries it on a thread of its own, so that this one's policy stays as it is.
fn early_kill() -> Result<(), String> {
    std::thread::spawn(|| KillPolicy::Early.set().map_err(|error| error.to_string()))
        .join()
        .unwrap_or_else(|_| Err("the thread that tried it panicked".to_owned()))
}

fn there(path: &str) -> Result<String, String> {
    match Path::new(path).try_exists() {
        Ok(true) => Ok(path.to_owned()),
        Ok(false) => Err(format!("no {path}")),
        Err(error) => Err(format!("{path}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_needed_thing_decides_and_every_gap_has_a_mend() {
        let mut report = Report { lines: Vec::new() };
        report.add("a", Ok("there".into()), Standing::Needed, "do this");
        report.add("b", Err("not there".into()), Standing::Missing, "do that");
        assert!(report.relays());
        report.add("c", Err("not there".into()), Standing::Needed, "do it");
        assert!(!report.relays());
        assert!(report.lines[0].mend.is_empty() && !report.lines[1].mend.is_empty());
        assert!(report.to_string().contains("NEEDED"));
    }

    #[test]
    fn the_check_of_this_host_ends() {
        assert!(check().lines.len() > 5);
    }
}
