//! The device's one clock.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Instant;

use vmm_sys_util::timerfd::TimerFd;

/// A descriptor that is readable from a given time on. It is never read, only set again: a read might wait.
#[derive(Debug)]
pub struct Timer {
    timer: TimerFd,
    set: Option<Instant>,
}

impl Timer {
    /// One that is not set.
    ///
    /// # Errors
    /// There are no more file descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self { timer: TimerFd::new()?, set: None })
    }

    /// Its descriptor.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Sets it to `at`, or to never.
    ///
    /// # Errors
    /// The system refuses.
    pub fn set(&mut self, at: Option<Instant>, now: Instant) -> io::Result<()> {
        // One that has gone off has to be set anew, also to the same time.
        let is_ahead = self.set.is_none_or(|set| set > now);
        if at == self.set && is_ahead {
            return Ok(());
        }
        match at {
            // None at all would be never.
            Some(at) => {
                let wait = at.saturating_duration_since(now);
                self.timer.reset(wait.max(std::time::Duration::from_millis(1)), None)?;
            }
            None => self.timer.clear()?,
        }
        self.set = at;
        Ok(())
    }
}
