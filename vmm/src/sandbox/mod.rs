//! What keeps the VMM's process within bounds, and its end a clean one: the system calls of each thread, what is said
//! of one that is refused, the end of a process whose own memory went bad, the terminal as it was, and freed memory
//! that goes back at once.

pub mod allocator;
pub mod hangup;
pub mod refused;
pub mod role;
pub mod seccomp;
pub mod sigbus_fallback;
pub mod terminal;
