//! System calls that can change the layout, at their return: for kernels where faults take the mmap lock (before 6.4),
//! or where something that [`crate::locks`] needs is missing. It slows down every system call of the machine.

use core::intrinsics::{AtomicOrdering, atomic_xchg};

use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};
use memckpt_ebpf::{Record, config, source};

use crate::maps::{bump, config, control, current_task, emit, load_u64, probe_u64};
use crate::nr;
use crate::regs::{self, Abi};

/// raw_syscalls:sys_exit(regs, result). It runs at every system call of the machine: first things first.
#[btf_tracepoint]
pub fn call_return(ctx: BtfTracePointContext) -> i32 {
    let Some((control, mm)) = control() else { return 0 };
    let task = current_task();
    // SAFETY: current's task_struct, offset from BTF.
    if unsafe { load_u64(task, config(config::TASK_MM)) } != mm {
        return 0;
    }
    let regs: *const u8 = ctx.arg(0);
    let (call, abi) = regs::number(task, regs);
    let args = regs::arguments(regs);
    if abi == Abi::None || (abi == Abi::Native && !nr::is_layout_call(call, args[0])) {
        return 0;
    }
    let mut record = Record {
        source: if abi == Abi::Native { source::CALL } else { source::COMPAT_CALL },
        call: call as u32,
        args,
        result: ctx.arg::<u64>(1) as i64,
        ..Record::default()
    };
    if abi == Abi::Native && call == nr::BRK {
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
