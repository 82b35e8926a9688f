//! The LRU lists that the kernel reclaims pages from.

use std::ptr;

use super::SyscallError;

/// From linux/mempolicy.h: move pages that only this process maps.
const MPOL_MF_MOVE: i32 = 1 << 1;

/// Puts on the LRU lists what CPUs have kept apart for them (mm/swap.c). Until then a page freed by MADV_FREE is not yet the
/// kernel's to drop, nor told as such in smaps.
///
/// The way is move_pages(2) of no pages, which drains first: `lru_cache_disable` in `do_pages_move` (mm/migrate.c; `migrate_prep`
/// before Linux 5.14). It needs a kernel with CONFIG_NUMA, as distributions build theirs.
///
/// # Errors
/// ENOSYS without CONFIG_NUMA.
pub fn drain() -> Result<(), SyscallError> {
    let (nowhere, mut status) = ([0i32; 1], [0i32; 1]);
    // SAFETY: with a count of 0 no array is read or written; those given live until the call returns.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            0usize,
            ptr::null::<libc::c_void>(),
            nowhere.as_ptr(),
            status.as_mut_ptr(),
            MPOL_MF_MOVE,
        )
    };
    if done == 0 {
        return Ok(());
    }
    Err(SyscallError::new("move_pages", "no pages", std::io::Error::last_os_error()))
}
