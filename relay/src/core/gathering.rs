//! What is kept of the gathering of all vCPUs for one machine check.

use std::sync::Arc;
use std::time::Instant;

use crate::decide::machine_check::{Assignment, Pending};
use crate::types::WaitReason;
use crate::x86::mca::McaState;

/// A gathering of all vCPUs for one machine check.
pub(crate) struct Gathering {
    /// Tells it from those before and after it.
    pub(crate) number: u64,
    /// The vCPU that asked for it, and the error that it is for.
    pub(crate) leader: usize,
    pub(crate) error: Pending,
    /// The vCPUs that have to stop before it is settled.
    pub(crate) asked: Vec<usize>,
    /// The state of each of them that has stopped.
    pub(crate) states: Vec<Option<McaState>>,
    /// Set once every vCPU has stopped: what each is to inject, or why none does.
    pub(crate) outcome: Option<Arc<Result<Vec<Assignment>, WaitReason>>>,
    /// vCPUs that have not acted on the outcome yet.
    pub(crate) leaving: Vec<usize>,
    /// When it was called.
    pub(crate) since: Instant,
}

impl Gathering {
    pub(crate) fn settle(&mut self, outcome: Result<Vec<Assignment>, WaitReason>) {
        self.outcome = Some(Arc::new(outcome));
        // vCPUs that have not stopped are not waited for.
        let came = self.asked.iter().filter(|vcpu| self.states[**vcpu].is_some());
        self.leaving = came.copied().collect();
    }

    /// The vCPUs that were asked and have not come.
    pub(crate) fn missing(&self) -> Vec<usize> {
        self.asked.iter().copied().filter(|vcpu| self.states[*vcpu].is_none()).collect()
    }
}
