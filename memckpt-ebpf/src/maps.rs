//! The maps, the configuration and the primitives on them.

use core::intrinsics::{AtomicOrdering, atomic_xadd};
use core::ptr::read_volatile;

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE,
    helpers::{
        bpf_get_current_pid_tgid, bpf_probe_read_kernel,
        generated::{bpf_get_current_task, bpf_get_current_task_btf},
    },
    macros::map,
    maps::{Array, HashMap, PerCpuArray, RingBuf},
};
use memckpt_ebpf::{
    BUFFERS, Control, MAX_CALLS, MAX_WRITERS, RING_BYTES, Record, SUMMARY_WORDS, WORDS, Writer, config,
    counter, loss,
};

/// Offsets into kernel structures. User space overwrites it, aya freezes it, the verifier sees constants.
#[unsafe(no_mangle)]
static CONFIG: [u32; config::LEN] = [0; config::LEN];

#[map]
pub static CONTROL: Array<Control> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// One bit a chunk, both buffers behind one another.
#[map]
pub static TOUCHED: Array<u64> = Array::with_max_entries(BUFFERS * WORDS, BPF_F_MMAPABLE);
/// One bit a GiB that has a bit in `TOUCHED`.
#[map]
pub static SUMMARY: Array<u64> = Array::with_max_entries(BUFFERS * SUMMARY_WORDS, BPF_F_MMAPABLE);
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(counter::LEN, 0);
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(RING_BYTES, 0);
/// kprobe mode: the arguments of a call, by task and function, for the probe at its return.
#[map]
pub static CALLS: HashMap<u64, [u64; 3]> = HashMap::with_max_entries(MAX_CALLS, 0);
/// The last process_vm_writev of each foreign task that made one. User space takes them out.
#[map]
pub static WRITERS: HashMap<u64, Writer> = HashMap::with_max_entries(MAX_WRITERS, 0);

#[inline(always)]
pub fn config(index: usize) -> usize {
    // SAFETY: a read of a live static; volatile because the loader changes it behind the compiler's back.
    unsafe { read_volatile(&raw const CONFIG[index]) as usize }
}

/// The target's mm and the control page, while there is a target.
#[inline(always)]
pub fn control() -> Option<(*mut Control, u64)> {
    let control = CONTROL.get_ptr_mut(0)?;
    // SAFETY: an array's only element, which lives as long as the programs.
    let mm = unsafe { read_volatile(&raw const (*control).target_mm) };
    if mm == 0 { None } else { Some((control, mm)) }
}

/// Loads the u64 at `base + offset` of a pointer that the verifier knows to be a kernel structure.
///
/// The kernel turns a fault of such a load into 0.
///
/// # Safety
/// `base` must come from a BTF-typed argument or bpf_get_current_task_btf and `offset` from BTF.
#[inline(always)]
pub unsafe fn load_u64(base: *const u8, offset: usize) -> u64 {
    // SAFETY: as the caller promises; the verifier checks it again.
    unsafe { read_volatile(base.add(offset).cast()) }
}

/// Loads the u32 at `base + offset`.
///
/// # Safety
/// As for [`load_u64`].
#[inline(always)]
pub unsafe fn load_u32(base: *const u8, offset: usize) -> u32 {
    // SAFETY: as the caller promises; the verifier checks it again.
    unsafe { read_volatile(base.add(offset).cast()) }
}

/// Reads kernel memory that the verifier has no type for; 0 where that faults.
#[inline(always)]
pub fn probe_u64(base: u64, offset: usize) -> u64 {
    // SAFETY: bpf_probe_read_kernel checks the address.
    unsafe { bpf_probe_read_kernel((base as *const u8).wrapping_add(offset).cast()).unwrap_or(0) }
}

/// As [`probe_u64`], four bytes.
#[inline(always)]
pub fn probe_u32(base: u64, offset: usize) -> u32 {
    // SAFETY: bpf_probe_read_kernel checks the address.
    unsafe { bpf_probe_read_kernel((base as *const u8).wrapping_add(offset).cast()).unwrap_or(0) }
}

#[inline(always)]
pub fn current_task() -> *const u8 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_get_current_task_btf() as *const u8 }
}

/// The current task as a key.
#[inline(always)]
pub fn current_id() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_get_current_task() }
}

#[inline(always)]
pub fn current_mm() -> u64 {
    // SAFETY: current's own task_struct, offset from BTF.
    unsafe { load_u64(current_task(), config(config::TASK_MM)) }
}

#[inline(always)]
pub fn count(index: u32) {
    if let Some(slot) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: this CPU's slot of a live map. An increment lost to preemption is only a statistic.
        unsafe { *slot += 1 };
    }
}

#[inline(always)]
pub fn lose(control: *mut Control, kind: usize) {
    // SAFETY: the control page; atomic, as other CPUs and user space use it too.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(&raw mut (*control).losses[kind], 1) };
}

#[inline(always)]
pub fn bump(word: *mut u64) {
    // SAFETY: callers pass a word of the control page.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(word, 1) };
}

#[inline(always)]
pub fn unbump(word: *mut u64) {
    // SAFETY: callers pass a word of the control page.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(word, u64::MAX) };
}

#[inline(always)]
pub fn emit(control: *mut Control, mut record: Record) {
    let id = bpf_get_current_pid_tgid();
    record.tgid = (id >> 32) as u32;
    record.tid = id as u32;
    if let Some(mut entry) = EVENTS.reserve::<Record>(0) {
        entry.write(record);
        entry.submit(0);
        count(counter::EVENTS);
    } else {
        lose(control, loss::RING_FULL);
    }
}
