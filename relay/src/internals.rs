//! Items that this project's own tests, tools and benchmarks use. They are no part of the public interface and may
//! change without notice.

pub use crate::acpi::cper;
pub use crate::decide::firmware;
pub use crate::decide::machine_check;
pub use crate::decide::rounds::LOOP_ROUNDS;
pub use crate::memory::access;
pub use crate::memory::scan;
pub use crate::memory::uffd;
pub use crate::types::Caught;

/// Returns when the observer has been told of all that has happened until now: some of it another thread may be telling it.
pub fn flush(relay: &crate::Handle) {
    relay.0.outbox.flush();
}
