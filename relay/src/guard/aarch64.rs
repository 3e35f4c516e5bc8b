//! The guarded copies of aarch64, see [`copy`](super::copy). X0 where to, X1 where from, X2 how many bytes, X3 the new value
//! of an exchange, X4 and X5 which of the two operands is the guest's. A fault leaves the number of bytes still to be copied
//! in X2; X0 returns it. Only registers that a callee may change are used, and no stack.

use std::arch::global_asm;

global_asm!(
    ".pushsection .text.mce_relay_guard, \"ax\", @progbits",
    ".p2align 4",
    ".globl mce_relay_guard_begin",
    ".hidden mce_relay_guard_begin",
    "mce_relay_guard_begin:",
    // Copies. Up to 64 bytes by a head and a tail that may overlap, more in steps of 64 with such a tail.
    ".globl mce_relay_guard_copy",
    ".hidden mce_relay_guard_copy",
    "mce_relay_guard_copy:",
    "cmp x2, #64",
    "b.hi 5f",
    "add x7, x1, x2", // the ends
    "add x8, x0, x2",
    "cmp x2, #32",
    "b.hi 4f",
    "cmp x2, #16",
    "b.hs 3f",
    "cmp x2, #8",
    "b.hs 2f",
    "cbz x2, 9f",
    "8: ldrb w6, [x1], #1",
    "strb w6, [x0], #1",
    "sub x2, x2, #1",
    "cbnz x2, 8b",
    "9: mov x0, #0",
    "ret",
    "2: ldr x6, [x1]",
    "ldur x7, [x7, #-8]",
    "str x6, [x0]",
    "stur x7, [x8, #-8]",
    "mov x0, #0",
    "ret",
    "3: ldr q0, [x1]",
    "ldur q1, [x7, #-16]",
    "str q0, [x0]",
    "stur q1, [x8, #-16]",
    "mov x0, #0",
    "ret",
    "4: ldp q0, q1, [x1]",
    "ldp q2, q3, [x7, #-32]",
    "stp q0, q1, [x0]",
    "stp q2, q3, [x8, #-32]",
    "mov x0, #0",
    "ret",
    "5: ldp q0, q1, [x1]",
    "ldp q2, q3, [x1, #32]",
    "stp q0, q1, [x0]",
    "stp q2, q3, [x0, #32]",
    "add x1, x1, #64",
    "add x0, x0, #64",
    "sub x2, x2, #64",
    "cmp x2, #64",
    "b.hi 5b",
    // 1 to 64 are left, behind at least 64 that are done.
    "add x7, x1, x2",
    "add x8, x0, x2",
    "ldp q0, q1, [x7, #-64]",
    "ldp q2, q3, [x7, #-32]",
    "stp q0, q1, [x8, #-64]",
    "stp q2, q3, [x8, #-32]",
    "mov x0, #0",
    "ret",
    // One access each, as wide as it says, a load with acquire and a store with release. X2 has the width.
    ".globl mce_relay_guard_move1",
    ".hidden mce_relay_guard_move1",
    "mce_relay_guard_move1: ldarb w6, [x1]",
    "stlrb w6, [x0]",
    "mov x0, #0",
    "ret",
    ".globl mce_relay_guard_move2",
    ".hidden mce_relay_guard_move2",
    "mce_relay_guard_move2: ldarh w6, [x1]",
    "stlrh w6, [x0]",
    "mov x0, #0",
    "ret",
    ".globl mce_relay_guard_move4",
    ".hidden mce_relay_guard_move4",
    "mce_relay_guard_move4: ldar w6, [x1]",
    "stlr w6, [x0]",
    "mov x0, #0",
    "ret",
    ".globl mce_relay_guard_move8",
    ".hidden mce_relay_guard_move8",
    "mce_relay_guard_move8: ldar x6, [x1]",
    "stlr x6, [x0]",
    "mov x0, #0",
    "ret",
    // Compares [X0] with [X1], and stores X3 there if they are equal; [X1] gets what was there.
    ".globl mce_relay_guard_swap1",
    ".hidden mce_relay_guard_swap1",
    "mce_relay_guard_swap1: ldrb w6, [x1]",
    "2: ldaxrb w7, [x0]",
    "cmp w7, w6",
    "b.ne 3f",
    "stlxrb w8, w3, [x0]",
    "cbnz w8, 2b",
    "3: strb w7, [x1]",
    "mov x0, #0",
    "ret",
    ".globl mce_relay_guard_swap2",
    ".hidden mce_relay_guard_swap2",
    "mce_relay_guard_swap2: ldrh w6, [x1]",
    "2: ldaxrh w7, [x0]",
    "cmp w7, w6",
    "b.ne 3f",
    "stlxrh w8, w3, [x0]",
    "cbnz w8, 2b",
    "3: strh w7, [x1]",
    "mov x0, #0",
    "ret",
    ".globl mce_relay_guard_swap4",
    ".hidden mce_relay_guard_swap4",
    "mce_relay_guard_swap4: ldr w6, [x1]",
    "2: ldaxr w7, [x0]",
    "cmp w7, w6",
    "b.ne 3f",
    "stlxr w8, w3, [x0]",
    "cbnz w8, 2b",
    "3: str w7, [x1]",
    "mov x0, #0",
    "ret",
    ".globl mce_relay_guard_swap8",
    ".hidden mce_relay_guard_swap8",
    "mce_relay_guard_swap8: ldr x6, [x1]",
    "2: ldaxr x7, [x0]",
    "cmp x7, x6",
    "b.ne 3f",
    "stlxr w8, x3, [x0]",
    "cbnz w8, 2b",
    "3: str x7, [x1]",
    "mov x0, #0",
    "ret",
    ".globl mce_relay_guard_end",
    ".hidden mce_relay_guard_end",
    "mce_relay_guard_end:",
    // Where the handler goes on. X2 counts down with each step that is done.
    ".globl mce_relay_guard_failed",
    ".hidden mce_relay_guard_failed",
    "mce_relay_guard_failed:",
    "mov x0, x2",
    "ret",
    ".popsection",
);

unsafe extern "C" {
    fn mce_relay_guard_failed();
}

/// Where a thread goes on that a fault stopped within the copies. Async-signal-safe.
pub(super) fn behind(_: usize) -> usize {
    mce_relay_guard_failed as *const () as usize
}

/// The registers of the copies.
pub(super) struct Registers<'a>(&'a mut libc::mcontext_t);

impl<'a> Registers<'a> {
    pub(super) fn of(context: &'a mut libc::ucontext_t) -> Self {
        Self(&mut context.uc_mcontext)
    }

    /// Where the guest's operand begins, and its length.
    pub(super) fn operand(&self) -> (u64, u64) {
        (self.0.regs[4], self.0.regs[5])
    }

    /// The instruction that the thread is at.
    pub(super) fn at(&self) -> u64 {
        self.0.pc
    }

    pub(super) fn go_on_at(&mut self, at: u64) {
        self.0.pc = at;
    }
}
