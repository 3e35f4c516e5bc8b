//! The relay's work on a thread of the host's, for hosts that have an event loop and want no thread more.

use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::thread::Work;
use crate::core::shared::Shared;
use crate::signal::{KillPolicy, Poll};

/// The relay's work, which the host's event loop does: by
/// [`RelayBuilder::start_polled`](crate::RelayBuilder::start_polled).
///
/// It belongs to the thread that started it, which the kernel signals of AOs. While that thread is outside
/// [`Self::process`], SIGBUS is blocked on it and a pending one makes the descriptor readable. So whatever else the thread
/// does must not touch guest memory but by [`Handle::read`](crate::Handle::read) and its like: an AR where SIGBUS is
/// blocked is the process's end, without a word.
///
/// Dropping it ends the relay's work ([`Handle::is_alive`](crate::Handle::is_alive)), sets late kill on the thread and
/// restores its signal mask.
pub struct Polled {
    shared: Arc<Shared>,
    work: Work,
    poll: Poll,
    /// The slot and the mask are of one thread.
    not_send: PhantomData<*const ()>,
}

impl Polled {
    pub(super) fn new(shared: Arc<Shared>, work: Work, poll: Poll) -> Self {
        // The first turn is due at once: it looks for what went bad before.
        poll.set_timer(Duration::ZERO);
        // Nobody has set it before.
        let _ = shared.worker.set(std::thread::current().id());
        Self { shared, work, poll, not_send: PhantomData }
    }

    /// Does what there is to do now: takes what was signalled, tells who has to know, looks for what nobody was
    /// signalled. To be called whenever the descriptor is readable (level-triggered); at another time it does no
    /// harm. It does not wait, but it may take its time: a look at the page tables some
    /// ten milliseconds, the rescue of a huge page as long as a copy of it. The observer,
    /// kicks and the [`Bell`](crate::Bell) are called in it.
    ///
    /// Once the [`Relay`](crate::Relay) has been dropped it does nothing.
    pub fn process(&mut self) {
        self.poll.begin(&self.shared.wake);
        if self.shared.stop.load(Ordering::Acquire) {
            self.poll.end();
            return;
        }
        let pause = self.work.turn(&self.shared);
        self.poll.set_timer(pause);
        self.poll.end();
        if !self.work.slot.is_empty() {
            // It came after the signals were taken, and is not pending any more.
            self.poll.set_timer(Duration::ZERO);
        }
    }
}

impl AsFd for Polled {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.poll.as_fd()
    }
}

impl AsRawFd for Polled {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl std::fmt::Debug for Polled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Polled").field("poll", &self.poll).finish_non_exhaustive()
    }
}

impl Drop for Polled {
    fn drop(&mut self) {
        self.shared.alive.store(false, Ordering::Release);
        // With early kill left on the thread AOs would come to it and wait for somebody to look.
        if let Err(error) = KillPolicy::Late.set() {
            log::warn!("cannot set late kill on the thread of a relay that has ended: {error}");
        }
    }
}
