//! The relay: takes signals, keeps the ledger, and tells each error on the thread of the vCPU concerned.
//!
//! Threads of two kinds work under one lock. The relay's thread takes AOs and calls the vCPUs that have something to
//! do. A vCPU's thread calls [`VcpuPort::before_run`](vcpu_port::VcpuPort::before_run) before each KVM_RUN; while
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
