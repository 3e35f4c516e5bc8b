//! The guarded copies of x86-64, see [`copy`](super::copy). RDI where to, RSI where from, RDX how many bytes, RCX the new
//! value of an exchange, R8 and R9 which of the two operands is the guest's. A fault leaves the number of bytes still to be
//! copied in RDX, of `rep movsb` in RCX; RAX returns it.

use std::arch::global_asm;

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

unsafe extern "C" {
    fn mce_relay_guard_rep();
    fn mce_relay_guard_failed();
    fn mce_relay_guard_rep_failed();
}

/// Where a thread goes on that a fault stopped at `at`, an address within the copies. Async-signal-safe.
pub(super) fn behind(at: usize) -> usize {
    match at == mce_relay_guard_rep as *const () as usize {
        true => mce_relay_guard_rep_failed as *const () as usize,
        false => mce_relay_guard_failed as *const () as usize,
    }
}

/// The registers of the copies.
pub(super) struct Registers<'a>(&'a mut libc::mcontext_t);

impl<'a> Registers<'a> {
    pub(super) fn of(context: &'a mut libc::ucontext_t) -> Self {
        Self(&mut context.uc_mcontext)
    }

    /// Where the guest's operand begins, and its length.
    pub(super) fn operand(&self) -> (u64, u64) {
        // An address is its bits.
        let value = |at: libc::c_int| self.0.gregs[at as usize].cast_unsigned();
        (value(libc::REG_R8), value(libc::REG_R9))
    }

    /// The instruction that the thread is at.
    pub(super) fn at(&self) -> u64 {
        self.0.gregs[libc::REG_RIP as usize].cast_unsigned()
    }

    pub(super) fn go_on_at(&mut self, at: u64) {
        self.0.gregs[libc::REG_RIP as usize] = at.cast_signed();
    }
}
