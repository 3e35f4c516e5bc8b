//! Forged failures on their way to the thread that is to take them.

use crate::types::Caught;

/// Forged failures on their way.
#[derive(Debug, Default)]
pub(crate) struct Forgery {
    /// Not sent yet; `None` is the relay's own thread, and otherwise the vCPU's.
    pub(crate) queued: Vec<(Option<usize>, Caught)>,
    /// Sent by the thread that is taking its signals now.
    pub(crate) sent: Vec<Caught>,
}

impl Forgery {
    /// Whether `caught` was forged. Each forged one counts once.
    pub(crate) fn knows(&mut self, caught: Caught) -> bool {
        let at = self.sent.iter().position(|sent| *sent == caught);
        at.map(|at| self.sent.swap_remove(at)).is_some()
    }
}
