//! The end of the mm: from then on its address may belong to another.

use core::intrinsics::{AtomicOrdering, atomic_xchg};

use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};
use memckpt_ebpf::{Control, Record, config, gone, source};

use crate::maps::{config, control, current_mm, current_task, emit, load_u32};

#[inline(always)]
fn end(control: *mut Control, how: u32) {
    // SAFETY: words of the control page.
    unsafe {
        atomic_xchg::<u64, { AtomicOrdering::SeqCst }>(&raw mut (*control).gone, how as u64);
        atomic_xchg::<u64, { AtomicOrdering::SeqCst }>(&raw mut (*control).target_mm, 0);
    }
    emit(control, Record { source: source::GONE, call: how, ..Record::default() });
}

/// exit_mmap(mm), also after an exec.
#[btf_tracepoint]
pub fn mm_exit(ctx: BtfTracePointContext) -> i32 {
    let Some((control, mm)) = control() else { return 0 };
    if ctx.arg::<u64>(0) == mm {
        // exec_mmap has switched to the new mm before it drops the old one; exit_mm leaves none.
        let exec = current_mm() != 0 && is_target(control);
        end(control, if exec { gone::EXEC } else { gone::EXIT });
    }
    0
}

#[inline(always)]
fn is_target(control: *mut Control) -> bool {
    // SAFETY: current's task_struct, offset from BTF; the control page.
    let (tgid, target) =
        unsafe { (load_u32(current_task(), config(config::TASK_TGID)) as u64, (*control).target_tgid) };
    target != 0 && tgid == target
}

/// sched_process_exec(task, old_pid, bprm), for when somebody else keeps the old mm alive. The task already has its
/// new mm, so only its thread group tells.
#[btf_tracepoint]
pub fn exec(_: BtfTracePointContext) -> i32 {
    let Some((control, _)) = control() else { return 0 };
    if is_target(control) {
        end(control, gone::EXEC);
    }
    0
}
