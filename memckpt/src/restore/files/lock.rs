//! File locks: those of an opening are taken here, those of a process by the process.

use std::os::fd::{AsRawFd as _, OwnedFd};

use crate::image::proto::FileLockEntry;
use crate::kernel::SyscallError;
use crate::restore::batch::Batch;
use crate::restore::checkpoint::{Alive, Checkpoint};
use crate::restore::error::{Refusal, RestoreError};

use super::Opened;

// FL_POSIX, FL_FLOCK and FL_OFDLCK of include/linux/filelock.h.
const FL_POSIX: u32 = 1;
const FL_FLOCK: u32 = 2;
const FL_OFDLCK: u32 = 1024;

/// Takes the locks of openings.
pub(super) fn of_openings(checkpoint: &Checkpoint, files: &Opened) -> Result<(), RestoreError> {
    for lock in checkpoint.locks.iter().filter(|lock| lock.flag != FL_POSIX) {
        let of = checkpoint.alive().find(|(process, _)| process.pid == lock.pid);
        let descriptor =
            of.and_then(|(_, alive)| alive.descriptors.iter().find(|d| d.fd.cast_signed() == lock.fd));
        let Some(fd) = descriptor.and_then(|descriptor| files.files.get(&descriptor.id)) else {
            let what = format!("its descriptor {}, which has a lock, is missing", lock.fd);
            return Err(Refusal::State { pid: lock.pid, what }.into());
        };
        take(fd, lock)?;
    }
    Ok(())
}

fn take(fd: &OwnedFd, lock: &FileLockEntry) -> Result<(), RestoreError> {
    let (call, result) = match lock.flag {
        FL_FLOCK => {
            let how = if is_exclusive(lock) { libc::LOCK_EX } else { libc::LOCK_SH };
            // SAFETY: no memory is involved.
            ("flock", unsafe { libc::flock(fd.as_raw_fd(), how | libc::LOCK_NB) })
        }
        FL_OFDLCK => {
            let range = range(lock);
            // SAFETY: the structure lives across the call, which reads it.
            ("fcntl(F_OFD_SETLK)", unsafe {
                libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const range)
            })
        }
        other => {
            let what =
                format!("its descriptor {} has a lock of a kind that is not restored ({other})", lock.fd);
            return Err(Refusal::State { pid: lock.pid, what }.into());
        }
    };
    let error = std::io::Error::last_os_error();
    match error.raw_os_error() {
        _ if result == 0 => Ok(()),
        Some(libc::EAGAIN | libc::EACCES) => {
            let what =
                format!("somebody else has locked the file of its descriptor {}: end that first", lock.fd);
            Err(Refusal::State { pid: lock.pid, what }.into())
        }
        _ => Err(SyscallError::new(call, format!("descriptor {}", lock.fd), error).into()),
    }
}

/// Has a process take its own locks: it has its descriptors, and closes none any more, which would release them.
pub(in crate::restore) fn of_process(
    checkpoint: &Checkpoint,
    pid: i32,
    alive: &Alive,
    batch: &mut Batch<'_>,
) -> Result<(), RestoreError> {
    for lock in checkpoint.locks.iter().filter(|lock| lock.flag == FL_POSIX && lock.pid == pid) {
        if !alive.descriptors.iter().any(|descriptor| descriptor.fd.cast_signed() == lock.fd) {
            let what = format!("its descriptor {}, which has a lock, is missing", lock.fd);
            return Err(Refusal::State { pid, what }.into());
        }
        let range = range(lock);
        // struct flock: type and whence, 16 bits each, padding, start and length, the PID.
        let mut bytes = [range.l_type.to_ne_bytes(), range.l_whence.to_ne_bytes(), [0; 2], [0; 2]].concat();
        bytes.extend([range.l_start, range.l_len, 0].map(i64::to_ne_bytes).concat());
        batch.call_with("fcntl(F_SETLK)", libc::SYS_fcntl, &bytes, |at| {
            [lock.fd as u64, libc::F_SETLK as u64, at]
        })?;
    }
    batch.flush()
}

fn is_exclusive(lock: &FileLockEntry) -> bool {
    lock.r#type == libc::F_WRLCK as u32
}

fn range(lock: &FileLockEntry) -> libc::flock {
    libc::flock {
        l_type: if is_exclusive(lock) { libc::F_WRLCK } else { libc::F_RDLCK } as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: lock.start,
        l_len: lock.len,
        l_pid: 0,
    }
}
