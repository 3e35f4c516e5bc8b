//! What this project's own tests, tools and benchmarks look into. Nothing of it is meant for others, and any of it may
//! change without notice.

pub use crate::acpi::cper;
pub use crate::decide::firmware;
pub use crate::decide::machine_check;
pub use crate::decide::rounds::LOOP_ROUNDS;
pub use crate::memory::access;
pub use crate::memory::scan;
pub use crate::types::Caught;
