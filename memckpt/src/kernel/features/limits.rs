//! Tries what rights and limits allow.

use std::os::fd::AsRawFd;

use super::probes::pipe;
use super::tracking::say;
use crate::kernel::SyscallError;
use crate::kernel::status::status;

/// Numbers of linux/capability.h.
pub(super) const CAP_SYS_PTRACE: u32 = 19;
pub(super) const CAP_SYS_ADMIN: u32 = 21;
pub(super) const CAP_SYS_RESOURCE: u32 = 24;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// The pipe size of splice mode, and how many pipes it uses at once.
const PIPE_BYTES: i32 = 1 << 20;
const PIPES: usize = 4;
/// What an infection shares with its target.
const SEGMENT_BYTES: usize = 32 << 10;

/// Whether this process has capability `number` (linux/capability.h) in effect.
#[must_use]
pub fn capability_is_effective(number: u32) -> bool {
    status(std::process::id() as i32).is_ok_and(|status| status.cap_effective >> number & 1 == 1)
}

pub(super) fn has_all(capabilities: &[u32]) -> Result<(), String> {
    let missing: Vec<&str> =
        capabilities.iter().filter(|&&c| !capability_is_effective(c)).map(|&c| capability_name(c)).collect();
    if missing.is_empty() { Ok(()) } else { Err(format!("not in effect: {}", missing.join(", "))) }
}

pub(super) fn may_load_bpf() -> Result<(), String> {
    if capability_is_effective(CAP_SYS_ADMIN) { Ok(()) } else { has_all(&[CAP_BPF, CAP_PERFMON]) }
}

fn capability_name(number: u32) -> &'static str {
    match number {
        CAP_SYS_PTRACE => "CAP_SYS_PTRACE",
        CAP_SYS_ADMIN => "CAP_SYS_ADMIN",
        CAP_SYS_RESOURCE => "CAP_SYS_RESOURCE",
        CAP_PERFMON => "CAP_PERFMON",
        CAP_BPF => "CAP_BPF",
        _ => "another capability",
    }
}

pub(super) fn pipe_size() -> Result<(), String> {
    let mut open = Vec::new();
    for i in 1..=PIPES {
        let (reader, writer) = pipe().map_err(say)?;
        // SAFETY: takes and gives numbers only.
        let size = unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE_BYTES) };
        if size < 0 {
            return Err(format!(
                "pipe {i} of {PIPES}: {}",
                SyscallError::last("fcntl(F_SETPIPE_SZ)", "1 MiB")
            ));
        }
        open.push((reader, writer));
    }
    Ok(())
}

pub(super) fn sysv_shm() -> Result<(), String> {
    let forced = std::fs::read_to_string("/proc/sys/kernel/shm_rmid_forced")
        .map_err(|e| format!("no SysV IPC: {e}"))?;
    if forced.trim() != "0" {
        return Err(
            "kernel.shm_rmid_forced is set: a segment would vanish before the target attaches it".to_owned()
        );
    }
    // SAFETY: a new segment of our own, removed again whatever happens; it is attached where the kernel finds room.
    unsafe {
        let id = libc::shmget(libc::IPC_PRIVATE, SEGMENT_BYTES, libc::IPC_CREAT | 0o700);
        if id < 0 {
            return Err(say(SyscallError::last("shmget", "a new segment")));
        }
        let at = libc::shmat(id, std::ptr::null(), libc::SHM_EXEC);
        let attached =
            if at as isize == -1 { Err(say(SyscallError::last("shmat", "a new segment"))) } else { Ok(()) };
        if attached.is_ok() {
            libc::shmdt(at);
        }
        libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut());
        attached
    }
}

pub(super) fn kernel_release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "unknown".to_owned(), |r| r.trim().to_owned())
}
