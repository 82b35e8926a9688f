//! The open files of a tree, opened once each, here: every process of the tree inherits all of them, and keeps those that are its own.

mod event;
mod inotify;
mod late;
mod lock;
mod opening;
mod path;
mod pipe;
mod segment;
mod shared;
mod socket;
mod terminal;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::image::proto::{FileEntry, FownEntry, InotifyFileEntry};
use crate::kernel::SyscallError;

use super::checkpoint::Checkpoint;
use super::error::{Refusal, RestoreError};

use late::{Late, OpenedThere};
use segment::Segments;
use shared::SharedObjects;
use terminal::Terminals;

pub(super) use lock::of_process as locks_of_process;
pub(super) use opening::read;

/// Descriptors at and above which ours are, so that no process's own number is among them.
const LEAST: i32 = 1024;
/// Flags that say how a file was opened at first, and not how it is open.
const ONCE: i32 = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC;
/// Flags that fcntl(F_SETFL) can change.
const STATUS: i32 = libc::O_APPEND | libc::O_NONBLOCK | libc::O_ASYNC | libc::O_DIRECT | libc::O_NOATIME;

/// All that is open.
pub(super) struct Opened {
    /// By their numbers in `files.img`.
    files: HashMap<u32, OwnedFd>,
    late: HashMap<u32, Late>,
    /// Where our numbers begin.
    least: i32,
    mapped: HashMap<(u32, u32), OwnedFd>,
    shared: SharedObjects,
    segments: Segments,
    owners: Vec<(u32, FownEntry)>,
    pub(super) terminals: Terminals,
    watches: Vec<(u32, InotifyFileEntry)>,
}

impl Opened {
    /// What a process opens itself.
    pub(super) fn there(&self) -> OpenedThere<'_> {
        OpenedThere::new(&self.late, self.least)
    }

    /// Our descriptor of file `id`.
    pub(super) fn number(&self, pid: i32, id: u32) -> Result<i32, RestoreError> {
        known(pid, id, self.files.get(&id))
    }

    /// Our descriptor to map file `id` by.
    pub(super) fn mapped(&self, pid: i32, id: u32, flags: u32) -> Result<i32, RestoreError> {
        known(pid, id, self.mapped.get(&(id, flags)))
    }

    /// Our descriptor of shared object `id`.
    pub(super) fn shared(&self, pid: i32, id: u32) -> Result<i32, RestoreError> {
        known(pid, id, self.shared.get(id))
    }

    /// The number of the System V segment with the content of shared object `id`.
    pub(super) fn segment(&self, pid: i32, id: u32) -> Result<i32, RestoreError> {
        self.segments.id(id).ok_or_else(|| {
            let what = format!("segment {id} is not in the images");
            Refusal::State { pid, what }.into()
        })
    }

    /// The tree has all that it needs: what would show that we were there goes.
    pub(super) fn let_go(&self) -> Result<(), SyscallError> {
        self.segments.detach()
    }

    /// The tree runs: what outlasts processes stays.
    pub(super) fn keep(&self) {
        self.segments.keep();
    }

    /// Once all processes are there and have opened theirs: who is told of what happens to a file, who has locked it, who watches it,
    /// and seals that would have hindered a mapping.
    pub(super) fn settle(&self, checkpoint: &Checkpoint) -> Result<(), RestoreError> {
        for (id, owner) in &self.owners {
            let Some(fd) = self.files.get(id) else { continue };
            // struct f_owner_ex: F_OWNER_TID 0, F_OWNER_PID 1, F_OWNER_PGRP 2; CRIU has PIDTYPE_PID 0, TGID 1, PGID 2.
            let whose = [owner.pid_type as i32, owner.pid as i32];
            set(fd, F_SETOWN_EX, whose.as_ptr().addr(), "fcntl(F_SETOWN_EX)")?;
            set(fd, F_SETSIG, owner.signum as usize, "fcntl(F_SETSIG)")?;
        }
        lock::of_openings(checkpoint, self)?;
        for (id, entry) in &self.watches {
            if let Some(fd) = self.files.get(id) {
                inotify::watch(fd, entry)?;
            }
        }
        self.shared.seal()
    }
}

/// Not in libc (include/uapi/asm-generic/fcntl.h).
const F_SETOWN_EX: i32 = 15;
const F_SETSIG: i32 = 10;

fn set(fd: &OwnedFd, command: i32, argument: usize, name: &'static str) -> Result<(), SyscallError> {
    // SAFETY: the argument is a number, or points to what the command reads.
    if unsafe { libc::fcntl(fd.as_raw_fd(), command, argument) } < 0 {
        return Err(SyscallError::last(name, format!("descriptor {}", fd.as_raw_fd())));
    }
    Ok(())
}

fn known(pid: i32, id: u32, fd: Option<&OwnedFd>) -> Result<i32, RestoreError> {
    fd.map(AsRawFd::as_raw_fd).ok_or_else(|| {
        let what = format!("file {id} is not in the images");
        Refusal::State { pid, what }.into()
    })
}

fn owner(entry: &FileEntry) -> Option<&FownEntry> {
    let of = [
        entry.reg.as_ref().map(|file| &file.fown),
        entry.pipe.as_ref().map(|file| &file.fown),
        entry.efd.as_ref().map(|file| &file.fown),
        entry.tfd.as_ref().map(|file| &file.fown),
        entry.sgfd.as_ref().map(|file| &file.fown),
        entry.epfd.as_ref().map(|file| &file.fown),
        entry.memfd.as_ref().map(|file| &file.fown),
        entry.ify.as_ref().map(|file| &file.fown),
        entry.usk.as_ref().map(|file| &file.fown),
        entry.isk.as_ref().map(|file| &file.fown),
        entry.tty.as_ref().map(|file| &file.fown),
    ];
    of.into_iter().flatten().next()
}

/// Another opening of what `fd` is.
fn reopen(fd: &impl AsRawFd, flags: i32) -> Result<OwnedFd, SyscallError> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let flags = OFlag::from_bits_retain(flags | libc::O_CLOEXEC);
    nix::fcntl::open(path.as_str(), flags, nix::sys::stat::Mode::empty())
        .map_err(|e| SyscallError::new("open", path, e))
}

/// Sets the status flags that an opening has.
fn set_flags(fd: impl AsFd, flags: u32) -> Result<(), SyscallError> {
    let fd = fd.as_fd();
    let flags = OFlag::from_bits_retain(flags as i32 & STATUS);
    match fcntl(fd, FcntlArg::F_SETFL(flags)) {
        Ok(_) => Ok(()),
        Err(e) => Err(SyscallError::new("fcntl(F_SETFL)", format!("descriptor {}", fd.as_raw_fd()), e)),
    }
}

/// A descriptor that a system call has given.
fn made(fd: libc::c_long, call: &'static str) -> Result<OwnedFd, SyscallError> {
    match i32::try_from(fd) {
        // SAFETY: a new descriptor, which is nobody else's.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(SyscallError::new(call, "a new descriptor", io::Error::last_os_error())),
    }
}

/// Another descriptor of the same opening.
fn copy(fd: &OwnedFd) -> Result<OwnedFd, SyscallError> {
    fd.try_clone()
        .map_err(|e| SyscallError::new("fcntl(F_DUPFD)", format!("descriptor {}", fd.as_raw_fd()), e))
}

/// A copy that is not among the numbers of the tree.
fn high(fd: &OwnedFd, least: i32) -> Result<OwnedFd, SyscallError> {
    let copy = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(least))
        .map_err(|e| SyscallError::new("fcntl(F_DUPFD)", format!("above {least}"), e))?;
    // SAFETY: a new descriptor, which is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}
