//! x86-64 system call numbers (arch/x86/entry/syscalls/syscall_64.tbl), and which of them are of interest.

pub const WRITE: u64 = 1;
pub const MMAP: u64 = 9;
pub const MPROTECT: u64 = 10;
pub const MUNMAP: u64 = 11;
pub const BRK: u64 = 12;
pub const IOCTL: u64 = 16;
pub const PWRITE64: u64 = 18;
pub const WRITEV: u64 = 20;
pub const MREMAP: u64 = 25;
pub const MADVISE: u64 = 28;
pub const SHMAT: u64 = 30;
pub const SHMDT: u64 = 67;
pub const PTRACE: u64 = 101;
pub const MLOCK: u64 = 149;
pub const MUNLOCK: u64 = 150;
pub const MLOCKALL: u64 = 151;
pub const MUNLOCKALL: u64 = 152;
pub const PRCTL: u64 = 157;
pub const ARCH_PRCTL: u64 = 158;
pub const IO_SETUP: u64 = 206;
pub const IO_DESTROY: u64 = 207;
pub const REMAP_FILE_PAGES: u64 = 216;
pub const MBIND: u64 = 237;
pub const PWRITEV: u64 = 296;
pub const PROCESS_VM_WRITEV: u64 = 311;
pub const USERFAULTFD: u64 = 323;
pub const MLOCK2: u64 = 325;
pub const PWRITEV2: u64 = 328;
pub const PKEY_MPROTECT: u64 = 329;
pub const IO_URING_SETUP: u64 = 425;
pub const IO_URING_ENTER: u64 = 426;
pub const IO_URING_REGISTER: u64 = 427;
pub const PROCESS_MADVISE: u64 = 440;
pub const SET_MEMPOLICY_HOME_NODE: u64 = 450;
pub const MAP_SHADOW_STACK: u64 = 453;
pub const MSEAL: u64 = 462;

/// prctl options (linux/prctl.h).
const PR_SET_MM: u64 = 35;
const PR_SET_MEMORY_MERGE: u64 = 67;
const PR_SET_VMA: u64 = 0x5356_4d41;
/// ARCH_SHSTK_ENABLE and ARCH_SHSTK_DISABLE (asm/prctl.h).
const ARCH_SHSTK: [u64; 2] = [0x5001, 0x5002];

/// UFFDIO_REGISTER (linux/userfaultfd.h).
const UFFDIO_REGISTER: u64 = 0xC020_AA00;

/// Whether `call` may change the layout, or what an address stands for.
#[inline(always)]
pub fn is_layout_call(call: u64, first: u64) -> bool {
    // prctl and arch_prctl look at an int.
    let option = first & 0xffff_ffff;
    match call {
        MMAP
        | MPROTECT
        | MUNMAP
        | BRK
        | MREMAP
        | MADVISE
        | SHMAT
        | SHMDT
        | MLOCK
        | MUNLOCK
        | MLOCKALL
        | MUNLOCKALL
        | IO_SETUP
        | IO_DESTROY
        | REMAP_FILE_PAGES
        | MBIND
        | USERFAULTFD
        | MLOCK2
        | PKEY_MPROTECT
        | IO_URING_SETUP
        | IO_URING_REGISTER
        | PROCESS_MADVISE
        | SET_MEMPOLICY_HOME_NODE
        | MAP_SHADOW_STACK
        | MSEAL => true,
        PRCTL => option == PR_SET_MM || option == PR_SET_MEMORY_MERGE || option == PR_SET_VMA,
        ARCH_PRCTL => option == ARCH_SHSTK[0] || option == ARCH_SHSTK[1],
        _ => false,
    }
}

/// Whether a write lock of the target's own in `call` is explained by it. A userfaultfd changes nothing until a range
/// is registered with it.
#[inline(always)]
pub fn is_layout_lock(call: u64, args: &[u64; 6]) -> bool {
    is_layout_call(call, args[0]) || (call == IOCTL && args[1] & 0xffff_ffff == UFFDIO_REGISTER)
}

/// Whether `call` does what is of interest with the lock taken for reading. The advices that drop pages do (madvise_lock(),
/// mm/madvise.c, 6.15; a per-VMA lock instead from 6.16 on), and PR_SET_MM, which changes names
/// (prctl_set_mm_map(), kernel/sys.c).
#[inline(always)]
pub fn is_read_lock_call(call: u64, first: u64) -> bool {
    call == MADVISE || call == PROCESS_MADVISE || (call == PRCTL && first & 0xffff_ffff == PR_SET_MM)
}

/// Whether a foreign task's `call` may write what the target's memory holds, under a lock for reading.
#[inline(always)]
pub fn writes_to_others(call: u64) -> bool {
    matches!(
        call,
        WRITE | PWRITE64 | WRITEV | PWRITEV | PWRITEV2 | PTRACE | PROCESS_VM_WRITEV | IO_URING_ENTER
    )
}

/// The 64-bit number of those of a 32-bit call's that [`writes_to_others`] (syscall_32.tbl), or another number that
/// is of no interest.
#[inline(always)]
pub fn of_compat(call: u64) -> u64 {
    match call {
        4 => WRITE,
        26 => PTRACE,
        146 => WRITEV,
        181 => PWRITE64,
        334 => PWRITEV,
        348 => PROCESS_VM_WRITEV,
        379 => PWRITEV2,
        426 => IO_URING_ENTER,
        _ => u32::MAX as u64,
    }
}

/// The same for the numbers of x32 that differ, the x32 bit taken off.
#[inline(always)]
pub fn of_x32(call: u64) -> u64 {
    match call {
        516 => WRITEV,
        521 => PTRACE,
        535 => PWRITEV,
        540 => PROCESS_VM_WRITEV,
        547 => PWRITEV2,
        same => same,
    }
}
