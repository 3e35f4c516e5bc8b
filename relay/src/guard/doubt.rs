//! Marks of which it is not known yet whether the pages are bad, and who waits for that.
//!
//! A handler marks as much memory as the host may have lost: a huge page. The relay finds out which of its pages are bad,
//! within milliseconds, or within seconds where it rescues 1 GiB. A device whose ring lies beside the bad page waits
//! meanwhile, as a vCPU does, and need not ask for a reset.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::attempt;

/// For so long at most: whoever waits has its own orders to obey.
const PATIENCE: Duration = Duration::from_millis(500);
/// The relay is called again after this: the handler may not have said what it has marked.
const AGAIN: Duration = Duration::from_millis(10);

/// How many threads wait.
static WAITING: Mutex<usize> = Mutex::new(0);
static SETTLED: Condvar = Condvar::new();
/// The number of the scratch page until which it was waited in vain: nobody waits before the next one, so that the waits of
/// one request do not add up.
static IN_VAIN: AtomicU64 = AtomicU64::new(u64::MAX);

/// Waits while it is `in_doubt`; not at all where no relay can find out: there is none, or it is the calling thread's.
pub(super) fn wait_while(in_doubt: impl Fn() -> bool) {
    let generation = attempt::generation();
    if IN_VAIN.load(Ordering::Relaxed) == generation || !in_doubt() || !attempt::wake() {
        return;
    }
    let since = Instant::now();
    let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
    *waiting += 1;
    while in_doubt() {
        if since.elapsed() > PATIENCE {
            IN_VAIN.store(generation, Ordering::Relaxed);
            break;
        }
        let (again, waited) =
            SETTLED.wait_timeout(waiting, AGAIN).unwrap_or_else(PoisonError::into_inner);
        waiting = again;
        if waited.timed_out() && !attempt::wake() {
            break;
        }
    }
    *waiting -= 1;
}

/// A relay has found out about some pages.
pub(super) fn settled() {
    let waiting = *WAITING.lock().unwrap_or_else(PoisonError::into_inner);
    // Without waiters it would be a system call for nothing.
    if waiting != 0 {
        SETTLED.notify_all();
    }
}
