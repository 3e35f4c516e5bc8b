//! Whether the guest makes progress: how often in a row it was told of its touch of the same page.

use std::time::Duration;

/// A page that the guest touches again after it was told, this often without a pause of ten seconds in between, is a
/// loop: the guest takes the machine check and does nothing about the page. Linux never touches a page again that it was
/// told of.
///
/// The touches are those of all vCPUs, since a thread that loops may be moved from one to the next. A page that every
/// thread of a large guest uses may be touched once by each vCPU before the guest has put it away; so of the first
/// touches of the vCPUs one counts.
pub const LOOP_ROUNDS: u32 = 64;

/// A touch that comes this long after the last one of the same page begins a new count.
pub(crate) const LOOP_PAUSE: Duration = Duration::from_secs(10);

/// The pages that were touched in the last [`LOOP_PAUSE`].
#[derive(Debug, Default)]
pub(crate) struct Rounds(Vec<Touched>);

/// A page that vCPUs have touched and were to be told of.
#[derive(Debug, Clone)]
struct Touched {
    gpa: u64,
    /// Who has touched it.
    vcpus: Vec<usize>,
    /// How often, without the first touches of all vCPUs but one.
    rounds: u32,
    last: Duration,
}

impl Rounds {
    /// One more touch of the page at `gpa`, by `vcpu`.
    pub(crate) fn count(&mut self, vcpu: usize, gpa: u64, now: Duration) {
        // Whatever is not touched any more is no loop; so the list stays short.
        self.0.retain(|touched| now.saturating_sub(touched.last) < LOOP_PAUSE);
        match self.0.iter_mut().find(|touched| touched.gpa == gpa) {
            Some(touched) => {
                if touched.vcpus.contains(&vcpu) {
                    touched.rounds += 1;
                } else {
                    touched.vcpus.push(vcpu);
                }
                touched.last = now;
            }
            None => self.0.push(Touched { gpa, vcpus: vec![vcpu], rounds: 1, last: now }),
        }
    }

    /// Of a touch of the page at `gpa` the guest was not told after all: it is no round.
    pub(crate) fn take_back(&mut self, gpa: u64) {
        if let Some(touched) = self.0.iter_mut().find(|touched| touched.gpa == gpa) {
            touched.rounds = touched.rounds.saturating_sub(1);
        }
    }

    /// How often the page at `gpa` was touched lately.
    pub(crate) fn of(&self, gpa: u64) -> u32 {
        self.0.iter().find(|touched| touched.gpa == gpa).map_or(0, |touched| touched.rounds)
    }

    /// How often in a row the guest was told of its touch of the page at `gpa`, when that is too often.
    /// Said once: a guest that is let go on has as many rounds again.
    pub(crate) fn take_loop(&mut self, gpa: u64) -> Option<u32> {
        let at = self.0.iter().position(|t| t.gpa == gpa && t.rounds > LOOP_ROUNDS)?;
        Some(self.0.swap_remove(at).rounds - 1)
    }
}
