//! The memory layouts that memckpt's BPF programs share with user space.
//!
//! The programs decide nothing: they set bits, count, and copy facts into records.
#![no_std]

/// log2 of the bytes in a chunk: what one page-table page maps.
pub const CHUNK_SHIFT: u32 = 21;
/// log2 of the bytes that one 64-bit word of chunk bits covers (128 MiB).
pub const WORD_SHIFT: u32 = CHUNK_SHIFT + 6;
/// log2 of the bytes that one summary bit covers (1 GiB).
pub const SUMMARY_SHIFT: u32 = 30;
/// Bits of a user address with 4-level page tables. Higher addresses are counted as lost.
pub const ADDRESS_BITS: u32 = 47;
/// Words of chunk bits in one buffer (8 MiB).
pub const WORDS: u32 = 1 << (ADDRESS_BITS - WORD_SHIFT);
/// Words of summary bits in one buffer (16 KiB).
pub const SUMMARY_WORDS: u32 = 1 << (ADDRESS_BITS - SUMMARY_SHIFT - 6);
/// Words of chunk bits under one summary bit.
pub const WORDS_PER_SUMMARY_BIT: u32 = 1 << (SUMMARY_SHIFT - WORD_SHIFT);
/// Fault buffers: one is written while the other is read.
pub const BUFFERS: u32 = 2;
/// A range of more words than this (4 GiB) is reported through the ring instead of bit by bit: the verifier walks
/// through every round of the loop.
pub const MAX_RANGE_WORDS: u64 = 32;
/// Bytes of the event ring unless user space asks for another size.
pub const RING_BYTES: u32 = 1 << 20;
/// Calls of probed functions that can be under way at once, in kprobe mode.
pub const MAX_CALLS: u32 = 4096;
/// Foreign tasks whose last process_vm_writev may be under way at once.
pub const MAX_WRITERS: u32 = 4096;

/// Indices into the read-only `CONFIG` array, filled in from the kernel's BTF before the load.
pub mod config {
    /// Offset of `task_struct.mm`.
    pub const TASK_MM: usize = 0;
    /// Offset of `task_struct.tgid`.
    pub const TASK_TGID: usize = 1;
    /// Offset of `task_struct.thread_info.status`, which holds TS_COMPAT.
    pub const TASK_STATUS: usize = 2;
    /// Offset of `vm_area_struct.vm_mm`.
    pub const VMA_MM: usize = 3;
    /// Offset of `mm_struct.brk`.
    pub const MM_BRK: usize = 4;
    /// Offset of `mm_struct.mm_mt`.
    pub const MM_TREE: usize = 5;
    /// Offset of `ma_state.tree`.
    pub const MAS_TREE: usize = 6;
    /// Offset of `mm_struct.owner`, or [`ABSENT`].
    pub const MM_OWNER: usize = 7;
    /// Offset of `mm_struct.flags`.
    pub const MM_FLAGS: usize = 8;
    /// Offset of `task_struct.flags`.
    pub const TASK_FLAGS: usize = 9;
    /// Offset of `vm_unmapped_area_info.length`.
    pub const AREA_LENGTH: usize = 10;
    /// How many there are.
    pub const LEN: usize = 11;
    /// The kernel has no such member.
    pub const ABSENT: u32 = u32::MAX;
}

/// Indices into the per-CPU `COUNTERS` array. Statistics only: an update may be lost to preemption.
pub mod counter {
    /// Faults of the target seen.
    pub const FAULTS: u32 = 0;
    /// Ranges of the target that were zapped.
    pub const ZAPS: u32 = 1;
    /// Records written to the ring.
    pub const EVENTS: u32 = 2;
    /// How many there are.
    pub const LEN: u32 = 3;
}

/// Indices into [`Control::losses`]. Each is incremented atomically.
pub mod loss {
    /// Records that found the ring full.
    pub const RING_FULL: usize = 0;
    /// Addresses at or above 2^47.
    pub const HIGH_ADDRESS: usize = 1;
    /// Marks given up on because buffers flipped under them again and again.
    pub const FLIP: usize = 2;
    /// Calls that found the map of calls under way full.
    pub const CALLS_FULL: usize = 3;
    /// Huge-page collapses seen without their address.
    pub const COLLAPSE: usize = 4;
    /// Foreign writes that found the map of those under way full.
    pub const WRITERS_FULL: usize = 5;
    /// How many there are.
    pub const LEN: usize = 6;
}

/// The page that steers the programs, mapped by user space.
///
/// What programs only read, what they write often and what they write seldom lie in different cache lines.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Control {
    /// The target's `mm_struct`; 0 switches every program off. Cleared by the programs when the mm ends.
    pub target_mm: u64,
    /// The buffer, 0 or 1, that faults are written to.
    pub active: u64,
    /// The target's thread group in the initial PID namespace; 0 if unknown.
    pub target_tgid: u64,
    /// Not 0 once the mm is gone: see [`gone`].
    pub gone: u64,
    /// Not 0: the target's layout calls are told when they let go of the mmap lock, and not when they return.
    pub calls_by_lock: u64,
    /// `mm->brk` after the last brk call.
    pub last_brk: u64,
    /// Thread ID, in the namespace of `capture_ns`, of the thread that captures an mm; 0: no capture under way.
    pub capture_tid: u64,
    /// Padding.
    pub pad0: u64,

    /// Moves whenever the layout may be about to change.
    pub generation: u64,
    /// The task that took the mmap lock as a writer and still holds it, be it as a reader; 0: none that is known.
    /// This and what follows belongs to that one task, as the lock does.
    pub lock_owner: u64,
    /// What `generation` became by that.
    pub lock_number: u64,
    /// `mm->brk` then.
    pub lock_brk: u64,
    /// Where the kernel found room for a mapping under this lock: a range around all the places it looked up; 0, 0: it
    /// did not look.
    pub lock_area: [u64; 2],
    /// Padding.
    pub pad1: [u64; 2],

    /// Programs that are writing into each buffer right now, each in a line of its own.
    pub writers: [Line; BUFFERS as usize],

    /// See [`loss`].
    pub losses: [u64; loss::LEN],
    /// Padding.
    pub pad2: [u64; 2],

    /// The PID namespace (st_dev and st_ino of /proc/self/ns/pid) of the thread that captures an mm.
    pub capture_ns: [u64; 2],
    /// The `mm_struct` that this thread last took the lock of, its own left out unless it has no other.
    pub captured_mm: u64,
    /// That mm's owner's thread group in the initial PID namespace, or 0.
    pub captured_tgid: u64,
    /// That mm's brk.
    pub captured_brk: u64,
    /// Not 0: capture the thread's own mm rather than another.
    pub capture_own: u64,
    /// The first word of that mm's flags.
    pub captured_flags: u64,
    /// Padding.
    pub pad3: u64,

    /// Not 0: the address of a pt_regs, that the thread which captures wants to see.
    pub peek_at: u64,
    /// What is there, or only ones where nothing is mapped.
    pub peeked: Call,
    /// Padding.
    pub pad4: [u64; 7],
}

/// A system call as the task's saved registers have it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// orig_ax.
    pub number: u64,
    /// rdi, rsi, rdx, r10, r8, r9.
    pub args: [u64; 6],
    /// ax: -ENOSYS until the call's function has returned, its result from then on.
    pub result: u64,
}

/// A process_vm_writev whose copy may come after it let go of the target's lock.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Writer {
    /// Where the kernel keeps the registers of the task that made the call, as long as that task lives.
    pub regs: u64,
    /// What they say while it is in the call.
    pub call: Call,
    /// Where it writes to; up to [`u64::MAX`] where that is not known.
    pub start: u64,
    /// How much.
    pub len: u64,
}

/// One counter in a cache line of its own.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Line {
    /// The counter.
    pub value: u64,
    /// Padding.
    pub pad: [u64; 7],
}

/// Values of [`Control::gone`] and of a [`source::GONE`] record's `call`.
pub mod gone {
    /// The target executed another program.
    pub const EXEC: u32 = 1;
    /// The address space was torn down.
    pub const EXIT: u32 = 2;
}

/// Values of [`Record::source`].
pub mod source {
    /// A system call of the target returned; `call` is its number.
    pub const CALL: u32 = 1;
    /// A 32-bit system call of the target returned: `call` and `args` mean something else.
    pub const COMPAT_CALL: u32 = 2;
    /// More than [`super::MAX_RANGE_WORDS`] words of pages were dropped: `args[0]` up to `args[1]`.
    pub const ZAP: u32 = 3;
    /// The mm is gone; `call` is one of [`super::gone`].
    pub const GONE: u32 = 4;
    /// A foreign task lets go of the target's mmap lock in system call `call` (by its 64-bit number).
    pub const FOREIGN: u32 = 5;
    /// do_madvise returned, from whatever caller: start, length, advice.
    pub const MADVISE: u32 = 6;
    /// The target lets go of its mmap lock in system call `call`: it is done with what the lock was for, and how it
    /// will end is not known. `extra`: see [`super::Control::lock_area`].
    pub const LOCKED: u32 = 7;
}

/// Bits of a [`source::LOCKED`] record's `flags`.
pub mod locked {
    /// The call itself was over: the lock is that of work on the way back to user mode (signals, closed files).
    pub const LATE: u32 = 1;
}

/// Bits of a [`source::FOREIGN`] record's `flags`.
pub mod foreign {
    /// The task lets go of the lock as a reader.
    pub const READ: u32 = 1;
    /// The task took the lock as a writer.
    pub const WRITE: u32 = 2;
    /// `extra` holds the one remote iovec: base and length.
    pub const IOVEC: u32 = 4;
    /// The arguments are not those of the 64-bit call.
    pub const ODD: u32 = 8;
}

/// What the ring carries.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// One of [`source`].
    pub source: u32,
    /// Meaning given by `source`.
    pub call: u32,
    /// Thread group of the task that ran, in the initial PID namespace.
    pub tgid: u32,
    /// That task, in the initial PID namespace.
    pub tid: u32,
    /// Meaning given by `source`.
    pub flags: u32,
    /// Padding.
    pub pad: u32,
    /// The call's arguments.
    pub args: [u64; 6],
    /// The call's result.
    pub result: i64,
    /// brk: `mm->brk` before and after. FOREIGN: see [`foreign::IOVEC`].
    pub extra: [u64; 2],
    /// What [`Control::generation`] became when the lock was taken that the record is about; 0: it is about none, or
    /// about one taken for reading.
    pub lock: u64,
}

const _: () = {
    assert!(size_of::<Control>() == 8 * 64);
    assert!(core::mem::offset_of!(Control, generation) == 64);
    assert!(core::mem::offset_of!(Control, writers) == 2 * 64);
    assert!(core::mem::offset_of!(Control, losses) == 4 * 64);
    assert!(core::mem::offset_of!(Control, capture_ns) == 5 * 64);
    assert!(core::mem::offset_of!(Control, peek_at) == 6 * 64);
    assert!(size_of::<Control>() <= 4096);
    assert!(size_of::<Record>() == 104);
    assert!(size_of::<Writer>() == 88);
    assert!(WORDS == 1 << 20 && SUMMARY_WORDS == 1 << 11 && WORDS_PER_SUMMARY_BIT == 8);
};
