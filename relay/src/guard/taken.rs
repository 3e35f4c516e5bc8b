//! What the SIGBUS handler does about a touch by the VMM's own code.

use super::areas;
#[cfg(target_arch = "x86_64")]
use super::copy;

/// What became of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Touched {
    /// The thread goes on: the copy ends as an error, or a scratch page is there. The host address at which the guest has
    /// the page, where it is guest RAM.
    GoesOn(Option<u64>),
    /// It is nothing of this kind.
    Not,
}

/// The host address at which the guest has the memory at `addr`, where that is guest RAM that the process knows of.
/// Async-signal-safe.
pub(crate) fn guest_ram(addr: u64) -> Option<u64> {
    areas::find(addr).map(|found| found.hva())
}

/// A fault of the calling thread at `addr`; `lsb` says how much memory is bad, and `context` is the handler's third argument, where there is one. Async-signal-safe: atomic accesses, and one mmap(2).
pub(crate) fn recover(addr: u64, lsb: u8, context: *mut libc::c_void) -> Touched {
    let found = areas::find_at_rest(addr);
    if goes_on_behind_copy(context) {
        if let Some(found) = &found {
            found.mark();
        }
        return Touched::GoesOn(found.map(|found| found.hva()));
    }
    match found {
        Some(found) if found.in_view && found.scratch(lsb) => Touched::GoesOn(Some(found.hva())),
        _ => Touched::Not,
    }
}

/// Whether the thread was in a copy of ours; it goes on where that returns an error.
#[cfg(target_arch = "x86_64")]
fn goes_on_behind_copy(context: *mut libc::c_void) -> bool {
    // SAFETY: null, or what the kernel passed to the handler on this thread.
    let Some(context) = (unsafe { context.cast::<libc::ucontext_t>().as_mut() }) else {
        return false;
    };
    let Some(rip) = context.uc_mcontext.gregs.get_mut(libc::REG_RIP as usize) else {
        return false;
    };
    // An address is its bits.
    match usize::try_from(rip.cast_unsigned()).ok().and_then(copy::recovery) {
        Some(at) => {
            *rip = (at as u64).cast_signed();
            true
        }
        None => false,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn goes_on_behind_copy(_: *mut libc::c_void) -> bool {
    false
}
