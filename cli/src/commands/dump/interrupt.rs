//! Signals that end a dump but not the process, which has to remove what it began.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use mce_relay_vmm::sandbox::hangup;
use signal_hook::{SigId, flag, low_level};

use super::error::DumpError;

/// While this lives the first Ctrl-C only sets a mark. The second ends the process, for a dump that waits for a reader
/// that does not read.
#[derive(Debug)]
pub(super) struct Interrupt {
    signal: Arc<AtomicUsize>,
    ids: Vec<SigId>,
}

impl Interrupt {
    pub(super) fn new() -> Self {
        let (signal, second) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let mut ids = Vec::new();
        for (number, value) in [(libc::SIGINT, 2), (libc::SIGTERM, 15), (libc::SIGHUP, 1)] {
            if hangup::ignores(number) {
                continue; // as nohup has it
            }
            // They are called in this order.
            ids.extend(flag::register_conditional_default(number, Arc::clone(&second)));
            ids.extend(flag::register(number, Arc::clone(&second)));
            ids.extend(flag::register_usize(number, Arc::clone(&signal), value));
        }
        Self { signal, ids }
    }

    /// An error if a signal has come.
    pub(super) fn check(&self) -> Result<(), DumpError> {
        match self.signal.load(Ordering::Relaxed) {
            0 => Ok(()),
            signal => {
                let signal = i32::try_from(signal).unwrap_or(libc::SIGTERM);
                Err(DumpError::Interrupted { signal, removed: None })
            }
        }
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        for id in self.ids.drain(..) {
            low_level::unregister(id);
        }
    }
}
