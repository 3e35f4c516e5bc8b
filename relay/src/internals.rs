//! Items that this project's own tests, tools and benchmarks use. They are no part of the public interface and may
//! change without notice.

pub use crate::acpi::cper;
pub use crate::decide::firmware;
pub use crate::decide::machine_check;
pub use crate::memory::access;
pub use crate::memory::scan;
pub use crate::types::Caught;
