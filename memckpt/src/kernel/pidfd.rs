//! pidfd_open(2), pidfd_getfd(2), pidfd_send_signal(2).

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use super::SyscallError;

/// A descriptor of process `pid`; it never comes to mean another process (Linux 5.3). Close-on-exec.
///
/// # Errors
/// ESRCH: no such process. EINVAL: a thread that is not a leader.
pub fn open(pid: i32) -> Result<OwnedFd, SyscallError> {
    // SAFETY: takes and gives numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    owned(fd, "pidfd_open", || format!("process {pid}"))
}

/// A copy of descriptor `raw` of the process behind `pidfd` (Linux 5.6). Close-on-exec.
///
/// # Errors
/// EBADF: it has no such descriptor. EPERM: no right to trace it.
pub fn getfd(pidfd: impl AsFd, raw: i32) -> Result<OwnedFd, SyscallError> {
    // SAFETY: takes and gives numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_fd().as_raw_fd(), raw, 0) };
    owned(fd, "pidfd_getfd", || format!("the target's descriptor {raw}"))
}

/// Sends `signal` to the process behind `pidfd`; 0 only asks whether it is there (Linux 5.1).
///
/// # Errors
/// ESRCH: it has ended and was waited for. EPERM: no right to signal it.
pub fn send_signal(pidfd: impl AsFd, signal: i32) -> Result<(), SyscallError> {
    let fd = pidfd.as_fd().as_raw_fd();
    // SAFETY: no siginfo is given; the rest are numbers.
    let result = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, std::ptr::null::<libc::siginfo_t>(), 0)
    };
    if result < 0 {
        return Err(SyscallError::last("pidfd_send_signal", format!("signal {signal}")));
    }
    Ok(())
}

fn owned(fd: libc::c_long, call: &'static str, object: impl Fn() -> String) -> Result<OwnedFd, SyscallError> {
    if fd < 0 {
        return Err(SyscallError::last(call, object()));
    }
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::puppet::Puppet;

    #[test]
    fn finds_a_process_and_its_descriptors_and_notices_its_end() {
        let puppet = Puppet::start().unwrap();
        let pidfd = open(puppet.pid()).unwrap();
        send_signal(&pidfd, 0).unwrap();
        assert_eq!(getfd(&pidfd, 9999).unwrap_err().errno(), Some(libc::EBADF));
        drop(puppet);
        assert_eq!(send_signal(&pidfd, 0).unwrap_err().errno(), Some(libc::ESRCH));
    }
}
