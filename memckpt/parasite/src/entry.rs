//! The ways in and out that no compiler may have a hand in.

use core::arch::{asm, global_asm};
use core::mem::offset_of;

use crate::layout::{PARAMETERS, Parameters, Registers, STACK_TOP, XSAVE};

/// Offset of a register in the segment.
macro_rules! register {
    ($name:ident) => {
        PARAMETERS + offset_of!(Parameters, registers) + offset_of!(Registers, $name)
    };
}

// parasite_start: where memckpt sends the thread behind shmat. The extended state is saved before any compiled code can use it.
//
// parasite_restart: restart_syscall with the thread's own registers and stack, where a signal handler then also runs.
// rt_sigreturn cancels a restart block, so the interrupted call has to be finished before it.
global_asm!(
    ".section .text.start,\"ax\",@progbits",
    ".globl parasite_start",
    "parasite_start:",
    "lea rdi, [rip + parasite_start]",
    "mov eax, [rdi + {xfeatures}]",
    "mov edx, [rdi + {xfeatures} + 4]",
    "xsave64 [rdi + {xsave}]",
    "lea rsp, [rdi + {stack_top}]",
    "xor ebp, ebp",
    "cld",
    "call {main}",
    "ud2",
    ".section .text.restart,\"ax\",@progbits",
    ".globl parasite_restart",
    "parasite_restart:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "lea rdi, [rip + parasite_start]",
    "mov [rdi + {saved_sp}], rsp",
    "mov rsp, [rdi + {sp}]",
    "mov rsi, [rdi + {si}]",
    "mov rdx, [rdi + {dx}]",
    "mov r10, [rdi + {r10}]",
    "mov r8, [rdi + {r8}]",
    "mov r9, [rdi + {r9}]",
    "mov rbx, [rdi + {bx}]",
    "mov rbp, [rdi + {bp}]",
    "mov r12, [rdi + {r12}]",
    "mov r13, [rdi + {r13}]",
    "mov r14, [rdi + {r14}]",
    "mov r15, [rdi + {r15}]",
    "mov rdi, [rdi + {di}]",
    "mov eax, 219",
    "syscall",
    "lea rdi, [rip + parasite_start]",
    "mov [rdi + {restart_result}], rax",
    "mov rsp, [rdi + {saved_sp}]",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    main = sym crate::parasite_main,
    xfeatures = const PARAMETERS + offset_of!(Parameters, xfeatures),
    xsave = const XSAVE,
    stack_top = const STACK_TOP,
    saved_sp = const PARAMETERS + offset_of!(Parameters, saved_sp),
    restart_result = const PARAMETERS + offset_of!(Parameters, restart_result),
    sp = const register!(sp),
    si = const register!(si),
    dx = const register!(dx),
    di = const register!(di),
    r10 = const register!(r10),
    r8 = const register!(r8),
    r9 = const register!(r9),
    bx = const register!(bx),
    bp = const register!(bp),
    r12 = const register!(r12),
    r13 = const register!(r13),
    r14 = const register!(r14),
    r15 = const register!(r15),
);

/// Finishes the interrupted call; its result is in the parameters.
pub(crate) unsafe fn restart() {
    // SAFETY: parasite_restart keeps what a function has to keep.
    unsafe { asm!("call parasite_restart", clobber_abi("C")) }
}

/// munmap of this very code by an instruction outside it; the `ret` there takes the frame's first word, the way to
/// rt_sigreturn.
pub(crate) unsafe fn leave_by(address: u64, length: u64, gadget: u64, frame: u64) -> ! {
    // SAFETY: nothing of this stack is used any more.
    unsafe {
        asm!("mov rsp, rcx", "jmp rdx", in("rax") crate::system::nr::MUNMAP, in("rdi") address, in("rsi") length,
             in("rdx") gadget, in("rcx") frame, options(noreturn))
    }
}
