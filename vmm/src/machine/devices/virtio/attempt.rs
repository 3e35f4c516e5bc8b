//! Whether guest memory was whole while a device used it.

/// A stretch of work with guest memory, from [`Attempt::begin`] on.
///
/// A device uses what it has read in an attempt, and counts as written what it has written in it, only if the attempt
/// is clean at the end.
#[derive(Debug)]
#[must_use]
pub struct Attempt(());

impl Attempt {
    /// Begins one.
    pub fn begin() -> Self {
        Self(())
    }

    /// Whether no page that this thread touched since the beginning was bad.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        true
    }
}
