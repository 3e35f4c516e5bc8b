//! Why a VM gives no answer.

use std::io::{self};
use std::path::PathBuf;

use mce_relay_vmm::outlets::peer::Peer;

/// Why a VM did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No process listens there.
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
    /// The connection broke off.
    #[error("the VM at {path} did not answer", path = .path.display())]
    Talk {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It answered before and has ended.
    #[error("the VM at {path} has ended{how}", path = .path.display())]
    Ended {
        /// The socket.
        path: PathBuf,
        /// How, in brackets; empty where that is not known.
        how: String,
    },
    /// It does not answer.
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
        /// Whether a request that changes it had been sent.
        asked: bool,
    },
    /// Something other than this VMM listens there.
    #[error("what listens at {path} is not an mce-relay VM: {what}", path = .path.display())]
    Stranger {
        /// The socket.
        path: PathBuf,
        /// What was not understood.
        what: String,
    },
    /// The process that it names is not the one that listens.
    #[error(
        "what listens at {path} says that it is process {says}, and the kernel says that it is {is} (0: one of \
         another PID namespace); nothing is done to another process's memory. Run this command in the VM's PID \
         namespace (nsenter --pid), and ask no socket whose owner you do not trust",
        path = .path.display()
    )]
    OtherProcess {
        /// The socket.
        path: PathBuf,
        /// The process that it names.
        says: u32,
        /// The process that listens, as the kernel has it.
        is: u32,
    },
    /// The VM refused the request.
    #[error("the VM says: {error}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// Its reason.
        error: String,
    },
}

/// What the user has to know about a request that was not answered.
fn later(asked: &bool) -> &'static str {
    if *asked { ". What was asked of it may be done when it goes on" } else { "" }
}
