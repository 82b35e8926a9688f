//! Layout events: what a system call may have changed, told when it can be read.

use memckpt_ebpf::{Record, foreign, gone, locked, source};
use serde::{Deserialize, Serialize};

use crate::addr::{Addr, AddrRange, PAGE_SIZE};

/// Every address: what an event means of which no range is known.
pub const EVERYTHING: AddrRange = AddrRange::new(0, u64::MAX);

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// mmap, map_shadow_stack.
    Mmap,
    /// munmap.
    Munmap,
    /// mremap: moved pages may look clean although they lie elsewhere now.
    Mremap,
    /// brk.
    Brk,
    /// mprotect, pkey_mprotect.
    Mprotect,
    /// madvise by any route, with the advice. MADV_FREE leaves the range in doubt until it is written again.
    Madvise(i32),
    /// mlock and its kin, mbind, set_mempolicy_home_node, mseal, prctl(PR_SET_VMA): VMAs split or change flags.
    Flags,
    /// remap_file_pages: a non-linear mapping, emulated since Linux 4.0.
    RemapFilePages,
    /// shmat.
    Shmat,
    /// shmdt.
    Shmdt,
    /// io_setup: a new ring that the kernel writes.
    AioSetup,
    /// io_destroy.
    AioDestroy,
    /// io_uring_setup: the kernel may write on its own from now on.
    IoUringSetup,
    /// io_uring_register: buffers may be pinned.
    IoUringRegister,
    /// The target created a userfaultfd.
    Userfaultfd,
    /// prctl(PR_SET_MM), prctl(PR_SET_MEMORY_MERGE), arch_prctl(ARCH_SHSTK_*).
    Prctl,
    /// The target executed another program: its address space is another.
    Exec,
    /// The address space is gone.
    Exit,
    /// Somebody else may have written into the target: process_vm_writev, ptrace, `/proc/PID/mem`.
    ProcessVmWrite,
    /// Somebody else held the target's mmap lock as a writer while in write(2): `/proc/PID/clear_refs`, ours included.
    ClearRefs,
    /// A range of more than 4 GiB whose pages were dropped: too many chunks to mark.
    Zap,
    /// Anything may have changed.
    Unknown,
}

/// One event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayoutEvent {
    /// What happened.
    pub kind: EventKind,
    /// The thread group that made the call, in the initial PID namespace.
    pub tgid: u32,
    /// The system call's number; 0 where it is none.
    pub call: u32,
    /// The call's arguments; for [`EventKind::Brk`] the requested break, the old one and the new one.
    pub args: [u64; 6],
    /// The call's result: an address or a count, or a negative errno. 0 where it is told before it has one.
    pub result: i64,
    /// What the generation became by the write lock that the event tells of; 0: it tells of none.
    #[serde(default)]
    pub lock: u64,
    pub(super) range: Option<AddrRange>,
    /// Told at the mmap lock and not at the return: the result is not known.
    #[serde(default)]
    pub(super) by_lock: bool,
    /// By the lock of work that came after the call itself.
    #[serde(default)]
    late: bool,
    /// The hole that the kernel found for a mapping, under the lock that is told of.
    #[serde(default)]
    pub(super) area: Option<AddrRange>,
}

const SYS_WRITES: [i64; 5] =
    [libc::SYS_write, libc::SYS_writev, libc::SYS_pwrite64, libc::SYS_pwritev, libc::SYS_pwritev2];
/// Not in libc 0.2's table for every target: x86-64 numbers (syscall_64.tbl).
const SYS_MAP_SHADOW_STACK: i64 = 453;
const SYS_MSEAL: i64 = 462;
const SYS_SET_MEMPOLICY_HOME_NODE: i64 = 450;

impl LayoutEvent {
    /// Ranges whose layout or content identity may have changed, page-aligned. VMAs next to them may have been split
    /// or joined at the edge. A failed call counts as one that did part of its work. [`EVERYTHING`] where unknown.
    #[must_use]
    pub fn ranges(&self) -> Vec<AddrRange> {
        let [a0, a1, a2, a3, a4, _] = self.args;
        let given = |start: u64, len: u64| {
            let range = AddrRange::with_len(Addr(start), len).page_aligned();
            if range.is_empty() { vec![] } else { vec![range] }
        };
        let result = u64::try_from(self.result).ok();
        match self.kind {
            EventKind::Mmap | EventKind::Mremap if self.by_lock => self.ranges_by_lock(),
            EventKind::Mmap => match result {
                Some(at) => given(at, a1),
                // MAP_FIXED unmaps before it can fail.
                None if a3 & libc::MAP_FIXED as u64 != 0 => given(a0, a1),
                None => vec![],
            },
            EventKind::Munmap | EventKind::Mprotect | EventKind::Madvise(_) | EventKind::RemapFilePages => {
                given(a0, a1)
            }
            EventKind::Mremap => {
                let mut ranges = given(a0, a1);
                match result {
                    Some(at) => ranges.extend(given(at, a2)),
                    None if a3 & libc::MREMAP_FIXED as u64 != 0 => ranges.extend(given(a4, a2)),
                    None => {}
                }
                ranges
            }
            EventKind::Brk => {
                let (old, new) = (a1.min(a2), a1.max(a2));
                given(old & !(PAGE_SIZE - 1), new.saturating_sub(old & !(PAGE_SIZE - 1)))
            }
            EventKind::IoUringSetup
            | EventKind::IoUringRegister
            | EventKind::Userfaultfd
            | EventKind::ClearRefs => {
                vec![]
            }
            EventKind::Flags | EventKind::ProcessVmWrite | EventKind::Zap => {
                self.range.map_or_else(|| vec![EVERYTHING], |r| if r.is_empty() { vec![] } else { vec![r] })
            }
            EventKind::Shmat
            | EventKind::Shmdt
            | EventKind::AioSetup
            | EventKind::AioDestroy
            | EventKind::Prctl
            | EventKind::Exec
            | EventKind::Exit
            | EventKind::Unknown => vec![EVERYTHING],
        }
    }

    /// Whether the event tells of a lock of the call itself, which did what the call is for.
    #[must_use]
    pub fn is_of_the_call(&self) -> bool {
        !self.late
    }

    /// Reads a record of the ring. What it does not know becomes [`EventKind::Unknown`].
    pub(super) fn from_record(record: &Record) -> Self {
        let mut event = Self {
            kind: EventKind::Unknown,
            tgid: record.tgid,
            call: 0,
            args: record.args,
            result: record.result,
            lock: record.lock,
            range: None,
            by_lock: record.source == source::LOCKED,
            late: record.source == source::LOCKED && record.flags & locked::LATE != 0,
            area: None,
        };
        match record.source {
            source::CALL => event.set_call(record),
            source::LOCKED => {
                event.set_call(record);
                let area = AddrRange::new(record.extra[0], record.extra[1]).page_aligned();
                // brk's two ends are there instead.
                event.area = (event.kind != EventKind::Brk && !area.is_empty()).then_some(area);
            }
            source::ZAP => {
                event.kind = EventKind::Zap;
                event.range = Some(AddrRange::new(record.args[0], record.args[1]).page_aligned());
            }
            source::GONE => {
                event.kind = if record.call == gone::EXEC { EventKind::Exec } else { EventKind::Exit };
            }
            source::MADVISE => event.kind = EventKind::Madvise(record.args[2] as i32),
            source::FOREIGN => event.set_foreign(record),
            _ => {}
        }
        event
    }

    fn set_call(&mut self, record: &Record) {
        self.call = record.call;
        let [a0, a1, a2, ..] = record.args;
        self.kind = match i64::from(record.call) {
            libc::SYS_mmap => EventKind::Mmap,
            SYS_MAP_SHADOW_STACK => EventKind::Mmap,
            libc::SYS_munmap => EventKind::Munmap,
            libc::SYS_mremap => EventKind::Mremap,
            libc::SYS_brk => {
                self.args = [a0, record.extra[0], record.extra[1], 0, 0, 0];
                EventKind::Brk
            }
            libc::SYS_mprotect | libc::SYS_pkey_mprotect => EventKind::Mprotect,
            libc::SYS_madvise => EventKind::Madvise(a2 as i32),
            // The target's own: the vector is in its memory, which may have changed since.
            libc::SYS_process_madvise => EventKind::Unknown,
            libc::SYS_remap_file_pages => EventKind::RemapFilePages,
            libc::SYS_shmat => EventKind::Shmat,
            libc::SYS_shmdt => EventKind::Shmdt,
            libc::SYS_io_setup => EventKind::AioSetup,
            libc::SYS_io_destroy => EventKind::AioDestroy,
            libc::SYS_io_uring_setup => EventKind::IoUringSetup,
            libc::SYS_io_uring_register => EventKind::IoUringRegister,
            // At the lock, only UFFDIO_REGISTER is told of.
            libc::SYS_userfaultfd | libc::SYS_ioctl => EventKind::Userfaultfd,
            libc::SYS_mlock
            | libc::SYS_munlock
            | libc::SYS_mlock2
            | libc::SYS_mbind
            | SYS_MSEAL
            | SYS_SET_MEMPOLICY_HOME_NODE => {
                self.range = Some(AddrRange::with_len(Addr(a0), a1).page_aligned());
                EventKind::Flags
            }
            libc::SYS_mlockall | libc::SYS_munlockall => EventKind::Flags,
            libc::SYS_prctl if a0 == libc::PR_SET_VMA as u64 => {
                self.range = Some(AddrRange::with_len(Addr(a2), record.args[3]).page_aligned());
                EventKind::Flags
            }
            libc::SYS_prctl | libc::SYS_arch_prctl => EventKind::Prctl,
            _ => EventKind::Unknown,
        };
    }

    fn set_foreign(&mut self, record: &Record) {
        self.call = record.call;
        let call = i64::from(record.call);
        let [_, _, a2, a3, ..] = record.args;
        let wrote_lock = record.flags & foreign::WRITE != 0;
        // The lock of a write to `/proc/PID/mem` that made the stack grow ends as a reader's (expand_stack(),
        // mm/mmap.c); clear_refs keeps it to the end (clear_refs_write(), fs/proc/task_mmu.c).
        let as_reader = record.flags & foreign::READ != 0;
        self.kind = match call {
            libc::SYS_process_vm_writev | libc::SYS_ptrace => EventKind::ProcessVmWrite,
            // With /proc/PID/mem as its file.
            libc::SYS_io_uring_enter if as_reader => EventKind::ProcessVmWrite,
            _ if !SYS_WRITES.contains(&call) => EventKind::Unknown,
            _ if wrote_lock && !as_reader => EventKind::ClearRefs,
            _ => EventKind::ProcessVmWrite,
        };
        let exact = match call {
            _ if record.flags & foreign::ODD != 0 => None,
            libc::SYS_process_vm_writev if record.flags & foreign::IOVEC != 0 => {
                Some((record.extra[0], record.extra[1]))
            }
            // PTRACE_POKEDATA and _POKETEXT write a word; the other requests write registers or nothing.
            libc::SYS_ptrace => match record.args[0] {
                4 | 5 => Some((a2, 8)),
                _ => Some((0, 0)),
            },
            // pwrite64(fd, buffer, count, offset): the offset in /proc/PID/mem is the address.
            libc::SYS_pwrite64 => Some((a3, a2)),
            _ => None,
        };
        self.range = exact.map(|(start, len)| AddrRange::with_len(Addr(start), len).page_aligned());
    }
}
