//! The command line. Its forms are Cloud Hypervisor's, since its users are ours.

use std::path::PathBuf;
use std::str::FromStr;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use mce_relay::{AoChannel, Pace};

use crate::config::{CpuVendor, MemoryZone, OnUndeliverable, PageSize, SerialMode};
use crate::poison::{Means, PageRange};

/// Runs Linux guests on KVM and tells them of the host's memory errors.
#[derive(Debug, Parser)]
#[command(name = "mce-relay", version, max_term_width = 100)]
pub struct Cli {
    /// Say more on stderr: each step of each error (-v), and how (-vv). RUST_LOG overrides it.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Reads this process's command line. What makes no sense ends it, with words and status 2.
#[must_use]
pub fn parse() -> Cli {
    let cli = Cli::parse();
    if let Err(error) = cli.check() {
        error.exit();
    }
    cli
}

impl Cli {
    /// Checks what goes beyond single values.
    fn check(&self) -> Result<(), clap::Error> {
        match &self.command {
            Command::Run(args) if args.ao_channel == AoChannel::Mce && args.ghes_poll.is_some() => {
                let words = "--ghes-poll says how the guest looks for firmware-first records, and with \
                             --ao-channel mce it is given none; leave one of the two out";
                Err(Self::command().error(ErrorKind::ArgumentConflict, words))
            }
            Command::Run(args)
                if !args.memory_zone.is_empty()
                    && args.memory.as_ref().is_some_and(|memory| memory.0.size != 0) =>
            {
                let words = "--memory and --memory-zone both say what guest RAM is; leave --memory out, \
                             or give it as size=0";
                Err(Self::command().error(ErrorKind::ArgumentConflict, words))
            }
            _ => Ok(()),
        }
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a guest and relay memory errors to it.
    ///
    /// A guest that resets itself, or dies of a triple fault, is started again in the same process,
    /// with good memory in place of what went bad.
    ///
    /// Exit status: 0 the guest powered off, or the API ended it; 1 it could not be started, or this
    /// program failed; 2 the command line is wrong; 3 the guest reset itself (with --no-reboot);
    /// 4 triple fault (with --no-reboot, or three in a row right after the start); 5 KVM failed;
    /// 6 the guest touched a bad page and could not be told (with --on-undeliverable stop, or reset
    /// and --no-reboot); 7 memory of this program itself went bad; 128+N ended by signal N.
    Run(Box<RunArgs>),
    /// Make pages of a running guest go bad, on the host.
    ///
    /// All addresses are checked before the first page is poisoned; then the pages are poisoned as
    /// fast as the kernel takes them, and looked at. Exit status 1 when not all of them are bad.
    ///
    /// Needs root, and a host kernel with memory failure handling. It really takes the page out of
    /// use on this host: use the lab (make lab) unless the host is meant for it.
    Poison {
        /// API socket of the VM (path=PATH or PATH).
        #[arg(long, value_name = "path=PATH")]
        api_socket: ApiPath,
        /// Guest-physical addresses and ranges, e.g. 0x1000,0x3000..0x8000: 0x…, or decimal with K,
        /// M or G; a range is all pages from its start to before its end. May be given repeatedly.
        #[arg(long, value_name = "LIST", required = true, value_delimiter = ',')]
        gpa: Vec<PageRange>,
        /// By what means.
        #[arg(long, value_enum)]
        via: Means,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Take a host page that software poisoned back into use.
    ///
    /// Needs root and the hwpoison-inject module. The kernel refuses it from the first real
    /// hardware error on.
    Unpoison {
        /// The host's page frame number, as `poison` prints it.
        #[arg(long, value_parser = parse_number)]
        pfn: u64,
    },
    /// Show a running VM's bad pages, and what became of each.
    Status {
        /// API socket of the VM (path=PATH or PATH).
        #[arg(long, value_name = "path=PATH")]
        api_socket: ApiPath,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Have a running guest stop using pages that are whole and predicted to fail.
    ///
    /// The guest is told by a firmware-first record (a corrected error past its threshold). Linux then
    /// moves what is in the page elsewhere and never uses it again; nothing is lost, and no process is
    /// signalled. Returns when the guest has taken the record for every page; what it did with a page
    /// only its own log and /proc/meminfo (HardwareCorrupted) say. Exit status 1 when a page could not
    /// be told of, with the reason.
    Retire {
        /// API socket of the VM (path=PATH or PATH).
        #[arg(long, value_name = "path=PATH")]
        api_socket: ApiPath,
        /// Guest-physical addresses and ranges, as for `poison`.
        #[arg(long, value_name = "LIST", required = true, value_delimiter = ',')]
        gpa: Vec<PageRange>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Read a running guest's memory, bad pages or not.
    ///
    /// The VM does the reading, so a bad page is reported and harms neither the VM nor its guest. A
    /// guest that runs meanwhile changes what is being read; `mce-relay pause` holds it still.
    Memory {
        /// What to do with it.
        #[command(subcommand)]
        command: MemoryCommand,
    },
    /// Hold all vCPUs of a running VM; returns when none of them is in the guest any more.
    ///
    /// Memory errors are still taken meanwhile, and told when the VM goes on.
    Pause {
        /// API socket of the VM (path=PATH or PATH).
        #[arg(long, value_name = "path=PATH")]
        api_socket: ApiPath,
    },
    /// Let a paused VM go on.
    ///
    /// If it was paused because the guest touched a bad page and could not be told
    /// (--on-undeliverable pause), the vCPU touches the page again, and if the guest still cannot be
    /// told, the VM is paused again.
    Resume {
        /// API socket of the VM (path=PATH or PATH).
        #[arg(long, value_name = "path=PATH")]
        api_socket: ApiPath,
    },
    /// Show what this host and its kernel offer, and what to do about what is missing.
    ///
    /// Exit status 1 when something is missing without which no error can be relayed.
    Check {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// What to do with a guest's memory.
#[derive(Debug, Subcommand)]
pub enum MemoryCommand {
    /// Show some bytes of a running guest's memory.
    ///
    /// As a hexdump with guest-physical addresses, in the form of `hexdump -C`: a `*` stands for
    /// lines like the one before. All bytes or none: when one of them is in a bad page, the error
    /// names its address and how much can be read before it. Exit status 1 then.
    Read {
        /// API socket of the VM (path=PATH or PATH).
        #[arg(long, value_name = "path=PATH")]
        api_socket: ApiPath,
        /// Guest-physical address of the first byte: 0x…, or decimal with K, M or G.
        #[arg(long, value_parser = parse_number)]
        gpa: u64,
        /// Number of bytes, 1 or more, in the same forms.
        #[arg(long, default_value = "64", value_parser = parse_number)]
        len: u64,
        /// Write the bytes as they are, to a file or a program; a terminal is refused.
        #[arg(long, conflicts_with = "json")]
        raw: bool,
        /// Print JSON, with the bytes as hexadecimal digits.
        #[arg(long)]
        json: bool,
    },
    /// Write all memory of a running guest to a file.
    ///
    /// In FILE the offset is the guest-physical address. It is sparse: what is no RAM or reads as
    /// zeros is a hole. So are bad pages, which FILE.json lists with all else that is to be known
    /// of the image. FILE.json is written last: a FILE without it is not complete (Ctrl-C). Both
    /// are readable by their owner alone, as they hold the guest's secrets.
    ///
    /// `mce-relay pause` before makes it an image of one moment. Exit status 1, and nothing left
    /// behind, when the image could not be completed or the guest started over meanwhile; bad
    /// pages are no reason.
    Dump {
        /// API socket of the VM (path=PATH or PATH).
        #[arg(long, value_name = "path=PATH")]
        api_socket: ApiPath,
        /// Where to write the image. Neither it nor FILE.json may exist.
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Print JSON: what FILE.json holds.
        #[arg(long)]
        json: bool,
    },
}

/// What to boot, and how.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Linux kernel: vmlinux (ELF) or bzImage.
    #[arg(long, value_name = "PATH")]
    pub kernel: PathBuf,
    /// Initial ram file system.
    #[arg(long, value_name = "PATH")]
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, default_value = "console=ttyS0", value_name = "TEXT")]
    pub cmdline: String,
    /// Number of vCPUs (boot=N or N).
    #[arg(long, default_value = "1", value_name = "N")]
    pub cpus: Cpus,
    /// Guest RAM: size=SIZE with K, M or G (or SIZE alone), and more after commas.
    ///
    /// shared=on: in a memfd that other processes can map; off (the default): anonymous memory.
    /// hugepages=on: in huge pages of the host's pool, all of them promised before the guest starts;
    /// hugepage_size=2M (the default) or 1G. thp=off: the host is not to join pages to transparent
    /// huge pages (the default is on: it may). prefault=on: all of it gets memory before the guest
    /// starts. file=PATH: the memory is this file, at least SIZE long, shared with whoever maps it
    /// where shared=on is given, and otherwise private; on hugetlbfs it comes in huge pages. What a
    /// shared file holds is lost when the guest starts over.
    #[arg(long, value_name = "size=SIZE,…")]
    pub memory: Option<Memory>,
    /// Guest RAM in several zones, each with the keys of --memory (and id=NAME, which is only for you);
    /// given once for each, in the order of their addresses. Instead of --memory.
    #[arg(long, value_name = "size=SIZE,…")]
    pub memory_zone: Vec<Memory>,
    /// First serial port: tty (Ctrl-A x quits), file=PATH, socket=PATH or off.
    #[arg(long, default_value = "tty", value_name = "MODE")]
    pub serial: Serial,
    /// Second serial port, where the guest image's agent listens; forms as for --serial.
    #[arg(long, default_value = "off", value_name = "MODE")]
    pub serial2: Serial,
    /// Make an API socket (mode 0600) at this path, which must not exist.
    #[arg(long, value_name = "path=PATH")]
    pub api_socket: Option<ApiPath>,
    /// Write every event to this file, one line of JSON each.
    #[arg(long, value_name = "path=PATH")]
    pub event_monitor: Option<ApiPath>,
    /// Whose processor, and so whose machine-check architecture, the guest sees.
    #[arg(long, default_value = "host", value_enum)]
    pub cpu_vendor: VendorArg,
    /// Offer local machine checks to Intel-style guests; off, every vCPU is called for each error.
    #[arg(long, default_value = "on", value_enum)]
    pub lmce: Switch,
    /// When to take errors: as soon as the host knows of them, or when the guest touches them.
    #[arg(long, default_value = "early", value_enum)]
    pub mce_kill: Kill,
    /// What to do when the guest touched a bad page and cannot be told.
    #[arg(long, default_value = "stop", value_enum)]
    pub on_undeliverable: OnUndeliverable,
    /// Which way AOs go: auto, by firmware-first records (ACPI HEST) to AMD-style guests that have
    /// taken the error source, by machine check to all others; mce or ghes, for every guest.
    ///
    /// A guest that does not take records is told by machine check all the same, after ten seconds at
    /// most. ARs are always machine checks. With mce the guest is given no error source.
    #[arg(long, default_value_t, value_name = "auto|mce|ghes", value_parser = ao_channel)]
    pub ao_channel: AoChannel,
    /// Have the guest look for firmware-first records every so many milliseconds instead of
    /// interrupting it. Linux rounds that to whole seconds.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u32).range(1..=3_600_000))]
    pub ghes_poll: Option<u32>,
    /// How fast the guest is told of AOs: burst=N at once, then rate=N a second, or one of the two.
    ///
    /// Linux keeps the errors it is told of in a short queue until it has taken each page out of
    /// use (6.1: about 32 records), and what does not fit there is lost without a word; nothing
    /// tells the VMM how full it is. The default uses half of that, at a rate that a guest with a
    /// slow console keeps up with. An AR never waits for this.
    #[arg(long, default_value_t, value_name = "burst=N,rate=N")]
    pub ao_pace: AoPace,
    /// End when the guest resets itself or would be reset, instead of starting it again.
    #[arg(long)]
    pub no_reboot: bool,
}

fn ao_channel(text: &str) -> Result<AoChannel, String> {
    match text {
        "auto" => Ok(AoChannel::Auto),
        "mce" => Ok(AoChannel::Mce),
        "ghes" => Ok(AoChannel::Ghes),
        _ => Err("expected auto, mce or ghes".to_owned()),
    }
}

/// `on` or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "the words say it, and clap would show the comments as help")]
pub enum Switch {
    On,
    Off,
}

/// A guest's processor vendor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum VendorArg {
    /// The host's own.
    Host,
    /// Intel: SRAO and SRAR, LMCE or rendezvous.
    Intel,
    /// AMD: deferred errors and SUCCOR.
    Amd,
}

impl From<VendorArg> for CpuVendor {
    fn from(arg: VendorArg) -> Self {
        match arg {
            VendorArg::Host => Self::Host,
            VendorArg::Intel => Self::Intel,
            VendorArg::Amd => Self::Amd,
        }
    }
}

/// Early or late kill.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kill {
    /// AO: the guest is told before it touches the page.
    Early,
    /// AR only.
    Late,
}

impl From<Kill> for mce_relay::KillPolicy {
    fn from(arg: Kill) -> Self {
        match arg {
            Kill::Early => Self::Early,
            Kill::Late => Self::Late,
        }
    }
}

/// `path=PATH` or `PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiPath(pub PathBuf);

impl FromStr for ApiPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("path=").unwrap_or(text) {
            "" => Err("the path is empty; expected path=PATH".to_owned()),
            path => Ok(Self(path.into())),
        }
    }
}

/// `boot=N` or `N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpus(pub u8);

impl FromStr for Cpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_prefix("boot=").unwrap_or(text);
        match number.parse() {
            Ok(0) | Err(_) => Err(format!(
                "{number:?} is not a number of vCPUs; expected 1 to {}",
                crate::config::MAX_CPUS
            )),
            Ok(cpus) => Ok(Self(cpus)),
        }
    }
}

/// Guest RAM where none is asked for, in bytes.
const DEFAULT_RAM: u64 = 512 << 20;

impl RunArgs {
    /// The zones of guest RAM.
    #[must_use]
    pub fn zones(&self) -> Vec<MemoryZone> {
        match (&self.memory, self.memory_zone.as_slice()) {
            // Cloud Hypervisor wants a --memory size=0 beside zones.
            (_, [_, ..]) => self.memory_zone.iter().map(|zone| zone.0.clone()).collect(),
            (Some(memory), []) => vec![memory.0.clone()],
            (None, []) => vec![MemoryZone::new(DEFAULT_RAM)],
        }
    }
}

/// `size=SIZE` and more, or `SIZE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory(pub MemoryZone);

impl FromStr for Memory {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const KEYS: &str = "size=SIZE, shared=on|off, hugepages=on|off, hugepage_size=2M|1G, \
                            thp=on|off, prefault=on|off, file=PATH, id=NAME";
        if !text.contains('=') {
            return parse_number(text).map(|size| Self(MemoryZone::new(size)));
        }
        let mut zone = MemoryZone::new(0);
        let (mut hugepages, mut hugepage_size) = (false, None);
        let mut given: Vec<&str> = Vec::new();
        for part in text.split(',') {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let switch = || match value {
                "on" => Ok(true),
                "off" => Ok(false),
                _ => Err(format!("{key} is {value:?}; expected on or off")),
            };
            match key {
                "size" => zone.size = parse_number(value)?,
                "shared" => zone.shared = switch()?,
                "hugepages" => hugepages = switch()?,
                "thp" => zone.thp = switch()?,
                "prefault" => zone.prefault = switch()?,
                "hugepage_size" => {
                    hugepage_size = Some(match parse_number(value) {
                        Ok(size) if size == PageSize::Size2M.bytes() => PageSize::Size2M,
                        Ok(size) if size == PageSize::Size1G.bytes() => PageSize::Size1G,
                        _ => return Err(format!("hugepage_size is {value:?}; expected 2M or 1G")),
                    });
                }
                "file" if !value.is_empty() => zone.file = Some(value.into()),
                "id" if !value.is_empty() => {}
                _ => return Err(format!("{part:?} is not understood; expected {KEYS}")),
            }
            if given.contains(&key) {
                return Err(format!("{key} is given twice"));
            }
            given.push(key);
        }
        if !given.contains(&"size") {
            return Err(format!("size is missing; expected size=SIZE and, if wanted, of {KEYS}"));
        }
        match (hugepages, hugepage_size) {
            (false, Some(_)) => {
                return Err("hugepage_size needs hugepages=on".to_owned());
            }
            (true, _) if zone.file.is_some() => {
                return Err(
                    "hugepages=on and file exclude each other; for both, give a file on a \
                            mount of hugetlbfs, without hugepages"
                        .to_owned(),
                );
            }
            (true, _) if given.contains(&"thp") && zone.thp => {
                return Err(
                    "thp=on and hugepages=on exclude each other: hugetlb pages are huge already"
                        .to_owned(),
                );
            }
            (true, size) => zone.page_size = size.unwrap_or(PageSize::Size2M),
            (false, None) => {}
        }
        Ok(Self(zone))
    }
}

/// `tty`, `file=PATH`, `socket=PATH` or `off`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Serial(pub SerialMode);

impl FromStr for Serial {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mode = match text.split_once('=') {
            None if text == "tty" => SerialMode::Tty,
            None if text == "off" => SerialMode::Off,
            Some(("file", path)) if !path.is_empty() => SerialMode::File(path.into()),
            Some(("socket", path)) if !path.is_empty() => SerialMode::Socket(path.into()),
            _ => {
                return Err(format!(
                    "{text:?} is not understood; expected tty, file=PATH, socket=PATH or off"
                ));
            }
        };
        Ok(Self(mode))
    }
}

/// `burst=N`, `rate=N`, or both with a comma between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AoPace(pub Pace);

impl FromStr for AoPace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut burst, mut rate) = (None, None);
        for part in text.split(',') {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let number = match key {
                "burst" => &mut burst,
                "rate" => &mut rate,
                _ => {
                    return Err(format!(
                        "{part:?} is not understood; expected burst=N, rate=N or burst=N,rate=N"
                    ));
                }
            };
            let parsed = value.parse().ok().filter(|number| *number > 0);
            let Some(parsed) = parsed else {
                return Err(format!(
                    "{key} is {value:?}; expected a number from 1 to {}",
                    u32::MAX
                ));
            };
            if number.replace(parsed).is_some() {
                return Err(format!("{key} is given twice"));
            }
        }
        let default = Pace::default();
        Ok(Self(Pace { burst: burst.unwrap_or(default.burst), rate: rate.unwrap_or(default.rate) }))
    }
}

impl std::fmt::Display for AoPace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Pace { burst, rate } = self.0;
        write!(f, "burst={burst},rate={rate}")
    }
}

impl FromStr for PageRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((start, end)) = text.split_once("..") else {
            return parse_number(text).map(Self::page);
        };
        let number =
            |text| parse_number(text).map_err(|error| format!("{error}, as in 0x3000..0x8000"));
        let (start, end) = (number(start)?, number(end)?);
        Self::new(start, end).ok_or_else(|| match start == end {
            true => format!("{text} is empty: the end of a range is not part of it"),
            false => format!("{text} ends before it starts"),
        })
    }
}

/// A number of bytes or an address: `0x…` or decimal, with K, M, G or T for powers of 1024.
///
/// # Errors
/// Words for the user.
pub fn parse_number(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a number; expected e.g. 512M, 4G, 4096 or 0x1000");
    if let Some(digits) = text.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).map_err(|_| wrong());
    }
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        Some(b'T' | b't') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} does not fit into 64 bits"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn channels() {
        let parse = |more: &[&str]| {
            let line = ["mce-relay", "run", "--kernel", "/x"].iter().chain(more).copied();
            Cli::try_parse_from(line).and_then(|cli| cli.check().map(|()| cli))
        };
        let given = |more: &[&str]| match parse(more).unwrap().command {
            Command::Run(args) => (args.ao_channel, args.ghes_poll),
            _ => unreachable!(),
        };
        assert_eq!(given(&[]), (AoChannel::Auto, None));
        assert_eq!(given(&["--ao-channel", "mce"]), (AoChannel::Mce, None));
        let poll = ["--ao-channel=ghes", "--ghes-poll=100"];
        assert_eq!(given(&poll), (AoChannel::Ghes, Some(100)));
        for (bad, named) in [
            (&["--ao-channel", "acpi"][..], "expected auto, mce or ghes"),
            (&["--ghes-poll", "0"], "1..=3600000"),
            (&["--ghes-poll", "fast"], "fast"),
            (&["--ghes-poll", "100", "--ao-channel", "mce"], "leave one of the two out"),
        ] {
            let error = parse(bad).unwrap_err().to_string();
            assert!(error.contains(named), "{bad:?}: {error}");
        }
    }

    #[test]
    fn numbers() {
        assert_eq!(parse_number("512M"), Ok(512 << 20));
        assert_eq!(parse_number("0x1000"), Ok(4096));
        assert_eq!(parse_number("4g"), Ok(4 << 30));
        for bad in ["", "M", "0x", "-1", "1.5G", "99999999T", "0xg", "é"] {
            assert!(parse_number(bad).unwrap_err().contains(bad), "{bad}");
        }
    }

    #[test]
    fn memory_forms() {
        let zone = MemoryZone::new(1 << 30);
        let parse = |text: &str| text.parse::<Memory>().map(|memory| memory.0);
        assert_eq!(parse("size=1G"), Ok(zone.clone()));
        assert_eq!(parse("64M"), Ok(MemoryZone::new(64 << 20)));
        assert_eq!(parse("size=1G,shared=on"), Ok(MemoryZone { shared: true, ..zone.clone() }));
        let huge = MemoryZone { page_size: PageSize::Size2M, ..zone.clone() };
        assert_eq!(parse("size=1G,hugepages=on"), Ok(huge));
        let huge = MemoryZone { page_size: PageSize::Size1G, prefault: true, ..zone.clone() };
        assert_eq!(parse("prefault=on,hugepage_size=1G,hugepages=on,size=1G"), Ok(huge));
        let file = MemoryZone { file: Some("/a=b".into()), thp: false, ..zone };
        assert_eq!(parse("id=x,size=1G,file=/a=b,thp=off"), Ok(file));
        for (bad, named) in [
            ("", "\"\" is not a number"),
            ("size=", "\"\" is not a number"),
            ("hugepages=on", "size is missing"),
            ("size=1G,shared=yes", "shared is \"yes\"; expected on or off"),
            ("size=1G,shared", "shared is \"\""),
            ("size=1G,hugepage_size=2M", "needs hugepages=on"),
            ("size=1G,hugepages=on,hugepage_size=4M", "hugepage_size is \"4M\""),
            ("size=1G,hugepages=on,file=/x", "exclude each other"),
            ("size=1G,hugepages=on,thp=on", "exclude each other"),
            ("size=1G,size=2G", "size is given twice"),
            ("size=1G,", "\"\" is not understood"),
            ("size=1G,file=", "file="),
            ("size=1G,mergeable=on", "mergeable=on"),
        ] {
            let error = parse(bad).unwrap_err();
            assert!(error.contains(named), "{bad}: {error}");
        }
    }

    #[test]
    fn zones() {
        let zones = |more: &[&str]| {
            let line = ["mce-relay", "run", "--kernel", "/x"].iter().chain(more).copied();
            let cli = Cli::try_parse_from(line).and_then(|cli| cli.check().map(|()| cli))?;
            let Command::Run(args) = cli.command else { unreachable!() };
            Ok::<_, clap::Error>(args.zones())
        };
        let sizes = |more: &[&str]| -> Vec<u64> {
            zones(more).unwrap().iter().map(|zone| zone.size >> 20).collect()
        };
        assert_eq!(sizes(&[]), [512]);
        assert_eq!(sizes(&["--memory", "64M"]), [64]);
        let two = ["--memory-zone", "size=1G,id=a", "--memory-zone", "size=2G,hugepages=on"];
        assert_eq!(sizes(&two), [1024, 2048]);
        assert_eq!(sizes(&[&["--memory", "size=0"], &two[..]].concat()), [1024, 2048]);
        let error = zones(&[&["--memory", "64M"], &two[..]].concat()).unwrap_err().to_string();
        assert!(error.contains("--memory-zone"), "{error}");
    }

    #[test]
    fn paces() {
        let default = Pace::default();
        assert_eq!("burst=8,rate=2".parse(), Ok(AoPace(Pace { burst: 8, rate: 2 })));
        assert_eq!("rate=2,burst=8".parse(), Ok(AoPace(Pace { burst: 8, rate: 2 })));
        assert_eq!("burst=8".parse(), Ok(AoPace(Pace { burst: 8, ..default })));
        assert_eq!("rate=2".parse(), Ok(AoPace(Pace { rate: 2, ..default })));
        assert_eq!(AoPace::default().to_string().parse(), Ok(AoPace(default)));
        for (bad, named) in [
            ("", "\"\" is not understood"),
            ("8", "\"8\""),
            ("burst", "burst is \"\""),
            ("burst=", "1 to 4294967295"),
            ("burst=0", "burst is \"0\""),
            ("rate=-1", "rate is \"-1\""),
            ("rate=4294967296", "4294967296"),
            ("burst=1,burst=2", "twice"),
            ("burst=1,", "\"\" is not understood"),
            ("speed=1", "speed=1"),
        ] {
            let error = bad.parse::<AoPace>().unwrap_err();
            assert!(error.contains(named), "{bad}: {error}");
        }
    }

    #[test]
    fn pages_and_ranges() {
        assert_eq!("0x1000".parse(), Ok(PageRange::page(0x1000)));
        assert_eq!("0x3000..0x8000".parse(), Ok(PageRange::new(0x3000, 0x8000).unwrap()));
        assert_eq!("16M..17M".parse(), Ok(PageRange::new(16 << 20, 17 << 20).unwrap()));
        for (bad, named) in [
            ("", "\"\""),
            ("0x3000..", "\"\""),
            ("..0x3000", "\"\""),
            ("0x3000...0x8000", ".0x8000"),
            ("0x3000-0x8000", "0x3000-0x8000"),
            ("0x8000..0x3000", "0x8000..0x3000 ends before it starts"),
            ("0x3000..0x3000", "0x3000..0x3000 is empty"),
        ] {
            let error = bad.parse::<PageRange>().unwrap_err();
            assert!(error.contains(named), "{bad}: {error}");
        }
        let list = ["mce-relay", "poison", "--api-socket", "/x", "--via", "madvise"];
        let list = list.iter().copied().chain(["--gpa", "0x1000,0x3000..0x5000", "--gpa", "1M"]);
        let Command::Poison { gpa, .. } = Cli::parse_from(list).command else { unreachable!() };
        let expected = ["0x1000", "0x3000..0x5000", "1M"].map(|text| text.parse().unwrap());
        assert_eq!(gpa, expected);
    }

    #[test]
    fn serial_forms() {
        assert_eq!("tty".parse(), Ok(Serial(SerialMode::Tty)));
        assert_eq!("file=/x".parse(), Ok(Serial(SerialMode::File("/x".into()))));
        for bad in ["", "file", "file=", "pty"] {
            assert!(bad.parse::<Serial>().unwrap_err().contains("expected tty"), "{bad}");
        }
    }

    #[test]
    fn cpus_and_paths() {
        assert_eq!("boot=2".parse(), Ok(Cpus(2)));
        assert!("0".parse::<Cpus>().is_err() && "256".parse::<Cpus>().is_err());
        assert_eq!("path=/a".parse(), Ok(ApiPath("/a".into())));
        assert!("path=".parse::<ApiPath>().is_err());
    }
}
