//! Why a serial port cannot be opened.

use std::io::{self};
use std::path::PathBuf;

use thiserror::Error;

use crate::machine::devices::virtio::vsock::host::HostError;
use crate::outlets::sockets::BindError;

/// Why a serial port cannot be opened.
#[derive(Debug, Error)]
pub enum SerialError {
    /// No more file descriptors.
    #[error("cannot create an eventfd for a serial port")]
    EventFd(#[source] io::Error),
    /// The terminal refused raw mode.
    #[error("cannot set the terminal to raw mode")]
    Terminal(#[source] io::Error),
    /// Standard output could not be used.
    #[error("cannot use standard output for a serial port")]
    Stdout(#[source] io::Error),
    /// The output file could not be made.
    #[error("cannot open the serial output file {}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The socket could not be made.
    #[error("cannot make a serial socket at {}", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: BindError,
    },
    /// The socket of virtio-vsock could not be made.
    #[error(transparent)]
    Vsock(#[from] HostError),
    /// The thread could not be started.
    #[error("cannot start the thread of a serial port")]
    Thread(#[source] io::Error),
}
