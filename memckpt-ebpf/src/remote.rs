//! Accesses to the target by tasks that do not live in its mm, where its lock is not hooked (before 6.4, every fault takes
//! it): told when they get hold of its pages.
//!
//! They copy after that, so each call that may write is noted as under way, until it is over; see `foreign.rs`.

use aya_ebpf::{
    macros::{fexit, kprobe},
    programs::{FExitContext, ProbeContext},
};

use crate::capture;
use crate::foreign;
use crate::maps::{control, current_mm, current_task};

/// get_user_pages_remote(mm, ...): `/proc/PID/mem` and ptrace (__access_remote_vm(), mm/memory.c).
#[fexit]
pub fn remote_got(ctx: FExitContext) -> i32 {
    accessed(ctx.arg(0));
    0
}

/// pin_user_pages_remote(mm, ...): process_vm_writev (process_vm_rw_single_vec(), mm/process_vm_access.c).
#[fexit]
pub fn remote_pinned(ctx: FExitContext) -> i32 {
    accessed(ctx.arg(0));
    0
}

/// The first, at its entry.
#[kprobe]
pub fn remote_got_entry(ctx: ProbeContext) -> u32 {
    accessed(ctx.arg(0).unwrap_or(0));
    0
}

/// The second, at its entry.
#[kprobe]
pub fn remote_pinned_entry(ctx: ProbeContext) -> u32 {
    accessed(ctx.arg(0).unwrap_or(0));
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
        foreign::gets_pages(control, current_task());
    }
}
