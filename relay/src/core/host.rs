//! The host's callbacks.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use log::error;

/// Calls `callback`, which is the host's `what`. If it panics, that is said, and the relay goes on.
pub(crate) fn call_host<R>(what: &str, callback: impl FnOnce() -> R) -> Option<R> {
    // What a callback of the host's leaves half done is the host's.
    match catch_unwind(AssertUnwindSafe(callback)) {
        Ok(result) => Some(result),
        Err(_) => {
            error!("the host's {what} panicked; the relay goes on without it");
            None
        }
    }
}

/// What the host's [`Mca`](crate::Mca) is called where it fails.
pub(crate) const BACK_END: &str = "machine-check back end";

/// The same of a call of the host's that may fail: a panic is an error.
pub(crate) fn ask_host<R>(what: &str, ask: impl FnOnce() -> io::Result<R>) -> io::Result<R> {
    call_host(what, ask).unwrap_or_else(|| Err(io::Error::other("it panicked")))
}
