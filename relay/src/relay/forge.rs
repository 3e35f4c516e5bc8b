//! Forged memory failures: the same signals as the kernel's, which this process sends to itself.
//!
//! They are for trying what follows from a memory failure where no page can be poisoned. The kernel lets a thread send
//! such a signal to itself only, so the thread that is to take it is asked to send it. The page stays whole, and every
//! trace of it says that it was forged: the signal's event, and the page in the ledger.
//! and the page in the ledger.

use super::handle::Handle;
use crate::event::SignalledThread;
use crate::signal::{ExitByte, ThreadSlot};
use crate::types::{Caught, FailureKind, PAGE_SHIFT, PAGE_SIZE};

/// Why a memory failure is not forged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ForgeError {
    /// The address is not guest RAM.
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
    /// Makes the relay and the guest take the 4 KiB page at guest-physical `gpa` for bad, by a signal like the
    /// kernel's: an AO on the relay's thread, or, with a `vcpu`, an AR on its thread, as if the guest had touched the
    /// page there. Returns at once.
    ///
    /// The guest cannot tell it from a real failure: it stops using the page, and an AR may cost it a process, or its
    /// life.
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
            // The relay's thread kicks it: the caller may hold a lock that the kick takes.
            inner.to_call.push(vcpu);
        }
        drop(inner);
        self.0.wake();
        Ok(())
    }

    /// Runs `poison` on this thread, which is neither a vCPU's nor the relay's, and takes the memory failures that the
    /// kernel signals to it meanwhile. The caller of `madvise(MADV_HWPOISON)` is sent an AR, as if it had touched the
    /// page; as the guest has not touched it, it counts as an AO.
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
