//! What the guest's processors are: CPUID, MSRs and registers.

pub mod cpuid;
pub mod msr;
pub mod registers;
