//! The relays of this process: an AO may be signalled to the thread of another one than its own.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::shared::Shared;

/// The relays of this process.
static RELAYS: Mutex<Vec<Weak<Shared>>> = Mutex::new(Vec::new());

pub(crate) fn relays() -> MutexGuard<'static, Vec<Weak<Shared>>> {
    // Whole entries are put in and taken out.
    RELAYS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has all relays of this process look at what was signalled; whether one of them does so on another thread than this.
pub(crate) fn wake_all() -> bool {
    let all = relays().iter().filter_map(Weak::upgrade).collect::<Vec<_>>();
    all.iter().for_each(|relay| relay.wake());
    all.iter().any(|relay| relay.is_working() && !relay.is_worker())
}

/// The relays of this process but `own`.
pub(crate) fn others(own: &Shared) -> Vec<Arc<Shared>> {
    let all = relays().iter().filter_map(Weak::upgrade).collect::<Vec<_>>();
    all.into_iter().filter(|other| !std::ptr::eq(&raw const **other, own)).collect()
}
