//! The touched-chunk bitmaps and the control page, shared with the BPF programs by mmap.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use memckpt_ebpf::{Control, SUMMARY_WORDS, WORDS, WORDS_PER_SUMMARY_BIT};

use crate::addr::Chunk;
use crate::kernel::SyscallError;

/// A BPF array of 64-bit words, mapped.
#[derive(Debug)]
pub(super) struct Words {
    at: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: shared memory that is only ever accessed through atomics.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// Maps the first `len` words of the array behind `fd` (BPF_F_MMAPABLE, Linux 5.5).
    pub(super) fn map(fd: BorrowedFd<'_>, len: usize, name: &str) -> Result<Self, SyscallError> {
        // SAFETY: a new shared mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len * 8,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(at.cast::<AtomicU64>()) {
            Some(at) if at.as_ptr().cast() != libc::MAP_FAILED => Ok(Self { at, len }),
            _ => Err(SyscallError::last("mmap", format!("BPF map {name}"))),
        }
    }

    /// Word number `index`. Panics beyond the end, as a slice would: indices are ours.
    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.len, "word {index} of {}", self.len);
        // SAFETY: inside the mapping, which lives as long as `self`; aligned, as the mapping is to a page.
        unsafe { &*self.at.as_ptr().add(index) }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: our own mapping; no reference outlives `self`.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len * 8) };
    }
}

/// The control page.
#[derive(Debug)]
pub(super) struct ControlPage(Words);

macro_rules! field {
    ($name:ident) => {
        pub(super) fn $name(&self) -> &AtomicU64 {
            self.0.word(std::mem::offset_of!(Control, $name) / 8)
        }
    };
}

impl ControlPage {
    pub(super) fn map(fd: BorrowedFd<'_>) -> Result<Self, SyscallError> {
        Words::map(fd, size_of::<Control>() / 8, "CONTROL").map(Self)
    }

    field!(target_mm);
    field!(target_tgid);
    field!(active);
    field!(gone);
    field!(last_brk);
    field!(generation);
    field!(capture_tid);
    field!(captured_mm);
    field!(captured_tgid);
    field!(captured_brk);
    field!(captured_flags);
    field!(capture_own);
    field!(calls_by_lock);
    field!(lock_owner);
    field!(peek_at);

    pub(super) fn capture_ns(&self, index: usize) -> &AtomicU64 {
        self.0.word(std::mem::offset_of!(Control, capture_ns) / 8 + index)
    }

    /// Word number `index` of what was peeked.
    pub(super) fn peeked(&self, index: usize) -> &AtomicU64 {
        self.0.word(std::mem::offset_of!(Control, peeked) / 8 + index)
    }

    pub(super) fn loss(&self, kind: usize) -> u64 {
        self.0.word(std::mem::offset_of!(Control, losses) / 8 + kind).load(Ordering::SeqCst)
    }

    fn writers(&self, buffer: u32) -> &AtomicU64 {
        self.0.word(std::mem::offset_of!(Control, writers) / 8 + buffer as usize * 8)
    }

    /// Makes the other buffer the active one and waits until no program writes this one any more.
    ///
    /// `memckpt-ebpf/src/mark.rs` has the protocol. False: programs were still writing after `limit`, which only
    /// starvation explains; the caller must count the epoch as lost.
    pub(super) fn flip(&self, limit: Duration) -> bool {
        let old = (self.active().load(Ordering::SeqCst) & 1) as u32;
        // SeqCst: the store comes before the load of writers, as their increment comes before their load of active.
        self.active().store(u64::from(old ^ 1), Ordering::SeqCst);
        let start = Instant::now();
        while self.writers(old).load(Ordering::SeqCst) != 0 {
            if start.elapsed() > limit {
                return false;
            }
            // A program can be preempted, by us too.
            std::thread::yield_now();
        }
        true
    }
}

/// Which of the two buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buffer {
    /// The one that faults go to now.
    Current,
    /// The one before the last flip: final.
    Previous,
}

/// Both buffers.
#[derive(Debug)]
pub(super) struct Bitmaps {
    chunks: Words,
    summary: Words,
}

impl Bitmaps {
    pub(super) fn map(chunks: BorrowedFd<'_>, summary: BorrowedFd<'_>) -> Result<Self, SyscallError> {
        Ok(Self {
            chunks: Words::map(chunks, 2 * WORDS as usize, "TOUCHED")?,
            summary: Words::map(summary, 2 * SUMMARY_WORDS as usize, "SUMMARY")?,
        })
    }

    /// Calls `f` with the number and the content of each word of `buffer` under a summary bit.
    fn for_each_word(&self, buffer: u32, mut f: impl FnMut(u32, &AtomicU64)) {
        for i in 0..SUMMARY_WORDS {
            let mut bits = self.summary.word((buffer * SUMMARY_WORDS + i) as usize).load(Ordering::SeqCst);
            while bits != 0 {
                let gib = i * 64 + bits.trailing_zeros();
                bits &= bits - 1;
                for word in gib * WORDS_PER_SUMMARY_BIT..(gib + 1) * WORDS_PER_SUMMARY_BIT {
                    f(word, self.chunks.word((buffer * WORDS + word) as usize));
                }
            }
        }
    }

    /// The chunks marked in `buffer`, in order.
    pub(super) fn touched(&self, buffer: u32) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        self.for_each_word(buffer, |word, value| {
            let mut bits = value.load(Ordering::SeqCst);
            while bits != 0 {
                chunks.push(Chunk(word * 64 + bits.trailing_zeros()));
                bits &= bits - 1;
            }
        });
        chunks
    }

    /// How many chunks are marked in `buffer`.
    pub(super) fn count(&self, buffer: u32) -> u64 {
        let mut count = 0;
        self.for_each_word(buffer, |_, value| {
            count += u64::from(value.load(Ordering::Relaxed).count_ones());
        });
        count
    }

    /// Marks `chunk` in `buffer`, summary first: whoever sees the bit sees the summary.
    pub(super) fn set(&self, buffer: u32, chunk: Chunk) {
        let word = chunk.0 / 64;
        if word >= WORDS {
            return;
        }
        let gib = word / WORDS_PER_SUMMARY_BIT;
        self.summary
            .word((buffer * SUMMARY_WORDS + gib / 64) as usize)
            .fetch_or(1 << (gib % 64), Ordering::SeqCst);
        self.chunks.word((buffer * WORDS + word) as usize).fetch_or(1 << (chunk.0 % 64), Ordering::SeqCst);
    }

    /// Clears `buffer`, which no program may be writing.
    pub(super) fn clear(&self, buffer: u32) {
        self.for_each_word(buffer, |_, value| value.store(0, Ordering::SeqCst));
        for i in 0..SUMMARY_WORDS {
            self.summary.word((buffer * SUMMARY_WORDS + i) as usize).store(0, Ordering::SeqCst);
        }
    }
}
