//! Accesses to the target by tasks that do not live in its mm, where its lock is not hooked (before 6.4 every fault takes
//! it): told by the functions that they go through.
//!
//! process_vm_writev is told when it gets the mm, and copies later, so that it counts as under way until it is over; the
//! others are told when they have copied. Counting them as under way too costs nothing. See `foreign.rs`.

use aya_ebpf::{macros::fexit, programs::FExitContext};

use crate::capture;
use crate::foreign;
use crate::maps::{control, current_mm, current_task};

/// mm_access(task, mode) gives process_vm_writev the mm (process_vm_rw_core(), mm/process_vm_access.c).
#[fexit]
pub fn remote_mm(ctx: FExitContext) -> i32 {
    accessed(ctx.arg(2));
    0
}

/// access_remote_vm(mm, address, buffer, length, flags): `/proc/PID/mem` (mem_rw(), fs/proc/base.c).
#[fexit]
pub fn remote_memory(ctx: FExitContext) -> i32 {
    accessed(ctx.arg(0));
    0
}

/// __access_remote_vm(mm, address, buffer, length, flags): ptrace (ptrace_access_vm(), kernel/ptrace.c).
#[fexit]
pub fn remote_word(ctx: FExitContext) -> i32 {
    accessed(ctx.arg(0));
    0
}

#[inline(always)]
fn accessed(mm: u64) {
    let Some((control, target)) = control() else { return };
    if capture::peek(control) {
        return;
    }
    let current = current_mm();
    if mm == target && current != mm && current != 0 {
        foreign::accesses(control, current_task());
    }
}
