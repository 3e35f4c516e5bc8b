//! The relay's lock. Kicks are not made under it but when it is given back: a host's kick may take a lock of
//! the host's own, under which another thread of it may call the relay.

use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use log::error;

use crate::relay::Inner;

/// Makes one vCPU leave the guest; `None` once its port has gone, so that nobody is kicked after that.
pub(crate) type Kick = Arc<Mutex<Option<Box<dyn Fn() + Send>>>>;

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

/// The relay's state, locked.
pub(crate) struct Locked<'a> {
    mutex: &'a Mutex<Inner>,
    /// `None` only while the lock is being given back.
    guard: Option<MutexGuard<'a, Inner>>,
}

impl<'a> Locked<'a> {
    pub(crate) fn new(mutex: &'a Mutex<Inner>) -> Self {
        // Nothing that panics while it holds the lock leaves the data half-changed in a way that would be
        // worse than a VMM that no longer relays.
        Self { mutex, guard: Some(mutex.lock().unwrap_or_else(PoisonError::into_inner)) }
    }

    /// Gives the lock back until `changed` is notified, for `time` at most; at once where there are kicks to be
    /// made first.
    pub(crate) fn wait(mut self, changed: &Condvar, time: Duration) -> Self {
        let mutex = self.mutex;
        if !self.kicks.is_empty() {
            drop(self);
            return Self::new(mutex);
        }
        let guard = self.guard.take().map(|guard| {
            changed.wait_timeout(guard, time).unwrap_or_else(PoisonError::into_inner).0
        });
        Self { mutex, guard }
    }
}

impl Deref for Locked<'_> {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        match &self.guard {
            Some(guard) => guard,
            None => unreachable!("the guard is there until the lock is given back"),
        }
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Inner {
        match &mut self.guard {
            Some(guard) => guard,
            None => unreachable!("the guard is there until the lock is given back"),
        }
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let Some(mut guard) = self.guard.take() else { return };
        let kicks = std::mem::take(&mut guard.kicks);
        drop(guard);
        for kick in kicks {
            // A kick that panicked before did nothing to the box it is in.
            let kick = kick.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(kick) = kick.as_ref() {
                call_host("kick of a vCPU", kick);
            }
        }
    }
}
