//! Why a relay is not started, and a thread not attached.

use std::io;

/// Why a relay could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The SIGBUS handler could not be installed.
    #[error("cannot install the SIGBUS handler")]
    Handler(#[source] io::Error),
    /// The memory-failure policy could not be set.
    #[error("cannot set the memory-failure policy (prctl PR_MCE_KILL)")]
    Policy(#[source] io::Error),
    /// The relay's thread could not be set up.
    #[error("cannot start the relay's thread")]
    Thread(#[source] io::Error),
    /// The memory that is to be kept for rescues is not to be had.
    #[error("cannot set {} MiB aside for what is left of huge pages that go bad; ask for less, or for none", .bytes >> 20)]
    Reserve {
        /// How many bytes were asked for.
        bytes: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The error source's page is not a page of guest RAM.
    #[error("the error source's page, GPA {page:#x}, is not a 4 KiB page of guest RAM")]
    SourcePage {
        /// Guest-physical address as it was given.
        page: u64,
    },
    /// The error source's page could not be written.
    #[error("cannot write the error source's page")]
    SourceWrite(#[source] io::Error),
}

/// Why a thread could not be attached as a vCPU's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The relay was started for fewer vCPUs.
    #[error("there is no vCPU {vcpu}: the relay was started for {vcpus}")]
    NoVcpu {
        /// The vCPU.
        vcpu: usize,
        /// How many there are.
        vcpus: usize,
    },
    /// Another thread runs it.
    #[error("vCPU {vcpu} is attached already; drop its port first")]
    Attached {
        /// The vCPU.
        vcpu: usize,
    },
    /// SIGBUS is blocked on this thread, and cannot be unblocked.
    #[error(
        "SIGBUS is blocked on the thread of vCPU {vcpu}: KVM_RUN would try a bad page again for ever"
    )]
    Blocked {
        /// The vCPU.
        vcpu: usize,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The thread could not be given a slot for its signals.
    #[error("the thread of vCPU {vcpu} cannot take memory failures")]
    Slot {
        /// The vCPU.
        vcpu: usize,
        /// The cause.
        #[source]
        source: io::Error,
    },
}
