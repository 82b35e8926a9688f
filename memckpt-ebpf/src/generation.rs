//! The VMA generation: it moves before, or while, the layout of the target changes.

use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};
use memckpt_ebpf::{Control, config, foreign, loss};

use crate::capture::capture_mm;
use crate::maps::{CONTROL, FOREIGN, bump, config, control, current_id, current_mm, load_u64, lose};

/// mmap_lock_acquire_returned(mm, write, success).
///
/// Not mmap_lock_released: munmap releases as a reader.
#[btf_tracepoint]
pub fn lock_taken(ctx: BtfTracePointContext) -> i32 {
    let Some(control) = CONTROL.get_ptr_mut(0) else { return 0 };
    capture_mm(control, ctx.arg(0));
    if is_target(control, ctx.arg(0)) && ctx.arg::<u64>(2) & 0xff != 0 {
        taken(control, ctx.arg(0), ctx.arg::<u64>(1) & 0xff != 0);
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
    if is_target(control, ctx.arg(0)) && ctx.arg::<u64>(3) & 0xff != 0 {
        taken(control, ctx.arg(0), ctx.arg::<u64>(2) & 0xff != 0);
    }
    0
}

#[inline(always)]
fn is_target(control: *mut Control, mm: u64) -> bool {
    // SAFETY: the control page.
    unsafe { core::ptr::read_volatile(&raw const (*control).target_mm) == mm }
}

#[inline(always)]
fn taken(control: *mut Control, mm: u64, write: bool) {
    if write {
        // SAFETY: the control page.
        bump(unsafe { &raw mut (*control).generation });
    }
    let current = current_mm();
    // Kernel threads (khugepaged, reclaim) have no mm and return from no system call.
    if current != mm && current != 0 {
        // Somebody else's system call: whether it was a write into the target shows when it returns.
        let task = current_id();
        let how = if write { foreign::WRITE } else { foreign::READ };
        match FOREIGN.get_ptr_mut(&task) {
            // SAFETY: an element of a live map, used by this task only.
            Some(slot) => unsafe { *slot |= how },
            None if FOREIGN.insert(&task, &how, 0).is_ok() => {
                // SAFETY: the control page.
                bump(unsafe { &raw mut (*control).foreign_open });
            }
            None => lose(control, loss::FOREIGN_FULL),
        }
    }
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
