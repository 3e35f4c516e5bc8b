//! A tap of the host: a network interface of which this process is the other end.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_UP, IFF_VNET_HDR, c_int, ifreq};
use thiserror::Error;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use super::layout::HEADER;
use crate::config::TapSource;

/// Where taps come from.
const CLONE: &str = "/dev/net/tun";

/// Why there is no tap.
#[derive(Debug, Error)]
pub enum TapError {
    /// No interface has that name.
    #[error(
        "there is no network interface {name:?}; make one with `ip tuntap add dev {name} mode tap user $(id -u)` and \
         `ip link set {name} up`, as root"
    )]
    Absent {
        /// Its name.
        name: String,
    },
    /// The interface cannot be asked for its state.
    #[error("cannot ask for the state of network interface {name:?}")]
    State {
        /// Its name.
        name: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// This host gives no taps.
    #[error("cannot open {CLONE}, which taps come from (kernel module tun)")]
    Open(#[source] io::Error),
    /// The interface cannot be had.
    #[error("cannot use network interface {name:?}: {}", why(.source))]
    Attach {
        /// Its name.
        name: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A descriptor that is none.
    #[error(
        "file descriptor {fd} is not a tap; expected one of {CLONE} on which TUNSETIFF was done"
    )]
    NotATap {
        /// Its number.
        fd: RawFd,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A descriptor of an interface without Ethernet.
    #[error(
        "file descriptor {fd} is a tun, which has no Ethernet frames; expected a tap (IFF_TAP)"
    )]
    Tun {
        /// Its number.
        fd: RawFd,
    },
}

/// What an error of TUNSETIFF means.
fn why(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EBUSY) => "another process uses it",
        Some(libc::EPERM) => "it belongs to another user; make it with `ip tuntap add … user`",
        Some(libc::EINVAL) => "it is not a tap",
        _ => "it is not to be had",
    }
}

/// How long a tap may still be in use: by the device of the boot before, of which the kernel has a part left to end, or by a
/// process that was forked from this one and does not run its own program yet.
const LET_GO: Duration = Duration::from_secs(1);

/// One queue of a tap. Closed when dropped; the interface stays if it was made to.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    /// Whether frames on it have a header.
    has_header: bool,
    mtu: Option<u16>,
}

impl Tap {
    /// Opens the tap of a configuration.
    ///
    /// # Errors
    /// See [`TapError`].
    pub fn open(source: &TapSource) -> Result<Self, TapError> {
        match source {
            TapSource::Name(name) => Self::by_name(name),
            TapSource::Fd(fd) => Self::by_fd(*fd),
        }
    }

    fn by_name(name: &str) -> Result<Self, TapError> {
        // The kernel would make an interface that is not there.
        let (mtu, is_up) = state(name).map_err(|source| match source.raw_os_error() {
            Some(libc::ENODEV) => TapError::Absent { name: name.into() },
            _ => TapError::State { name: name.into(), source },
        })?;
        let error = |source| TapError::Attach { name: name.into(), source };
        let attach = |flags: c_int| {
            let flags = flags | IFF_TAP | IFF_NO_PI;
            let mut options = OpenOptions::new();
            options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
            let file = options.open(CLONE).map_err(TapError::Open)?;
            let mut request = request(name);
            #[allow(clippy::cast_possible_truncation, reason = "they are flags of 16 bits")]
            let flags = flags as i16;
            request.ifr_ifru.ifru_flags = flags;
            // SAFETY: the kernel reads an ifreq, which the reference is to.
            match unsafe { ioctl_with_ref(&file, libc::TUNSETIFF, &request) } {
                0 => Ok(file),
                _ => Err(error(io::Error::last_os_error())),
            }
        };
        let failed_with = |result: &Result<File, TapError>, errno| match result {
            Err(TapError::Attach { source, .. }) => source.raw_os_error() == Some(errno),
            _ => false,
        };
        let begun = Instant::now();
        let file = loop {
            let mut result = attach(0);
            if failed_with(&result, libc::EINVAL) {
                // One with several queues wants to be told that this is known.
                result = attach(IFF_MULTI_QUEUE);
            }
            if !failed_with(&result, libc::EBUSY) || begun.elapsed() > LET_GO {
                break result?;
            }
            std::thread::sleep(LET_GO / 100);
        };
        if !is_up {
            log::warn!(
                "virtio-net: network interface {name} is down, and takes no frames before `ip link set {name} up`"
            );
        }
        Ok(Self { file, name: name.into(), has_header: false, mtu })
    }

    fn by_fd(fd: RawFd) -> Result<Self, TapError> {
        let error = |source| TapError::NotATap { fd, source };
        // One of its own, as the next boot wants it again.
        // SAFETY: without pointers; the kernel checks the number.
        let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
        if copy < 0 {
            return Err(error(io::Error::last_os_error()));
        }
        // SAFETY: it has just been made, and nobody else has it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(copy) });
        let mut request = request("");
        // SAFETY: the kernel writes an ifreq, which the reference is to, or whoever the descriptor belongs to refuses.
        if unsafe { ioctl_with_mut_ref(&file, libc::TUNGETIFF, &mut request) } != 0 {
            return Err(error(io::Error::last_os_error()));
        }
        // SAFETY: it was zeroed, or TUNGETIFF has set it; all values are valid.
        let flags = c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let name = request.ifr_name.iter().take_while(|byte| **byte != 0);
        let name = name.map(|byte| char::from(byte.to_ne_bytes()[0])).collect();
        if flags & IFF_TAP == 0 {
            return Err(TapError::Tun { fd });
        }
        // Whether there is packet information before each frame cannot be asked: its bit says something else here.
        let has_header = flags & IFF_VNET_HDR != 0;
        if has_header {
            without_offloads(&file).map_err(error)?;
        }
        not_waiting(&file).map_err(error)?;
        Ok(Self { file, name, has_header, mtu: None })
    }

    /// What is not a tap but takes and gives whole frames as one does, and without waiting: a socket.
    #[must_use]
    pub fn of_socket(socket: OwnedFd, mtu: Option<u16>) -> Self {
        Self { file: socket.into(), name: "a socket".into(), has_header: false, mtu }
    }

    /// The MTU of its interface in bytes, where that is known: by name.
    #[must_use]
    pub fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    /// Has vhost-net take each frame by itself, which it does on a tap whose send buffer has a limit. Of several at once it tries
    /// one that is in a bad page again and again, without an end.
    pub(super) fn one_at_a_time(&self) -> io::Result<()> {
        let almost_none: c_int = c_int::MAX - 1;
        // SAFETY: TUNSETSNDBUF reads an int, which the reference is to.
        match unsafe { ioctl_with_ref(&self.file, libc::TUNSETSNDBUF, &almost_none) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Its file, for vhost-net.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Whether each frame on it has a header of [`HEADER`] bytes.
    pub(super) fn has_header(&self) -> bool {
        self.has_header
    }

    /// Reads a frame, to behind the first [`HEADER`] bytes of `bytes`; returns its length.
    pub(super) fn read(&self, bytes: &mut [u8]) -> io::Result<usize> {
        let skip = if self.has_header { HEADER } else { 0 };
        let len = (&self.file).read(&mut bytes[HEADER - skip..])?;
        match len.checked_sub(skip) {
            Some(len) if len > 0 => Ok(len),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Writes the frame that is behind the first [`HEADER`] bytes of `bytes`, by one call.
    pub(super) fn write(&self, bytes: &mut [u8]) -> io::Result<()> {
        let skip = if self.has_header { 0 } else { HEADER };
        // Whatever the guest has there is not the host's to know.
        bytes[..HEADER].fill(0);
        let bytes = &bytes[skip..];
        match (&self.file).write(bytes)? {
            len if len == bytes.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl fmt::Display for Tap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// A request about the interface of that name, of at most 15 bytes.
pub(super) fn request(name: &str) -> ifreq {
    // SAFETY: ifreq is plain data; all zero is a valid value.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name.iter_mut().take(room).zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request
}

/// The MTU of an interface of this network namespace in bytes, and whether it is up.
fn state(name: &str) -> io::Result<(Option<u16>, bool)> {
    let socket = UnixDatagram::unbound()?;
    let ask = |what| {
        let mut request = request(name);
        // SAFETY: the kernel reads and writes an ifreq, which the reference is to.
        match unsafe { ioctl_with_mut_ref(&socket, what, &mut request) } {
            0 => Ok(request.ifr_ifru),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: SIOCGIFMTU and SIOCGIFFLAGS have set these; all values are valid.
    let (mtu, flags) =
        unsafe { (ask(libc::SIOCGIFMTU)?.ifru_mtu, ask(libc::SIOCGIFFLAGS)?.ifru_flags) };
    Ok((u16::try_from(mtu).ok(), c_int::from(flags) & IFF_UP != 0))
}

/// No frame comes from the kernel that is to be cut or summed up first, and the header is as long as virtio's.
fn without_offloads(tap: &File) -> io::Result<()> {
    #[allow(clippy::cast_possible_wrap, clippy::cast_possible_truncation, reason = "it is 12")]
    let header = HEADER as c_int;
    // SAFETY: TUNSETVNETHDRSZ reads an int, which the reference is to; TUNSETOFFLOAD takes a value.
    let done = unsafe {
        ioctl_with_ref(tap, libc::TUNSETVNETHDRSZ, &header) == 0
            && ioctl_with_val(tap, libc::TUNSETOFFLOAD, 0) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A read or a write that would wait is an error instead.
fn not_waiting(file: &File) -> io::Result<()> {
    // SAFETY: fcntl with these commands takes and returns numbers.
    let done = unsafe {
        let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
        flags >= 0 && libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}
