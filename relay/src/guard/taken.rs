//! What the SIGBUS handler does about a touch by the VMM's own code.

use std::sync::atomic::{AtomicU64, Ordering};

#[cfg(target_arch = "aarch64")]
use super::aarch64::Registers;
use super::areas;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::copy;
#[cfg(target_arch = "x86_64")]
use super::x86_64::Registers;
use crate::types::PAGE_SHIFT;

thread_local! {
    // Without destructor and lazy initialisation, as the handler reads it.

    /// The page of the last fault that this thread went on from by [`recover_by_other_name`].
    static LAST_BY_OTHER_NAME: AtomicU64 = const { AtomicU64::new(0) };
}

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

/// A fault of the calling thread at `addr`; `lsb` says how much memory is bad, and `context` is the handler's third argument,
/// where there is one. Async-signal-safe: atomic accesses, and one mmap(2).
pub(crate) fn recover(addr: u64, lsb: u8, context: *mut libc::c_void) -> Touched {
    let found = areas::find_at_rest(addr);
    // The kernel may name the page by its other mapping: see `recover_by_other_name`.
    let other = found.as_ref().and_then(areas::Found::other_name);
    // The kernel says where the page is, and not always which byte was touched.
    let size = 1_u64 << lsb.clamp(PAGE_SHIFT, 63);
    let within = addr & (size - 1);
    let mut names = [Some(addr), other].into_iter().flatten();
    if names.any(|name| goes_on_behind_copy(name.saturating_sub(within), size, context)) {
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

/// The same for a thread that is no vCPU's, where `addr` is the guest's own mapping of a page that devices have, too.
///
/// A touch that finds poison of which the kernel knew nothing is signalled with the address of the first of the page's mappings
/// in this process (`kill_proc` in mm/memory-failure.c), whichever was touched; that of a page that has gone from the page tables
/// is signalled with its own. So the thread may have been in the view, which gets its scratch page; if it was not, it touches
/// the page again and gets here a second time, and nothing can be done for it.
pub(crate) fn recover_by_other_name(addr: u64, lsb: u8) -> Touched {
    let Some(found) = areas::find_at_rest(addr) else { return Touched::Not };
    if found.other_name().is_none() {
        return Touched::Not;
    }
    let page = addr >> PAGE_SHIFT;
    let again = LAST_BY_OTHER_NAME.with(|last| last.swap(page, Ordering::Relaxed) == page);
    match found.is_marked() {
        (true, _) if again => Touched::Not,
        // It has gone from the page tables, so a touch by the view has its own address: the next one, if it is one.
        (_, true) => Touched::GoesOn(None),
        // Another thread may have come to it first.
        _ if found.scratch(lsb) => Touched::GoesOn(Some(found.hva())),
        _ => Touched::Not,
    }
}

/// Whether the thread was in a copy of ours, and the `size` bytes at `first`, of which some are bad, have the guest's part of it in
/// them; it goes on where that returns an error.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn goes_on_behind_copy(first: u64, size: u64, context: *mut libc::c_void) -> bool {
    // SAFETY: null, or what the kernel passed to the handler on this thread.
    let Some(context) = (unsafe { context.cast::<libc::ucontext_t>().as_mut() }) else {
        return false;
    };
    let mut registers = Registers::of(context);
    let (start, len) = registers.operand();
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
fn goes_on_behind_copy(_: u64, _: u64, _: *mut libc::c_void) -> bool {
    false
}
