//! Signals that end a command between two pages, so that it can clean up.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use mce_relay_vmm::sandbox::hangup;
use signal_hook::SigId;

/// While this lives a Ctrl-C ends the work but not the process, which has to restore what it changed.
pub(super) struct Interrupted {
    /// The signal that came; 0 while there was none.
    signal: Arc<AtomicUsize>,
    ids: Vec<SigId>,
}

impl Interrupted {
    pub(super) fn new() -> Self {
        let signal = Arc::new(AtomicUsize::new(0));
        let register = |(number, value)| {
            // A signal that is ignored (nohup) stays so.
            let heeded = !hangup::ignores(number);
            let flag = || signal_hook::flag::register_usize(number, Arc::clone(&signal), value);
            heeded.then(flag)?.ok()
        };
        let ends = [(libc::SIGINT, 2), (libc::SIGTERM, 15), (libc::SIGHUP, 1)];
        let ids = ends.into_iter().filter_map(register).collect();
        Self { signal, ids }
    }

    pub(super) fn is_set(&self) -> bool {
        self.signal().is_some()
    }

    /// The signal that came.
    pub(super) fn signal(&self) -> Option<u8> {
        u8::try_from(self.signal.load(Ordering::Relaxed)).ok().filter(|signal| *signal != 0)
    }
}

impl Drop for Interrupted {
    fn drop(&mut self) {
        for id in self.ids.drain(..) {
            signal_hook::low_level::unregister(id);
        }
    }
}
