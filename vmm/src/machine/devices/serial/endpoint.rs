//! What is behind a serial line: a file, a socket, the terminal.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use crate::config::SerialMode;
use crate::machine::devices::serial::error::SerialError;
use crate::outlets::files::{Appended, LogFile};
use crate::outlets::sockets::{self, BoundPath};

/// Where output goes and input comes from.
#[derive(Debug)]
pub(crate) enum Endpoint {
    File(Appended),
    Terminal { output: File, input_open: bool },
    Socket { listener: UnixListener, client: Option<UnixStream>, input_open: bool },
}

impl Endpoint {
    pub(crate) fn open(
        mode: &SerialMode,
    ) -> Result<Option<(Self, Option<BoundPath>)>, SerialError> {
        Ok(Some(match mode {
            SerialMode::Off => return Ok(None),
            SerialMode::Tty => {
                let output = own_stdout().map_err(SerialError::Stdout)?;
                (Self::Terminal { output, input_open: true }, None)
            }
            SerialMode::File(to) => (Self::File(open_file(to)?), None),
            SerialMode::Socket(path) => {
                let (endpoint, path) = listen(path)?;
                (endpoint, Some(path))
            }
        }))
    }

    /// Whether it is a file that keeps what is written.
    pub(crate) fn keeps(&self) -> bool {
        matches!(self, Self::File(file) if file.is_regular())
    }

    pub(crate) fn output_fd(&self) -> Option<RawFd> {
        match self {
            Self::File(file) => Some(file.as_raw_fd()),
            Self::Terminal { output: file, .. } => Some(file.as_raw_fd()),
            Self::Socket { client, .. } => client.as_ref().map(AsRawFd::as_raw_fd),
        }
    }

    pub(crate) fn input_fd(&self) -> Option<RawFd> {
        match self {
            Self::Terminal { input_open: true, .. } => Some(libc::STDIN_FILENO),
            Self::Socket { client, input_open: true, .. } => {
                client.as_ref().map(AsRawFd::as_raw_fd)
            }
            _ => None,
        }
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.write(bytes),
            Self::Terminal { output: file, .. } => file.write(bytes),
            Self::Socket { client: Some(client), .. } => client.write(bytes),
            Self::Socket { client: None, .. } => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File(_) => Ok(0),
            // Not by std's Stdin: bytes in its buffer would be hidden from poll.
            Self::Terminal { .. } => {
                // SAFETY: the buffer is valid for writes of its length.
                let n = unsafe {
                    libc::read(libc::STDIN_FILENO, buffer.as_mut_ptr().cast(), buffer.len())
                };
                usize::try_from(n).map_err(|_| io::Error::last_os_error())
            }
            Self::Socket { client: Some(client), .. } => client.read(buffer),
            Self::Socket { client: None, .. } => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    pub(crate) fn end_of_input(&mut self) {
        match self {
            Self::Terminal { input_open, .. } | Self::Socket { input_open, .. } => {
                *input_open = false;
            }
            Self::File(_) => {}
        }
    }
}

fn open_file(to: &LogFile) -> Result<Appended, SerialError> {
    // For a FIFO without a reader this returns an error and does not wait.
    Appended::open(to, false).map_err(|source| SerialError::File { path: to.path.clone(), source })
}

fn listen(path: &Path) -> Result<(Endpoint, BoundPath), SerialError> {
    let error = |source| SerialError::Socket { path: path.into(), source };
    let (listener, bound) = sockets::bind(path).map_err(error)?;
    listener.set_nonblocking(true).map_err(|source| error(source.into()))?;
    Ok((Endpoint::Socket { listener, client: None, input_open: false }, bound))
}

/// Standard output, where possible by a descriptor of our own that does not block: O_NONBLOCK on the shared one would
/// affect every other process that writes to it.
fn own_stdout() -> io::Result<File> {
    // SAFETY: standard output stays open as long as the process (std opens it if it is closed).
    let stdout = unsafe { BorrowedFd::borrow_raw(libc::STDOUT_FILENO) };
    let shared = File::from(stdout.try_clone_to_owned()?);
    let kind = shared.metadata()?.file_type();
    if kind.is_char_device() || kind.is_fifo() {
        let own = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open("/proc/self/fd/1");
        if let Ok(own) = own {
            return Ok(own);
        }
    }
    Ok(shared)
}
