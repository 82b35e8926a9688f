//! What is there only once its process is: the process opens it itself.

use std::collections::HashMap;

use crate::image::proto::{FileEntry, PidfdEntry, RegFileEntry, TtyType};
use crate::restore::batch::Batch;
use crate::restore::checkpoint::Checkpoint;
use crate::restore::error::{Refusal, RestoreError};

use super::ONCE;
use super::terminal::Terminals;

/// A file that its process opens itself.
#[derive(Clone, Debug)]
pub(in crate::restore) enum Late {
    /// In the `/proc` of a process of the tree.
    Path(RegFileEntry),
    /// `/dev/tty`, with these flags.
    ControllingTerminal(u32),
    /// A process of the tree.
    Process(PidfdEntry),
}

impl Late {
    /// `entry`, if it is such a file.
    pub(super) fn of(
        checkpoint: &Checkpoint,
        terminals: &Terminals,
        pid: i32,
        entry: &FileEntry,
    ) -> Result<Option<Self>, RestoreError> {
        let is_there = |pid: i32| checkpoint.processes.iter().any(|process| process.pid == pid);
        if let Some(reg) = &entry.reg {
            let of = reg.name.strip_prefix("/proc/").and_then(|rest| rest.split('/').next()?.parse().ok());
            return Ok(of.is_some_and(is_there).then(|| Self::Path(reg.clone())));
        }
        if let Some(pidfd) = &entry.pidfd {
            if !is_there(pidfd.nspid) {
                let what = format!("pidfd of process {}", pidfd.nspid);
                let reason =
                    "means a process that is not in the checkpoint, and whose ID may be another's by now"
                        .to_owned();
                return Err(Refusal::File { pid, what, reason }.into());
            }
            return Ok(Some(Self::Process(pidfd.clone())));
        }
        let controlling =
            entry.tty.as_ref().filter(|tty| terminals.kind(tty.tty_info_id) == Some(TtyType::Ctty));
        Ok(controlling.map(|tty| Self::ControllingTerminal(tty.flags)))
    }

    /// Has a process open it; its number there, at or above `least`.
    fn open(&self, least: i32, batch: &mut Batch<'_>) -> Result<i32, RestoreError> {
        let mut open = |name: &str, flags: u32| {
            let flags = flags as i32 & !ONCE;
            let flags = flags | libc::O_CLOEXEC | libc::O_NOCTTY;
            let path = [name.as_bytes(), &[0]].concat();
            let here = libc::AT_FDCWD as u64;
            batch.call_with("openat", libc::SYS_openat, &path, |at| [here, at, flags as u64, 0])?;
            batch.last_result()
        };
        let low = match self {
            Self::Path(file) => {
                let low = open(&file.name, file.flags)?;
                let set = libc::SEEK_SET as u64;
                batch.call("lseek", libc::SYS_lseek, [low as u64, file.pos, set])?;
                low
            }
            Self::ControllingTerminal(flags) => open("/dev/tty", *flags)?,
            Self::Process(pidfd) => {
                let flags = u64::from(pidfd.flags) & libc::O_NONBLOCK as u64;
                batch.call("pidfd_open", libc::SYS_pidfd_open, [pidfd.nspid as u64, flags])?;
                batch.last_result()?
            }
        };
        let duplicate = [low as u64, libc::F_DUPFD_CLOEXEC as u64, least as u64];
        batch.call("fcntl(F_DUPFD)", libc::SYS_fcntl, duplicate)?;
        Ok(batch.last_result()? as i32)
    }
}

/// What one process has opened itself, by the numbers of `files.img`.
#[derive(Debug)]
pub(in crate::restore) struct OpenedThere<'a> {
    late: &'a HashMap<u32, Late>,
    least: i32,
    numbers: HashMap<u32, i32>,
}

impl<'a> OpenedThere<'a> {
    /// Nothing yet. The process has use for no number from `least` on.
    pub(super) fn new(late: &'a HashMap<u32, Late>, least: i32) -> Self {
        Self { late, least, numbers: HashMap::new() }
    }

    /// The process's descriptor of file `id`, which it opens now if it is one for it to open.
    pub(in crate::restore) fn number(
        &mut self,
        id: u32,
        batch: &mut Batch<'_>,
    ) -> Result<Option<i32>, RestoreError> {
        let Some(late) = self.late.get(&id) else { return Ok(None) };
        if let Some(number) = self.numbers.get(&id) {
            return Ok(Some(*number));
        }
        let number = late.open(self.least, batch)?;
        self.numbers.insert(id, number);
        Ok(Some(number))
    }
}
