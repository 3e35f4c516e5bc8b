//! `mce-relay run`: what to boot, and how.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use mce_relay::{AoChannel, Pace};
use mce_relay_vmm::api::types::policy::{Notify, OnUndeliverable};
use mce_relay_vmm::config::{
    CpuVendor, DeviceConfig, MemoryZone, PageSize, RescuePolicy, VmConfig,
};
use mce_relay_vmm::sandbox::seccomp::Mode;
use mce_relay_vmm::session::config::RunConfig;
use mce_relay_vmm::session::names::VmName;

use super::devices::{Console, Disk, NetArg, RngArg, Serial, VsockArg};
use super::parts::parts;
use super::values::{ApiPath, LogPath, on_or_off, parse_number};

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
    /// Guest RAM: size=SIZE with K, M, G or T (or SIZE alone), and more after commas; 512M where neither this nor
    /// --memory-zone is given.
    ///
    /// shared=on: in a memfd that other processes can map; off (the default): anonymous memory.
    /// hugepages=on: in huge pages of the host's pool, all of them promised before the guest starts;
    /// hugepage_size=2M (the default) or 1G. thp=off: the host is not to join pages to transparent
    /// huge pages (the default is on: it may). prefault=on: all of it gets memory before the guest
    /// starts. file=PATH: the memory is this file, at least SIZE long, shared with whoever maps it
    /// where shared=on is given, and otherwise private; on hugetlbfs it comes in huge pages. What a
    /// shared file holds is lost when the guest starts over. A shared file has to be on tmpfs, hugetlbfs or
    /// DAX: of another one the host drops a bad page and reads it again as it once was, without a word to
    /// anybody, which lossy=on accepts. guest_memfd=on: the memory is KVM's own file (Linux 6.18), in
    /// ordinary pages that all get memory before the guest starts; not with virtio devices.
    #[arg(long, value_name = "size=SIZE,...")]
    pub memory: Option<Memory>,
    /// Guest RAM in several zones, each with the keys of --memory (and id=NAME, which is only for you);
    /// given once for each, in the order of their addresses. Instead of --memory.
    #[arg(long, value_name = "size=SIZE,...")]
    pub memory_zone: Vec<Memory>,
    /// First serial port: tty (Ctrl-A x quits), file=PATH, file=PATH,max-size=SIZE, socket=PATH or off.
    ///
    /// A file is appended to, with a line between boots; longer than max-size it becomes PATH.1 and a new one is
    /// begun. SIGHUP has it opened again (logrotate). A socket takes one client at a time, who stays connected
    /// when the guest starts over. Both have mode 0600.
    #[arg(long, default_value = "tty", value_name = "MODE")]
    pub serial: Serial,
    /// Second serial port, where the guest image's agent listens; forms as for --serial.
    #[arg(long, default_value = "off", value_name = "MODE")]
    pub serial2: Serial,
    /// Virtio console (hvc0): off, tty, file=PATH, file=PATH,max-size=SIZE, socket=PATH or null, which drops
    /// what the guest writes; else as for --serial, and without an exit to the VMM for each byte.
    #[arg(long, default_value = "off", value_name = "MODE")]
    pub console: Console,
    /// Give the guest a virtio disk: path=PATH, a regular file or a block device; given once for each disk.
    ///
    /// readonly=on: the guest may not write to it. direct=on: without the host's page cache (O_DIRECT).
    /// image_type=raw|qcow2: what is in the file (raw, unless it begins as qcow2: then it has to be said).
    /// id=NAME: what the guest sees as its serial number, at most 20 bytes. The guest's first disk is
    /// /dev/vda. The file is locked against other VMs that would write to it. It has whole sectors of 512 bytes: of a
    /// longer file the guest does not have the rest, which is said.
    #[arg(long, value_name = "path=PATH")]
    pub disk: Vec<Disk>,
    /// Give the guest a virtio source of random bytes, read from this character device or FIFO: src=/dev/urandom.
    #[arg(long, value_name = "src=PATH")]
    pub rng: Option<RngArg>,
    /// Give the guest a virtio network device on a tap of the host: tap=NAME, and more after commas; given once for
    /// each.
    ///
    /// tap=NAME: the interface, which has to be there and be this user's (`ip tuntap add dev NAME mode tap user
    /// USER`, `ip link set NAME up`). fd=N instead: a descriptor of a tap that is handed to this process, without
    /// packet information (IFF_NO_PI). mac=XX:XX:XX:XX:XX:XX: the guest's address; without it one is chosen at
    /// random, and kept when the guest starts over. mtu=N: the MTU that the guest is told, 68 to 65535; without it
    /// that of the interface. vhost=on: the host's kernel moves the frames (/dev/vhost-net), not this process.
    /// id=NAME is only for you. A frame in a bad page is dropped, as by a wire.
    #[arg(long, value_name = "tap=NAME,...")]
    pub net: Vec<NetArg>,
    /// Give the guest virtio sockets: cid=N (its address, from 3) and socket=PATH.
    ///
    /// A program of the host's connects to the unix socket PATH (mode 0600), writes a line "CONNECT PORT", reads a line
    /// "OK PORT" and is connected to the guest's program at that port. A program of the guest's that connects to
    /// port P of the host (address 2) reaches the unix socket PATH_P, which a program of the host's has made.
    #[arg(long, value_name = "cid=N,socket=PATH")]
    pub vsock: Option<VsockArg>,
    /// Call the VM so, and make its API socket where the other commands look for that name: in
    /// $XDG_RUNTIME_DIR/mce-relay, or where that is not set in /run/mce-relay for root and
    /// mce-relay-UID in the directory for temporary files for others. Its events and its last ledger stay
    /// there when it has ended, for `events --vm NAME` and `status --vm NAME`.
    #[arg(long, value_name = "NAME", conflicts_with = "api_socket")]
    pub name: Option<VmName>,
    /// Make an API socket (mode 0600) at this path, where there may be one that nobody listens at any more.
    #[arg(long, value_name = "path=PATH")]
    pub api_socket: Option<ApiPath>,
    /// Append every event to this file, one line of JSON each; max-size=SIZE and SIGHUP as for --serial.
    #[arg(long, value_name = "path=PATH[,max-size=SIZE]")]
    pub event_monitor: Option<LogPath>,
    /// Whose processor, and so whose machine-check architecture, the guest sees.
    #[arg(long, default_value = "host", value_enum)]
    pub cpu_vendor: VendorArg,
    /// Offer local machine checks to Intel-style guests; off, every vCPU is called for each error.
    #[arg(long, default_value = "on", value_enum)]
    pub lmce: Switch,
    /// When to take errors: as soon as the host knows of them, or when the guest touches them.
    #[arg(long, default_value = "early", value_enum)]
    pub mce_kill: Kill,
    /// Keep what is left of a huge page of which a part goes bad: on, off, or reserve=SIZE to set memory aside for it at the
    /// start.
    ///
    /// The host loses all of a huge page (hugepages=on, shared=off) when a line of it goes bad, and can still read the
    /// rest, from Linux 6.6 on. The rest is put into ordinary memory at the same place, and the guest loses 4 KiB. That
    /// memory is as much as the huge page has, and is taken when it is needed, or set aside: 1G for a page of 1 GiB. Where
    /// there is none the guest loses the whole huge page. When the guest starts over it has a huge page again, if the
    /// host's pool has one. The kernel reads the rest by a mapping of its own: a second bad line in the same huge page
    /// that nobody has noticed yet takes the host down then.
    #[arg(long, default_value = "on", value_name = "on|off|reserve=SIZE", value_parser = rescue)]
    pub rescue: RescuePolicy,
    /// What to do when the guest touched a bad page and cannot be told.
    #[arg(long, default_value = "stop", value_enum)]
    pub on_undeliverable: OnUndeliverableArg,
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
    /// use (6.1: about 32 records), and what does not fit there is lost without a word. The
    /// default uses half of that, at a rate that a guest with a slow console keeps up with; the first page
    /// after a rest counts for a second more. Where the guest's console says that it is done with a page, the
    /// next one is told at once. An AR never waits for this.
    #[arg(long, default_value_t, value_name = "burst=N,rate=N")]
    pub ao_pace: AoPace,
    /// Which system calls the VMM may make: true, those that each of its threads needs, and with any other
    /// it ends (exit status 8); log, all, and the host's kernel logs the others; false, all.
    #[arg(long, default_value = "true", value_enum, value_name = "true|log|false")]
    pub seccomp: Seccomp,
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

fn rescue(text: &str) -> Result<RescuePolicy, String> {
    match (text, text.strip_prefix("reserve=")) {
        ("on", _) => Ok(RescuePolicy::On { reserve: 0 }),
        ("off", _) => Ok(RescuePolicy::Off),
        (_, Some(size)) => parse_number(size).map(|reserve| RescuePolicy::On { reserve }),
        _ => Err("expected on, off or reserve=SIZE".to_owned()),
    }
}

/// `on` or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "the words say it, and clap would show the comments as help")]
pub enum Switch {
    On,
    Off,
}

/// What to do about system calls that the VMM does not need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "the option's help says it")]
pub enum Seccomp {
    True,
    Log,
    False,
}

impl From<Seccomp> for Mode {
    fn from(arg: Seccomp) -> Self {
        match arg {
            Seccomp::True => Self::On,
            Seccomp::Log => Self::Log,
            Seccomp::False => Self::Off,
        }
    }
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

/// What to do about an AR that the guest cannot be told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnUndeliverableArg {
    /// End the VM, with exit status 6.
    Stop,
    /// Pause the VM; `mce-relay resume` has the vCPU touch the page again, and if the guest still
    /// cannot be told, it is paused again.
    Pause,
    /// Start the guest again with good memory; with --no-reboot, end with exit status 6.
    Reset,
}

impl From<OnUndeliverableArg> for OnUndeliverable {
    fn from(arg: OnUndeliverableArg) -> Self {
        match arg {
            OnUndeliverableArg::Stop => Self::Stop,
            OnUndeliverableArg::Pause => Self::Pause,
            OnUndeliverableArg::Reset => Self::Reset,
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
                mce_relay_vmm::config::MAX_CPUS
            )),
            Ok(cpus) => Ok(Self(cpus)),
        }
    }
}

/// Default size of guest RAM, in bytes.
const DEFAULT_RAM: u64 = 512 << 20;

impl RunArgs {
    /// The configuration that the VMM takes.
    #[must_use]
    pub fn config(&self) -> RunConfig {
        let ghes = (self.ao_channel != AoChannel::Mce)
            .then(|| self.ghes_poll.map_or(Notify::Interrupt, |millis| Notify::Poll { millis }));
        RunConfig {
            vm: VmConfig {
                kernel: self.kernel.clone(),
                initramfs: self.initramfs.clone(),
                cmdline: self.cmdline.clone(),
                cpus: self.cpus.0,
                serial: [self.serial.0.clone(), self.serial2.0.clone()],
                devices: self.devices(),
                cpu_vendor: self.cpu_vendor.into(),
            },
            memory: self.zones(),
            name: self.name.clone(),
            api_socket: self.api_socket.as_ref().map(|path| path.0.clone()),
            event_monitor: self.event_monitor.as_ref().map(|path| path.0.clone()),
            lmce: self.lmce == Switch::On,
            mce_kill: self.mce_kill.into(),
            rescue: self.rescue,
            on_undeliverable: self.on_undeliverable.into(),
            ao_channel: self.ao_channel,
            ghes,
            ao_pace: self.ao_pace.0,
            seccomp: self.seccomp.into(),
            no_reboot: self.no_reboot,
        }
    }

    /// The virtio devices, in the order of their windows.
    pub(crate) fn devices(&self) -> Vec<DeviceConfig> {
        let rng = self.rng.iter().map(|rng| DeviceConfig::Rng { src: rng.0.clone() });
        let net = self.net.iter().map(|net| DeviceConfig::Net(net.0.clone()));
        let disks = self.disk.iter().map(|disk| DeviceConfig::Disk(disk.0.clone()));
        let console = self.console.0.clone().map(DeviceConfig::Console);
        let vsock = self.vsock.iter().map(|VsockArg { cid, socket }| DeviceConfig::Vsock {
            cid: *cid,
            socket: socket.clone(),
        });
        disks.chain(rng).chain(console).chain(net).chain(vsock).collect()
    }

    /// The zones of guest RAM.
    #[must_use]
    pub fn zones(&self) -> Vec<MemoryZone> {
        let mut zones = match (&self.memory, self.memory_zone.as_slice()) {
            // Cloud Hypervisor users write --memory size=0 beside zones.
            (_, [_, ..]) => self.memory_zone.iter().map(|zone| zone.0.clone()).collect(),
            (Some(memory), []) => vec![memory.0.clone()],
            (None, []) => vec![MemoryZone::new(DEFAULT_RAM)],
        };
        let has_devices = !self.devices().is_empty();
        zones.iter_mut().for_each(|zone| zone.viewed = has_devices);
        zones
    }
}

/// `size=SIZE` and more, or `SIZE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory(pub MemoryZone);

impl FromStr for Memory {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const KEYS: &str = "size=SIZE, shared=on|off, hugepages=on|off, hugepage_size=2M|1G, \
                            thp=on|off, prefault=on|off, file=PATH, lossy=on|off, \
                            guest_memfd=on|off, id=NAME";
        if !text.contains('=') {
            return parse_number(text).map(|size| Self(MemoryZone::new(size)));
        }
        let mut zone = MemoryZone::new(0);
        let (mut hugepages, mut hugepage_size) = (false, None);
        let parts = parts(text)?;
        for part in &parts {
            let (key, value) = (part.key(), part.value());
            let switch = || on_or_off(key, value);
            match key {
                "size" => zone.size = parse_number(value)?,
                "shared" => zone.shared = switch()?,
                "hugepages" => hugepages = switch()?,
                "thp" => zone.thp = switch()?,
                "prefault" => zone.prefault = switch()?,
                "lossy" => zone.lossy = switch()?,
                "guest_memfd" => zone.guest_memfd = switch()?,
                "hugepage_size" => {
                    hugepage_size = Some(match parse_number(value) {
                        Ok(size) if size == PageSize::Size2M.bytes() => PageSize::Size2M,
                        Ok(size) if size == PageSize::Size1G.bytes() => PageSize::Size1G,
                        _ => return Err(format!("hugepage_size is {value:?}; expected 2M or 1G")),
                    });
                }
                "file" if !value.is_empty() => zone.file = Some(value.into()),
                "id" if !value.is_empty() => {}
                _ => return Err(part.not_understood(KEYS)),
            }
        }
        let is_given = |key| parts.iter().any(|part| part.key() == key);
        if !is_given("size") {
            return Err(format!("size is missing; expected size=SIZE and, if wanted, of {KEYS}"));
        }
        let others = ["hugepages", "file", "shared", "thp", "prefault"];
        if let Some(other) = others.iter().find(|other| zone.guest_memfd && is_given(other)) {
            return Err(format!(
                "guest_memfd=on and {other} exclude each other: the memory is KVM's own file, in ordinary pages that \
                 all get memory before the guest starts"
            ));
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
            (true, _) if is_given("thp") && zone.thp => {
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

/// `burst=N`, `rate=N`, or both with a comma between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AoPace(pub Pace);

impl FromStr for AoPace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut burst, mut rate) = (None, None);
        for part in parts(text)? {
            let (key, value) = (part.key(), part.value());
            let number = match key {
                "burst" => &mut burst,
                "rate" => &mut rate,
                _ => return Err(part.not_understood("burst=N, rate=N or burst=N,rate=N")),
            };
            let parsed = value.parse().ok().filter(|number| *number > 0);
            let Some(parsed) = parsed else {
                return Err(format!(
                    "{key} is {value:?}; expected a number from 1 to {}",
                    u32::MAX
                ));
            };
            *number = Some(parsed);
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

#[cfg(test)]
pub(super) mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::commands::{Cli, Command};

    pub(in crate::args) fn parse(more: &[&str]) -> Result<Box<RunArgs>, clap::Error> {
        let line = ["mce-relay", "run", "--kernel", "/x"].iter().chain(more).copied();
        match Cli::try_parse_from(line).and_then(|cli| cli.check().map(|()| cli))?.command {
            Command::Run(args) => Ok(args),
            _ => unreachable!(),
        }
    }

    #[test]
    fn channels() {
        let given = |more: &[&str]| {
            let args = parse(more).unwrap();
            (args.ao_channel, args.ghes_poll)
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
        let own = MemoryZone { guest_memfd: true, ..zone.clone() };
        assert_eq!(parse("size=1G,guest_memfd=on"), Ok(own));
        assert_eq!(parse("size=1G,guest_memfd=off,thp=on"), Ok(zone.clone()));
        let file = MemoryZone { file: Some("/a=b,c".into()), thp: false, ..zone };
        assert_eq!(parse("id=x,size=1G,file=/a=b,,c,thp=off"), Ok(file));
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
            ("size=1G,guest_memfd=on,shared=off", "guest_memfd=on and shared exclude each other"),
            ("size=1G,guest_memfd=on,prefault=off", "guest_memfd=on and prefault"),
            ("size=1G,guest_memfd=on,hugepages=on", "guest_memfd=on and hugepages"),
            ("size=1G,guest_memfd=yes", "guest_memfd is \"yes\"; expected on or off"),
            ("size=1G,size=2G", "size is given twice"),
            ("size=1G,id=a,id=b", "id is given twice"),
            ("size=1G,file=/a,b", "\"b\" is not understood"),
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
        let zones = |more: &[&str]| parse(more).map(|args| args.zones());
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
        let own = ["--memory", "size=64M,guest_memfd=on"];
        assert!(zones(&own).unwrap()[0].guest_memfd);
        let error = zones(&[&own[..], &["--rng", "src=/dev/urandom"]].concat());
        let error = error.unwrap_err().to_string();
        assert!(error.contains("without virtio devices"), "{error}");
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
    fn cpus() {
        assert_eq!("boot=2".parse(), Ok(Cpus(2)));
        assert!("0".parse::<Cpus>().is_err() && "256".parse::<Cpus>().is_err());
    }
}
