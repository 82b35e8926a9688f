//! A descriptor of another process, looked at through a copy of it: the same open file, so that nothing here may move its position,
//! take from it or change its flags.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd};
use std::path::PathBuf;

use nix::sys::stat::FileStat;

use super::fdinfo::FdInfo;
use super::{SyscallError, pidfd, socket_options};

/// F_GETSIG, F_GETOWN_EX and F_GETOWNER_UIDS of include/uapi/asm-generic/fcntl.h.
const F_GETSIG: libc::c_int = 11;
const F_GETOWN_EX: libc::c_int = 16;
const F_GETOWNER_UIDS: libc::c_int = 17;

/// An open file, seen from outside.
#[derive(Debug)]
pub struct Descriptor {
    /// Whose.
    pub pid: i32,
    /// Its number there.
    pub fd: i32,
    /// Its entry in fdinfo.
    pub info: FdInfo,
    /// Its inode.
    pub stat: FileStat,
    /// What `/proc/PID/fd` calls it.
    pub link: PathBuf,
    copy: OwnedFd,
}

/// Who gets SIGIO and its like: fcntl(2), F_SETOWN_EX and F_SETSIG.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// F_OWNER_TID, F_OWNER_PID or F_OWNER_PGRP.
    pub kind: u32,
    /// A thread, a process or a group; 0 for nobody.
    pub id: i32,
    /// The signal; 0 is SIGIO.
    pub signal: u32,
    /// Real and effective user in whose name it is sent.
    pub uids: (u32, u32),
}

/// The descriptors of process `pid`, ascending.
///
/// # Errors
/// No such process, or no right to trace it.
pub fn numbers(pid: i32) -> Result<Vec<i32>, SyscallError> {
    let path = format!("/proc/{pid}/fd");
    let entries = std::fs::read_dir(&path).map_err(|e| SyscallError::new("getdents64", &*path, e))?;
    let mut numbers = Vec::new();
    for entry in entries {
        let name = entry.map_err(|e| SyscallError::new("getdents64", &*path, e))?.file_name();
        numbers.extend(name.to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// The sockets among the descriptors of process `pid`.
///
/// # Errors
/// As [`numbers`] and [`Descriptor::open`].
pub fn sockets(pid: i32) -> Result<Vec<Descriptor>, SyscallError> {
    let process = pidfd::open(pid)?;
    let is_socket = |fd: &i32| {
        let link = std::fs::read_link(format!("/proc/{pid}/fd/{fd}"));
        link.is_ok_and(|link| link.to_string_lossy().starts_with("socket:["))
    };
    let opened =
        numbers(pid)?.into_iter().filter(is_socket).map(|fd| Descriptor::open(process.as_fd(), pid, fd));
    // One opened with O_PATH is no more than a name.
    let is_usable = |socket: &Descriptor| socket.info.flags & libc::O_PATH as u32 == 0;
    opened.filter(|socket| socket.as_ref().map_or(true, is_usable)).collect()
}

/// How many bytes wait to be read: in a pipe, a queue of events, a socket (FIONREAD). Of datagrams, those of the first.
///
/// # Errors
/// The file has no such number.
pub fn waiting(fd: BorrowedFd<'_>) -> std::io::Result<usize> {
    let mut waiting: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut waiting) };
    if rc < 0 { Err(std::io::Error::last_os_error()) } else { Ok(waiting as usize) }
}

/// A copy of our own descriptor `number`, which we were started with.
///
/// # Errors
/// EBADF: there is none.
pub fn inherited(number: i32) -> std::io::Result<OwnedFd> {
    // SAFETY: takes and gives numbers only.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: new, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

impl Descriptor {
    /// Copies descriptor `fd` of process `pid`, whose pidfd is `process`.
    ///
    /// # Errors
    /// It was closed, or there is no right to trace the process.
    pub fn open(process: BorrowedFd<'_>, pid: i32, fd: i32) -> Result<Self, SyscallError> {
        let path = format!("/proc/{pid}/fd/{fd}");
        let info = FdInfo::read(pid, fd)?;
        let copy = pidfd::getfd(process, fd)?;
        let stat = nix::sys::stat::fstat(&copy).map_err(|e| SyscallError::new("fstat", &*path, e))?;
        let link = std::fs::read_link(&path).map_err(|e| SyscallError::new("readlink", &*path, e))?;
        Ok(Self { pid, fd, info, stat, link, copy })
    }

    /// The file type bits of its mode: S_IFREG, S_IFIFO, ...; 0 for anonymous inodes.
    #[must_use]
    pub fn file_type(&self) -> u32 {
        self.stat.st_mode & libc::S_IFMT
    }

    /// See [`waiting`].
    ///
    /// # Errors
    /// The file has no such number.
    pub fn waiting(&self) -> Result<usize, SyscallError> {
        waiting(self.as_fd()).map_err(|e| SyscallError::new("ioctl(FIONREAD)", self.name(), e))
    }

    /// An option of a socket that is an int; absent where the socket has none such.
    ///
    /// # Errors
    /// It is no socket.
    pub fn option(&self, level: i32, name: i32) -> Result<Option<i32>, SyscallError> {
        socket_options::int(self.as_fd(), level, name)
            .map_err(|e| SyscallError::new("getsockopt", self.name(), e))
    }

    /// Who is told of its events.
    ///
    /// # Errors
    /// fcntl(2) fails. A file opened with O_PATH has no owner.
    pub fn owner(&self) -> Result<Owner, SyscallError> {
        if self.info.flags & libc::O_PATH as u32 != 0 {
            return Ok(Owner::default());
        }
        let raw = self.copy.as_raw_fd();
        let (mut owner, mut uids) = ([0_i32; 2], [0_u32; 2]);
        // SAFETY: F_GETOWN_EX writes one f_owner_ex, two ints, into `owner`.
        let rc = unsafe { libc::fcntl(raw, F_GETOWN_EX, owner.as_mut_ptr()) };
        if rc < 0 {
            return Err(self.error("fcntl(F_GETOWN_EX)"));
        }
        // SAFETY: takes and gives numbers only.
        let signal = unsafe { libc::fcntl(raw, F_GETSIG) };
        if signal < 0 {
            return Err(self.error("fcntl(F_GETSIG)"));
        }
        if owner[1] != 0 {
            // SAFETY: F_GETOWNER_UIDS writes two uid_t into `uids`.
            let rc = unsafe { libc::fcntl(raw, F_GETOWNER_UIDS, uids.as_mut_ptr()) };
            if rc < 0 {
                return Err(self.error("fcntl(F_GETOWNER_UIDS)"));
            }
        }
        let kind = if owner[1] == 0 { 0 } else { owner[0] as u32 };
        Ok(Owner { kind, id: owner[1], signal: signal as u32, uids: (uids[0], uids[1]) })
    }

    /// The failed call's errno, with this descriptor's name.
    #[must_use]
    pub fn error(&self, call: &'static str) -> SyscallError {
        SyscallError::last(call, self.name())
    }

    /// What messages call it.
    #[must_use]
    pub fn name(&self) -> String {
        format!("/proc/{}/fd/{} ({})", self.pid, self.fd, self.link.display())
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.copy.as_fd()
    }
}

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> i32 {
        self.copy.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Seek;

    use super::*;

    #[test]
    fn it_tells_position_flags_and_owner() {
        let pid = std::process::id() as i32;
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(10).unwrap();
        file.seek(std::io::SeekFrom::Start(4)).unwrap();
        // SAFETY: takes and gives numbers only.
        let rc = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETOWN, pid) };
        assert_eq!(rc, 0);
        let process = pidfd::open(pid).unwrap();
        assert!(numbers(pid).unwrap().contains(&file.as_raw_fd()));
        let seen = Descriptor::open(process.as_fd(), pid, file.as_raw_fd()).unwrap();
        assert_eq!((seen.info.pos, seen.file_type(), seen.stat.st_size), (4, libc::S_IFREG, 10));
        let owner = seen.owner().unwrap();
        assert_eq!((owner.kind, owner.id, owner.signal), (1, pid, 0));
        assert_eq!(Descriptor::open(process.as_fd(), pid, 9999).unwrap_err().errno(), Some(libc::ENOENT));
    }
}
