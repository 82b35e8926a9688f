//! kcmp(2): whether two numbers mean one kernel object (Linux 3.5; KCMP_EPOLL_TFD 4.13). Needs the right to trace both processes.

use std::cmp::Ordering;

use super::SyscallError;

// include/uapi/linux/kcmp.h
const KCMP_FILE: libc::c_int = 0;
const KCMP_FILES: libc::c_int = 2;
const KCMP_FS: libc::c_int = 3;
const KCMP_EPOLL_TFD: libc::c_int = 7;

/// `struct kcmp_epoll_slot`: the `toff`-th of the targets that epoll `efd` watches by number `tfd`.
#[repr(C)]
struct EpollSlot {
    efd: u32,
    tfd: u32,
    toff: u32,
}

/// How the open files behind two descriptors stand to each other, in an order that holds until the next boot.
///
/// # Errors
/// No such process or descriptor, or no right to trace both.
pub fn files(one: (i32, i32), other: (i32, i32)) -> Result<Ordering, SyscallError> {
    let result = call(one.0, other.0, KCMP_FILE, one.1 as u64, other.1 as u64);
    ordering(result, "kcmp(KCMP_FILE)", || {
        format!("descriptor {} of process {} and {} of {}", one.1, one.0, other.1, other.0)
    })
}

/// Whether two processes share their table of descriptors.
///
/// # Errors
/// As [`files`].
pub fn share_descriptors(one: i32, other: i32) -> Result<bool, SyscallError> {
    let of = || format!("processes {one} and {other}");
    ordering(call(one, other, KCMP_FILES, 0, 0), "kcmp(KCMP_FILES)", of).map(Ordering::is_eq)
}

/// Whether two processes share working directory, root and umask.
///
/// # Errors
/// As [`files`].
pub fn share_fs(one: i32, other: i32) -> Result<bool, SyscallError> {
    let of = || format!("processes {one} and {other}");
    ordering(call(one, other, KCMP_FS, 0, 0), "kcmp(KCMP_FS)", of).map(Ordering::is_eq)
}

/// Whether descriptor `fd` of `pid` is the open file that its epoll `epoll` watches as the `nth` one added by number `tfd`.
///
/// # Errors
/// As [`files`]; ENOENT: the epoll watches no such thing.
pub fn epoll_watches(pid: i32, fd: i32, epoll: i32, tfd: u32, nth: u32) -> Result<bool, SyscallError> {
    let slot = EpollSlot { efd: epoll as u32, tfd, toff: nth };
    let result = call(pid, pid, KCMP_EPOLL_TFD, fd as u64, &raw const slot as u64);
    let of = || format!("descriptor {fd} and epoll {epoll} of process {pid}");
    ordering(result, "kcmp(KCMP_EPOLL_TFD)", of).map(Ordering::is_eq)
}

fn call(one: i32, other: i32, kind: libc::c_int, a: u64, b: u64) -> libc::c_long {
    // SAFETY: numbers, but for KCMP_EPOLL_TFD's last, which points to an EpollSlot of the caller's that lives across the call.
    unsafe { libc::syscall(libc::SYS_kcmp, one, other, kind, a, b) }
}

fn ordering(
    result: libc::c_long,
    name: &'static str,
    object: impl Fn() -> String,
) -> Result<Ordering, SyscallError> {
    match result {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        // 3: unequal, and the kernel gives no order.
        2 | 3 => Ok(Ordering::Greater),
        _ => Err(SyscallError::last(name, object())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn a_copy_is_the_same_file_and_a_second_opening_is_not() {
        let pid = std::process::id() as i32;
        let first = std::fs::File::open("/dev/null").unwrap();
        let (copy, second) = (first.try_clone().unwrap(), std::fs::File::open("/dev/null").unwrap());
        let compare =
            |a: &std::fs::File, b: &std::fs::File| files((pid, a.as_raw_fd()), (pid, b.as_raw_fd())).unwrap();
        assert_eq!(compare(&first, &copy), Ordering::Equal);
        assert_ne!(compare(&first, &second), Ordering::Equal);
        assert_eq!(compare(&first, &second), compare(&second, &first).reverse());
        assert!(share_descriptors(pid, pid).unwrap() && share_fs(pid, pid).unwrap());
        assert_eq!(files((pid, 9999), (pid, 9999)).unwrap_err().errno(), Some(libc::EBADF));
    }
}
