//! Why a VM gives no answer.

use std::io::{self};
use std::path::PathBuf;

use mce_relay_vmm::outlets::peer::Peer;

/// Why a VM did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error(
        "no VM is to be reached at {path}; expected the path of an API socket: what `mce-relay run --api-socket` was \
         given, or what `mce-relay list` shows",
        path = .path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The conversation broke off.
    #[error("the VM at {path} did not answer", path = .path.display())]
    Talk {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It was there, and is not any more.
    #[error("the VM at {path} has ended{how}", path = .path.display())]
    Ended {
        /// The socket.
        path: PathBuf,
        /// How, in brackets; nothing where that is not known.
        how: String,
    },
    /// It is there, and says nothing.
    #[error(
        "the VM at {path} has not answered for {secs} s: {peer}{}",
        later(.asked),
        path = .path.display()
    )]
    Silent {
        /// The socket.
        path: PathBuf,
        /// For how many seconds.
        secs: u64,
        /// The process that listens there.
        peer: Peer,
        /// Whether it had been asked for a change by then.
        asked: bool,
    },
    /// Something else than this VMM listens there.
    #[error("what listens at {path} is not an mce-relay VM: {what}", path = .path.display())]
    Stranger {
        /// The socket.
        path: PathBuf,
        /// What was not understood.
        what: String,
    },
    /// What it says of its process is not so.
    #[error(
        "what listens at {path} says that it is process {says}, and the kernel says that it is {is} (0: one of \
         another PID namespace); nothing is done to another process's memory. Run this command in the VM's PID \
         namespace (nsenter --pid), and ask no socket whose owner you do not trust",
        path = .path.display()
    )]
    OtherProcess {
        /// The socket.
        path: PathBuf,
        /// The process by its own words.
        says: u32,
        /// The process that listens, by the kernel's.
        is: u32,
    },
    /// The VM answered with an error.
    #[error("the VM says: {error}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// Its words.
        error: String,
    },
}

/// What is to be known of a request that was not answered.
fn later(asked: &bool) -> &'static str {
    if *asked { ". What was asked of it may be done when it goes on" } else { "" }
}
