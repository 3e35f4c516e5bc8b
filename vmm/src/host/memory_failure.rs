//! Whether the host handles memory failures.

/// There only in kernels with CONFIG_MEMORY_FAILURE.
pub const EARLY_KILL_SYSCTL: &str = "/proc/sys/vm/memory_failure_early_kill";
