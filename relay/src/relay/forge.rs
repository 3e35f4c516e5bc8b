//! Forged memory failures: the same signals as the kernel's, which this process sends to itself.
//!
//! They are for trying what follows from a memory failure where none can be had. The kernel lets a
//! thread send such a signal to itself only, so the thread that is to take it is asked to. The page
//! is whole all the while, and every trace of it says that it was forged: the event of the signal,
//! and the page in the ledger.

use super::handle::Handle;
use crate::event::SignalledThread;
use crate::signal::{ExitByte, ThreadSlot};
use crate::types::{Caught, FailureKind, PAGE_SHIFT, PAGE_SIZE};

/// Why a memory failure is not forged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ForgeError {
    /// It would not be of the guest's memory.
    #[error("GPA {gpa:#x} is not guest RAM")]
    NotRam {
        /// Guest-physical address.
        gpa: u64,
    },
    /// There is no such vCPU, or its thread is not there yet.
    #[error("there is no vCPU {vcpu} that could touch the page")]
    NoVcpu {
        /// The vCPU.
        vcpu: usize,
    },
}

impl Handle {
    /// Has the 4 KiB page at `gpa` taken for bad, by a signal like the kernel's: an AO on the relay's
    /// thread, or an AR on the thread of `vcpu`, which stands for a touch of the guest's there. Returns
    /// at once.
    ///
    /// The guest cannot know: it gives the page up, and an AR may cost it a process, or its life.
    ///
    /// # Errors
    /// See [`ForgeError`].
    pub fn forge(&self, gpa: u64, vcpu: Option<usize>) -> Result<(), ForgeError> {
        let gpa = gpa & !(PAGE_SIZE - 1);
        let hva = self.0.ram().hva(gpa).ok_or(ForgeError::NotRam { gpa })?;
        let kind =
            if vcpu.is_some() { FailureKind::ActionRequired } else { FailureKind::ActionOptional };
        let mut inner = self.0.lock();
        if let Some(vcpu) = vcpu
            && inner.vcpus.get(vcpu).is_none_or(Option::is_none)
        {
            return Err(ForgeError::NoVcpu { vcpu });
        }
        inner.forgery.queued.push((vcpu, Caught { kind, hva, lsb: PAGE_SHIFT }));
        if let Some(vcpu) = vcpu {
            inner.ask(vcpu);
            // The relay's thread makes it leave the guest: the caller may hold a lock that the kick takes.
            inner.to_call.push(vcpu);
        }
        drop(inner);
        self.0.wake();
        Ok(())
    }

    /// Runs `poison` on this thread, which is no vCPU's and not the relay's, and takes the memory
    /// failures that the kernel sends it meanwhile. The caller of `madvise(MADV_HWPOISON)` is sent an
    /// AR, as if it had touched the page; as nobody in the guest has, the page is taken as an AO.
    ///
    /// # Errors
    /// This thread takes memory failures already.
    pub fn poisoning<R>(&self, poison: impl FnOnce() -> R) -> std::io::Result<R> {
        let slot = ThreadSlot::attach(ExitByte::NONE)?;
        let result = poison();
        let mut inner = self.0.lock();
        while let Some(caught) = slot.take() {
            self.0.enter(&mut inner, caught, SignalledThread::Caller);
        }
        drop(inner);
        self.0.wake();
        Ok(result)
    }
}
