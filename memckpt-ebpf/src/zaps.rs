//! Pages dropped, or made writable, without a fault. All are marked when it is done, never before: a mark made
//! before a flip for a page dropped after the scan would be lost to the next epoch.

use aya_ebpf::{
    macros::{btf_tracepoint, fexit, kprobe, kretprobe},
    programs::{BtfTracePointContext, FExitContext, ProbeContext, RetProbeContext},
};
use memckpt_ebpf::{Record, config, counter, loss, source};

use crate::maps::{CALLS, config, control, count, current_id, emit, load_u64, lose, probe_u64};
use crate::mark::{mark, mark_range};

/// Which probed function a stored call belongs to: task_structs are aligned to more than this.
const UNMAP: u64 = 0;
const ZAP: u64 = 1;
const MADVISE: u64 = 2;

#[inline(always)]
fn zapped(vma: *const u8, start: u64, end: u64) {
    let Some((control, mm)) = control() else { return };
    // SAFETY: a vm_area_struct argument; the caller holds a lock that keeps it.
    if unsafe { load_u64(vma, config(config::VMA_MM)) } == mm {
        mark_range(control, start, end);
        count(counter::ZAPS);
    }
}

/// unmap_page_range(tlb, vma, addr, end, details).
#[fexit]
pub fn unmap_return(ctx: FExitContext) -> i32 {
    zapped(ctx.arg(1), ctx.arg(2), ctx.arg(3));
    0
}

/// zap_page_range_single(vma, address, size, details).
#[fexit]
pub fn zap_return(ctx: FExitContext) -> i32 {
    let start: u64 = ctx.arg(1);
    zapped(ctx.arg(0), start, start.wrapping_add(ctx.arg::<u64>(2)));
    0
}

/// zap_page_range_single_batched(tlb, vma, address, size, details), Linux 6.17.
#[fexit]
pub fn zap_batched_return(ctx: FExitContext) -> i32 {
    let start: u64 = ctx.arg(2);
    zapped(ctx.arg(1), start, start.wrapping_add(ctx.arg::<u64>(3)));
    0
}

/// collapse_huge_page(mm, address, ...): the new huge page is writable, so what follows takes no fault.
#[fexit]
pub fn collapse_return(ctx: FExitContext) -> i32 {
    let Some((control, mm)) = control() else { return 0 };
    if ctx.arg::<u64>(0) == mm {
        mark(control, ctx.arg(1));
    }
    0
}

/// huge_memory:mm_collapse_huge_page(mm, isolated, status): no address, so a success is a loss.
#[btf_tracepoint]
pub fn collapse_seen(ctx: BtfTracePointContext) -> i32 {
    const SCAN_SUCCEED: u64 = 1;
    let Some((control, mm)) = control() else { return 0 };
    if ctx.arg::<u64>(0) == mm && ctx.arg::<u64>(2) & 0xffff_ffff == SCAN_SUCCEED {
        lose(control, loss::COLLAPSE);
    }
    0
}

/// do_madvise(mm, start, len, behavior): io_uring and process_madvise come through here too.
#[fexit]
pub fn madvise_return(ctx: FExitContext) -> i32 {
    let Some((control, mm)) = control() else { return 0 };
    if ctx.arg::<u64>(0) == mm {
        madvised(control, [ctx.arg(1), ctx.arg(2), ctx.arg(3)]);
    }
    0
}

#[inline(always)]
fn madvised(control: *mut memckpt_ebpf::Control, args: [u64; 3]) {
    let args = [args[0], args[1], args[2] & 0xffff_ffff, 0, 0, 0];
    emit(control, Record { source: source::MADVISE, args, ..Record::default() });
}

// kprobe mode: a return probe has no arguments, so the entry keeps them.

#[inline(always)]
fn keep(function: u64, mm_at: u64, args: [u64; 3]) {
    let Some((control, mm)) = control() else { return };
    if mm_at == mm && CALLS.insert(&(current_id() | function), &args, 0).is_err() {
        lose(control, loss::CALLS_FULL);
    }
}

#[inline(always)]
fn kept(function: u64) -> Option<(*mut memckpt_ebpf::Control, [u64; 3])> {
    let (control, _) = control()?;
    let key = current_id() | function;
    let slot = CALLS.get_ptr(&key)?;
    // SAFETY: an element of a live map, used by this task only.
    let args = unsafe { *slot };
    let _ = CALLS.remove(&key);
    Some((control, args))
}

#[kprobe]
pub fn unmap_entry(ctx: ProbeContext) -> u32 {
    if let (Some(vma), Some(start), Some(end)) = (ctx.arg::<u64>(1), ctx.arg(2), ctx.arg(3)) {
        keep(UNMAP, probe_u64(vma, config(config::VMA_MM)), [start, end, 0]);
    }
    0
}

#[kretprobe]
pub fn unmap_done(_: RetProbeContext) -> u32 {
    if let Some((control, [start, end, _])) = kept(UNMAP) {
        mark_range(control, start, end);
        count(counter::ZAPS);
    }
    0
}

#[kprobe]
pub fn zap_entry(ctx: ProbeContext) -> u32 {
    if let (Some(vma), Some(start), Some(size)) = (ctx.arg::<u64>(0), ctx.arg::<u64>(1), ctx.arg::<u64>(2)) {
        keep(ZAP, probe_u64(vma, config(config::VMA_MM)), [start, start.wrapping_add(size), 0]);
    }
    0
}

#[kprobe]
pub fn zap_batched_entry(ctx: ProbeContext) -> u32 {
    if let (Some(vma), Some(start), Some(size)) = (ctx.arg::<u64>(1), ctx.arg::<u64>(2), ctx.arg::<u64>(3)) {
        keep(ZAP, probe_u64(vma, config(config::VMA_MM)), [start, start.wrapping_add(size), 0]);
    }
    0
}

#[kretprobe]
pub fn zap_done(_: RetProbeContext) -> u32 {
    if let Some((control, [start, end, _])) = kept(ZAP) {
        mark_range(control, start, end);
        count(counter::ZAPS);
    }
    0
}

/// At the entry: collapse_huge_page takes the mm write lock for the exchange itself, so a clear orders with it.
#[kprobe]
pub fn collapse_entry(ctx: ProbeContext) -> u32 {
    let Some((control, mm)) = control() else { return 0 };
    if let (Some(of), Some(address)) = (ctx.arg::<u64>(0), ctx.arg::<u64>(1))
        && of == mm
    {
        mark(control, address);
    }
    0
}

#[kprobe]
pub fn madvise_entry(ctx: ProbeContext) -> u32 {
    if let (Some(mm), Some(start), Some(len), Some(advice)) =
        (ctx.arg::<u64>(0), ctx.arg(1), ctx.arg(2), ctx.arg(3))
    {
        keep(MADVISE, mm, [start, len, advice]);
    }
    0
}

#[kretprobe]
pub fn madvise_done(_: RetProbeContext) -> u32 {
    if let Some((control, args)) = kept(MADVISE) {
        madvised(control, args);
    }
    0
}
