//! The VMA generation: it moves before, or while, the layout of the target changes.

use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};
use memckpt_ebpf::{Control, config};

use crate::capture::capture_mm;
use crate::locks;
use crate::maps::{CONTROL, bump, config, control, load_u64};

/// mmap_lock_acquire_returned(mm, write, success).
///
/// Not mmap_lock_released: munmap releases as a reader.
#[btf_tracepoint]
pub fn lock_taken(ctx: BtfTracePointContext) -> i32 {
    let Some(control) = CONTROL.get_ptr_mut(0) else { return 0 };
    capture_mm(control, ctx.arg(0));
    if is_target(control, ctx.arg::<u64>(0)) && ctx.arg::<u64>(2) & 0xff != 0 {
        if ctx.arg::<u64>(1) & 0xff != 0 {
            locks::taken(control, ctx.arg(0));
        }
    }
    0
}

/// Older kernels (6.1, 6.12): mmap_lock_acquire_returned(mm, memcg_path, write, success).
///
/// A program of its own: the verifier lets nobody choose an argument by a variable.
#[btf_tracepoint]
pub fn lock_taken_with_path(ctx: BtfTracePointContext) -> i32 {
    let Some(control) = CONTROL.get_ptr_mut(0) else { return 0 };
    capture_mm(control, ctx.arg(0));
    if is_target(control, ctx.arg::<u64>(0)) && ctx.arg::<u64>(3) & 0xff != 0 {
        if ctx.arg::<u64>(2) & 0xff != 0 {
            locks::taken(control, ctx.arg(0));
        }
    }
    0
}

#[inline(always)]
fn is_target(control: *mut Control, mm: u64) -> bool {
    // SAFETY: the control page.
    unsafe { core::ptr::read_volatile(&raw const (*control).target_mm) == mm }
}

/// ma_write(function, ma_state, pivot, value): a maple tree of VMAs changes. For kernels without per-VMA locks
/// (before 6.4), where every fault takes the mmap lock and [`lock_taken`] would cost 30 % of a fault.
#[btf_tracepoint]
pub fn tree_written(ctx: BtfTracePointContext) -> i32 {
    let Some((control, mm)) = control() else { return 0 };
    // SAFETY: a ma_state argument, offset from BTF.
    let tree = unsafe { load_u64(ctx.arg(1), config(config::MAS_TREE)) };
    if tree == mm.wrapping_add(config(config::MM_TREE) as u64) {
        // SAFETY: the control page.
        bump(unsafe { &raw mut (*control).generation });
    }
    0
}
