//! Whether a scratch page came into use while something was done.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// How many times scratch pages came into use in this process.
static GENERATION: AtomicU64 = AtomicU64::new(0);
/// Has the relays of this process look at what was touched.
static WAKE: OnceLock<fn() -> bool> = OnceLock::new();

/// Called before the scratch page is in place, after the bad one is marked. Async-signal-safe.
pub(super) fn trip() {
    GENERATION.fetch_add(1, Ordering::AcqRel);
}

/// `wake` has the relays of this process look at what the handler has stored, and says whether one of them will, on another
/// thread than the calling one.
pub(crate) fn set_wake(wake: fn() -> bool) {
    WAKE.get_or_init(|| wake);
}

/// The relays look at once at what the handler has stored. False where there is none, or none but the calling thread's.
pub(super) fn wake() -> bool {
    WAKE.get().is_some_and(|wake| wake())
}

/// How many scratch pages have come into use.
pub(super) fn generation() -> u64 {
    GENERATION.load(Ordering::Acquire)
}

/// One piece of a device's work, a request say, in a view of guest memory: begun before the first `get_slice()` (a slice is
/// not checked again), and asked before anything of it is let out or counts as done. Costs two relaxed loads.
///
/// ```
/// # fn read_request() -> u32 { 7 }
/// use mce_relay::guard::Attempt;
///
/// let attempt = Attempt::begin();
/// let request = read_request();
/// if attempt.is_clean() {
///     // All that was read is what the guest has there.
/// #   assert_eq!(request, 7);
/// } else {
///     // Some of it may be a scratch page's zeros, and some of what was written may be lost: the request fails.
/// }
/// ```
#[derive(Debug, Clone, Copy)]
#[must_use]
pub struct Attempt(u64);

impl Attempt {
    /// Before the first slice of guest memory is got, and so before the first access.
    pub fn begin() -> Self {
        // Acquire: whoever sees this number sees the marks that were made before it.
        Self(GENERATION.load(Ordering::Acquire))
    }

    /// Whether all accesses since [`Self::begin`] were to guest memory. False after one of any thread was not: that may
    /// have been another device's, and the work is done again or fails all the same. Then [`is_bad`](super::is_bad) says
    /// which page it was.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        // The accesses come before the load: one that reached a scratch page came after the number was raised.
        fence(Ordering::Acquire);
        let is_clean = GENERATION.load(Ordering::Relaxed) == self.0;
        if !is_clean {
            wake();
        }
        is_clean
    }
}
