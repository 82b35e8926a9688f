//! System V shared memory segments (sysvipc(7)), of our own IPC namespace.

use std::fs;
use std::mem::MaybeUninit;

use serde::{Deserialize, Serialize};

use super::SyscallError;

/// In the mode of a segment: it has given up its number, and goes with its last attachment (include/uapi/linux/shm.h).
const SHM_DEST: u32 = 0o1000;
/// The number that the next object of its kind gets (ipc(2), CONFIG_CHECKPOINT_RESTORE, Linux 3.8); CAP_SYS_ADMIN, or CAP_CHECKPOINT_RESTORE
/// (5.9).
const NEXT_ID: &str = "/proc/sys/kernel/shm_next_id";

/// What a segment is, as shmctl(IPC_STAT) tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentStat {
    /// What others find it by; 0, IPC_PRIVATE, for nothing.
    pub key: i32,
    /// The owner.
    pub uid: u32,
    /// The owning group.
    pub gid: u32,
    /// Permissions.
    pub mode: u32,
    /// Whether it was removed, and goes with its last attachment.
    pub removed: bool,
    /// Its length in bytes, as it was asked for.
    pub size: u64,
}

fn object(id: i32) -> String {
    format!("System V segment {id}")
}

fn raw_stat(id: i32) -> Result<libc::shmid_ds, SyscallError> {
    let mut state = MaybeUninit::<libc::shmid_ds>::zeroed();
    // SAFETY: writes a shmid_ds, of which all bytes are zero before.
    unsafe {
        match libc::shmctl(id, libc::IPC_STAT, state.as_mut_ptr()) {
            0 => Ok(state.assume_init()),
            _ => Err(SyscallError::last("shmctl(IPC_STAT)", object(id))),
        }
    }
}

/// What segment `id` is.
///
/// # Errors
/// EINVAL: there is none. EACCES: it may not be looked at.
pub fn stat(id: i32) -> Result<SegmentStat, SyscallError> {
    let state = raw_stat(id)?;
    let mode = u32::from(state.shm_perm.mode);
    Ok(SegmentStat {
        key: state.shm_perm.__key,
        uid: state.shm_perm.uid,
        gid: state.shm_perm.gid,
        mode: mode & 0o777,
        removed: mode & SHM_DEST != 0,
        size: state.shm_segsz as u64,
    })
}

/// How many attachments segment `id` has.
///
/// # Errors
/// As [`stat`].
pub fn attachments(id: i32) -> Result<u64, SyscallError> {
    Ok(raw_stat(id)?.shm_nattch)
}

/// Makes segment `id`, which must be free, as its key must be.
///
/// The choice is the whole namespace's, and another process may take it:
///
/// ```text
/// we                      another
/// shm_next_id = 7
///                         shmget: it has 7
/// shmget: we have 8
/// ```
///
/// What we have then is given back. It is tried again while 7 is free.
///
/// # Errors
/// The number cannot be chosen or belongs to another one, the key does (EEXIST), or shmget(2) fails otherwise.
pub fn create(id: i32, key: i32, size: u64, mode: u32) -> Result<(), SyscallError> {
    const TRIES: usize = 16;
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | (mode & 0o777) as i32;
    for _ in 0..TRIES {
        fs::write(NEXT_ID, id.to_string()).map_err(|e| SyscallError::new("write", NEXT_ID, e))?;
        // SAFETY: takes no memory.
        let made = unsafe { libc::shmget(key, size as usize, flags) };
        if made == id {
            return Ok(());
        }
        if made < 0 {
            let error = SyscallError::last("shmget", object(id));
            // What was chosen and not used must not become somebody else's.
            let _ = fs::write(NEXT_ID, "-1");
            return Err(error);
        }
        remove(made)?;
        if stat(id).is_ok() {
            break;
        }
    }
    Err(SyscallError::new("shmget", object(id), std::io::ErrorKind::AlreadyExists))
}

/// Gives segment `id` to somebody.
///
/// # Errors
/// shmctl(2) fails.
pub fn give(id: i32, uid: u32, gid: u32) -> Result<(), SyscallError> {
    let mut state = raw_stat(id)?;
    (state.shm_perm.uid, state.shm_perm.gid) = (uid, gid);
    // SAFETY: reads a shmid_ds.
    match unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut state) } {
        0 => Ok(()),
        _ => Err(SyscallError::last("shmctl(IPC_SET)", object(id))),
    }
}

/// Removes segment `id`: it goes with its last attachment.
///
/// # Errors
/// shmctl(2) fails.
pub fn remove(id: i32) -> Result<(), SyscallError> {
    // SAFETY: takes no memory for IPC_RMID.
    match unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(SyscallError::last("shmctl(IPC_RMID)", object(id))),
    }
}

/// A segment, attached here. Detached on drop.
#[derive(Debug)]
pub struct Attached {
    base: *mut u8,
    len: usize,
}

// SAFETY: the mapping belongs to the process, and is written through `&mut self` only.
unsafe impl Send for Attached {}
// SAFETY: `&self` gives no access to the memory.
unsafe impl Sync for Attached {}

impl Attached {
    /// Attaches segment `id`.
    ///
    /// # Errors
    /// shmat(2) fails.
    pub fn new(id: i32) -> Result<Self, SyscallError> {
        let len = stat(id)?.size as usize;
        // SAFETY: maps where nothing is.
        let base = unsafe { libc::shmat(id, std::ptr::null(), 0) };
        if base.addr() == usize::MAX {
            return Err(SyscallError::last("shmat", object(id)));
        }
        Ok(Self { base: base.cast(), len })
    }

    /// Sets all of it to zero.
    pub fn clear(&mut self) {
        // SAFETY: mapped and writable, `len` bytes, as long as `self` lives.
        unsafe { self.base.write_bytes(0, self.len) };
    }

    /// Writes `bytes` from `offset` on, as many as it has room for.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX).min(self.len);
        let len = bytes.len().min(self.len - offset);
        // SAFETY: mapped and writable, `len` bytes, as long as `self` lives; the ranges are within, and `bytes` is not.
        unsafe { self.base.add(offset).copy_from_nonoverlapping(bytes.as_ptr(), len) };
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: attached by us, and nobody has references into it.
        unsafe { libc::shmdt(self.base.cast()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of our own, with a number that the kernel gives; removed on drop.
    struct Own(i32);

    impl Own {
        fn new() -> Self {
            // SAFETY: takes no memory.
            let id = unsafe { libc::shmget(libc::IPC_PRIVATE, 5000, libc::IPC_CREAT | 0o640) };
            assert!(id >= 0);
            Self(id)
        }
    }

    impl Drop for Own {
        fn drop(&mut self) {
            let _ = remove(self.0);
        }
    }

    #[test]
    fn a_segment_is_told_and_goes() {
        let own = Own::new();
        let mut attached = Attached::new(own.0).unwrap();
        let told = stat(own.0).unwrap();
        assert_eq!((told.key, told.mode, told.removed, told.size), (0, 0o640, false, 5000));
        assert_eq!(attachments(own.0).unwrap(), 1);
        attached.clear();
        attached.write(4990, &[7; 100]);
        attached.write(1 << 40, &[7; 100]);
        remove(own.0).unwrap();
        assert!(stat(own.0).unwrap().removed, "as long as it is attached");
        drop(attached);
        assert_eq!(stat(own.0).unwrap_err().errno(), Some(libc::EINVAL));
    }

    /// In a namespace where nobody else makes any.
    #[test]
    fn a_number_can_be_chosen_once() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let alone = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWIPC).unwrap();
            let id = Own::new().0;
            create(id, libc::IPC_PRIVATE, 4096, 0o600).unwrap();
            let _own = Own(id);
            give(id, 1, 2).unwrap();
            let told = stat(id).unwrap();
            assert_eq!((told.uid, told.gid, told.size), (1, 2, 4096));
            assert!(create(id, libc::IPC_PRIVATE, 4096, 0o600).is_err());
            assert_eq!(stat(id).unwrap(), told);
            create(id + 1, 0x1234, 4096, 0o600).unwrap();
            let _other = Own(id + 1);
            assert_eq!(create(id + 2, 0x1234, 4096, 0o600).unwrap_err().errno(), Some(libc::EEXIST));
        });
        alone.join().unwrap();
    }
}
