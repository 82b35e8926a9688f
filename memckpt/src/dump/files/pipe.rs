//! Pipes and FIFOs, with what is in them: copied by tee(2), which takes nothing away.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, tee};

use crate::dump::error::DumpError;
use crate::image::proto::{FdTypes, FifoEntry, FileEntry, PipeDataEntry, PipeEntry};
use crate::kernel::SyscallError;
use crate::kernel::descriptor::Descriptor;

use super::collector::{Collector, owner};
use super::path::Inode;
use super::refusal::refuse_descriptor;

/// Which ends of a pipe the tree has, and whether its content was taken.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ends {
    number: u32,
    fifo: bool,
    reads: bool,
    writes: bool,
}

impl Collector<'_> {
    /// One end of a pipe, or one opening of a FIFO.
    pub(super) fn pipe(&mut self, found: &Descriptor, id: u32) -> Result<FileEntry, DumpError> {
        let is_pipe = found.link.to_str().is_some_and(|link| link.starts_with("pipe:["));
        if found.info.flags & libc::O_PATH as u32 != 0 {
            if is_pipe {
                let reason = "cannot be made again: close it first";
                return Err(refuse_descriptor(found, "pipe opened with O_PATH", reason));
            }
            return self.path_file(found, id);
        }
        let fifo = if is_pipe {
            None
        } else {
            // Its path has an entry of its own.
            let path_id = self.next_id();
            Some((path_id, self.path_file(found, path_id)?))
        };
        let pipe_id = self.take_content(found, fifo.is_some())?;
        let Some((path_id, path)) = fifo else {
            let pipe = PipeEntry { id, pipe_id, flags: found.info.file_flags(), fown: owner(found)? };
            return Ok(FileEntry {
                r#type: FdTypes::Pipe as i32,
                id,
                pipe: Some(pipe),
                ..FileEntry::default()
            });
        };
        self.out.files.push(path);
        let fifo = FifoEntry { id, pipe_id, regf_id: Some(path_id) };
        Ok(FileEntry { r#type: FdTypes::Fifo as i32, id, fifo: Some(fifo), ..FileEntry::default() })
    }

    /// Takes what is in the pipe, once, through the first descriptor that reads from it; gives the pipe's number.
    fn take_content(&mut self, found: &Descriptor, fifo: bool) -> Result<u32, DumpError> {
        let inode = Inode::of(&found.stat);
        let pipe_id = self.pipe_number(inode, fifo);
        let access = found.info.flags & libc::O_ACCMODE as u32;
        let reads = access != libc::O_WRONLY as u32;
        let ends = self.pipes.entry(inode).or_default();
        let first = reads && !ends.reads;
        ends.reads |= reads;
        ends.writes |= access != libc::O_RDONLY as u32;
        if first {
            self.content(found, pipe_id, fifo)?;
        }
        Ok(pipe_id)
    }

    /// The number of a pipe. For pipes their inode, by which `--inherit-fd fd[N]:pipe:[INODE]` names them at restore.
    fn pipe_number(&mut self, inode: Inode, fifo: bool) -> u32 {
        let ends = self.pipes.entry(inode).or_default();
        (ends.number, ends.fifo) = (inode.ino as u32, fifo);
        ends.number
    }

    fn content(&mut self, found: &Descriptor, pipe_id: u32, fifo: bool) -> Result<(), DumpError> {
        let size = fcntl(found, FcntlArg::F_GETPIPE_SZ)
            .map_err(|e| SyscallError::new("fcntl(F_GETPIPE_SZ)", found.name(), e))?;
        let bytes = peek(found, size)?;
        if !bytes.is_empty() && found.info.flags & libc::O_DIRECT as u32 != 0 {
            return Err(refuse_descriptor(
                found,
                "pipe in packet mode",
                "holds packets, whose bounds cannot be seen without taking them: try again when it is empty",
            ));
        }
        let entry = PipeDataEntry { pipe_id, bytes: bytes.len() as u32, size: Some(size as u32) };
        if fifo { &mut self.out.fifos } else { &mut self.out.pipes }.push((entry, bytes));
        Ok(())
    }

    /// Says which pipes lead out of the tree. CRIU makes them again without the other end, unless that is given.
    pub(super) fn note_outer_ends(&mut self) {
        let mut numbers: Vec<_> = self
            .pipes
            .values()
            .filter(|ends| !ends.fifo && ends.reads != ends.writes)
            .map(|e| e.number)
            .collect();
        numbers.sort_unstable();
        for number in numbers {
            if !self.options.is_external(&format!("pipe:[{number}]")) {
                self.notes.push(format!(
                    "pipe:[{number}] leads out of the tree: give its other end at restore (criu restore --inherit-fd 'fd[N]:pipe:[{number}]')"
                ));
            }
        }
    }
}

/// What is in the pipe, which has room for `size` bytes. Nothing is taken.
fn peek(pipe: &Descriptor, size: i32) -> Result<Vec<u8>, SyscallError> {
    let error = |call, e: nix::errno::Errno| SyscallError::new(call, pipe.name(), e);
    if pipe.waiting()? == 0 {
        return Ok(Vec::new());
    }
    let (ours, into): (OwnedFd, OwnedFd) =
        nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|e| error("pipe2", e))?;
    // tee(2) begins at the front each time, so all must fit at once: as many buffers as the pipe has.
    fcntl(&into, FcntlArg::F_SETPIPE_SZ(size)).map_err(|e| error("fcntl(F_SETPIPE_SZ)", e))?;
    let copied =
        tee(pipe, &into, size as usize, SpliceFFlags::SPLICE_F_NONBLOCK).map_err(|e| error("tee", e))?;
    drop(into);
    let mut bytes = Vec::with_capacity(copied);
    File::from(ours).read_to_end(&mut bytes).map_err(|e| SyscallError::new("read", pipe.name(), e))?;
    Ok(bytes)
}
