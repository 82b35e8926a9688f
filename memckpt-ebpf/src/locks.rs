//! The target's mmap lock, from one end to the other: what was done under it is told when it is let go of.
//!
//! The lock is exclusive from the moment that it is taken for writing until it is let go of, even where it was turned
//! into a reader's in between (munmap and shrinking do, mmap_write_downgrade()). So what is noted under it needs room for
//! one task only, and no atomics:
//!
//! ```text
//! munmap                                     another
//! takes the lock as a writer: owner = self
//!   VMAs out of the tree
//! turns into a reader                        readers come in: the owner is not them
//!   pages dropped
//! lets go: owner is self: record             writers come in only now
//! ```
//! mmap_lock_released fires before the lock is free, so records reach the ring in the order of the locks, and each
//! after its change can be read.

use core::intrinsics::{AtomicOrdering, atomic_xadd};
use core::ptr::{read_volatile, write_volatile};

use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};
use memckpt_ebpf::{Control, Record, config, locked, source};

use crate::foreign;
use crate::maps::{config, control, current_id, current_task, emit, load_u64, probe_u64};
use crate::nr;
use crate::regs::{self, Abi, Who};

/// The current task has taken the lock as a writer. `mm`: the target's.
#[inline(always)]
pub fn taken(control: *mut Control, mm: *const u8) {
    // SAFETY: words of the control page; an mm_struct argument with an offset from BTF.
    unsafe {
        let before = atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(&raw mut (*control).generation, 1);
        write_volatile(&raw mut (*control).lock_number, before + 1);
        write_volatile(&raw mut (*control).lock_brk, load_u64(mm, config(config::MM_BRK)));
        write_volatile(&raw mut (*control).lock_area[0], 0);
        write_volatile(&raw mut (*control).lock_area[1], 0);
        write_volatile(&raw mut (*control).lock_owner, current_id());
    }
}

#[inline(always)]
fn is_owner(control: *mut Control) -> bool {
    // SAFETY: the control page.
    unsafe { read_volatile(&raw const (*control).lock_owner) == current_id() }
}

/// mmap_lock_released(mm, write).
#[btf_tracepoint]
pub fn lock_released(ctx: BtfTracePointContext) -> i32 {
    released(ctx.arg(0), ctx.arg::<u64>(1) & 0xff != 0);
    0
}

/// Older kernels (6.12): mmap_lock_released(mm, memcg_path, write). A program of its own, as for the taking.
#[btf_tracepoint]
pub fn lock_released_with_path(ctx: BtfTracePointContext) -> i32 {
    released(ctx.arg(0), ctx.arg::<u64>(2) & 0xff != 0);
    0
}

/// `write`: it is let go of as a writer.
#[inline(always)]
fn released(lock_of: u64, write: bool) {
    let Some((control, mm)) = control() else { return };
    if lock_of != mm {
        return;
    }
    let task = current_task();
    let mut lock = 0;
    if is_owner(control) {
        // SAFETY: words of the control page.
        unsafe {
            lock = read_volatile(&raw const (*control).lock_number);
            write_volatile(&raw mut (*control).lock_owner, 0);
        }
    }
    // SAFETY: current's task_struct, offset from BTF.
    let current = unsafe { load_u64(task, config(config::TASK_MM)) };
    if current == mm {
        own(control, task, mm, lock);
    } else if current != 0 {
        foreign::released(control, task, lock, write);
    }
}

/// A thread of the target lets go of the lock. `lock`: its number, 0 if it was taken for reading.
#[inline(always)]
fn own(control: *mut Control, task: *const u8, mm: u64, lock: u64) {
    // SAFETY: the control page.
    if unsafe { read_volatile(&raw const (*control).calls_by_lock) } == 0 || regs::who(task) != Who::Thread {
        return;
    }
    let regs = regs::saved();
    let (call, abi) = regs::number(task, regs);
    let args = regs::arguments(regs);
    let told = match abi {
        Abi::None => false,
        Abi::Compat | Abi::X32 => lock != 0,
        Abi::Native if lock != 0 => nr::is_layout_lock(call, &args),
        Abi::Native => nr::is_read_lock_call(call, args[0]),
    };
    if !told {
        return;
    }
    let native = abi == Abi::Native;
    let mut record = Record {
        source: if native { source::LOCKED } else { source::COMPAT_CALL },
        call: call as u32,
        flags: if regs::is_late(regs) { locked::LATE } else { 0 },
        args,
        lock,
        ..Record::default()
    };
    if lock != 0 {
        // SAFETY: words of the control page, ours until the lock is free.
        record.extra = unsafe {
            if native && call == nr::BRK {
                [read_volatile(&raw const (*control).lock_brk), probe_u64(mm, config(config::MM_BRK))]
            } else {
                [
                    read_volatile(&raw const (*control).lock_area[0]),
                    read_volatile(&raw const (*control).lock_area[1]),
                ]
            }
        };
    }
    emit(control, record);
}

/// vm_unmapped_area(address, info): where the kernel found a hole for a mapping, or an error. The mapping lies inside
/// that hole, but need not begin where it does (__thp_get_unmapped_area(), mm/huge_memory.c, asks for more and aligns).
#[btf_tracepoint]
pub fn area_found(ctx: BtfTracePointContext) -> i32 {
    const MAX_ERRNO: u64 = 4095;
    let Some((control, _)) = control() else { return 0 };
    let start: u64 = ctx.arg(0);
    if !is_owner(control) || start >= MAX_ERRNO.wrapping_neg() {
        return 0;
    }
    // SAFETY: a vm_unmapped_area_info argument with an offset from BTF; words of the control page, ours until the lock
    // is free.
    unsafe {
        let end = start.wrapping_add(load_u64(ctx.arg(1), config(config::AREA_LENGTH)));
        let low = &raw mut (*control).lock_area[0];
        let high = &raw mut (*control).lock_area[1];
        // Searched more than once: shmem_get_unmapped_area() does, and a search upwards after one downwards.
        let none = read_volatile(high) == 0;
        if none || start < read_volatile(low) {
            write_volatile(low, start);
        }
        if none || end > read_volatile(high) {
            write_volatile(high, end);
        }
    }
    0
}
