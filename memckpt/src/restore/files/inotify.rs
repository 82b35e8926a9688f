//! What inotify watches: added last, so that it hears nothing of the restore.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use crate::image::proto::{InotifyFileEntry, InotifyWdEntry};
use crate::kernel::{SyscallError, file_handle};
use crate::restore::error::{Refusal, RestoreError};

use super::made;

/// INOTIFY_IOC_SETNEXTWD of linux/inotify.h (Linux 4.17, CONFIG_CHECKPOINT_RESTORE): the number of the watch that comes next.
const SET_NEXT: libc::c_ulong = 0x4004_4900;
/// What a watch may be added with; the kernel shows bits of its own, too.
const MASK: u32 = libc::IN_ALL_EVENTS | libc::IN_EXCL_UNLINK | libc::IN_ONESHOT;

/// One that watches nothing yet.
pub(super) fn make(entry: &InotifyFileEntry) -> Result<OwnedFd, SyscallError> {
    // SAFETY: makes a descriptor.
    let fd = made(unsafe { libc::inotify_init1(libc::IN_CLOEXEC) }.into(), "inotify_init1")?;
    super::set_flags(&fd, entry.flags)?;
    Ok(fd)
}

/// Adds what it watches.
pub(super) fn watch(fd: &OwnedFd, entry: &InotifyFileEntry) -> Result<(), RestoreError> {
    for watch in &entry.wd {
        let path = path(watch)?;
        let name = path.display().to_string();
        let next = watch.wd.cast_signed();
        // SAFETY: takes a number.
        if unsafe { libc::ioctl(fd.as_raw_fd(), SET_NEXT, next) } != 0 {
            return Err(SyscallError::last("ioctl(INOTIFY_IOC_SETNEXTWD)", name).into());
        }
        let text = [path.as_os_str().as_bytes(), &[0]].concat();
        // SAFETY: the text ends in a zero byte.
        let got = unsafe { libc::inotify_add_watch(fd.as_raw_fd(), text.as_ptr().cast(), watch.mask & MASK) };
        if got < 0 {
            return Err(SyscallError::last("inotify_add_watch", name).into());
        }
        if got != next {
            let what = format!("inotify watches {name} as number {next}, and would get {got} for it");
            return Err(Refusal::Checkpoint(what).into());
        }
    }
    Ok(())
}

/// Where the inode is that is watched. CRIU does not always say.
fn path(watch: &InotifyWdEntry) -> Result<PathBuf, RestoreError> {
    let handle = &watch.f_handle;
    if let Some(path) = &handle.path {
        let inode = std::fs::symlink_metadata(path).map(|is| is.ino());
        return match inode {
            Ok(inode) if inode == watch.i_ino => Ok(path.into()),
            _ => {
                let what = format!("inotify watches {path}, which is not what it was: put it back");
                Err(Refusal::Checkpoint(what).into())
            }
        };
    }
    let bytes: Vec<u8> = handle.handle.iter().flat_map(|word| word.to_le_bytes()).collect();
    let bytes = &bytes[..bytes.len().min(handle.bytes as usize)];
    file_handle::path(watch.s_dev, handle.r#type.cast_signed(), bytes).map_err(|e| {
        let what = format!("inotify watches inode {}, which cannot be found by its handle: {e}", watch.i_ino);
        Refusal::Checkpoint(what).into()
    })
}
