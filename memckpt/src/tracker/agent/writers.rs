//! process_vm_writev calls that may not be over: what they copy may land after they let go of the target's lock, and so
//! after a checkpoint's scan.
//!
//! ```text
//! writer                                   this session
//! process_vm_writev: pins, takes a note
//!                                          collect: the call is not over
//!                                          scan, clear, dump
//! copies
//!                                          commit: its range is written in the next epoch too
//!                                          next collect: the call is over, and before this scan: forgotten
//! ```
//! Whether it is over is told by the registers that its task came into the kernel with: they say the same until the
//! call's function has returned, and its result takes the place of ax (do_syscall_64(), arch/x86/entry/common.c). PIDs
//! and their namespaces do not matter. A task that came back with the very same call counts as still in the old one; once it
//! is dead, its stack may be gone or another task's, which in no case hides a call under way.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use aya::maps::{HashMap, MapData};
use memckpt_ebpf::{Call, MAX_WRITERS, Writer};

use super::bitmap::ControlPage;
use super::events::EVERYTHING;
use super::sys;
use crate::addr::{Addr, AddrRange};
use crate::kernel::SyscallError;

const WORDS: usize = size_of::<Writer>() / 8;
const CALL_WORDS: usize = size_of::<Call>() / 8;

/// A `Writer` as plain words.
type Note = [u64; WORDS];

pub(super) struct Writers {
    map: HashMap<MapData, u64, Note>,
    /// The same map.
    fd: OwnedFd,
    /// Notes taken out of the map whose calls were not over.
    open: Vec<Note>,
    /// Reading it makes the program run that looks at registers for us: `/proc/self/pagemap`, which takes our own mmap
    /// lock; or, where that is not hooked, `/proc/self/mem`, which asks for our own pages.
    trigger: File,
    /// It can no longer be told who writes.
    blind: bool,
}

impl Writers {
    pub(super) fn new(
        map: HashMap<MapData, u64, Note>,
        fd: OwnedFd,
        lock_is_hooked: bool,
    ) -> Result<Self, SyscallError> {
        let path = if lock_is_hooked { "/proc/self/pagemap" } else { "/proc/self/mem" };
        let trigger = File::open(path).map_err(|e| SyscallError::new("open", path, e))?;
        Ok(Self { map, fd, open: Vec::new(), trigger, blind: false })
    }

    /// Ranges that calls seen so far may still be writing. `lost`: notes could not be taken.
    pub(super) fn ranges(&mut self, control: &ControlPage, lost: bool) -> Vec<AddrRange> {
        self.blind |= lost || self.take_notes().is_err();
        if self.blind {
            // For good: which calls were missed, and how long they take, is not known.
            return vec![EVERYTHING];
        }
        let trigger = &self.trigger;
        self.open.retain(|note| may_be_under_way(control, trigger, note));
        self.open.iter().map(range).collect()
    }

    /// First out of the map, then the question whether it is over: what begins in between makes a new note.
    fn take_notes(&mut self) -> std::io::Result<()> {
        // Insertions by programs may confuse the order of keys; they come with records of their own, later than ours.
        let keys: Result<Vec<u64>, _> = self.map.keys().take(2 * MAX_WRITERS as usize).collect();
        for key in keys.map_err(std::io::Error::other)? {
            if let Some(note) = sys::take(self.fd.as_fd(), key)?
                && !self.open.contains(&note)
            {
                self.open.push(note);
            }
        }
        Ok(())
    }
}

fn range(note: &Note) -> AddrRange {
    let [.., start, len] = *note;
    AddrRange::with_len(Addr(start), len).page_aligned()
}

fn may_be_under_way(control: &ControlPage, trigger: &File, note: &Note) -> bool {
    // Unless the program says otherwise.
    for (index, word) in note[1..=CALL_WORDS].iter().enumerate() {
        control.peeked(index).store(*word, Ordering::SeqCst);
    }
    control.peek_at().store(note[0], Ordering::SeqCst);
    // SAFETY: gettid has no preconditions.
    let tid = unsafe { libc::gettid() };
    control.capture_tid().store(tid as u64, Ordering::SeqCst);
    // Its result does not matter: the lock is taken, and pages are asked for, at any address (pagemap_read,
    // fs/proc/task_mmu.c; __access_remote_vm, mm/memory.c).
    let _ = trigger.read_at(&mut [0; 8], 0);
    control.capture_tid().store(0, Ordering::SeqCst);
    control.peek_at().store(0, Ordering::SeqCst);
    (0..CALL_WORDS).all(|index| control.peeked(index).load(Ordering::SeqCst) == note[1 + index])
}
