//! The relay's lock. The host's kicks and its observer are called when it is given back, not under it: they may take a
//! lock of the host's own. A thread that has changed nothing calls neither.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::changed::Changed;
use super::host::call_host;
use super::outbox::Outbox;
use crate::event::Event;
use crate::signal::Wake;

/// Makes one vCPU leave the guest; `None` once its port has gone, so that nobody is kicked after that.
pub(crate) type Kick = Arc<Mutex<Option<Box<dyn Fn() + Send>>>>;

/// What is locked, and collects what the host is to be called for.
pub(crate) trait Collects {
    /// The kicks that are to be made.
    fn kicks(&mut self) -> &mut Vec<Kick>;
    /// What the observer is to be told.
    fn events(&mut self) -> &mut Vec<Event>;
    /// Whether the relay's thread is to be woken.
    fn wakes(&mut self) -> &mut bool;
}

/// The relay's state, locked.
pub(crate) struct Locked<'a, T: Collects> {
    mutex: &'a Mutex<T>,
    outbox: &'a Outbox,
    wake: &'a Wake,
    /// There are events in the outbox that this thread has put there and not delivered.
    owes: bool,
    /// `None` only while the lock is being given back.
    guard: Option<MutexGuard<'a, T>>,
}

impl<'a, T: Collects> Locked<'a, T> {
    pub(crate) fn new(mutex: &'a Mutex<T>, outbox: &'a Outbox, wake: &'a Wake) -> Self {
        // Nothing that panics while it holds the lock leaves the data half-changed in a way that would be
        // worse than a VMM that no longer relays.
        let guard = Some(mutex.lock().unwrap_or_else(PoisonError::into_inner));
        Self { mutex, outbox, wake, owes: false, guard }
    }

    /// Gives the lock back for what must not wait for the observer or compete with the relay's thread: what there is to
    /// be told is told, and that thread woken, when the lock that [`Self::again`] gets is given back.
    pub(crate) fn give_back_quietly(mut self) {
        self.owes = false;
        self.give_back(false);
    }

    /// The lock again, after [`Self::give_back_quietly`].
    pub(crate) fn again(mutex: &'a Mutex<T>, outbox: &'a Outbox, wake: &'a Wake) -> Self {
        let mut again = Self::new(mutex, outbox, wake);
        again.owes = true;
        again
    }

    /// Gives the lock back, makes the kicks and, if it is to be, wakes the relay's thread; whether the observer is to be
    /// told something.
    fn give_back(&mut self, may_wake: bool) -> bool {
        let Some(mut guard) = self.guard.take() else { return false };
        let kicks = std::mem::take(guard.kicks());
        let events = std::mem::take(guard.events());
        let any = !events.is_empty();
        let wakes = may_wake && std::mem::take(guard.wakes());
        // Under the lock, so that they are in the order in which it all happened.
        self.outbox.extend(events);
        drop(guard);
        for kick in kicks {
            // A kick that panicked before did nothing to the box it is in.
            let kick = kick.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(kick) = kick.as_ref() {
                call_host("kick of a vCPU", kick);
            }
        }
        if wakes {
            self.wake.wake();
        }
        any
    }

    /// Gives the lock back until `changed` is notified, for `time` at most; at once where the host is to be called
    /// first.
    pub(crate) fn wait(mut self, changed: &Changed, time: Duration) -> Self {
        let (mutex, outbox, wake) = (self.mutex, self.outbox, self.wake);
        if !self.kicks().is_empty() || !self.events().is_empty() || *self.wakes() {
            drop(self);
            return Self::new(mutex, outbox, wake);
        }
        let owes = self.owes;
        let guard = self.guard.take().map(|guard| changed.wait(guard, time));
        Self { mutex, outbox, wake, owes, guard }
    }
}

impl<T: Collects> Deref for Locked<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match &self.guard {
            Some(guard) => guard,
            None => unreachable!("the guard is there until the lock is given back"),
        }
    }
}

impl<T: Collects> DerefMut for Locked<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        match &mut self.guard {
            Some(guard) => guard,
            None => unreachable!("the guard is there until the lock is given back"),
        }
    }
}

impl<T: Collects> Drop for Locked<'_, T> {
    fn drop(&mut self) {
        if self.give_back(true) || self.owes {
            self.outbox.deliver();
        }
    }
}
