//! The host's side: the socket at which the host's programs come, and those at which they wait for the guest's.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::outlets::sockets::{self, BindError, BoundPath};

/// The longest path of a socket, in bytes: sun_path has 108, of which one ends it.
const LONGEST: usize = 107;
/// What a path of [`dial`] has beside that of the socket: `_` and the digits of the largest port.
const SUFFIX: usize = 11;

/// Why there is no socket for the host's programs.
#[derive(Debug, Error)]
pub enum HostError {
    /// It could not be made.
    #[error("cannot make the vsock socket at {}", path.display())]
    Bind {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: BindError,
    },
    /// There would be no room for the ports.
    #[error(
        "cannot make the vsock socket at {}: the path has {} bytes; expected at most {}, as the sockets for the \
         guest's connections are at PATH_PORT",
        path.display(), path.as_os_str().len(), LONGEST - SUFFIX
    )]
    TooLong {
        /// Its path.
        path: PathBuf,
    },
}

/// The socket at which programs ask for a port of the guest's. It lives as long as the process; a program that comes while
/// the guest starts over waits.
#[derive(Debug)]
pub struct VsockLine {
    listener: UnixListener,
    path: PathBuf,
    _bound: BoundPath,
}

impl VsockLine {
    /// Makes it, with mode 0600.
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn open(path: &Path) -> Result<Self, HostError> {
        if path.as_os_str().len() > LONGEST - SUFFIX {
            return Err(HostError::TooLong { path: path.into() });
        }
        let error = |source| HostError::Bind { path: path.into(), source };
        let (listener, bound) = sockets::bind(path).map_err(error)?;
        listener.set_nonblocking(true).map_err(|source| error(source.into()))?;
        Ok(Self { listener, path: path.into(), _bound: bound })
    }

    /// Where it listens.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Connects to the program that waits for the guest at `port`, without waiting.
    ///
    /// # Errors
    /// Nobody listens at PATH_PORT, or too many already wait to be accepted there.
    pub fn dial(&self, port: u32) -> io::Result<UnixStream> {
        let mut path: OsString = self.path.clone().into();
        path.push(format!("_{port}"));
        connect(Path::new(&path))
    }
}

/// Connects to the unix socket at `path`; std's own would wait where the other side does not accept.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let bytes = path.as_os_str().as_bytes();
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: all-zero bytes are a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).map_err(io::Error::other)?;
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    // SAFETY: socket takes no pointer.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was made above, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let len = libc::socklen_t::try_from(size_of_val(&address)).map_err(io::Error::other)?;
    // SAFETY: the address is a live local of that length.
    let failed = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) };
    match failed {
        0 => Ok(socket.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether both directions of a socket are closed.
#[must_use]
pub fn has_hung_up(stream: &UnixStream) -> bool {
    let mut fd = libc::pollfd { fd: stream.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: it is one live pollfd.
    let found = unsafe { libc::poll(&raw mut fd, 1, 0) };
    found > 0 && fd.revents & (libc::POLLHUP | libc::POLLERR) != 0
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::words::with_causes;

    #[test]
    fn it_is_its_owners_and_goes_with_the_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let line = VsockLine::open(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let again = with_causes(&VsockLine::open(&path).unwrap_err());
        assert!(again.contains("running process"), "{again}");
        drop(line);
        assert!(!path.exists());
    }

    #[test]
    fn a_path_has_room_for_the_ports() {
        let dir = tempfile::tempdir().unwrap();
        let name = "x".repeat(LONGEST - SUFFIX - dir.path().as_os_str().len());
        let error = VsockLine::open(&dir.path().join(&name)).unwrap_err().to_string();
        assert!(error.contains("97 bytes; expected at most 96"), "{error}");
        let line = VsockLine::open(&dir.path().join(&name[1..])).unwrap();
        let listener = UnixListener::bind(dir.path().join(format!("{}_{}", &name[1..], u32::MAX)));
        line.dial(u32::MAX).unwrap();
        drop(listener.unwrap());
        line.dial(u32::MAX).unwrap_err();
    }

    #[test]
    fn where_nobody_accepts_nobody_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let line = VsockLine::open(&path).unwrap();
        let listener = UnixListener::bind(dir.path().join("v_7")).unwrap();
        // Else as many wait as the host lets, which may be more than this process may open.
        // SAFETY: the listener's own descriptor.
        assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 8) }, 0);
        let mut made = Vec::new();
        let error = loop {
            match line.dial(7) {
                Ok(stream) => made.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}
