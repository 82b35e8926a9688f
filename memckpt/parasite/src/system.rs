//! System calls, and what would otherwise be calls of libcore.

use core::arch::asm;

/// x86-64 system call numbers.
pub(crate) mod nr {
    pub(crate) const CLOSE: u64 = 3;
    pub(crate) const MUNMAP: u64 = 11;
    pub(crate) const RT_SIGACTION: u64 = 13;
    pub(crate) const RT_SIGPROCMASK: u64 = 14;
    pub(crate) const MADVISE: u64 = 28;
    pub(crate) const SHMCTL: u64 = 31;
    pub(crate) const RT_SIGPENDING: u64 = 127;
    pub(crate) const FUTEX: u64 = 202;
    pub(crate) const VMSPLICE: u64 = 278;
    pub(crate) const PIPE2: u64 = 293;
    pub(crate) const USERFAULTFD: u64 = 323;
}

pub(crate) const EINTR: i64 = 4;
pub(crate) const EINVAL: i64 = 22;
pub(crate) const FUTEX_WAIT: u64 = 0;
pub(crate) const FUTEX_WAKE: u64 = 1;
pub(crate) const O_CLOEXEC: u64 = 0o2_000_000;
pub(crate) const SPLICE_F_NONBLOCK: u64 = 2;
pub(crate) const UFFD_USER_MODE_ONLY: u64 = 1;
const SIG_SETMASK: u64 = 2;

/// A system call; errors come as negative numbers.
pub(crate) unsafe fn syscall(number: u64, a: [u64; 6]) -> i64 {
    let result: i64;
    // SAFETY: the caller's business; rcx and r11 are all that the instruction itself destroys.
    unsafe {
        asm!("syscall", inlateout("rax") number as i64 => result, in("rdi") a[0], in("rsi") a[1], in("rdx") a[2],
             in("r10") a[3], in("r8") a[4], in("r9") a[5], lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// Blocks every signal that can be blocked.
pub(crate) fn block_signals() {
    set_signal_mask(u64::MAX);
}

/// Sets the thread's signal mask.
pub(crate) fn set_signal_mask(mask: u64) {
    // SAFETY: reads eight bytes of `mask`.
    unsafe {
        syscall(nr::RT_SIGPROCMASK, [SIG_SETMASK, (&raw const mask) as u64, 0, 8, 0, 0]);
    }
}

/// Copies. An instruction, since a call would go through a global offset table.
pub(crate) unsafe fn copy(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: the caller's promise of `len` bytes at both.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _,
             options(nostack, preserves_flags));
    }
}

/// Fills with zeroes.
pub(crate) unsafe fn zero(to: *mut u8, len: usize) {
    // SAFETY: the caller's promise of `len` bytes.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("al") 0u8,
             options(nostack, preserves_flags));
    }
}
