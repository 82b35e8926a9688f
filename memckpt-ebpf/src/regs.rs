//! What a task is doing in the kernel, by the registers that it came with.

use aya_ebpf::helpers::generated::{bpf_get_current_task_btf, bpf_task_pt_regs};
use memckpt_ebpf::{Call, config};

use crate::maps::{config, load_u32, load_u64};

/// struct pt_regs of x86-64 (asm/ptrace.h): fixed, as it is user-space ABI too.
mod at {
    pub const R10: usize = 56;
    pub const R9: usize = 64;
    pub const R8: usize = 72;
    pub const AX: usize = 80;
    pub const DX: usize = 96;
    pub const SI: usize = 104;
    pub const DI: usize = 112;
    pub const ORIG_AX: usize = 120;
}

/// Words of a pt_regs up to orig_ax.
pub const WORDS: usize = at::ORIG_AX / 8 + 1;

/// thread_info.status (asm/thread_info.h): the task is in a 32-bit system call.
const TS_COMPAT: u32 = 2;
/// PF_KTHREAD, PF_USER_WORKER and PF_IO_WORKER (linux/sched.h, Linux 6.4). A worker's registers are a copy of those of
/// the thread that made it (copy_thread(), arch/x86/kernel/process.c): it is in no call.
const PF_KTHREAD: u32 = 0x20_0000;
const PF_WORKER: u32 = 0x4000 | 0x10;
/// __X32_SYSCALL_BIT (asm/unistd.h).
const X32: u64 = 0x4000_0000;

/// Who runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// An ordinary thread.
    Thread,
    /// A thread that a process made in the kernel, to work for it.
    Worker,
    /// A thread of the kernel's own.
    Kernel,
}

/// What kind of thread `task` is.
#[inline(always)]
pub fn who(task: *const u8) -> Who {
    // SAFETY: current's task_struct, offset from BTF.
    let flags = unsafe { load_u32(task, config(config::TASK_FLAGS)) };
    if flags & PF_KTHREAD != 0 {
        Who::Kernel
    } else if flags & PF_WORKER != 0 {
        Who::Worker
    } else {
        Who::Thread
    }
}

/// Whose numbers a call has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Abi {
    Native,
    Compat,
    X32,
    /// It is no call: an exception, whose orig_ax is -1 (idtentry_body, arch/x86/entry/entry_64.S).
    None,
}

/// The current task's registers at its entry into the kernel.
#[inline(always)]
pub fn saved() -> *const u8 {
    // SAFETY: the helpers have no preconditions beyond a task with BTF type (Linux 5.15).
    unsafe { bpf_task_pt_regs(bpf_get_current_task_btf()) as *const u8 }
}

/// The number of the call, as the kernel understands it, and whose it is. `regs`: a pt_regs of `task`, the current.
#[inline(always)]
pub fn number(task: *const u8, regs: *const u8) -> (u64, Abi) {
    // SAFETY: current's task_struct and a pt_regs, offsets from BTF and the ABI.
    let (compat, number) = unsafe {
        (load_u32(task, config(config::TASK_STATUS)) & TS_COMPAT != 0, load_u32(regs, at::ORIG_AX))
    };
    // The kernel looks at an int too (do_syscall_64(), arch/x86/entry/common.c).
    let number = number as u64;
    if number & 0x8000_0000 != 0 {
        (number, Abi::None)
    } else if compat {
        (number, Abi::Compat)
    } else if number & X32 != 0 {
        (number & !X32, Abi::X32)
    } else {
        (number, Abi::Native)
    }
}

/// Whether the call's function has returned. At its entry ax is -ENOSYS, and the result comes in when it is over; work
/// on the way back to user mode, a signal's frame among it, comes after that.
#[inline(always)]
pub fn is_late(regs: *const u8) -> bool {
    const ENOSYS: i64 = 38;
    // SAFETY: a pt_regs.
    unsafe { load_u64(regs, at::AX) as i64 != -ENOSYS }
}

/// The arguments of a native call. They survive it: only rax is overwritten.
#[inline(always)]
pub fn arguments(regs: *const u8) -> [u64; 6] {
    // SAFETY: a pt_regs.
    unsafe {
        [
            load_u64(regs, at::DI),
            load_u64(regs, at::SI),
            load_u64(regs, at::DX),
            load_u64(regs, at::R10),
            load_u64(regs, at::R8),
            load_u64(regs, at::R9),
        ]
    }
}

/// The call as it is saved, whatever it means.
#[inline(always)]
pub fn call(regs: *const u8) -> Call {
    // SAFETY: a pt_regs.
    let (number, result) = unsafe { (load_u64(regs, at::ORIG_AX), load_u64(regs, at::AX)) };
    Call { number, args: arguments(regs), result }
}

/// The same, of a copy.
#[inline(always)]
pub fn call_in(regs: &[u64; WORDS]) -> Call {
    Call {
        number: regs[at::ORIG_AX / 8],
        args: [
            regs[at::DI / 8],
            regs[at::SI / 8],
            regs[at::DX / 8],
            regs[at::R10 / 8],
            regs[at::R8 / 8],
            regs[at::R9 / 8],
        ],
        result: regs[at::AX / 8],
    }
}
