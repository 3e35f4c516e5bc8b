//! The relay's state, and everything that changes it: one lock, under which a failure enters the ledger and every page
//! comes to its states. Nothing here waits, signals a thread or calls a hypervisor.

pub(crate) mod changed;
pub(crate) mod forgery;
pub(crate) mod gathering;
pub(crate) mod host;
pub(crate) mod inner;
pub(crate) mod locked;
pub(crate) mod outbox;
mod record;
pub(crate) mod registry;
pub(crate) mod rescue;
mod rescuing;
pub(crate) mod shared;
mod touch;
pub(crate) mod transition;
