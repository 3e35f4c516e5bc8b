//! A condition variable that makes no system call where nobody waits for it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, MutexGuard, PoisonError};
use std::time::Duration;

/// Used with one mutex, which is held at each call.
#[derive(Debug, Default)]
pub(crate) struct Changed {
    condition: Condvar,
    /// Changes under the mutex only.
    waiting: AtomicUsize,
}

impl Changed {
    /// Gives the lock back until [`Self::notify`] is called, for `time` at most.
    pub(crate) fn wait<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        time: Duration,
    ) -> MutexGuard<'a, T> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let waited = self.condition.wait_timeout(guard, time);
        let guard = waited.unwrap_or_else(PoisonError::into_inner).0;
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        guard
    }

    /// Ends the waits of all who wait.
    pub(crate) fn notify(&self) {
        if self.waiting.load(Ordering::Relaxed) != 0 {
            self.condition.notify_all();
        }
    }
}
