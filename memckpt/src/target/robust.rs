//! A lock that the kernel gives up for us when we die: how the parasite hears of our death without a descriptor.

use std::sync::atomic::{AtomicU32, Ordering, compiler_fence};

use crate::kernel::SyscallError;

const FUTEX_WAITERS: u32 = 0x8000_0000;

/// struct robust_list_head (include/uapi/linux/futex.h).
#[repr(C)]
struct Head {
    next: *mut u64,
    futex_offset: i64,
    pending: *mut u64,
}

/// Held by the calling thread until dropped. Meanwhile the thread's robust list is ours: glibc's, which only robust
/// pthread mutexes use, is put back afterwards.
pub(super) struct RobustLock {
    head: Box<Head>,
    lock: *const AtomicU32,
    theirs: (*mut libc::c_void, usize),
}

impl RobustLock {
    /// Takes `lock`, whose list node is `node`.
    ///
    /// # Safety
    /// Both must lie in memory that stays mapped until this is dropped, or until the process ends.
    pub(super) unsafe fn take(lock: *const AtomicU32, node: *mut u64) -> Result<Self, SyscallError> {
        let this_thread = || "this thread".to_owned();
        let (mut list, mut len) = (std::ptr::null_mut(), 0usize);
        // SAFETY: the kernel writes a pointer and a length.
        if unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut list, &raw mut len) } != 0 {
            return Err(SyscallError::last("get_robust_list", this_thread()));
        }
        let offset = lock.addr() as i64 - node.addr() as i64;
        let mut head = Box::new(Head { next: node, futex_offset: offset, pending: std::ptr::null_mut() });
        // SAFETY: gettid has no arguments; `node` and `lock` are valid by the caller's promise, and the boxed head
        // stays where it is until `drop` has taken it off again.
        let rc = unsafe {
            node.write((&raw mut *head).addr() as u64);
            (*lock).store(libc::gettid() as u32 | FUTEX_WAITERS, Ordering::SeqCst);
            libc::syscall(libc::SYS_set_robust_list, &raw mut *head, size_of::<Head>())
        };
        if rc != 0 {
            return Err(SyscallError::last("set_robust_list", this_thread()));
        }
        Ok(Self { head, lock, theirs: (list, len) })
    }

    /// Gives the lock up and wakes whoever waits for it: the parasite then goes home.
    pub(super) fn release(&mut self) {
        let head = &raw mut *self.head;
        // SAFETY: the head is ours and on this thread's list; the lock is mapped by the promise made to `take`.
        unsafe {
            // Killed between the store and the wake, the kernel wakes for a pending operation that left 0.
            (&raw mut (*head).pending).write_volatile((*head).next);
            compiler_fence(Ordering::SeqCst);
            (*self.lock).store(0, Ordering::SeqCst);
            wake(self.lock);
            (&raw mut (*head).next).write_volatile(head.cast());
            (&raw mut (*head).pending).write_volatile(std::ptr::null_mut());
        }
    }
}

impl Drop for RobustLock {
    fn drop(&mut self) {
        self.release();
        // SAFETY: what get_robust_list said before.
        unsafe { libc::syscall(libc::SYS_set_robust_list, self.theirs.0, self.theirs.1) };
    }
}

/// FUTEX_WAKE of one waiter, of any process.
pub(super) fn wake(word: *const AtomicU32) {
    // SAFETY: the address is only used to find waiters.
    unsafe { libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAKE, 1) };
}

/// FUTEX_WAIT for at most `micros`, while the word holds `value`.
pub(super) fn wait(word: &AtomicU32, value: u32, micros: i64) {
    let timeout = libc::timespec { tv_sec: micros / 1_000_000, tv_nsec: micros % 1_000_000 * 1000 };
    // SAFETY: reads the word and the timeout.
    unsafe {
        libc::syscall(libc::SYS_futex, std::ptr::from_ref(word), libc::FUTEX_WAIT, value, &raw const timeout)
    };
}
