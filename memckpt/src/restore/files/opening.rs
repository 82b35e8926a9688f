//! Opening the files of a tree, each once.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsRawFd as _, OwnedFd};

use crate::image::proto::{
    FdTypes, FileEntry, InetSkEntry, InotifyFileEntry, MemfdFileEntry, RegFileEntry, UnixSkEntry,
};
use crate::kernel::SyscallError;
use crate::restore::checkpoint::{Alive, Checkpoint, Process};
use crate::restore::error::{Refusal, RestoreError};
use crate::restore::memory::{self, Origin, Source};
use crate::restore::request::Request;

use super::late::Late;
use super::path::Ghosts;
use super::pipe::Pipes;
use super::segment::{self, Segments};
use super::shared::SharedObjects;
use super::socket::{Connections, UnixSockets, is_connection};
use super::terminal::Terminals;
use super::{LEAST, Opened, event, high, inotify, owner};

/// What opening needs to know, and what was opened so far.
pub(super) struct Opening<'a> {
    checkpoint: &'a Checkpoint,
    request: &'a Request,
    pub(super) ghosts: Ghosts,
    pipes: Pipes,
    shared: SharedObjects,
    unix: UnixSockets,
    connections: Connections,
    terminals: Terminals,
    watches: Vec<(u32, InotifyFileEntry)>,
}

/// Reads what the images say of open files. Opens nothing.
pub(in crate::restore) fn read(checkpoint: &Checkpoint) -> Result<(), RestoreError> {
    let member = checkpoint.member();
    Ghosts::read(member)?;
    Pipes::read(member)?;
    let terminals = Terminals::read(member)?;
    UnixSockets::read(member)?;
    segment::read(checkpoint)?;
    for (process, alive) in checkpoint.alive() {
        for id in used(alive) {
            Late::of(checkpoint, &terminals, process.pid, checkpoint.file(process.pid, id)?)?;
        }
    }
    Ok(())
}

impl Opened {
    /// Opens whatever a process of the tree has open or mapped; connections wait to be told to go on.
    pub(in crate::restore) fn open(
        checkpoint: &Checkpoint,
        request: &Request,
    ) -> Result<(Self, Connections), RestoreError> {
        let member = checkpoint.member();
        let sockets = || checkpoint.files.values().filter_map(|entry| entry.isk.as_ref());
        check_connections(sockets(), request)?;
        raise_limit()?;
        let segments = Segments::make(checkpoint)?;
        let unix = checkpoint.files.values().filter_map(|entry| entry.usk.clone());
        let mut opening = Opening {
            checkpoint,
            request,
            ghosts: Ghosts::read(member)?,
            pipes: Pipes::read(member)?,
            shared: SharedObjects::make(checkpoint)?,
            unix: UnixSockets::make(member, unix)?,
            connections: Connections::block(sockets())?,
            terminals: Terminals::read(member)?,
            watches: Vec::new(),
        };
        let highest = checkpoint.alive().flat_map(|(_, alive)| &alive.descriptors).map(|d| d.fd).max();
        let least = i32::try_from(highest.unwrap_or(0)).unwrap_or(i32::MAX).saturating_add(1).max(LEAST);
        let (mut files, mut late) = (HashMap::new(), HashMap::new());
        let mut owners = Vec::new();
        let mut mapped = HashMap::new();
        for (process, alive) in checkpoint.alive() {
            for id in used(alive) {
                if files.contains_key(&id) {
                    continue;
                }
                let entry = checkpoint.file(process.pid, id)?;
                if let Some(its) = Late::of(checkpoint, &opening.terminals, process.pid, entry)? {
                    late.insert(id, its);
                    continue;
                }
                let fd = opening.file(process, entry)?;
                files.insert(id, high(&fd, least)?);
                owners.extend(owner(entry).filter(|owner| owner.pid != 0).map(|owner| (id, owner.clone())));
            }
            for vma in alive.mm.vmas.iter().filter(|vma| memory::is_made(vma)) {
                if let Origin::Mapped(Source::File { id, flags, .. }) = memory::origin(vma)
                    && !mapped.contains_key(&(id, flags))
                {
                    let entry = checkpoint.file(process.pid, id)?;
                    mapped.insert((id, flags), opening.for_mapping(process, entry, flags)?);
                }
            }
        }
        opening.messages(&files)?;
        opening.ghosts.unlink();
        opening.terminals.settle(checkpoint, least)?;
        let Opening { shared, connections, terminals, watches, .. } = opening;
        Ok((Self { files, late, least, mapped, shared, segments, owners, terminals, watches }, connections))
    }
}

/// The files that a process has open, or is in.
fn used(alive: &Alive) -> BTreeSet<u32> {
    let descriptors = alive.descriptors.iter().map(|d| d.id);
    descriptors.chain([alive.mm.exe_file_id, alive.fs.cwd_id, alive.fs.root_id]).collect()
}

/// The peers of connections expect that nothing has happened to them.
fn check_connections<'a>(
    mut sockets: impl Iterator<Item = &'a InetSkEntry>,
    request: &Request,
) -> Result<(), Refusal> {
    match sockets.find(|entry| is_connection(entry)) {
        Some(entry) if !request.tcp_established => Err(Refusal::Checkpoint(format!(
            "it has a TCP connection (port {} to port {}), which is restored with --tcp-established only",
            entry.src_port, entry.dst_port
        ))),
        _ => Ok(()),
    }
}

impl Opening<'_> {
    fn file(&mut self, process: &Process, entry: &FileEntry) -> Result<OwnedFd, RestoreError> {
        if let Some(reg) = &entry.reg {
            return self.path(process.pid, reg);
        }
        if let Some(pipe) = &entry.pipe {
            let resource = format!("pipe:[{}]", pipe.pipe_id);
            let given = self.request.inherited.iter().find(|given| given.resource == resource);
            return match given {
                Some(given) => self.pipes.given(process.pid, pipe, given.fd),
                None => self.pipes.pipe(pipe),
            };
        }
        if let Some(fifo) = &entry.fifo {
            let path = fifo.regf_id.and_then(|id| self.checkpoint.files.get(&id)?.reg.as_ref());
            return self.pipes.fifo(process.pid, fifo, path);
        }
        if let Some(memfd) = &entry.memfd {
            return self.shared.memfd(process.pid, memfd);
        }
        if let Some(UnixSkEntry { id, .. }) = &entry.usk
            && let Some(socket) = self.unix.get(*id)
        {
            return Ok(socket?);
        }
        if let Some(inet) = &entry.isk {
            return self.connections.open(process.pid, inet, self.checkpoint.member());
        }
        if let Some(tty) = &entry.tty {
            let path = tty.regf_id.and_then(|id| self.checkpoint.files.get(&id)?.reg.as_ref());
            let path = path.map(|reg| reg.name.as_str());
            return self.terminals.open(process.pid, tty, path, self.request.shell_job);
        }
        if let Some(inotify) = &entry.ify {
            self.watches.push((inotify.id, inotify.clone()));
            return Ok(inotify::make(inotify)?);
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

    /// Puts messages into unix sockets, with the files that come with them: some are open nowhere else.
    fn messages(&mut self, files: &HashMap<u32, OwnedFd>) -> Result<(), RestoreError> {
        let checkpoint = self.checkpoint;
        let mut unseen: HashMap<u32, OwnedFd> = HashMap::new();
        for id in self.unix.under_way() {
            if !files.contains_key(&id) && !unseen.contains_key(&id) {
                let root = checkpoint.root();
                let fd = self.file(root, checkpoint.file(root.pid, id)?)?;
                unseen.insert(id, fd);
            }
        }
        let file = |id| Some(files.get(&id).or_else(|| unseen.get(&id))?.as_raw_fd());
        self.unix.settle(file, |resource| self.request.external.iter().any(|given| given == resource))
    }
}

/// As many descriptors as we may have.
fn raise_limit() -> Result<(), SyscallError> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let failed = |e| SyscallError::new("setrlimit(RLIMIT_NOFILE)", "memckpt", e);
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(failed)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(failed)
}
