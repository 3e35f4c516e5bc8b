//! Keeps the VMM's process within limits, and ends it cleanly: the system calls of each thread, the report of one that
//! is refused, the end of a process whose own memory went bad, restoring the terminal,
//! and giving memory back: what is freed, and what the start has taken.

pub mod allocator;
pub mod hangup;
pub mod refused;
pub mod role;
pub mod seccomp;
pub mod sigbus_fallback;
pub mod start_up;
pub mod terminal;
