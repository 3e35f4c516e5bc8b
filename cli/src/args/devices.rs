//! The devices of a VM, as the user writes them: its serial port and its virtio devices.

use std::hash::{BuildHasher, Hasher};
use std::path::PathBuf;
use std::str::FromStr;

use mce_relay_vmm::config::{
    ConsoleMode, DiskConfig, GUEST_CIDS, ImageType, NetConfig, SerialMode, TapSource,
};

use super::parts::parts;
use super::values::{log_file, on_or_off};

/// `tty`, `file=PATH`, `file=PATH,max-size=SIZE`, `socket=PATH` or `off`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Serial(pub SerialMode);

impl FromStr for Serial {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORMS: &str = "tty, file=PATH, file=PATH,max-size=SIZE, socket=PATH or off";
        let parts = parts(text)?;
        let mode = match parts.as_slice() {
            _ if text == "tty" => SerialMode::Tty,
            _ if text == "off" => SerialMode::Off,
            [file, ..] if file.key() == "file" && !file.value().is_empty() => {
                SerialMode::File(log_file(&parts, FORMS)?)
            }
            [socket] if socket.key() == "socket" && !socket.value().is_empty() => {
                SerialMode::Socket(socket.value().into())
            }
            [.., last] => return Err(last.not_understood(FORMS)),
            [] => return Err(format!("expected {FORMS}")),
        };
        Ok(Self(mode))
    }
}

/// A form of [`Serial`], or `null`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Console(pub Option<ConsoleMode>);

impl FromStr for Console {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "null" {
            return Ok(Self(Some(ConsoleMode::Null)));
        }
        match text.parse() {
            Ok(Serial(SerialMode::Off)) => Ok(Self(None)),
            Ok(Serial(mode)) => Ok(Self(Some(ConsoleMode::Line(mode)))),
            // Its words, and the one form more.
            Err(error) => Err(error.replace(" or off", ", null or off")),
        }
    }
}

/// `path=PATH` and more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk(pub DiskConfig);

impl FromStr for Disk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const KEYS: &str =
            "path=PATH, readonly=on|off, direct=on|off, image_type=raw|qcow2, id=NAME";
        /// Bytes of a serial number (VIRTIO_BLK_ID_BYTES).
        const ID: usize = 20;
        let (path, image_type) = (PathBuf::new(), None);
        let mut disk = DiskConfig { path, readonly: false, direct: false, image_type, id: None };
        for part in parts(text)? {
            let (key, value) = (part.key(), part.value());
            match key {
                "path" => disk.path = value.into(),
                "readonly" => disk.readonly = on_or_off(key, value)?,
                "direct" => disk.direct = on_or_off(key, value)?,
                "image_type" => {
                    disk.image_type = Some(match value {
                        "raw" => ImageType::Raw,
                        "qcow2" => ImageType::Qcow2,
                        _ => {
                            return Err(format!("image_type is {value:?}; expected raw or qcow2"));
                        }
                    });
                }
                "id" if value.is_empty() || value.len() > ID || !value.is_ascii() => {
                    return Err(format!("id is {value:?}; expected 1 to {ID} ASCII characters"));
                }
                "id" => disk.id = Some(value.to_owned()),
                _ => return Err(part.not_understood(KEYS)),
            }
        }
        if disk.path.as_os_str().is_empty() {
            return Err(format!("no path is given; expected {KEYS}"));
        }
        Ok(Self(disk))
    }
}

/// `src=PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RngArg(pub PathBuf);

impl FromStr for RngArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut src = None;
        for part in parts(text)? {
            match (part.key(), part.value()) {
                ("src", path) if !path.is_empty() => src = Some(path.into()),
                _ => return Err(part.not_understood("src=PATH")),
            }
        }
        src.map(Self).ok_or_else(|| "expected src=PATH".to_owned())
    }
}

/// `tap=NAME` or `fd=N`, and more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetArg(pub NetConfig);

impl FromStr for NetArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const KEYS: &str = "tap=NAME or fd=N, mac=XX:XX:XX:XX:XX:XX, mtu=N, vhost=on|off, id=NAME";
        let (mut tap, mut mac, mut mtu, mut vhost) = (None, None, None, false);
        for part in parts(text)? {
            let (key, value) = (part.key(), part.value());
            match key {
                "tap" | "fd" if tap.is_some() => {
                    return Err("tap and fd exclude each other: a device is on one tap".to_owned());
                }
                "tap" => tap = Some(TapSource::Name(interface(value)?)),
                "fd" => tap = Some(TapSource::Fd(descriptor(value)?)),
                "mac" => mac = Some(unicast(value)?),
                "mtu" => mtu = Some(parse_mtu(value)?),
                "vhost" => vhost = on_or_off(key, value)?,
                "id" if !value.is_empty() => {}
                _ => return Err(part.not_understood(KEYS)),
            }
        }
        let tap = tap.ok_or_else(|| format!("tap is missing; expected {KEYS}"))?;
        Ok(Self(NetConfig { tap, mac: mac.unwrap_or_else(any_mac), mtu, vhost }))
    }
}

/// A name that a network interface can have (dev_valid_name of the kernel, IFNAMSIZ).
fn interface(name: &str) -> Result<String, String> {
    let has_bad = name.contains(|one: char| one.is_whitespace() || "/:%".contains(one));
    match name {
        "" | "." | ".." => {
            Err(format!("tap is {name:?}; expected the name of a network interface"))
        }
        _ if name.len() > 15 || has_bad => Err(format!(
            "tap is {name:?}; expected the name of a network interface: 1 to 15 bytes without spaces, / : and %"
        )),
        _ => Ok(name.to_owned()),
    }
}

fn descriptor(text: &str) -> Result<i32, String> {
    let fd = text.parse().ok().filter(|fd| *fd >= 0);
    fd.ok_or_else(|| format!("fd is {text:?}; expected the number of one file descriptor"))
}

fn parse_mtu(text: &str) -> Result<u16, String> {
    let mtu = text.parse().ok().filter(|mtu| *mtu >= 68);
    mtu.ok_or_else(|| format!("mtu is {text:?}; expected 68 to 65535"))
}

/// The address of one network card.
fn unicast(text: &str) -> Result<[u8; 6], String> {
    let hex = |part: &str| {
        let is_hex = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
        u8::from_str_radix(part, 16).ok().filter(|_| is_hex)
    };
    let bytes: Option<Vec<u8>> = text.split(':').map(hex).collect();
    match bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok()) {
        Some(mac) if mac[0] & 1 == 0 && mac != [0; 6] => Ok(mac),
        Some(_) => Err(format!(
            "mac is {text:?}, which no network card has; expected an even first byte, and not all zeros"
        )),
        None => Err(format!("mac is {text:?}; expected six bytes, as in 02:00:00:00:00:01")),
    }
}

/// One that nobody else is likely to have, of those that anybody may use.
fn any_mac() -> [u8; 6] {
    // Its keys are random.
    let random = std::hash::RandomState::new().build_hasher().finish().to_le_bytes();
    let mut mac = [0; 6];
    mac.copy_from_slice(&random[..6]);
    mac[0] = mac[0] & !1 | 2;
    mac
}

/// `cid=N,socket=PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VsockArg {
    /// The guest's address.
    pub cid: u32,
    /// The host's socket.
    pub socket: PathBuf,
}

impl FromStr for VsockArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const KEYS: &str = "cid=N and socket=PATH, with a comma between";
        let (mut cid, mut socket) = (None, None);
        for part in parts(text)? {
            match (part.key(), part.value()) {
                ("cid", value) => cid = Some(guest_cid(value)?),
                ("socket", value) if !value.is_empty() => socket = Some(value.into()),
                // Cloud Hypervisor's name of the device, which has none here.
                ("id", value) if !value.is_empty() => {}
                _ => return Err(part.not_understood(KEYS)),
            }
        }
        let cid = cid.ok_or_else(|| format!("cid is missing; expected {KEYS}"))?;
        let socket = socket.ok_or_else(|| format!("socket is missing; expected {KEYS}"))?;
        Ok(Self { cid, socket })
    }
}

fn guest_cid(text: &str) -> Result<u32, String> {
    let cid = text.parse().ok().filter(|cid| GUEST_CIDS.contains(cid));
    cid.ok_or_else(|| {
        let (first, last) = (GUEST_CIDS.start(), GUEST_CIDS.end());
        format!("cid is {text:?}; expected {first} to {last} (2 is the host's)")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::run::tests::parse;
    use mce_relay_vmm::config::DeviceConfig;
    use mce_relay_vmm::outlets::files::LogFile;

    #[test]
    fn serial_forms() {
        assert_eq!("tty".parse(), Ok(Serial(SerialMode::Tty)));
        assert_eq!("file=/x".parse(), Ok(Serial(SerialMode::File("/x".into()))));
        let limited = LogFile { path: "/x".into(), max_size: Some(1 << 20) };
        assert_eq!("file=/x,max-size=1M".parse(), Ok(Serial(SerialMode::File(limited))));
        assert!("file=/x,max-size=big".parse::<Serial>().unwrap_err().contains("big"));
        assert_eq!("file=/x,,y".parse(), Ok(Serial(SerialMode::File("/x,y".into()))));
        assert_eq!("socket=/x,,y".parse(), Ok(Serial(SerialMode::Socket("/x,y".into()))));
        for bad in ["", "file", "file=", "pty", "socket=", "tty,off"] {
            assert!(bad.parse::<Serial>().unwrap_err().contains("expected tty"), "{bad}");
        }
        for (bad, named) in [
            ("file=/x,y", "\"y\" is not understood"),
            ("socket=/x,y", "a comma in a value is written twice"),
            ("file=/x,file=/y", "file is given twice"),
            ("socket=/x,socket=/y", "socket is given twice"),
            ("file=/x,max-size=1,max-size=2", "max-size is given twice"),
        ] {
            let error = bad.parse::<Serial>().unwrap_err();
            assert!(error.contains(named), "{bad}: {error}");
        }
    }

    #[test]
    fn disk_forms() {
        let parse = |text: &str| text.parse::<Disk>().map(|disk| disk.0);
        let disk = DiskConfig {
            path: "/a,b".into(),
            readonly: true,
            direct: false,
            image_type: Some(ImageType::Qcow2),
            id: Some("x".to_owned()),
        };
        assert_eq!(parse("path=/a,,b,readonly=on,id=x,image_type=qcow2"), Ok(disk));
        for (bad, named) in [
            ("", "\"\" is not understood"),
            ("readonly=on", "no path is given"),
            ("path=", "no path is given"),
            ("path=/a,b", "\"b\" is not understood"),
            ("path=/a,b", "a comma in a value is written twice"),
            ("path=/a,path=/b", "path is given twice"),
            ("path=/a,id=x,id=y", "id is given twice"),
            ("path=/a,id=", "1 to 20 ASCII characters"),
            ("path=/a,readonly=1", "readonly is \"1\"; expected on or off"),
            ("path=/a,image_type=vmdk", "expected raw or qcow2"),
        ] {
            let error = parse(bad).unwrap_err();
            assert!(error.contains(named), "{bad}: {error}");
        }
    }

    #[test]
    fn console_forms() {
        let parse = |text: &str| text.parse::<Console>().map(|console| console.0);
        let line = |mode| Ok(Some(ConsoleMode::Line(mode)));
        assert_eq!(parse("off"), Ok(None));
        assert_eq!(parse("null"), Ok(Some(ConsoleMode::Null)));
        assert_eq!(parse("tty"), line(SerialMode::Tty));
        assert_eq!(parse("file=/x"), line(SerialMode::File("/x".into())));
        assert_eq!(parse("socket=/x"), line(SerialMode::Socket("/x".into())));
        for bad in ["", "pty", "file=", "socket", "null=1"] {
            let error = parse(bad).unwrap_err();
            assert!(error.contains("socket=PATH, null or off"), "{bad}: {error}");
        }
    }

    #[test]
    fn rng_forms() {
        assert_eq!("src=/dev/urandom".parse(), Ok(RngArg("/dev/urandom".into())));
        for (bad, named) in [
            ("", "expected src=PATH"),
            ("src=", "\"src=\" is not understood"),
            ("/dev/urandom", "expected src=PATH"),
            ("src=/x,iommu=on", "\"iommu=on\" is not understood"),
            ("src=/x,src=/y", "twice"),
            ("src=/x,y", "a comma in a value is written twice"),
        ] {
            let error = bad.parse::<RngArg>().unwrap_err();
            assert!(error.contains(named), "{bad}: {error}");
        }
        let devices = |more: &[&str]| parse(more).unwrap().config().vm.devices;
        assert_eq!(devices(&[]), []);
        let rng = DeviceConfig::Rng { src: "/dev/urandom".into() };
        assert_eq!(devices(&["--rng", "src=/dev/urandom"]), [rng]);
    }

    #[test]
    fn net_forms() {
        let parse_net = |text: &str| text.parse::<NetArg>().map(|net| net.0);
        let tap = TapSource::Name("tap0".into());
        let net = NetConfig { tap, mac: [2, 0, 0, 0, 0xab, 1], mtu: None, vhost: false };
        assert_eq!(parse_net("tap=tap0,mac=02:00:00:00:AB:01"), Ok(net.clone()));
        let more = NetConfig { mtu: Some(9000), vhost: true, ..net.clone() };
        let text = "id=x,mtu=9000,vhost=on,mac=02:00:00:00:ab:01,tap=tap0";
        assert_eq!(parse_net(text), Ok(more));
        let by_fd = NetConfig { tap: TapSource::Fd(5), ..net };
        assert_eq!(parse_net("fd=5,mac=02:00:00:00:ab:01,vhost=off"), Ok(by_fd));
        let (one, two) = (parse_net("tap=tap0").unwrap(), parse_net("tap=tap0").unwrap());
        assert_ne!(one.mac, two.mac, "at random");
        assert_eq!((one.mac[0] & 3, two.mac[0] & 3), (2, 2), "for one card, and anybody's");
        for (bad, named) in [
            ("", "\"\" is not understood"),
            ("mac=02:00:00:00:00:01", "tap is missing"),
            ("tap=", "tap is \"\""),
            ("tap", "tap is \"\""),
            ("tap0", "\"tap0\" is not understood"),
            ("tap=0123456789abcdef", "1 to 15 bytes"),
            ("tap=a/b", "1 to 15 bytes"),
            ("tap=tap%d", "1 to 15 bytes"),
            ("tap=a,tap=b", "tap is given twice"),
            ("tap=a,id=x,id=y", "id is given twice"),
            ("tap=a,fd=3", "exclude each other"),
            ("fd=-1", "fd is \"-1\""),
            ("fd=[3,4]", "fd is \"[3\""),
            ("tap=a,mac=02:00:00:00:00", "six bytes"),
            ("tap=a,mac=2:0:0:0:0:1", "six bytes"),
            ("tap=a,mac=+2:00:00:00:00:01", "six bytes"),
            ("tap=a,mac=01:00:00:00:00:01", "even first byte"),
            ("tap=a,mac=00:00:00:00:00:00", "not all zeros"),
            ("tap=a,mtu=67", "68 to 65535"),
            ("tap=a,mtu=65536", "68 to 65535"),
            ("tap=a,vhost=yes", "vhost is \"yes\"; expected on or off"),
            ("tap=a,ip=192.0.2.1", "\"ip=192.0.2.1\" is not understood"),
        ] {
            let error = parse_net(bad).unwrap_err();
            assert!(error.contains(named), "{bad}: {error}");
        }
        let devices = |more: &[&str]| parse(more).unwrap().config().vm.devices;
        let both = devices(&["--net", "tap=a", "--net", "tap=b,vhost=on"]);
        let vhosts =
            both.iter().map(|device| matches!(device, DeviceConfig::Net(net) if net.vhost));
        assert_eq!(vhosts.collect::<Vec<_>>(), [false, true]);
    }

    #[test]
    fn vsock_forms() {
        let good = VsockArg { cid: 3, socket: "/v=1".into() };
        assert_eq!("cid=3,socket=/v=1".parse(), Ok(good.clone()));
        assert_eq!("socket=/v=1,id=_vsock0,cid=3".parse(), Ok(good));
        let comma = VsockArg { cid: 3, socket: "/v,1".into() };
        assert_eq!("cid=3,socket=/v,,1".parse(), Ok(comma));
        for (bad, named) in [
            ("", "\"\" is not understood; expected cid=N and socket=PATH"),
            ("cid=3", "socket is missing"),
            ("socket=/v", "cid is missing"),
            ("cid=3,socket=", "\"socket=\" is not understood"),
            ("cid=3,socket", "\"socket\" is not understood"),
            ("cid=2,socket=/v", "cid is \"2\"; expected 3 to 4294967294"),
            ("cid=4294967295,socket=/v", "expected 3 to 4294967294"),
            ("cid=-1,socket=/v", "cid is \"-1\""),
            ("cid=,socket=/v", "cid is \"\""),
            ("cid=3,cid=4,socket=/v", "cid is given twice"),
            ("cid=3,socket=/v,socket=/w", "socket is given twice"),
            ("cid=3,socket=/v,id=3,id=4", "id is given twice"),
            ("cid=3,socket=/v,w", "\"w\" is not understood"),
            ("cid=3,socket=/v,iommu=on", "\"iommu=on\" is not understood"),
        ] {
            let error = bad.parse::<VsockArg>().unwrap_err();
            assert!(error.contains(named), "{bad}: {error}");
        }
        let devices = parse(&["--vsock", "cid=3,socket=/v"]).unwrap().config().vm.devices;
        assert_eq!(devices, [DeviceConfig::Vsock { cid: 3, socket: "/v".into() }]);
    }
}
