//! `mce-relay poison`: which pages, and by what means.

use std::path::PathBuf;
use std::str::FromStr;

use clap::error::ErrorKind;
use clap::{Args, ValueEnum};
use mce_relay::FailureKind;
use mce_relay_vmm::api::types::means::Means;
use mce_relay_vmm::host::flags::FlagsFilter;

use super::values::{ApiPath, parse_count, parse_seed};
use super::vm::VmArg;
use crate::poison::target::PageRange;

/// Which pages are to go bad, and how.
#[derive(Debug, Args)]
pub struct PoisonArgs {
    /// Which VM.
    #[command(flatten)]
    pub vm: VmArg,
    /// Guest-physical addresses and ranges, e.g. 0x1000,0x3000..0x8000: 0x and digits, or decimal with K,
    /// M, G or T; a range is all pages from its start to before its end. May be given repeatedly.
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        conflicts_with_all = ["random", "pid"]
    )]
    pub gpa: Vec<PageRange>,
    /// This many pages at random, of those that have memory of the VM's own behind them and are whole.
    #[arg(
        long,
        value_name = "N",
        conflicts_with = "pid",
        value_parser = parse_count,
        allow_negative_numbers = true
    )]
    pub random: Option<u64>,
    /// For the same random pages as in an earlier run, which has printed it.
    #[arg(long, value_name = "SEED", value_parser = parse_seed)]
    pub seed: Option<u64>,
    /// Pages of this process in the guest: its pid there, or its name. The guest's agent is asked.
    #[arg(long, value_name = "PID|NAME", requires = "agent")]
    pub pid: Option<String>,
    /// Socket of the guest's agent (`run --serial2 socket=PATH`).
    #[arg(long, value_name = "path=PATH")]
    pub agent: Option<ApiPath>,
    /// How many pages of that process at most.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max: u32,
    /// By what means.
    #[arg(long, value_enum)]
    pub via: MeansArg,
    /// For --via signal: an AO, or an AR as of a vCPU that touched the page. An AR wants --force, as
    /// it may cost the guest a process, or its life.
    #[arg(long, value_enum, default_value_t = KindArg::Ao)]
    pub kind: KindArg,
    /// For --via signal --kind ar: which vCPU.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub vcpu: u8,
    /// For a forged AR: do it though the guest may not survive it. For hwpoison-inject: do it though the VM
    /// has no memory cgroup of its own.
    #[arg(long)]
    pub force: bool,
    /// For hwpoison-inject: hit only pages of this memory cgroup: own, the VM's, which is the default
    /// (where it has none, --force does without); none; or the path of a cgroup's directory, or its inode
    /// number.
    #[arg(long, value_name = "own|none|PATH|INODE")]
    pub filter_memcg: Option<MemcgArg>,
    /// For hwpoison-inject: hit only pages of files on this device.
    #[arg(long, value_name = "MAJOR:MINOR")]
    pub filter_dev: Option<DevArg>,
    /// For hwpoison-inject: hit only pages with these flags, by name or number: of MASK exactly those in
    /// VALUE, e.g. anon+huge=anon. The names are those that `mce-relay pages` shows.
    #[arg(long, value_name = "MASK=VALUE")]
    pub filter_flags: Option<FlagsFilter>,
    /// Only say what would be done.
    #[arg(long)]
    pub dry_run: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// The kind of an error in several options together, and its text.
pub(super) type Wrong = (ErrorKind, &'static str);

impl PoisonArgs {
    /// Checks combinations of values.
    pub(super) fn check(&self) -> Result<(), Wrong> {
        let conflict = |words| Err((ErrorKind::ArgumentConflict, words));
        let filtered =
            self.filter_memcg.is_some() || self.filter_dev.is_some() || self.filter_flags.is_some();
        if self.gpa.is_empty() && self.random.is_none() && self.pid.is_none() {
            let words = "which pages? --gpa LIST, --random N, or --pid PROCESS of the guest's";
            return Err((ErrorKind::MissingRequiredArgument, words));
        }
        // Checked here, as clap drops values that conflict.
        if self.seed.is_some() && self.random.is_none() {
            return conflict("--seed is for --random N; leave it out");
        }
        if self.pid.is_none() && (self.agent.is_some() || self.max != 1) {
            return conflict("--agent and --max are for --pid; leave them out");
        }
        if filtered && self.via != MeansArg::HwpoisonInject {
            return conflict(
                "filters are hwpoison-inject's; leave them out, or use --via hwpoison-inject",
            );
        }
        if self.kind == KindArg::Ar && self.via != MeansArg::Signal {
            return conflict(
                "--kind ar is for --via signal; a page that really is bad gives an AR when the guest touches it",
            );
        }
        if self.kind == KindArg::Ar && !self.force {
            return conflict(
                "a forged AR hits whatever the vCPU runs at that moment: a process of the guest dies, or the \
                 guest; if that is what you want, give --force, too",
            );
        }
        Ok(())
    }
}

/// AO or AR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KindArg {
    /// A page is gone, and nobody has touched it.
    Ao,
    /// A vCPU has touched it.
    Ar,
}

impl From<KindArg> for FailureKind {
    fn from(arg: KindArg) -> Self {
        match arg {
            KindArg::Ao => Self::ActionOptional,
            KindArg::Ar => Self::ActionRequired,
        }
    }
}

/// A memory cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemcgArg {
    /// The VM's own.
    Own,
    /// No filter.
    Nothing,
    /// Its directory.
    Path(PathBuf),
    /// Inode number of its directory.
    Inode(u64),
}

impl FromStr for MemcgArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "own" => Ok(Self::Own),
            "none" => Ok(Self::Nothing),
            path if path.starts_with('/') => Ok(Self::Path(path.into())),
            number => number.parse().map(Self::Inode).map_err(|_| {
                format!(
                    "{number:?} is no cgroup; expected own, none, the path of its directory (/DIR) or that \
                     directory's inode number"
                )
            }),
        }
    }
}

/// `MAJOR:MINOR` of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DevArg(pub u32, pub u32);

impl FromStr for DevArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text
            .split_once(':')
            .and_then(|(major, minor)| Some(Self(major.parse().ok()?, minor.parse().ok()?)));
        numbers.ok_or_else(|| format!("{text:?} is no device; expected MAJOR:MINOR, e.g. 8:1"))
    }
}

/// The means by which a page is made to go bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MeansArg {
    /// The hwpoison-inject module, by page frame number. The VMM gets an AO. Root.
    HwpoisonInject,
    /// madvise(MADV_HWPOISON): by this command, on a mapping of its own, where the memory is shared;
    /// else by the VMM. The caller gets an AR, the VMM an AO. Root.
    Madvise,
    /// madvise(MADV_SOFT_OFFLINE): the page moves to another frame and the old one is never used
    /// again. The guest notices nothing, and nothing goes into the ledger. Root.
    SoftOffline,
    /// The mce-inject module: the host's own machine-check code is made to believe in an error of the
    /// page. The VMM gets an AO. Root; `unpoison` is off from then on.
    MceInject,
    /// The host's firmware, which makes a real error of memory (ACPI's EINJ, the module einj). The VMM gets
    /// an AO. Root; `unpoison` is off from then on.
    Einj,
    /// UFFDIO_POISON, by the VMM on its own memory. Nothing is signalled until somebody touches the
    /// page; then it is an AR. No privileges, no CONFIG_MEMORY_FAILURE (Linux 6.6).
    Uffd,
    /// A signal that the VMM forges for itself; the page is whole. Everything about it is labelled as
    /// forged. No privileges.
    Signal,
}

impl From<MeansArg> for Means {
    fn from(arg: MeansArg) -> Self {
        match arg {
            MeansArg::HwpoisonInject => Self::HwpoisonInject,
            MeansArg::Madvise => Self::Madvise,
            MeansArg::SoftOffline => Self::SoftOffline,
            MeansArg::MceInject => Self::MceInject,
            MeansArg::Einj => Self::Einj,
            MeansArg::Uffd => Self::Uffd,
            MeansArg::Signal => Self::Signal,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::commands::{Cli, Command};

    fn parse(more: &[&str]) -> Result<Box<PoisonArgs>, clap::Error> {
        let line = ["mce-relay", "poison", "--api-socket", "/x"].iter().chain(more).copied();
        match Cli::try_parse_from(line).and_then(|cli| cli.check().map(|()| cli))?.command {
            Command::Poison(args) => Ok(args),
            _ => unreachable!(),
        }
    }

    #[test]
    fn lists_of_pages() {
        let more = ["--via", "madvise", "--gpa", "0x1000,0x3000..0x5000", "--gpa", "1M"];
        let expected = ["0x1000", "0x3000..0x5000", "1M"].map(|text| text.parse().unwrap());
        assert_eq!(parse(&more).unwrap().gpa, expected);
    }

    #[test]
    fn what_goes_together() {
        let inject = ["--via", "hwpoison-inject", "--gpa", "0"];
        let with = |more: &[&str]| parse(&[&inject[..], more].concat());
        assert_eq!(with(&[]).unwrap().filter_memcg, None);
        let given = with(&["--filter-memcg", "own", "--filter-dev", "8:1"]).unwrap();
        assert_eq!(
            (given.filter_memcg, given.filter_dev),
            (Some(MemcgArg::Own), Some(DevArg(8, 1)))
        );
        parse(&["--via", "signal", "--gpa", "0", "--kind", "ar", "--force"]).unwrap();
        parse(&["--via", "uffd", "--random", "3", "--seed", "9"]).unwrap();
        parse(&["--via", "uffd", "--pid", "agent", "--agent", "/y", "--max", "4"]).unwrap();
        for (bad, named) in [
            (&["--via", "uffd"][..], "--gpa"),
            (&["--via", "uffd", "--gpa", "0", "--random", "1"], "--random"),
            (&["--via", "uffd", "--random", "0"], "0"),
            (&["--via", "uffd", "--gpa", "0", "--seed", "1"], "--seed"),
            (&["--via", "uffd", "--pid", "1"], "--agent"),
            (&["--via", "uffd", "--gpa", "0", "--filter-dev", "1:1"], "hwpoison-inject's"),
            (&["--via", "uffd", "--gpa", "0", "--kind", "ar", "--force"], "--via signal"),
            (&["--via", "signal", "--gpa", "0", "--kind", "ar"], "--force"),
            (&["--via", "hwpoison-inject", "--gpa", "0", "--filter-dev", "8"], "MAJOR:MINOR"),
            (&["--via", "hwpoison-inject", "--gpa", "0", "--filter-memcg", "me"], "inode number"),
        ] {
            let error = parse(bad).unwrap_err().to_string();
            assert!(error.contains(named), "{bad:?}: {error}");
        }
    }
}
