//! Files of an images directory, by descriptor and without following links.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

/// No image with records comes near this: a pagemap of it counts some 50 million runs.
const MAX_RECORDS_FILE: u64 = 1 << 30;

/// Opens a directory to read and write in. With `follow`, it may be a symbolic link.
pub(super) fn open_dir(base: impl AsFd, path: &Path, follow: bool) -> Result<OwnedFd, Errno> {
    let mut flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    if !follow {
        flags |= OFlag::O_NOFOLLOW;
    }
    openat(base, path, flags, Mode::empty())
}

/// Device and inode: which file it is.
pub(super) fn identity(fd: impl AsFd) -> Result<(u64, u64), Errno> {
    let stat = nix::sys::stat::fstat(fd)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Where an open directory is now, for messages; `None` when it has no path.
pub(super) fn resolved(fd: impl AsFd) -> Option<PathBuf> {
    let link = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    std::fs::read_link(link).ok().filter(|path| path.is_dir())
}

/// Opens a regular file to read. A FIFO or device of that name neither blocks nor is read.
pub(super) fn open_file(dir: impl AsFd, name: &str) -> io::Result<Option<File>> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let file = match openat(dir, name, flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(Errno::ENOENT) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a regular file"));
    }
    Ok(Some(file))
}

/// The content of a file with records; `None` when there is no such file. Allocates no more than the file is long.
pub(super) fn read_file(dir: impl AsFd, name: &str) -> io::Result<Option<Vec<u8>>> {
    let Some(file) = open_file(dir, name)? else { return Ok(None) };
    let len = file.metadata()?.len();
    if len > MAX_RECORDS_FILE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{len} bytes are too many")));
    }
    let mut bytes = Vec::with_capacity(len as usize);
    file.take(len).read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

/// The names in a directory, in no order.
pub(super) fn names(dir: impl AsFd) -> Result<Vec<OsString>, Errno> {
    let mut dir = nix::dir::Dir::openat(
        dir,
        ".",
        OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    dir.iter()
        .map(|entry| entry.map(|e| std::ffi::OsStr::from_bytes(e.file_name().to_bytes()).to_owned()))
        .collect()
}
