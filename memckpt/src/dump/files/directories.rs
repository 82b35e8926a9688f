//! Executable, working directory, root and umask.

use std::path::PathBuf;

use nix::sys::stat::FileStat;

use crate::dump::error::DumpError;
use crate::image::proto::{FownEntry, FsEntry};
use crate::kernel::{SyscallError, status};

use super::collector::Collector;
use super::path::{Inode, PathFile};
use super::refusal::Place;

impl Collector<'_> {
    /// The number of the executable of `pid`.
    pub(super) fn executable(&mut self, pid: i32) -> Result<u32, DumpError> {
        self.linked(pid, Place::Executable, "exe")
    }

    /// Where `pid` stands in the file system.
    pub(super) fn directories(&mut self, pid: i32) -> Result<FsEntry, DumpError> {
        Ok(FsEntry {
            cwd_id: self.linked(pid, Place::WorkingDirectory, "cwd")?,
            root_id: self.linked(pid, Place::Root, "root")?,
            umask: Some(status::status(pid)?.umask),
        })
    }

    fn linked(&mut self, pid: i32, place: Place, name: &str) -> Result<u32, DumpError> {
        let path = format!("/proc/{pid}/{name}");
        let (link, stat) = look(&path)?;
        self.without_descriptor(pid, place, &link, stat, path)
    }

    /// The number of a file that is in use without a descriptor; one for each inode.
    pub(super) fn without_descriptor(
        &mut self,
        pid: i32,
        place: Place,
        link: &std::path::Path,
        stat: FileStat,
        source: String,
    ) -> Result<u32, DumpError> {
        let inode = Inode::of(&stat);
        if let Some(id) = self.inodes.get(&inode) {
            return Ok(*id);
        }
        let id = self.next_id();
        let owner = FownEntry::default();
        let file = PathFile { pid, place, link, stat, source, flags: 0, pos: 0, owner };
        let entry = self.regular(id, file)?;
        self.out.files.push(entry);
        self.inodes.insert(inode, id);
        Ok(id)
    }
}

/// What a link of /proc says, and what is behind it, whether or not that still has this name.
pub(super) fn look(path: &str) -> Result<(PathBuf, FileStat), SyscallError> {
    let link = std::fs::read_link(path).map_err(|e| SyscallError::new("readlink", path, e))?;
    let stat = nix::sys::stat::stat(path).map_err(|e| SyscallError::new("stat", path, e))?;
    Ok((link, stat))
}
