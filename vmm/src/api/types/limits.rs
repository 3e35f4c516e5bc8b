//! How much one request may ask for.

/// The most pages that one `vm.retire` or `vm.poison` may name.
pub const MAX_PAGES: usize = 4096;
/// The most that one `vm.memory` answers with, in bytes.
pub const MAX_READ: u64 = 4 << 20;
