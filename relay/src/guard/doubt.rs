//! Marks of which it is not known yet whether the pages are bad, and who waits for that.
//!
//! A handler marks as much memory as the host may have lost: a huge page. The relay finds out which of its pages are bad,
//! within milliseconds, or within seconds where it rescues 1 GiB. A device whose ring lies beside the bad page waits
//! meanwhile, as a vCPU does, and need not ask for a reset.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::attempt;

/// For so long at most: whoever waits has its own orders to obey.
const PATIENCE: Duration = Duration::from_millis(500);

static WAITING: Mutex<()> = Mutex::new(());
static SETTLED: Condvar = Condvar::new();

/// Waits while it is `in_doubt`; not at all in a process that has never had a relay.
pub(super) fn wait_while(in_doubt: impl Fn() -> bool) {
    if !in_doubt() || !attempt::wake() {
        return;
    }
    let since = Instant::now();
    let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
    while in_doubt() {
        let Some(left) = PATIENCE.checked_sub(since.elapsed()) else { return };
        waiting = SETTLED.wait_timeout(waiting, left).unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// A relay has found out about some pages.
pub(super) fn settled() {
    drop(WAITING.lock().unwrap_or_else(PoisonError::into_inner));
    SETTLED.notify_all();
}
