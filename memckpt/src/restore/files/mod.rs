//! The open files of a tree, opened once each, here: every process of the tree inherits all of them, and keeps those that are its own.

mod event;
mod path;
mod pipe;
mod shared;

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::image::proto::{FdTypes, FileEntry, FownEntry, MemfdFileEntry, RegFileEntry};
use crate::kernel::SyscallError;

use super::checkpoint::{Checkpoint, Process};
use super::error::{Refusal, RestoreError};
use super::memory::{self, Source};

use path::Ghosts;
use pipe::Pipes;
use shared::SharedObjects;

/// Descriptors at and above which ours are, so that no process's own number is among them.
const LEAST: i32 = 1024;
/// Flags that fcntl(F_SETFL) can change.
const STATUS: i32 = libc::O_APPEND | libc::O_NONBLOCK | libc::O_ASYNC | libc::O_DIRECT | libc::O_NOATIME;

/// All that is open.
pub(super) struct Opened {
    /// By their numbers in `files.img`.
    files: HashMap<u32, OwnedFd>,
    /// Files of `/proc` that are there only once the process is.
    late: HashMap<u32, RegFileEntry>,
    /// Where our numbers begin.
    least: i32,
    mapped: HashMap<(u32, u32), OwnedFd>,
    shared: SharedObjects,
    owners: Vec<(u32, FownEntry)>,
}

/// What opening needs to know.
struct Opening<'a> {
    checkpoint: &'a Checkpoint,
    ghosts: Ghosts,
    pipes: Pipes,
    shared: SharedObjects,
}

impl Opened {
    /// Opens whatever a process of the tree has open or mapped.
    pub(super) fn open(checkpoint: &Checkpoint) -> Result<Self, RestoreError> {
        let member = checkpoint.member();
        let mut opening = Opening {
            checkpoint,
            ghosts: Ghosts::read(member)?,
            pipes: Pipes::read(member)?,
            shared: SharedObjects::make(checkpoint)?,
        };
        let highest = checkpoint.alive().flat_map(|(_, alive)| &alive.descriptors).map(|d| d.fd).max();
        let least = i32::try_from(highest.unwrap_or(0)).unwrap_or(i32::MAX).saturating_add(1).max(LEAST);
        raise_limit()?;
        let (mut files, mut late) = (HashMap::new(), HashMap::new());
        let mut owners = Vec::new();
        let mut mapped = HashMap::new();
        for (process, alive) in checkpoint.alive() {
            let used: BTreeSet<u32> = alive
                .descriptors
                .iter()
                .map(|d| d.id)
                .chain([alive.mm.exe_file_id, alive.fs.cwd_id, alive.fs.root_id])
                .collect();
            for id in used {
                if files.contains_key(&id) {
                    continue;
                }
                let entry = checkpoint.file(process.pid, id)?;
                if let Some(reg) = entry.reg.as_ref().filter(|reg| is_late(checkpoint, &reg.name)) {
                    late.insert(id, reg.clone());
                    continue;
                }
                let fd = opening.file(process, entry)?;
                let high = fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(least))
                    .map_err(|e| SyscallError::new("fcntl(F_DUPFD)", format!("above {least}"), e))?;
                // SAFETY: a new descriptor, which is nobody else's.
                files.insert(id, unsafe { OwnedFd::from_raw_fd(high) });
                owners.extend(owner(entry).filter(|owner| owner.pid != 0).map(|owner| (id, owner.clone())));
            }
            for vma in alive.mm.vmas.iter().filter(|vma| memory::is_made(vma)) {
                if let Source::File { id, flags, .. } = memory::source(vma)
                    && !mapped.contains_key(&(id, flags))
                {
                    let entry = checkpoint.file(process.pid, id)?;
                    mapped.insert((id, flags), opening.for_mapping(process, entry, flags)?);
                }
            }
        }
        opening.ghosts.unlink();
        Ok(Self { files, late, least, mapped, shared: opening.shared, owners })
    }

    /// A file that its process must open itself, and the number above which it finds none of its own.
    pub(super) fn late(&self, id: u32) -> Option<(&RegFileEntry, i32)> {
        Some((self.late.get(&id)?, self.least))
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

    /// Once all processes are there: who is told of what happens to a file.
    pub(super) fn give_to_owners(&self) -> Result<(), RestoreError> {
        for (id, owner) in &self.owners {
            let Some(fd) = self.files.get(id) else { continue };
            // struct f_owner_ex: F_OWNER_TID 0, F_OWNER_PID 1, F_OWNER_PGRP 2; CRIU has PIDTYPE_PID 0, TGID 1, PGID 2.
            let whose = [owner.pid_type as i32, owner.pid as i32];
            set(fd, F_SETOWN_EX, whose.as_ptr().addr(), "fcntl(F_SETOWN_EX)")?;
            set(fd, F_SETSIG, owner.signum as usize, "fcntl(F_SETSIG)")?;
        }
        Ok(())
    }

    /// Seals that a mapping would have hindered, or that would have hindered a mapping.
    pub(super) fn seal(&self) -> Result<(), RestoreError> {
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

/// Whether a path is in the `/proc` of a process that is yet to be made.
fn is_late(checkpoint: &Checkpoint, path: &str) -> bool {
    let pid = path.strip_prefix("/proc/").and_then(|rest| rest.split('/').next()?.parse::<i32>().ok());
    pid.is_some_and(|pid| checkpoint.processes.iter().any(|process| process.pid == pid))
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
    ];
    of.into_iter().flatten().next()
}

impl Opening<'_> {
    fn file(&mut self, process: &Process, entry: &FileEntry) -> Result<OwnedFd, RestoreError> {
        if let Some(reg) = &entry.reg {
            return self.path(process.pid, reg);
        }
        if let Some(pipe) = &entry.pipe {
            return self.pipes.pipe(pipe);
        }
        if let Some(fifo) = &entry.fifo {
            let path = fifo.regf_id.and_then(|id| self.checkpoint.files.get(&id)?.reg.as_ref());
            return self.pipes.fifo(process.pid, fifo, path);
        }
        if let Some(memfd) = &entry.memfd {
            return self.shared.memfd(process.pid, memfd);
        }
        if let Some(made) = event::open(entry) {
            return Ok(made?);
        }
        let kind = FdTypes::try_from(entry.r#type).map_or("unknown".to_owned(), |kind| format!("{kind:?}"));
        let reason = "is of a kind that memckpt does not restore yet: use criu restore".to_owned();
        Err(Refusal::File { pid: process.pid, what: format!("file {} ({kind})", entry.id), reason }.into())
    }

    /// Opens a file for a mapping.
    fn for_mapping(
        &mut self,
        process: &Process,
        entry: &FileEntry,
        flags: u32,
    ) -> Result<OwnedFd, RestoreError> {
        match (&entry.reg, &entry.memfd) {
            (Some(reg), _) => {
                let reg = RegFileEntry { flags, pos: 0, ..reg.clone() };
                self.path(process.pid, &reg)
            }
            (None, Some(memfd)) => {
                let memfd = MemfdFileEntry { flags, pos: 0, ..memfd.clone() };
                self.shared.memfd(process.pid, &memfd)
            }
            _ => self.file(process, entry),
        }
    }
}

/// As many descriptors as we may have.
fn raise_limit() -> Result<(), SyscallError> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let failed = |e| SyscallError::new("setrlimit(RLIMIT_NOFILE)", "memckpt", e);
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(failed)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(failed)
}

/// Another opening of what `fd` is.
fn reopen(fd: BorrowedFd<'_>, flags: i32) -> Result<OwnedFd, SyscallError> {
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
