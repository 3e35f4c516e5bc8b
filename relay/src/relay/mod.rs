//! The relay: takes signals, keeps the ledger, and brings every error to the vCPU that has to be told, on that vCPU's
//! own thread.
//!
//! Two parties meet under one lock. The relay's thread takes AOs and wakes whoever has to act. A
//! vCPU thread comes round before each KVM_RUN ([`VcpuPort::before_run`](vcpu_port::VcpuPort::before_run)); while
//! nothing is wrong that costs one relaxed load.

mod attach;
pub mod builder;
pub mod error;
pub mod error_source;
#[cfg(feature = "forge")]
pub mod forge;
mod gathering;
pub mod handle;
pub mod inject;
pub mod polled;
pub mod rescue;
mod search;
pub mod start;
mod thread;
pub mod vcpu_port;
