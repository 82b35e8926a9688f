//! Page faults of the target's mm, whoever takes them.

use aya_ebpf::{
    macros::{btf_tracepoint, fexit, kprobe},
    programs::{BtfTracePointContext, FExitContext, ProbeContext},
};
use memckpt_ebpf::{config, counter};

use crate::maps::{config, control, count, current_mm, load_u64, probe_u64};
use crate::mark::mark;

/// VM_FAULT_RETRY and VM_FAULT_COMPLETED (mm_types.h): the locks were dropped, so the VMA may be freed by now.
const LOCKS_DROPPED: u64 = 0x400 | 0x4000;

/// At the return: the page-table entry is in place, so a mark after a flip means a write after the flip's scan began.
#[fexit]
pub fn fault_return(ctx: FExitContext) -> i32 {
    let Some((control, mm)) = control() else { return 0 };
    // handle_mm_fault(vma, address, flags, regs); behind the arguments lies the result.
    let result: u64 = ctx.arg(4);
    // SAFETY: a vm_area_struct argument; where it was freed meanwhile the load gives some number, or 0.
    let ours = unsafe { load_u64(ctx.arg(0), config(config::VMA_MM)) } == mm
        || (result & LOCKS_DROPPED != 0 && current_mm() == mm);
    if ours {
        mark(control, ctx.arg(1));
        count(counter::FAULTS);
    }
    0
}

/// At the entry, where only kprobes exist: enough while the target is frozen around scan and clear.
#[kprobe]
pub fn fault_entry(ctx: ProbeContext) -> u32 {
    let Some((control, mm)) = control() else { return 0 };
    let (Some(vma), Some(address)) = (ctx.arg::<u64>(0), ctx.arg::<u64>(1)) else { return 0 };
    if probe_u64(vma, config(config::VMA_MM)) == mm {
        mark(control, address);
        count(counter::FAULTS);
    }
    0
}

#[inline(always)]
fn fault_of_current(address: u64) {
    let Some((control, mm)) = control() else { return };
    if current_mm() == mm {
        mark(control, address);
        count(counter::FAULTS);
    }
}

/// exceptions:page_fault_user(address, regs, error_code).
#[btf_tracepoint]
pub fn fault_user(ctx: BtfTracePointContext) -> i32 {
    fault_of_current(ctx.arg(0));
    0
}

/// exceptions:page_fault_kernel: the target's own system calls touching its memory. GUP is not seen.
#[btf_tracepoint]
pub fn fault_kernel(ctx: BtfTracePointContext) -> i32 {
    fault_of_current(ctx.arg(0));
    0
}
