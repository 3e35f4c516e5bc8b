//! Whether guest memory was whole while a device used it.

pub use mce_relay::guard::Attempt;
