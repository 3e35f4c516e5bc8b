//! What a VM is made of, as plain data, and the checks that need nothing but the data.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::outlets::files::LogFile;

/// The largest number of vCPUs: xAPIC ids are 8 bits wide and 255 is the broadcast id.
pub const MAX_CPUS: u8 = 254;

/// Where the data of one serial port of the guest goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialMode {
    /// The port does not exist.
    Off,
    /// Standard output and input of this process; raw mode while the VM runs.
    Tty,
    /// Output is appended to this file; there is no input.
    File(LogFile),
    /// A unix stream socket is made at this path; one client at a time.
    Socket(PathBuf),
}

/// Where the data of the guest's virtio console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleMode {
    /// What the guest writes is dropped, and nothing comes.
    Null,
    /// As for a serial port.
    Line(SerialMode),
}

/// Which tap a network device is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TapSource {
    /// The network interface of that name; at most 15 bytes.
    Name(String),
    /// A descriptor of a tap that this process was started with.
    Fd(i32),
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// Where its frames go.
    pub tap: TapSource,
    /// The guest's address.
    pub mac: [u8; 6],
    /// The MTU that the guest is told, in bytes, 68 and more; `None`: that of the interface, where it has a name.
    pub mtu: Option<u16>,
    /// Whether the host's kernel moves the frames (vhost-net).
    pub vhost: bool,
}

/// The largest number of virtio devices: each has an interrupt of its own.
pub const MAX_DEVICES: usize = 8;

/// What is in the file of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageType {
    /// The disk's bytes.
    Raw,
    /// A qcow2 image.
    Qcow2,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// A regular file or a block device.
    pub path: PathBuf,
    /// The guest may not write to it.
    pub readonly: bool,
    /// Without the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// `None`: raw, unless it begins as an image of another kind.
    pub image_type: Option<ImageType>,
    /// What the guest sees as its serial number, at most 20 bytes.
    pub id: Option<String>,
}

/// The vsock addresses that a guest may have: 2 is the host's, smaller ones are reserved, and all ones stand for any.
pub const GUEST_CIDS: RangeInclusive<u32> = 3..=u32::MAX - 1;

/// One virtio device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceConfig {
    /// A disk.
    Disk(DiskConfig),
    /// A source of random bytes.
    Rng {
        /// The character device or FIFO that they are read from.
        src: PathBuf,
    },
    /// A console; a VM has at most one.
    Console(ConsoleMode),
    /// A network device.
    Net(NetConfig),
    /// Stream sockets between host and guest; a VM has at most one such device.
    Vsock {
        /// The guest's address, 3 to 4294967294.
        cid: u32,
        /// The unix socket at which the host's programs ask for a port of the guest's. The guest's connections to port P
        /// of the host go to the socket that is at this path with `_P` behind it.
        socket: PathBuf,
    },
}

/// The vendor of the processor that the guest sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CpuVendor {
    /// The host's own.
    #[default]
    Host,
    /// An Intel processor, on any host.
    Intel,
    /// An AMD processor, on any host.
    Amd,
}

/// The pages that guest RAM is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PageSize {
    /// Ordinary memory.
    #[default]
    Size4K,
    /// hugetlb pages of 2 MiB.
    Size2M,
    /// hugetlb pages of 1 GiB.
    Size1G,
}

impl PageSize {
    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Size4K => 4 << 10,
            Self::Size2M => 2 << 20,
            Self::Size1G => 1 << 30,
        }
    }
}

/// One stretch of guest RAM, all of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryZone {
    /// In bytes; a whole number of its pages.
    pub size: u64,
    /// Whether another process that maps its file has the same memory; else it belongs to this process alone.
    pub shared: bool,
    /// The size of its pages; a file brings its own.
    pub page_size: PageSize,
    /// Whether the host may join its pages to transparent huge pages.
    pub thp: bool,
    /// Whether all of it is allocated before the guest starts.
    pub prefault: bool,
    /// A file to be the memory, at least as long as it.
    pub file: Option<PathBuf>,
    /// Whether devices are to have a mapping of their own, in which a page that goes bad under their hands does not end the
    /// VMM. It takes a file: without one it is a memfd then.
    pub viewed: bool,
    /// Whether it is KVM's own: a guest_memfd, made anew for each boot. All of it is allocated before the guest starts, and
    /// it has no view for devices.
    pub guest_memfd: bool,
    /// Whether it may be a file of which the host loses bad pages without a signal: a shared one on a disk.
    pub lossy: bool,
}

impl MemoryZone {
    /// `size` bytes of anonymous memory in ordinary pages.
    #[must_use]
    pub const fn new(size: u64) -> Self {
        Self {
            size,
            shared: false,
            page_size: PageSize::Size4K,
            thp: true,
            prefault: false,
            file: None,
            viewed: false,
            guest_memfd: false,
            lossy: false,
        }
    }
}

/// What to do about huge pages of which a part goes bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RescuePolicy {
    /// They are lost as a whole.
    Off,
    /// The good part is kept, and so many bytes are set aside for it at the start.
    On {
        /// 0 takes memory when it is needed.
        reserve: u64,
    },
}

/// A whole VM.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// A Linux kernel: vmlinux (ELF, x86-64) or bzImage.
    pub kernel: PathBuf,
    /// An initramfs, in any form the kernel takes.
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line; at most 2047 bytes, no control characters.
    pub cmdline: String,
    /// Number of vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: u8,
    /// COM1 and COM2.
    pub serial: [SerialMode; 2],
    /// The virtio devices, at most [`MAX_DEVICES`].
    pub devices: Vec<DeviceConfig>,
    /// The vendor of the processor that the guest sees.
    pub cpu_vendor: CpuVendor,
}

/// Why a configuration cannot be a VM.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// No vCPU, or more than can be addressed.
    #[error("{asked} vCPUs asked for, but a VM has 1 to {max}")]
    Cpus {
        /// What was asked for.
        asked: u8,
        /// The most that this host allows.
        max: u8,
    },
    /// Two of the serial ports and the console on one terminal.
    #[error(
        "more than one of the serial ports and the console is set to the terminal, which only one of them can have; \
         set the others to off, file=PATH or socket=PATH"
    )]
    TwoTerminals,
    /// More devices than there are interrupts for them.
    #[error(
        "{asked} virtio devices asked for, but a VM has at most {MAX_DEVICES}: disks, network devices, console, source \
         of random bytes and vsock together"
    )]
    Devices {
        /// What was asked for.
        asked: usize,
    },
    /// Two network devices on one tap.
    #[error("several network devices asked for on one tap; each needs one of its own")]
    Taps,
    /// More than one console.
    #[error("several virtio consoles asked for, but a VM has at most one")]
    Consoles,
    /// More than one vsock device.
    #[error("several virtio-vsock devices asked for, but a VM has at most one")]
    Vsocks,
    /// An address that no guest has.
    #[error("the vsock address (cid) is {asked}; expected 3 to 4294967294")]
    Cid {
        /// What was asked for.
        asked: u32,
    },
}

impl VmConfig {
    /// What the line of the virtio console is on, if it has one.
    #[must_use]
    pub fn console_line(&self) -> Option<&SerialMode> {
        self.devices.iter().find_map(|device| match device {
            DeviceConfig::Console(ConsoleMode::Line(mode)) => Some(mode),
            _ => None,
        })
    }

    /// What the lines of the serial ports and of the console are on.
    pub fn lines(&self) -> impl Iterator<Item = &SerialMode> {
        self.serial.iter().chain(self.console_line())
    }

    /// The guest's address and the host's socket of each vsock device.
    pub fn vsocks(&self) -> impl Iterator<Item = (u32, &Path)> {
        self.devices.iter().filter_map(|device| match device {
            DeviceConfig::Vsock { cid, socket } => Some((*cid, &**socket)),
            _ => None,
        })
    }

    /// Checks what can be checked without a host.
    ///
    /// # Errors
    /// A number of vCPUs outside 1 to [`MAX_CPUS`], more than one line on the terminal, too many devices, several
    /// consoles or vsock devices, an address that no guest has, or two network devices on one tap.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.cpus == 0 || self.cpus > MAX_CPUS {
            return Err(ConfigError::Cpus { asked: self.cpus, max: MAX_CPUS });
        }
        if self.lines().filter(|mode| **mode == SerialMode::Tty).count() > 1 {
            return Err(ConfigError::TwoTerminals);
        }
        if self.devices.len() > MAX_DEVICES {
            return Err(ConfigError::Devices { asked: self.devices.len() });
        }
        if self.devices.iter().filter(|one| matches!(one, DeviceConfig::Console(_))).count() > 1 {
            return Err(ConfigError::Consoles);
        }
        let taps = || {
            self.devices.iter().filter_map(|device| match device {
                DeviceConfig::Net(net) => Some(&net.tap),
                _ => None,
            })
        };
        if taps().enumerate().any(|(nth, tap)| taps().take(nth).any(|other| other == tap)) {
            return Err(ConfigError::Taps);
        }
        let cids: Vec<u32> = self.vsocks().map(|(cid, _)| cid).collect();
        if cids.len() > 1 {
            return Err(ConfigError::Vsocks);
        }
        if let Some(asked) = cids.into_iter().find(|cid| !GUEST_CIDS.contains(cid)) {
            return Err(ConfigError::Cid { asked });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig {
            kernel: "vmlinux".into(),
            initramfs: None,
            cmdline: String::new(),
            cpus: 1,
            serial: [SerialMode::Tty, SerialMode::Off],
            devices: Vec::new(),
            cpu_vendor: CpuVendor::Host,
        }
    }

    #[test]
    fn refuses_impossible_cpu_counts() {
        for cpus in [0, 255] {
            let bad = VmConfig { cpus, ..config() };
            assert_eq!(bad.validate(), Err(ConfigError::Cpus { asked: cpus, max: MAX_CPUS }));
        }
        assert_eq!(VmConfig { cpus: MAX_CPUS, ..config() }.validate(), Ok(()));
    }

    #[test]
    fn one_terminal_only() {
        let bad = VmConfig { serial: [SerialMode::Tty, SerialMode::Tty], ..config() };
        assert_eq!(bad.validate(), Err(ConfigError::TwoTerminals));
        let console = |mode| vec![DeviceConfig::Console(ConsoleMode::Line(mode))];
        let bad = VmConfig { devices: console(SerialMode::Tty), ..config() };
        assert_eq!(bad.validate(), Err(ConfigError::TwoTerminals));
        let serial = [SerialMode::Off, SerialMode::Off];
        let good = VmConfig { devices: console(SerialMode::Tty), serial, ..config() };
        assert_eq!(good.validate(), Ok(()));
        let devices = vec![DeviceConfig::Console(ConsoleMode::Null); 2];
        let bad = VmConfig { devices, ..config() };
        assert_eq!(bad.validate(), Err(ConfigError::Consoles));
    }

    #[test]
    fn a_tap_for_each_network_device() {
        let net = |tap: &str| {
            let tap = TapSource::Name(tap.into());
            DeviceConfig::Net(NetConfig { tap, mac: [2; 6], mtu: None, vhost: false })
        };
        let with = |devices| VmConfig { devices, ..config() }.validate();
        assert_eq!(with(vec![net("a"), net("b")]), Ok(()));
        assert_eq!(with(vec![net("a"), net("b"), net("a")]), Err(ConfigError::Taps));
    }

    #[test]
    fn no_more_devices_than_interrupts() {
        let with = |count| {
            let devices = vec![DeviceConfig::Rng { src: "/dev/urandom".into() }; count];
            VmConfig { devices, ..config() }.validate()
        };
        assert_eq!(with(MAX_DEVICES), Ok(()));
        assert_eq!(with(9), Err(ConfigError::Devices { asked: 9 }));
    }

    #[test]
    fn one_vsock_device_with_an_address_of_a_guest() {
        let with = |cids: &[u32]| {
            let vsock = |cid: &u32| DeviceConfig::Vsock { cid: *cid, socket: "v".into() };
            let devices = cids.iter().map(vsock).collect();
            VmConfig { devices, ..config() }.validate()
        };
        assert_eq!(with(&[3]), Ok(()));
        assert_eq!(with(&[u32::MAX - 1]), Ok(()));
        for asked in [0, 2, u32::MAX] {
            assert_eq!(with(&[asked]), Err(ConfigError::Cid { asked }));
        }
        assert_eq!(with(&[3, 4]), Err(ConfigError::Vsocks));
    }
}
