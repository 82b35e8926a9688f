//! The code that a task runs while it is being made: it makes the system calls of a list, one after the other, and stops.
//!
//! It needs no stack, no thread-local storage and no memory but the list, so that it goes on while everything else of the task
//! is taken away. Between two lists the task stands in a ptrace stop.

use std::arch::global_asm;

// rbx: the list, of `target::Call`s: number, six arguments, result. r12: how many. Stops at the end, or at the first call that fails;
// r12 then counts it. clone3 comes back here twice; the second is stopped before it goes on.
global_asm!(
    ".pushsection .rodata.memckpt_restorer, \"a\", @progbits",
    ".balign 16",
    ".globl memckpt_restorer_start",
    ".globl memckpt_restorer_end",
    "memckpt_restorer_start:",
    "2: test r12, r12",
    "   jz 3f",
    "   mov rax, [rbx]",
    "   mov rdi, [rbx + 8]",
    "   mov rsi, [rbx + 16]",
    "   mov rdx, [rbx + 24]",
    "   mov r10, [rbx + 32]",
    "   mov r8, [rbx + 40]",
    "   mov r9, [rbx + 48]",
    ".globl memckpt_restorer_syscall",
    "memckpt_restorer_syscall:",
    "   syscall",
    "   mov [rbx + 56], rax",
    "   cmp rax, -4095",
    "   jae 3f",
    "   add rbx, 64",
    "   dec r12",
    "   jmp 2b",
    "3: int3",
    "   jmp 3b",
    "memckpt_restorer_end:",
    ".popsection",
);

unsafe extern "C" {
    static memckpt_restorer_start: u8;
    static memckpt_restorer_syscall: u8;
    static memckpt_restorer_end: u8;
}

/// Where the `syscall` instruction is in [`code`].
pub(super) fn syscall() -> u64 {
    ((&raw const memckpt_restorer_syscall).addr() - (&raw const memckpt_restorer_start).addr()) as u64
}

/// The code. It may lie anywhere.
pub(super) fn code() -> &'static [u8] {
    // SAFETY: the two symbols are the bounds of one piece of read-only data.
    unsafe {
        let start = &raw const memckpt_restorer_start;
        std::slice::from_raw_parts(start, (&raw const memckpt_restorer_end).addr() - start.addr())
    }
}
