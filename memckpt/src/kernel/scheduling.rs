//! How the kernel schedules a thread.

use super::SyscallError;

/// What sched_getattr(2) says (Linux 3.14).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// SCHED_OTHER and its like, without SCHED_RESET_ON_FORK.
    pub policy: u32,
    /// -20 to 19; of no meaning to real-time policies.
    pub nice: i32,
    /// 1 to 99 for real-time policies, else 0.
    pub priority: u32,
}

/// struct sched_attr as of Linux 3.14 (include/uapi/linux/sched/types.h).
#[repr(C)]
#[derive(Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Of a thread.
///
/// # Errors
/// ESRCH: there is no such thread.
pub fn attributes(tid: i32) -> Result<Attributes, SyscallError> {
    let mut attr = SchedAttr::default();
    let size = size_of::<SchedAttr>();
    // SAFETY: the kernel writes at most `size` bytes to `attr`, which has as many.
    let rc = unsafe { libc::syscall(libc::SYS_sched_getattr, tid, &raw mut attr, size, 0) };
    if rc != 0 {
        return Err(SyscallError::last("sched_getattr", format!("thread {tid}")));
    }
    Ok(Attributes { policy: attr.policy, nice: attr.nice, priority: attr.priority })
}

#[cfg(test)]
mod tests {
    #[test]
    fn of_ourselves() {
        let mine = super::attributes(0).unwrap();
        assert!(mine.policy < 8 && (-20..20).contains(&mine.nice), "{mine:?}");
        assert!(super::attributes(i32::MAX).is_err());
    }
}
