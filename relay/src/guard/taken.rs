//! What the SIGBUS handler does about a touch by the VMM's own code.

#[cfg(target_arch = "aarch64")]
use super::aarch64::Registers;
use super::areas;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::copy;
#[cfg(target_arch = "x86_64")]
use super::x86_64::Registers;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use crate::types::PAGE_SHIFT;

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
    if goes_on_behind_copy(addr, lsb, context) {
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

/// Whether the thread was in a copy of ours, and what is bad at `addr` is the guest's part of it; it goes on where that
/// returns an error.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn goes_on_behind_copy(addr: u64, lsb: u8, context: *mut libc::c_void) -> bool {
    // SAFETY: null, or what the kernel passed to the handler on this thread.
    let Some(context) = (unsafe { context.cast::<libc::ucontext_t>().as_mut() }) else {
        return false;
    };
    let mut registers = Registers::of(context);
    let (start, len) = registers.operand();
    // The kernel says where the page is, and not always which byte was touched.
    let size = 1_u64 << lsb.clamp(PAGE_SHIFT, 63);
    let first = addr & !(size - 1);
    let is_guests = start < first.saturating_add(size) && first < start.saturating_add(len);
    if !is_guests {
        return false;
    }
    match usize::try_from(registers.at()).ok().and_then(copy::recovery) {
        Some(at) => {
            registers.go_on_at(at as u64);
            true
        }
        None => false,
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn goes_on_behind_copy(_: u64, _: u8, _: *mut libc::c_void) -> bool {
    false
}
