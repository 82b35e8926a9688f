//! Pipes and FIFOs, with what was in them.

use std::collections::HashMap;
use std::io::Write as _;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;

use crate::image::chain::Member;
use crate::image::proto::{FifoEntry, PipeDataEntry, PipeEntry, RegFileEntry};
use crate::image::{ImageKind, magic};
use crate::kernel::SyscallError;
use crate::restore::error::{Refusal, RestoreError};

use super::{reopen, set_flags};

/// What is in pipes, by their numbers.
type Contents = HashMap<u32, (PipeDataEntry, Vec<u8>)>;

/// Those that are open, and kept open here until every process has its ends.
#[derive(Debug, Default)]
pub(super) struct Pipes {
    contents: Contents,
    fifo_contents: Contents,
    pipes: HashMap<u32, (OwnedFd, OwnedFd)>,
    fifos: HashMap<u32, OwnedFd>,
}

impl Pipes {
    pub(super) fn read(member: &Member) -> Result<Self, RestoreError> {
        let contents = |name, kind| -> Result<Contents, RestoreError> {
            let records = member.with_bytes(name, kind, |entry: &PipeDataEntry| entry.bytes.into())?;
            Ok(records.into_iter().map(|record| (record.0.pipe_id, record)).collect())
        };
        Ok(Self {
            contents: contents(magic::PIPES_DATA, ImageKind::PipesData)?,
            fifo_contents: contents(magic::FIFO_DATA, ImageKind::FifoData)?,
            ..Self::default()
        })
    }

    /// One end.
    pub(super) fn pipe(&mut self, entry: &PipeEntry) -> Result<OwnedFd, RestoreError> {
        let number = entry.pipe_id;
        if !self.pipes.contains_key(&number) {
            let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)
                .map_err(|e| SyscallError::new("pipe2", format!("pipe {number}"), e))?;
            let write = fill(write, self.contents.get(&number))?;
            self.pipes.insert(number, (read, write));
        }
        let (read, write) = &self.pipes[&number];
        let access = entry.flags as i32 & libc::O_ACCMODE;
        // One opening each: their flags are their own.
        let end = if access == libc::O_RDONLY { read } else { write };
        let fd = reopen(end, access | libc::O_NONBLOCK)?;
        set_flags(&fd, entry.flags)?;
        Ok(fd)
    }

    /// One end, which is one of the pipe that descriptor `ours` is of.
    pub(super) fn given(&self, pid: i32, entry: &PipeEntry, ours: RawFd) -> Result<OwnedFd, RestoreError> {
        let refused =
            |reason: String| Refusal::File { pid, what: format!("pipe:[{}]", entry.pipe_id), reason }.into();
        let waits = self.contents.get(&entry.pipe_id).map_or(0, |(_, bytes)| bytes.len());
        if waits > 0 {
            return Err(refused(format!(
                "holds {waits} bytes, which cannot be put into another: leave --inherit-fd out"
            )));
        }
        let flags = entry.flags as i32 & libc::O_ACCMODE | libc::O_NONBLOCK;
        match std::fs::read_link(format!("/proc/self/fd/{ours}")) {
            Ok(link) if link.to_str().is_some_and(|link| link.starts_with("pipe:[")) => {}
            _ => {
                return Err(refused(format!(
                    "cannot become descriptor {ours}: that is no pipe of the caller's"
                )));
            }
        }
        let fd = reopen(&ours, flags)?;
        set_flags(&fd, entry.flags)?;
        Ok(fd)
    }

    /// One opening of a FIFO, which has an entry of its own for its path.
    pub(super) fn fifo(
        &mut self,
        pid: i32,
        entry: &FifoEntry,
        path: Option<&RegFileEntry>,
    ) -> Result<OwnedFd, RestoreError> {
        let Some(path) = path else {
            let what = format!("FIFO {} has no path in the images", entry.id);
            return Err(Refusal::State { pid, what }.into());
        };
        let number = entry.pipe_id;
        if !self.fifos.contains_key(&number) {
            // Both at once, so that no opening has to wait.
            let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
            let fd = nix::fcntl::open(path.name.as_str(), flags, Mode::empty())
                .map_err(|e| SyscallError::new("open", path.name.clone(), e))?;
            let fd = fill(fd, self.fifo_contents.get(&number))?;
            self.fifos.insert(number, fd);
        }
        let fd = reopen(&self.fifos[&number], path.flags as i32 & libc::O_ACCMODE | libc::O_NONBLOCK)?;
        set_flags(&fd, path.flags)?;
        Ok(fd)
    }
}

fn fill(fd: OwnedFd, content: Option<&(PipeDataEntry, Vec<u8>)>) -> Result<OwnedFd, SyscallError> {
    let Some((entry, bytes)) = content else { return Ok(fd) };
    let name = || format!("pipe {}", entry.pipe_id);
    if let Some(size) = entry.size.and_then(|size| i32::try_from(size).ok()) {
        fcntl(&fd, FcntlArg::F_SETPIPE_SZ(size))
            .map_err(|e| SyscallError::new("fcntl(F_SETPIPE_SZ)", name(), e))?;
    }
    // Nobody reads: what does not fit must not wait.
    set_flags(&fd, libc::O_NONBLOCK as u32)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(bytes).map_err(|e| SyscallError::new("write", name(), e))?;
    tracing::debug!(descriptor = file.as_raw_fd(), bytes = bytes.len(), "filled {}", name());
    Ok(file.into())
}
