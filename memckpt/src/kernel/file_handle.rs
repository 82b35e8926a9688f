//! File handles: an inode's path, from what fdinfo tells of it (open_by_handle_at(2), Linux 2.6.39; needs CAP_DAC_READ_SEARCH).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;

/// MAX_HANDLE_SZ of include/linux/exportfs.h.
const MAX_HANDLE: usize = 128;

/// `struct file_handle` with room for the largest one.
#[repr(C)]
struct FileHandle {
    handle_bytes: u32,
    handle_type: i32,
    bytes: [u8; MAX_HANDLE],
}

/// A path of the inode with that handle on the file system with device number `dev` (major number << 20 | minor number).
/// It ends in ` (deleted)` when the inode has none any more.
///
/// # Errors
/// The file system is not mounted here, the handle leads nowhere (ESTALE), or we lack the right to use it.
pub fn path(dev: u32, kind: i32, handle: &[u8]) -> io::Result<PathBuf> {
    if handle.len() > MAX_HANDLE {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let mut raw = FileHandle { handle_bytes: handle.len() as u32, handle_type: kind, bytes: [0; MAX_HANDLE] };
    raw.bytes[..handle.len()].copy_from_slice(handle);
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "its file system is not mounted here");
    for point in mount_points(&mounts, dev) {
        let found = std::fs::File::open(&point).and_then(|mount| open(mount.as_raw_fd(), &mut raw));
        match found {
            Ok(fd) => return std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

fn open(mount: i32, handle: &mut FileHandle) -> io::Result<OwnedFd> {
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: the handle is a struct file_handle followed by at least as many bytes as it says, and lives across the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_by_handle_at, mount, handle, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Where the file system with that device number is mounted: fields 3 and 5 of mountinfo, proc_pid_mountinfo(5).
fn mount_points(mounts: &str, dev: u32) -> Vec<PathBuf> {
    let device = format!("{}:{}", dev >> 20, dev & 0xf_ffff);
    mounts
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            (*fields.get(2)? == device).then(|| PathBuf::from(unescape(fields.get(4).unwrap_or(&""))))
        })
        .collect()
}

/// Blanks and their like are written in octal: `\040`.
fn unescape(text: &str) -> std::ffi::OsString {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let digits = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let code = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code.filter(|_| first == b'\\') {
            Some(code) => {
                bytes.push(code);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_by_device() {
        let mounts = "36 35 98:0 /mnt1 /mnt/with\\040blank rw,noatime master:1 - ext3 /dev/root rw\n\
                      37 35 0:19 / /run rw - tmpfs none rw\n\
                      38 35 98:0 /x /other rw - ext3 /dev/root rw\n";
        assert_eq!(
            mount_points(mounts, 98 << 20),
            [PathBuf::from("/mnt/with blank"), PathBuf::from("/other")]
        );
        assert_eq!(mount_points(mounts, 19), [PathBuf::from("/run")]);
        assert!(mount_points(mounts, 20).is_empty());
    }
}
