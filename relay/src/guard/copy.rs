//! Copies, loads and stores that end as an error where a page is bad.
//!
//! They are a few lines of assembly between two labels (`x86_64.rs`, `aarch64.rs`). A fault in there, at whatever
//! instruction, leaves the number of bytes still to be copied in a register, and the SIGBUS handler has the thread go on at a
//! third label, which returns it. (OpenVMM's `trycopy` is the model of the idea.) The registers are those of the C calling
//! convention. Only a fault at the guest's memory ends so: the other operand is the VMM's own.
//!
//! On other architectures the kernel copies.

#[cfg(target_arch = "aarch64")]
use super::aarch64 as machine;
use super::areas;
use super::attempt::wake;
#[cfg(target_arch = "x86_64")]
use super::x86_64 as machine;

/// Guest memory could not be reached: a page is bad, or there is no memory behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "guest memory could not be reached behind the first {done} bytes: a page of it is bad, or not there"
)]
pub struct BadMemory {
    /// How many bytes were copied before, at least.
    pub done: usize,
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! routines {
    ($($name:ident),*) => {
        unsafe extern "C" {
            fn mce_relay_guard_begin();
            fn mce_relay_guard_end();
            $(fn $name(
                to: *mut u8,
                from: *const u8,
                len: usize,
                new: u64,
                guest: *const u8,
                guest_len: usize,
            ) -> usize;)*
        }
    };
}
// Each returns how many bytes were not copied. Of an exchange `from` is what has to be there, and gets what was there.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
routines!(
    mce_relay_guard_copy,
    mce_relay_guard_move1,
    mce_relay_guard_move2,
    mce_relay_guard_move4,
    mce_relay_guard_move8,
    mce_relay_guard_swap1,
    mce_relay_guard_swap2,
    mce_relay_guard_swap4,
    mce_relay_guard_swap8
);

/// Where a thread goes on that a fault stopped at the instruction `at`; `None` where that is not in a copy.
/// Async-signal-safe.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) fn recovery(at: usize) -> Option<usize> {
    let begin = mce_relay_guard_begin as *const () as usize;
    let end = mce_relay_guard_end as *const () as usize;
    (begin..end).contains(&at).then(|| machine::behind(at))
}

/// How many bytes were not copied.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline]
unsafe fn copy(to: *mut u8, from: *const u8, len: usize, guest: *const u8) -> usize {
    // SAFETY: as the caller says; a fault at guest memory ends the copy.
    unsafe { mce_relay_guard_copy(to, from, len, 0, guest, len) }
}

/// How many bytes were not copied. The kernel does it, a page at a time.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
unsafe fn copy(to: *mut u8, from: *const u8, len: usize, _: *const u8) -> usize {
    let local = libc::iovec { iov_base: from.cast_mut().cast(), iov_len: len };
    let remote = libc::iovec { iov_base: to.cast(), iov_len: len };
    // SAFETY: the kernel checks both addresses itself.
    let done = unsafe {
        libc::process_vm_writev(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0)
    };
    len - usize::try_from(done).unwrap_or(0).min(len)
}

#[inline]
fn done(len: usize, left: usize) -> Result<(), BadMemory> {
    if left == 0 { Ok(()) } else { Err(failed(len, left)) }
}

#[cold]
fn failed(len: usize, left: usize) -> BadMemory {
    // What the handler has stored goes to the relay.
    wake();
    BadMemory { done: len.saturating_sub(left) }
}

/// Copies `to.len()` bytes of guest memory at `from` to `to`. The guest may change them meanwhile.
///
/// # Errors
/// A page is bad, or the file that is mapped has no memory there any more. The bytes before are copied, others may be.
///
/// # Safety
/// `from..from + to.len()` is guest memory, and mapped. (Where nothing is mapped an access is SIGSEGV, and the process ends.)
#[inline]
pub unsafe fn read(from: *const u8, to: &mut [u8]) -> Result<(), BadMemory> {
    if areas::refuses(from.addr() as u64, to.len() as u64) {
        return Err(BadMemory { done: 0 });
    }
    // SAFETY: `to` is borrowed mutably, and `from` is guest memory by this function's contract.
    done(to.len(), unsafe { copy(to.as_mut_ptr(), from, to.len(), from) })
}

/// Copies `from` to guest memory at `to`.
///
/// # Errors
/// As of [`read()`].
///
/// # Safety
/// `to..to + from.len()` is guest memory, mapped, to which no Rust reference leads.
#[inline]
pub unsafe fn write(to: *mut u8, from: &[u8]) -> Result<(), BadMemory> {
    if areas::refuses(to.addr() as u64, from.len() as u64) {
        return Err(BadMemory { done: 0 });
    }
    // SAFETY: as of `read`, the other way round.
    done(from.len(), unsafe { copy(to, from.as_ptr(), from.len(), to) })
}

mod sealed {
    use super::BadMemory;

    /// What can be accessed at once.
    pub trait Access: Copy + Default {
        /// # Safety
        /// `at` is guest memory, aligned.
        unsafe fn load(at: *const Self) -> Result<Self, BadMemory>;
        /// # Safety
        /// As of `load`.
        unsafe fn store(at: *mut Self, value: Self) -> Result<(), BadMemory>;
        /// # Safety
        /// As of `load`.
        unsafe fn swap(at: *mut Self, current: Self, new: Self) -> Result<Self, BadMemory>;
    }
}

/// u8, u16, u32 and u64: what a processor accesses as a whole.
pub trait Word: sealed::Access {}

macro_rules! word {
    ($word:ty, $atomic:ty, $mov:ident, $swap:ident) => {
        impl Word for $word {}

        impl sealed::Access for $word {
            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            unsafe fn load(at: *const Self) -> Result<Self, BadMemory> {
                let (mut value, size) = (0, size_of::<Self>());
                let into = (&raw mut value).cast();
                // SAFETY: one access to `at`, guest memory by the caller's contract, and one to a local.
                let left = unsafe { $mov(into, at.cast(), size, 0, at.cast(), size) };
                done(size, left).map(|()| value)
            }

            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            unsafe fn store(at: *mut Self, value: Self) -> Result<(), BadMemory> {
                let (from, size) = ((&raw const value).cast(), size_of::<Self>());
                // SAFETY: as above.
                let left = unsafe { $mov(at.cast(), from, size, 0, at.cast(), size) };
                done(size, left)
            }

            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            unsafe fn swap(at: *mut Self, mut current: Self, new: Self) -> Result<Self, BadMemory> {
                let (was, size) = ((&raw mut current).cast(), size_of::<Self>());
                // SAFETY: as above.
                let left = unsafe { $swap(at.cast(), was, size, new.into(), at.cast(), size) };
                done(size, left).map(|()| current)
            }

            #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
            unsafe fn load(at: *const Self) -> Result<Self, BadMemory> {
                let mut bytes = [0; size_of::<Self>()];
                // SAFETY: guest memory by the caller's contract.
                unsafe { read(at.cast(), &mut bytes) }?;
                Ok(Self::from_ne_bytes(bytes))
            }

            #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
            unsafe fn store(at: *mut Self, value: Self) -> Result<(), BadMemory> {
                // SAFETY: as above.
                unsafe { write(at.cast(), &value.to_ne_bytes()) }
            }

            #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
            unsafe fn swap(at: *mut Self, current: Self, new: Self) -> Result<Self, BadMemory> {
                // The kernel compares and exchanges nothing for us: whether the page is good is asked first.
                // SAFETY: guest memory by the caller's contract.
                unsafe { Self::load(at) }?;
                // SAFETY: aligned guest memory, which others access by atomics, too.
                let found = unsafe { <$atomic>::from_ptr(at) };
                use std::sync::atomic::Ordering::{AcqRel, Acquire};
                Ok(match found.compare_exchange(current, new, AcqRel, Acquire) {
                    Ok(was) | Err(was) => was,
                })
            }
        }
    };
}

word!(u8, std::sync::atomic::AtomicU8, mce_relay_guard_move1, mce_relay_guard_swap1);
word!(u16, std::sync::atomic::AtomicU16, mce_relay_guard_move2, mce_relay_guard_swap2);
word!(u32, std::sync::atomic::AtomicU32, mce_relay_guard_move4, mce_relay_guard_swap4);
word!(u64, std::sync::atomic::AtomicU64, mce_relay_guard_move8, mce_relay_guard_swap8);

/// Loads a word of guest memory as a whole; on x86-64 and aarch64 also with acquire.
///
/// # Errors
/// As of [`read()`].
///
/// # Safety
/// `at` is guest memory, as for [`read()`], and aligned.
#[inline]
pub unsafe fn load<T: Word>(at: *const T) -> Result<T, BadMemory> {
    if areas::refuses(at.addr() as u64, size_of::<T>() as u64) {
        return Err(BadMemory { done: 0 });
    }
    // SAFETY: this function's contract.
    unsafe { T::load(at) }
}

/// Stores a word of guest memory as a whole; on x86-64 and aarch64 also with release.
///
/// # Errors
/// As of [`read()`].
///
/// # Safety
/// `at` is guest memory, as for [`write()`], and aligned.
#[inline]
pub unsafe fn store<T: Word>(at: *mut T, value: T) -> Result<(), BadMemory> {
    if areas::refuses(at.addr() as u64, size_of::<T>() as u64) {
        return Err(BadMemory { done: 0 });
    }
    // SAFETY: this function's contract.
    unsafe { T::store(at, value) }
}

/// Stores `new` if `current` is there, as one access; returns what was there.
///
/// # Errors
/// As of [`read()`].
///
/// # Safety
/// As of [`store()`].
#[inline]
pub unsafe fn compare_exchange<T: Word>(at: *mut T, current: T, new: T) -> Result<T, BadMemory> {
    if areas::refuses(at.addr() as u64, size_of::<T>() as u64) {
        return Err(BadMemory { done: 0 });
    }
    // SAFETY: this function's contract.
    unsafe { T::swap(at, current, new) }
}
