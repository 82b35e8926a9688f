//! The SysV segment through which parasite and memckpt share memory: it can be attached by number alone, so that one
//! system call in the target maps code, parameters and stack.

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use nix::sched::{CloneFlags, setns};

use super::blob::{CODE, IOVECS, IoVec, PARAMETERS, Parameters, SEGMENT_LEN};
use super::{blob, proc};
use crate::kernel::SyscallError;

/// What is asked for: an odd size, by which our segments can be told from others even before they are filled.
const SIZE: usize = SEGMENT_LEN - 729;

/// A segment, attached here. Dropping it detaches, and destroys it unless the parasite did.
pub(super) struct Segment {
    id: i32,
    base: *mut u8,
    namespace: Option<fs::File>,
    /// The parasite has given up the number: it may be somebody else's by now.
    pub(super) removed: bool,
}

// SAFETY: the mapping belongs to the process; whoever owns the segment uses it alone.
unsafe impl Send for Segment {}

impl Segment {
    /// Makes one in the IPC namespace of `pid` that the user `uid` may attach, holding the parasite's code.
    pub(super) fn create(pid: i32, uid: u32) -> Result<Self, SyscallError> {
        let namespace = ipc_namespace(pid)?;
        let (id, base) = inside(namespace.as_ref(), || create_here(uid))?;
        let segment = Self { id, base: base as *mut u8, namespace, removed: false };
        // SAFETY: freshly attached, SEGMENT_LEN bytes of whole pages, and nobody else knows it yet; touching it all now saves
        // page faults while the target stands.
        unsafe {
            segment.base.write_bytes(0, SEGMENT_LEN);
            segment.base.copy_from_nonoverlapping(CODE.as_ptr(), CODE.len());
            let p = segment.parameters();
            let me = std::process::id() as i32;
            (*p).magic = blob::MAGIC;
            (*p).shmid = id;
            (*p).creator_start = proc::start_time(me).unwrap_or(0);
            (*p).userfaultfd = -1;
            for pipe in &mut (*p).pipes {
                (pipe.read_end, pipe.write_end) = (-1, -1);
            }
        }
        Ok(segment)
    }

    pub(super) fn id(&self) -> i32 {
        self.id
    }

    /// Where it is attached here: mapped as long as `self` lives.
    pub(super) fn base(&self) -> *mut u8 {
        self.base
    }

    /// The parameters: mapped as long as `self` lives. What the parasite changes is to be read anew each time.
    pub(super) fn parameters(&self) -> *mut Parameters {
        self.base.wrapping_add(PARAMETERS).cast()
    }

    /// The iovecs.
    pub(super) fn iovecs(&self) -> *mut IoVec {
        self.base.wrapping_add(IOVECS).cast()
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        let id = self.id;
        if !self.removed {
            // SAFETY: shmctl takes no memory for IPC_RMID.
            let remove = move || match unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) } {
                0 => Ok(()),
                _ => Err(SyscallError::last("shmctl(IPC_RMID)", format!("segment {id}"))),
            };
            if let Err(error) = inside(self.namespace.as_ref(), remove) {
                tracing::debug!(%error, "segment not removed");
            }
        }
        // SAFETY: the attachment is ours, and nobody has references into it.
        unsafe { libc::shmdt(self.base.cast()) };
    }
}

/// The IPC namespace of a process, if it is not ours.
fn ipc_namespace(pid: i32) -> Result<Option<fs::File>, SyscallError> {
    let path = format!("/proc/{pid}/ns/ipc");
    let theirs = fs::metadata(&path).map_err(|e| SyscallError::new("stat", path.clone(), e))?;
    let ours =
        fs::metadata("/proc/self/ns/ipc").map_err(|e| SyscallError::new("stat", "/proc/self/ns/ipc", e))?;
    if (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino()) {
        return Ok(None);
    }
    fs::File::open(&path).map(Some).map_err(|e| SyscallError::new("open", path, e))
}

/// Runs `work` in an IPC namespace, on a thread of its own since the namespace is the thread's.
fn inside<T: Send>(
    namespace: Option<&fs::File>,
    work: impl FnOnce() -> Result<T, SyscallError> + Send,
) -> Result<T, SyscallError> {
    let Some(namespace) = namespace else { return work() };
    super::on_tracer_thread(|| {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWIPC)
            .map_err(|e| SyscallError::new("setns(CLONE_NEWIPC)", "the target's IPC namespace", e))?;
        work()
    })
}

/// Number and address of a new segment.
fn create_here(uid: u32) -> Result<(i32, usize), SyscallError> {
    // SAFETY: shmget takes no memory; shmctl reads and writes one shmid_ds; shmat maps where nothing is.
    unsafe {
        let id = libc::shmget(libc::IPC_PRIVATE, SIZE, libc::IPC_CREAT | 0o700);
        if id < 0 {
            return Err(SyscallError::last("shmget", format!("{SIZE} bytes")));
        }
        let failed = |call| {
            let error = SyscallError::last(call, format!("segment {id}"));
            libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut());
            error
        };
        let mut state = MaybeUninit::<libc::shmid_ds>::zeroed();
        if libc::shmctl(id, libc::IPC_STAT, state.as_mut_ptr()) != 0 {
            return Err(failed("shmctl(IPC_STAT)"));
        }
        let mut state = state.assume_init();
        if state.shm_perm.uid != uid {
            state.shm_perm.uid = uid;
            if libc::shmctl(id, libc::IPC_SET, &raw mut state) != 0 {
                return Err(failed("shmctl(IPC_SET)"));
            }
        }
        let base = libc::shmat(id, std::ptr::null(), 0);
        if base.addr() == usize::MAX {
            return Err(failed("shmat"));
        }
        Ok((id, base.addr()))
    }
}

/// Destroys segments in the IPC namespace of `pid` that a memckpt left behind which was killed before its target had
/// attached them. How many there were.
///
/// # Errors
/// Where the namespace cannot be entered.
pub fn sweep(pid: i32) -> Result<usize, SyscallError> {
    let namespace = ipc_namespace(pid)?;
    inside(namespace.as_ref(), || Ok(sweep_here()))
}

fn sweep_here() -> usize {
    /// include/uapi/linux/shm.h
    const SHM_STAT: i32 = 13;
    const SHM_INFO: i32 = 14;
    let mut swept = 0;
    // SAFETY: SHM_INFO writes a struct shm_info, which is smaller than a shmid_ds; SHM_STAT a shmid_ds.
    unsafe {
        let mut state = MaybeUninit::<libc::shmid_ds>::zeroed();
        let last = libc::shmctl(0, SHM_INFO, state.as_mut_ptr());
        for index in 0..=last {
            let id = libc::shmctl(index, SHM_STAT, state.as_mut_ptr());
            if id < 0 {
                continue;
            }
            let s = state.assume_init();
            if s.shm_segsz == SIZE && s.shm_nattch == 0 && s.shm_cpid > 0 && is_orphan(id, s.shm_cpid) {
                swept += usize::from(libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) == 0);
            }
        }
    }
    swept
}

/// Whether a segment is one of ours and its maker is gone.
fn is_orphan(id: i32, maker: i32) -> bool {
    // SAFETY: attached for reading; the length was checked, so the parameters lie inside.
    unsafe {
        let base = libc::shmat(id, std::ptr::null(), libc::SHM_RDONLY);
        if base.addr() == usize::MAX {
            return false;
        }
        let p = base.cast::<u8>().add(PARAMETERS).cast::<Parameters>();
        let (magic, start) = ((*p).magic, (*p).creator_start);
        libc::shmdt(base);
        match magic {
            // Killed before it was filled.
            0 => proc::start_time(maker).is_none(),
            blob::MAGIC => proc::start_time(maker) != Some(start),
            _ => false,
        }
    }
}

/// Whether the segments of a process that ends are destroyed under others' feet (kernel.shm_rmid_forced).
pub(super) fn rmid_is_forced() -> io::Result<bool> {
    Ok(fs::read_to_string("/proc/sys/kernel/shm_rmid_forced")?.trim() != "0")
}
