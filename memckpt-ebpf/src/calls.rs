//! System calls that can change the layout, at their return: a re-read then sees the change.

use core::intrinsics::{AtomicOrdering, atomic_xchg};

use aya_ebpf::{helpers::bpf_probe_read_user, macros::btf_tracepoint, programs::BtfTracePointContext};
use memckpt_ebpf::{Control, Record, config, foreign, source};

use crate::maps::{
    FOREIGN, bump, config, control, current_id, current_task, emit, load_u32, load_u64, probe_u64, unbump,
};

/// x86-64 system call numbers (arch/x86/entry/syscalls/syscall_64.tbl).
mod nr {
    pub const WRITE: u64 = 1;
    pub const MMAP: u64 = 9;
    pub const MPROTECT: u64 = 10;
    pub const MUNMAP: u64 = 11;
    pub const BRK: u64 = 12;
    pub const PWRITE64: u64 = 18;
    pub const WRITEV: u64 = 20;
    pub const MREMAP: u64 = 25;
    pub const MADVISE: u64 = 28;
    pub const SHMAT: u64 = 30;
    pub const SHMDT: u64 = 67;
    pub const PTRACE: u64 = 101;
    pub const MLOCK: u64 = 149;
    pub const MUNLOCK: u64 = 150;
    pub const MLOCKALL: u64 = 151;
    pub const MUNLOCKALL: u64 = 152;
    pub const PRCTL: u64 = 157;
    pub const ARCH_PRCTL: u64 = 158;
    pub const IO_SETUP: u64 = 206;
    pub const IO_DESTROY: u64 = 207;
    pub const REMAP_FILE_PAGES: u64 = 216;
    pub const MBIND: u64 = 237;
    pub const PWRITEV: u64 = 296;
    pub const PROCESS_VM_WRITEV: u64 = 311;
    pub const USERFAULTFD: u64 = 323;
    pub const MLOCK2: u64 = 325;
    pub const PWRITEV2: u64 = 328;
    pub const PKEY_MPROTECT: u64 = 329;
    pub const IO_URING_SETUP: u64 = 425;
    pub const IO_URING_REGISTER: u64 = 427;
    pub const PROCESS_MADVISE: u64 = 440;
    pub const SET_MEMPOLICY_HOME_NODE: u64 = 450;
    pub const MAP_SHADOW_STACK: u64 = 453;
    pub const MSEAL: u64 = 462;
}

/// struct pt_regs of x86-64 (asm/ptrace.h): fixed, as it is user-space ABI too.
mod regs {
    pub const R10: usize = 56;
    pub const R9: usize = 64;
    pub const R8: usize = 72;
    pub const DX: usize = 96;
    pub const SI: usize = 104;
    pub const DI: usize = 112;
    pub const ORIG_AX: usize = 120;
}

/// thread_info.status (asm/thread_info.h): the task is in a 32-bit system call.
const TS_COMPAT: u32 = 2;
/// prctl options (linux/prctl.h).
const PR_SET_MM: u64 = 35;
const PR_SET_MEMORY_MERGE: u64 = 67;
const PR_SET_VMA: u64 = 0x5356_4d41;
/// ARCH_SHSTK_ENABLE and ARCH_SHSTK_DISABLE (asm/prctl.h).
const ARCH_SHSTK: [u64; 2] = [0x5001, 0x5002];

#[inline(always)]
fn is_layout_call(call: u64, first: u64) -> bool {
    match call {
        nr::MMAP
        | nr::MPROTECT
        | nr::MUNMAP
        | nr::BRK
        | nr::MREMAP
        | nr::MADVISE
        | nr::SHMAT
        | nr::SHMDT
        | nr::MLOCK
        | nr::MUNLOCK
        | nr::MLOCKALL
        | nr::MUNLOCKALL
        | nr::IO_SETUP
        | nr::IO_DESTROY
        | nr::REMAP_FILE_PAGES
        | nr::MBIND
        | nr::USERFAULTFD
        | nr::MLOCK2
        | nr::PKEY_MPROTECT
        | nr::IO_URING_SETUP
        | nr::IO_URING_REGISTER
        | nr::PROCESS_MADVISE
        | nr::SET_MEMPOLICY_HOME_NODE
        | nr::MAP_SHADOW_STACK
        | nr::MSEAL => true,
        nr::PRCTL => first == PR_SET_MM || first == PR_SET_MEMORY_MERGE || first == PR_SET_VMA,
        nr::ARCH_PRCTL => first == ARCH_SHSTK[0] || first == ARCH_SHSTK[1],
        _ => false,
    }
}

#[inline(always)]
fn arguments(regs: *const u8) -> [u64; 6] {
    // SAFETY: the pt_regs argument of the tracepoint. Arguments survive the call: only rax is overwritten.
    unsafe {
        [
            load_u64(regs, regs::DI),
            load_u64(regs, regs::SI),
            load_u64(regs, regs::DX),
            load_u64(regs, regs::R10),
            load_u64(regs, regs::R8),
            load_u64(regs, regs::R9),
        ]
    }
}

/// raw_syscalls:sys_exit(regs, result). It runs at every system call of the machine: first things first.
#[btf_tracepoint]
pub fn call_return(ctx: BtfTracePointContext) -> i32 {
    let Some((control, mm)) = control() else { return 0 };
    let task = current_task();
    // SAFETY: current's task_struct, offset from BTF.
    if unsafe { load_u64(task, config(config::TASK_MM)) } != mm {
        // SAFETY: the control page.
        if unsafe { core::ptr::read_volatile(&raw const (*control).foreign_open) } != 0 {
            foreign_return(&ctx, control);
        }
        return 0;
    }
    let regs: *const u8 = ctx.arg(0);
    // SAFETY: current's task_struct and the pt_regs argument.
    let (compat, call) = unsafe {
        (load_u32(task, config(config::TASK_STATUS)) & TS_COMPAT != 0, load_u64(regs, regs::ORIG_AX))
    };
    if !compat {
        // SAFETY: the pt_regs argument.
        let first = unsafe { load_u64(regs, regs::DI) };
        if !is_layout_call(call, first) {
            return 0;
        }
    }
    let mut record = Record {
        source: if compat { source::COMPAT_CALL } else { source::CALL },
        call: call as u32,
        args: arguments(regs),
        result: ctx.arg::<u64>(1) as i64,
        ..Record::default()
    };
    if !compat && call == nr::BRK {
        // The old break is no argument of the call; it is what the last one left.
        let now = probe_u64(mm, config(config::MM_BRK));
        // SAFETY: the control page.
        let before =
            unsafe { atomic_xchg::<u64, { AtomicOrdering::SeqCst }>(&raw mut (*control).last_brk, now) };
        record.extra = [before, now];
    }
    // SAFETY: the control page. Where trees are watched and not locks, calls that only change flags move it here.
    bump(unsafe { &raw mut (*control).generation });
    emit(control, record);
    0
}

#[inline(always)]
fn foreign_return(ctx: &BtfTracePointContext, control: *mut Control) {
    let task = current_id();
    let Some(slot) = FOREIGN.get_ptr(&task) else { return };
    // SAFETY: an element of a live map, used by this task only.
    let how = unsafe { *slot };
    if FOREIGN.remove(&task).is_ok() {
        // SAFETY: the control page.
        unbump(unsafe { &raw mut (*control).foreign_open });
    }
    let regs: *const u8 = ctx.arg(0);
    // SAFETY: the pt_regs argument.
    let call = unsafe { load_u64(regs, regs::ORIG_AX) };
    let writes = matches!(
        call,
        nr::WRITE
            | nr::PWRITE64
            | nr::WRITEV
            | nr::PWRITEV
            | nr::PWRITEV2
            | nr::PTRACE
            | nr::PROCESS_VM_WRITEV
    );
    if !writes && how & foreign::WRITE == 0 {
        return;
    }
    let mut record = Record {
        source: source::FOREIGN,
        call: call as u32,
        flags: how,
        args: arguments(regs),
        result: ctx.arg::<u64>(1) as i64,
        ..Record::default()
    };
    if call == nr::PROCESS_VM_WRITEV && record.args[4] == 1 {
        // SAFETY: the helper checks the caller's address.
        if let Ok(iovec) = unsafe { bpf_probe_read_user::<[u64; 2]>(record.args[3] as *const _) } {
            record.extra = iovec;
            record.flags |= foreign::IOVEC;
        }
    }
    emit(control, record);
}
