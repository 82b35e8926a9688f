//! Files with a path, and those that have lost theirs.

use std::collections::HashMap;
use std::io::{Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use crate::image::chain::{Ghost, Member};
use crate::image::proto::{RegFileEntry, RemapFilePathEntry, RemapType};
use crate::image::{ImageKind, magic};
use crate::kernel::SyscallError;
use crate::restore::error::{Refusal, RestoreError};

use super::opening::Opening;
use super::{ONCE, reopen};

/// Files without a name: whose they are, and the ones that are made. What has a name meanwhile loses it on drop.
#[derive(Debug, Default)]
pub(super) struct Ghosts {
    /// The ghost of each file.
    of: HashMap<u32, u32>,
    contents: HashMap<u32, Ghost>,
    made: HashMap<u32, OwnedFd>,
    named: Vec<PathBuf>,
}

impl Ghosts {
    pub(super) fn read(member: &Member) -> Result<Self, RestoreError> {
        let mut ghosts = Self::default();
        let remaps: Vec<RemapFilePathEntry> = member.records(magic::REMAP_FPATH, ImageKind::RemapFpath)?;
        for remap in remaps {
            if remap.remap_type.is_some_and(|kind| kind != RemapType::Ghost as i32) {
                let what =
                    format!("file {} is found again in a way that memckpt does not know", remap.orig_id);
                return Err(Refusal::Checkpoint(what).into());
            }
            ghosts.of.insert(remap.orig_id, remap.remap_id);
            let name = magic::ghost_name(remap.remap_id);
            let content = member.ghost(&name)?.ok_or_else(|| RestoreError::Missing {
                path: member.path().to_owned(),
                file: name,
                hint: "",
            })?;
            ghosts.contents.insert(remap.remap_id, content);
        }
        Ok(ghosts)
    }

    /// Takes the names away that were needed to make them.
    pub(super) fn unlink(&mut self) {
        for path in self.named.drain(..) {
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "a deleted file was made again, and has its name now");
            }
        }
    }

    /// Makes ghost `number`, which had `name`: at that name if it is free, so that links in /proc say it.
    fn make(&mut self, number: u32, name: &str) -> Result<&OwnedFd, RestoreError> {
        if !self.made.contains_key(&number) {
            let Ghost { entry, pieces } = &self.contents[&number];
            let mode = Mode::from_bits_truncate(entry.mode & 0o7777);
            let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
            let fd = match nix::fcntl::open(name, flags | OFlag::O_CREAT | OFlag::O_EXCL, mode) {
                Ok(fd) => {
                    self.named.push(name.into());
                    fd
                }
                Err(nix::errno::Errno::EEXIST) => {
                    let directory = PathBuf::from(name).parent().map_or("/".into(), PathBuf::from);
                    nix::fcntl::open(&directory, flags | OFlag::O_TMPFILE, mode).map_err(|e| {
                        SyscallError::new("open(O_TMPFILE)", directory.display().to_string(), e)
                    })?
                }
                Err(errno) => return Err(SyscallError::new("open", name, errno).into()),
            };
            let failed = |call, e: std::io::Error| SyscallError::new(call, name, e);
            nix::sys::stat::fchmod(&fd, mode).map_err(|e| failed("fchmod", e.into()))?;
            nix::unistd::fchown(&fd, Some(entry.uid.into()), Some(entry.gid.into()))
                .map_err(|e| failed("fchown", e.into()))?;
            let file = std::fs::File::from(fd);
            for (at, bytes) in pieces {
                file.write_all_at(bytes, *at).map_err(|e| failed("pwrite", e))?;
            }
            if let Some(size) = entry.size.filter(|_| entry.chunks.unwrap_or(false)) {
                file.set_len(size).map_err(|e| failed("ftruncate", e))?;
            }
            self.made.insert(number, file.into());
        }
        Ok(&self.made[&number])
    }
}

impl Drop for Ghosts {
    fn drop(&mut self) {
        self.unlink();
    }
}

impl Opening<'_> {
    /// Opens what has, or had, a path.
    pub(super) fn path(&mut self, pid: i32, entry: &RegFileEntry) -> Result<OwnedFd, RestoreError> {
        let name = &entry.name;
        let refused = |reason: String| Refusal::File { pid, what: name.clone(), reason };
        let flags = entry.flags as i32 & !ONCE;
        let fd = if let Some(ghost) = self.ghosts.of.get(&entry.id).copied() {
            let fd = self.ghosts.make(ghost, name)?;
            reopen(fd, flags)?
        } else {
            let flags = OFlag::from_bits_retain(flags | libc::O_CLOEXEC | libc::O_NOCTTY);
            nix::fcntl::open(name.as_str(), flags, Mode::empty())
                .map_err(|e| refused(format!("cannot be opened: {e}. Put it back as it was")))?
        };
        let file = std::fs::File::from(fd);
        if flags & libc::O_PATH == 0 {
            let is = file.metadata().map_err(|e| SyscallError::new("fstat", name.clone(), e))?;
            if let Some(size) = entry.size.filter(|size| *size != is.len()) {
                return Err(refused(format!(
                    "has {} bytes now and had {size}: put it back as it was",
                    is.len()
                ))
                .into());
            }
            if entry.pos > 0 {
                (&file)
                    .seek(SeekFrom::Start(entry.pos))
                    .map_err(|e| SyscallError::new("lseek", name.clone(), e))?;
            }
        }
        Ok(file.into())
    }
}
