//! Finding the mm of a process: a lock that we take on purpose, seen by the probe on that lock.

use std::fs::File;
use std::os::linux::fs::MetadataExt;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use super::AgentError;
use super::bitmap::ControlPage;
use crate::kernel::SyscallError;

/// What the lock's probe saw of an mm.
#[derive(Clone, Copy, Debug)]
pub(super) struct Captured {
    pub(super) mm: u64,
    /// Its owner's thread group in the initial PID namespace, or 0.
    pub(super) tgid: u64,
    pub(super) brk: u64,
    /// The first word of its flags (include/linux/mm_types.h, MMF_*).
    pub(super) flags: u64,
}

/// Finds the mm of `pid` with the capture program attached: by a read of its pagemap, which touches and pins nothing.
pub(super) fn capture(control: &ControlPage, pid: i32) -> Result<Captured, AgentError> {
    const NS: &str = "/proc/self/ns/pid";
    let ns = std::fs::metadata(NS).map_err(|e| SyscallError::new("stat", NS, e))?;
    control.capture_ns(0).store(ns.st_dev(), Ordering::SeqCst);
    control.capture_ns(1).store(ns.st_ino(), Ordering::SeqCst);
    control.capture_own().store(u64::from(pid == std::process::id() as i32), Ordering::SeqCst);
    control.captured_mm().store(0, Ordering::SeqCst);
    control.captured_tgid().store(0, Ordering::SeqCst);
    let path = format!("/proc/{pid}/pagemap");
    let pagemap = File::open(&path).map_err(|e| SyscallError::new("open", path.as_str(), e))?;
    let mut entry = [0; 8];
    // SAFETY: gettid has no preconditions.
    let tid = unsafe { libc::gettid() };
    control.capture_tid().store(tid as u64, Ordering::SeqCst);
    // Any address does: the lock is taken for unmapped ones too (pagemap_read, fs/proc/task_mmu.c), and for reading.
    let read = pagemap.read_at(&mut entry, 0);
    control.capture_tid().store(0, Ordering::SeqCst);
    let mm = control.captured_mm().load(Ordering::SeqCst);
    match read {
        _ if mm != 0 => Ok(Captured {
            mm,
            tgid: control.captured_tgid().load(Ordering::SeqCst),
            brk: control.captured_brk().load(Ordering::SeqCst),
            flags: control.captured_flags().load(Ordering::SeqCst),
        }),
        Err(error) => Err(SyscallError::new("pread", path, error).into()),
        Ok(_) => Err(AgentError::Capture {
            hook: "tp_btf/mmap_lock_acquire_returned".into(),
            reason: "the probe did not fire".into(),
        }),
    }
}
