//! Copies, loads and stores that end as an error where a page is bad.
//!
//! They are a few lines of assembly between two labels. A fault in there, at whatever instruction, leaves the number of bytes
//! still to be copied in RDX (of `rep movsb`: in RCX), and the SIGBUS handler moves RIP to a third label, which returns it.
//! (OpenVMM's `trycopy` is the model of the idea.) The registers are those of the C calling convention: RDI where to, RSI
//! where from, RDX how many bytes; RAX returns how many were not copied.

#[cfg(target_arch = "x86_64")]
use std::arch::global_asm;

use super::areas;
use super::attempt::wake;

/// Guest memory could not be reached: a page is bad, or there is no memory behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "guest memory could not be reached behind the first {done} bytes: a page of it is bad, or not there"
)]
pub struct BadMemory {
    /// How many bytes were copied before, at least.
    pub done: usize,
}

#[cfg(target_arch = "x86_64")]
global_asm!(
    ".pushsection .text.mce_relay_guard, \"ax\", @progbits",
    ".p2align 4",
    ".globl mce_relay_guard_begin",
    ".hidden mce_relay_guard_begin",
    "mce_relay_guard_begin:",
    // Copies. Up to 64 bytes by a head and a tail that may overlap, more in steps of 64 with such a tail, and large pieces by
    // the string instruction, which is quickest for them.
    ".globl mce_relay_guard_copy",
    ".hidden mce_relay_guard_copy",
    "mce_relay_guard_copy:",
    "cmp rdx, 64",
    "ja 5f",
    "cmp rdx, 32",
    "ja 4f",
    "cmp rdx, 16",
    "jae 3f",
    "cmp rdx, 8",
    "jae 2f",
    "test rdx, rdx",
    "jz 9f",
    "8: mov al, [rsi]",
    "mov [rdi], al",
    "inc rsi",
    "inc rdi",
    "dec rdx",
    "jnz 8b",
    "9: xor eax, eax",
    "ret",
    "2: mov rax, [rsi]",
    "mov rcx, [rsi + rdx - 8]",
    "mov [rdi], rax",
    "mov [rdi + rdx - 8], rcx",
    "xor eax, eax",
    "ret",
    "3: movups xmm0, [rsi]",
    "movups xmm1, [rsi + rdx - 16]",
    "movups [rdi], xmm0",
    "movups [rdi + rdx - 16], xmm1",
    "xor eax, eax",
    "ret",
    "4: movups xmm0, [rsi]",
    "movups xmm1, [rsi + 16]",
    "movups xmm2, [rsi + rdx - 32]",
    "movups xmm3, [rsi + rdx - 16]",
    "movups [rdi], xmm0",
    "movups [rdi + 16], xmm1",
    "movups [rdi + rdx - 32], xmm2",
    "movups [rdi + rdx - 16], xmm3",
    "xor eax, eax",
    "ret",
    "5: cmp rdx, 1024",
    "jae 7f",
    "6: movups xmm0, [rsi]",
    "movups xmm1, [rsi + 16]",
    "movups xmm2, [rsi + 32]",
    "movups xmm3, [rsi + 48]",
    "movups [rdi], xmm0",
    "movups [rdi + 16], xmm1",
    "movups [rdi + 32], xmm2",
    "movups [rdi + 48], xmm3",
    "add rsi, 64",
    "add rdi, 64",
    "sub rdx, 64",
    "cmp rdx, 64",
    "ja 6b",
    // 1 to 64 are left, behind at least 64 that are done.
    "movups xmm0, [rsi + rdx - 64]",
    "movups xmm1, [rsi + rdx - 48]",
    "movups xmm2, [rsi + rdx - 32]",
    "movups xmm3, [rsi + rdx - 16]",
    "movups [rdi + rdx - 64], xmm0",
    "movups [rdi + rdx - 48], xmm1",
    "movups [rdi + rdx - 32], xmm2",
    "movups [rdi + rdx - 16], xmm3",
    "xor eax, eax",
    "ret",
    "7: mov rcx, rdx",
    ".globl mce_relay_guard_rep",
    ".hidden mce_relay_guard_rep",
    "mce_relay_guard_rep:",
    "rep movsb",
    "xor eax, eax",
    "ret",
    // One access each, as wide as it says. RDX has the width.
    ".globl mce_relay_guard_move1",
    ".hidden mce_relay_guard_move1",
    "mce_relay_guard_move1: mov al, [rsi]",
    "mov [rdi], al",
    "xor eax, eax",
    "ret",
    ".globl mce_relay_guard_move2",
    ".hidden mce_relay_guard_move2",
    "mce_relay_guard_move2: mov ax, [rsi]",
    "mov [rdi], ax",
    "xor eax, eax",
    "ret",
    ".globl mce_relay_guard_move4",
    ".hidden mce_relay_guard_move4",
    "mce_relay_guard_move4: mov eax, [rsi]",
    "mov [rdi], eax",
    "xor eax, eax",
    "ret",
    ".globl mce_relay_guard_move8",
    ".hidden mce_relay_guard_move8",
    "mce_relay_guard_move8: mov rax, [rsi]",
    "mov [rdi], rax",
    "xor eax, eax",
    "ret",
    // Compares [RDI] with [RSI], and stores RCX there if they are equal; [RSI] gets what was there.
    ".globl mce_relay_guard_swap1",
    ".hidden mce_relay_guard_swap1",
    "mce_relay_guard_swap1: mov al, [rsi]",
    "lock cmpxchg [rdi], cl",
    "mov [rsi], al",
    "xor eax, eax",
    "ret",
    ".globl mce_relay_guard_swap2",
    ".hidden mce_relay_guard_swap2",
    "mce_relay_guard_swap2: mov ax, [rsi]",
    "lock cmpxchg [rdi], cx",
    "mov [rsi], ax",
    "xor eax, eax",
    "ret",
    ".globl mce_relay_guard_swap4",
    ".hidden mce_relay_guard_swap4",
    "mce_relay_guard_swap4: mov eax, [rsi]",
    "lock cmpxchg [rdi], ecx",
    "mov [rsi], eax",
    "xor eax, eax",
    "ret",
    ".globl mce_relay_guard_swap8",
    ".hidden mce_relay_guard_swap8",
    "mce_relay_guard_swap8: mov rax, [rsi]",
    "lock cmpxchg [rdi], rcx",
    "mov [rsi], rax",
    "xor eax, eax",
    "ret",
    ".globl mce_relay_guard_end",
    ".hidden mce_relay_guard_end",
    "mce_relay_guard_end:",
    // Where the handler goes on. RDX counts down with each step that is done.
    ".globl mce_relay_guard_failed",
    ".hidden mce_relay_guard_failed",
    "mce_relay_guard_failed:",
    "mov rax, rdx",
    "ret",
    ".globl mce_relay_guard_rep_failed",
    ".hidden mce_relay_guard_rep_failed",
    "mce_relay_guard_rep_failed:",
    "mov rax, rcx",
    "ret",
    ".popsection",
);

#[cfg(target_arch = "x86_64")]
unsafe extern "C" {
    fn mce_relay_guard_begin();
    fn mce_relay_guard_rep();
    fn mce_relay_guard_end();
    fn mce_relay_guard_failed();
    fn mce_relay_guard_rep_failed();
    fn mce_relay_guard_copy(to: *mut u8, from: *const u8, len: usize) -> usize;
    fn mce_relay_guard_move1(to: *mut u8, from: *const u8, len: usize) -> usize;
    fn mce_relay_guard_move2(to: *mut u8, from: *const u8, len: usize) -> usize;
    fn mce_relay_guard_move4(to: *mut u8, from: *const u8, len: usize) -> usize;
    fn mce_relay_guard_move8(to: *mut u8, from: *const u8, len: usize) -> usize;
    fn mce_relay_guard_swap1(at: *mut u8, current: *mut u8, len: usize, new: u64) -> usize;
    fn mce_relay_guard_swap2(at: *mut u8, current: *mut u8, len: usize, new: u64) -> usize;
    fn mce_relay_guard_swap4(at: *mut u8, current: *mut u8, len: usize, new: u64) -> usize;
    fn mce_relay_guard_swap8(at: *mut u8, current: *mut u8, len: usize, new: u64) -> usize;
}

/// Where a thread goes on that a fault stopped at `rip`; `None` where that is not in a copy. Async-signal-safe.
#[cfg(target_arch = "x86_64")]
pub(super) fn recovery(rip: usize) -> Option<usize> {
    let begin = mce_relay_guard_begin as *const () as usize;
    let end = mce_relay_guard_end as *const () as usize;
    if !(begin..end).contains(&rip) {
        return None;
    }
    Some(match rip == mce_relay_guard_rep as *const () as usize {
        true => mce_relay_guard_rep_failed as *const () as usize,
        false => mce_relay_guard_failed as *const () as usize,
    })
}

/// How many bytes were not copied.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn copy(to: *mut u8, from: *const u8, len: usize) -> usize {
    // SAFETY: as the caller says; a fault at guest memory ends the copy, and one at memory of this process's own is not
    // possible.
    unsafe { mce_relay_guard_copy(to, from, len) }
}

/// How many bytes were not copied. The kernel does it, a page at a time.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn copy(to: *mut u8, from: *const u8, len: usize) -> usize {
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
/// A page is bad, or there is no memory behind it. The bytes before are copied, others may be.
///
/// # Safety
/// `from..from + to.len()` is guest memory: mapped, or an address range at which nothing will be.
#[inline]
pub unsafe fn read(from: *const u8, to: &mut [u8]) -> Result<(), BadMemory> {
    if areas::is_bad(from.addr() as u64, to.len() as u64) {
        return Err(BadMemory { done: 0 });
    }
    // SAFETY: `to` is borrowed mutably, and `from` is guest memory by this function's contract.
    done(to.len(), unsafe { copy(to.as_mut_ptr(), from, to.len()) })
}

/// Copies `from` to guest memory at `to`.
///
/// # Errors
/// As of [`read()`].
///
/// # Safety
/// `to..to + from.len()` is guest memory, to which no Rust reference leads: mapped, or an address range at which nothing
/// will be.
#[inline]
pub unsafe fn write(to: *mut u8, from: &[u8]) -> Result<(), BadMemory> {
    if areas::is_bad(to.addr() as u64, from.len() as u64) {
        return Err(BadMemory { done: 0 });
    }
    // SAFETY: as of `read`, the other way round.
    done(from.len(), unsafe { copy(to, from.as_ptr(), from.len()) })
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
            #[cfg(target_arch = "x86_64")]
            unsafe fn load(at: *const Self) -> Result<Self, BadMemory> {
                let mut value = 0;
                // SAFETY: one access to `at`, guest memory by the caller's contract, and one to a local.
                let left = unsafe { $mov((&raw mut value).cast(), at.cast(), size_of::<Self>()) };
                done(size_of::<Self>(), left).map(|()| value)
            }

            #[cfg(target_arch = "x86_64")]
            unsafe fn store(at: *mut Self, value: Self) -> Result<(), BadMemory> {
                // SAFETY: as above.
                let left = unsafe { $mov(at.cast(), (&raw const value).cast(), size_of::<Self>()) };
                done(size_of::<Self>(), left)
            }

            #[cfg(target_arch = "x86_64")]
            unsafe fn swap(at: *mut Self, mut current: Self, new: Self) -> Result<Self, BadMemory> {
                let was = (&raw mut current).cast();
                // SAFETY: as above.
                let left = unsafe { $swap(at.cast(), was, size_of::<Self>(), new.into()) };
                done(size_of::<Self>(), left).map(|()| current)
            }

            #[cfg(not(target_arch = "x86_64"))]
            unsafe fn load(at: *const Self) -> Result<Self, BadMemory> {
                let mut bytes = [0; size_of::<Self>()];
                // SAFETY: guest memory by the caller's contract.
                unsafe { read(at.cast(), &mut bytes) }?;
                Ok(Self::from_ne_bytes(bytes))
            }

            #[cfg(not(target_arch = "x86_64"))]
            unsafe fn store(at: *mut Self, value: Self) -> Result<(), BadMemory> {
                // SAFETY: as above.
                unsafe { write(at.cast(), &value.to_ne_bytes()) }
            }

            #[cfg(not(target_arch = "x86_64"))]
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

/// Loads a word of guest memory as a whole; on x86 also with acquire.
///
/// # Errors
/// As of [`read()`].
///
/// # Safety
/// `at` is guest memory, as for [`read()`], and aligned.
#[inline]
pub unsafe fn load<T: Word>(at: *const T) -> Result<T, BadMemory> {
    if areas::is_bad(at.addr() as u64, size_of::<T>() as u64) {
        return Err(BadMemory { done: 0 });
    }
    // SAFETY: this function's contract.
    unsafe { T::load(at) }
}

/// Stores a word of guest memory as a whole; on x86 also with release.
///
/// # Errors
/// As of [`read()`].
///
/// # Safety
/// `at` is guest memory, as for [`write()`], and aligned.
#[inline]
pub unsafe fn store<T: Word>(at: *mut T, value: T) -> Result<(), BadMemory> {
    if areas::is_bad(at.addr() as u64, size_of::<T>() as u64) {
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
    if areas::is_bad(at.addr() as u64, size_of::<T>() as u64) {
        return Err(BadMemory { done: 0 });
    }
    // SAFETY: this function's contract.
    unsafe { T::swap(at, current, new) }
}
