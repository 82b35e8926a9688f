//! Going through the descriptors: each open file once, each by its kind.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};

use crate::dump::error::DumpError;
use crate::dump::request::{Afterwards, FileOptions, Request};
use crate::dump::shared::SharedObjects;
use crate::image::proto::{FdTypes, FdinfoEntry, FileEntry, FownEntry};
use crate::image::{ImagesDir, OpenFiles};
use crate::kernel::descriptor::{self, Descriptor};
use crate::kernel::{SyscallError, kcmp, pidfd};

use super::Sockets;
use super::path::Inode;
use super::pipe::Ends;
use super::refusal::refuse_descriptor;
use super::socket::{UnixEnds, peers_first};
use super::terminal::Pseudoterminals;

/// FD_CLOEXEC, which is all that a descriptor has of its own.
const FD_CLOEXEC: u32 = libc::FD_CLOEXEC as u32;

/// What one look at a tree's open files has found so far.
pub(super) struct Collector<'a> {
    pub(super) options: &'a FileOptions,
    /// What was read of sockets; nothing before the freeze.
    pub(super) sockets: Option<Sockets<'a>>,
    /// What is not covered is refused, and not only told.
    strict: bool,
    pub(super) shared: &'a mut SharedObjects,
    pub(super) images: &'a mut ImagesDir,
    pub(super) out: OpenFiles,
    pub(super) notes: Vec<String>,
    last_id: u32,
    files: HashMap<Resemblance, Vec<Known>>,
    /// Files that have no descriptor: executables, directories and what is mapped.
    pub(super) inodes: HashMap<Inode, u32>,
    pub(super) ghosts: HashMap<Inode, u32>,
    pub(super) pipes: HashMap<Inode, Ends>,
    pub(super) unix: UnixEnds,
    pub(super) pseudoterminals: Pseudoterminals,
    /// Copies of files that are on their way through sockets, to tell them from others.
    under_way: Vec<OwnedFd>,
}

/// What two descriptors of one open file have in common. Not everything that resembles is the same: kcmp(2) says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Resemblance {
    inode: Inode,
    flags: u32,
    pos: u64,
}

/// An open file, and one of its descriptors.
struct Known {
    at: (i32, i32),
    id: u32,
    kind: FdTypes,
}

impl<'a> Collector<'a> {
    pub(super) fn new(
        request: &'a Request,
        sockets: Option<Sockets<'a>>,
        shared: &'a mut SharedObjects,
        images: &'a mut ImagesDir,
    ) -> Self {
        Self {
            options: &request.files,
            sockets,
            strict: request.afterwards == Afterwards::Ended,
            shared,
            images,
            out: OpenFiles::default(),
            notes: Vec::new(),
            last_id: 0,
            files: HashMap::new(),
            inodes: HashMap::new(),
            ghosts: HashMap::new(),
            pipes: HashMap::new(),
            unix: UnixEnds::default(),
            pseudoterminals: Pseudoterminals::default(),
            under_way: Vec::new(),
        }
    }

    /// A number for a file; numbers begin with 1.
    pub(super) fn next_id(&mut self) -> u32 {
        self.last_id += 1;
        self.last_id
    }

    /// `result`, or a note in its place where a refusal need not stop the dump.
    pub(super) fn unless_refused<T>(&mut self, result: Result<T, DumpError>) -> Result<Option<T>, DumpError> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(DumpError::Refused(refusal)) if !self.strict => {
                self.notes.push(format!("cannot be restored from this checkpoint: {refusal}"));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The tree stands still: what is so now is so in the checkpoint.
    pub(super) const fn is_frozen(&self) -> bool {
        self.sockets.is_some()
    }

    /// Refuses what may be otherwise in a moment: only where the tree stands still.
    pub(super) fn passing(&self, refusal: DumpError) -> Result<(), DumpError> {
        if self.is_frozen() { Err(refusal) } else { Ok(()) }
    }

    /// The table of descriptors of process `pid`.
    pub(super) fn table(&mut self, pid: i32) -> Result<Vec<FdinfoEntry>, DumpError> {
        let process = pidfd::open(pid)?;
        let mut table = Vec::new();
        for fd in descriptor::numbers(pid)? {
            let found = Descriptor::open(process.as_fd(), pid, fd)?;
            let file = self.file(&found);
            let Some((id, kind)) = self.unless_refused(file)? else { continue };
            let locks = self.locks(&found);
            self.unless_refused(locks)?;
            let flags = if found.info.close_on_exec() { FD_CLOEXEC } else { 0 };
            table.push(FdinfoEntry {
                id,
                flags,
                r#type: kind as i32,
                fd: fd as u32,
                xattr_security_selinux: None,
            });
        }
        Ok(table)
    }

    /// The number of the file that is on its way to somebody, of which `copy` is a descriptor of ours.
    pub(super) fn file_under_way(&mut self, copy: &OwnedFd) -> Result<u32, DumpError> {
        let ours = std::process::id() as i32;
        let kept = copy.try_clone().map_err(|e| SyscallError::new("dup", "a descriptor under way", e))?;
        let found = Descriptor::open(pidfd::open(ours)?.as_fd(), ours, kept.as_raw_fd())?;
        let (id, _) = self.file(&found)?;
        self.under_way.push(kept);
        Ok(id)
    }

    /// The number of an open file.
    fn file(&mut self, found: &Descriptor) -> Result<(u32, FdTypes), DumpError> {
        match self.known(found)? {
            Some(known) => Ok(known),
            None => self.add(found),
        }
    }

    /// The number of an open file that another descriptor means too.
    fn known(&self, found: &Descriptor) -> Result<Option<(u32, FdTypes)>, DumpError> {
        for known in self.files.get(&resemblance(found)).into_iter().flatten() {
            if kcmp::files(known.at, (found.pid, found.fd))? == Ordering::Equal {
                return Ok(Some((known.id, known.kind)));
            }
        }
        Ok(None)
    }

    fn add(&mut self, found: &Descriptor) -> Result<(u32, FdTypes), DumpError> {
        let id = self.next_id();
        let entry = self.entry(found, id)?;
        let kind = entry.r#type();
        self.out.files.push(entry);
        let known = Known { at: (found.pid, found.fd), id, kind };
        self.files.entry(resemblance(found)).or_default().push(known);
        Ok((id, kind))
    }

    /// The open file behind `found`, by its kind.
    fn entry(&mut self, found: &Descriptor, id: u32) -> Result<FileEntry, DumpError> {
        // Anonymous inodes, and files of the kernel's internal mounts, have links that are no paths. Their mode is the kernel's
        // business: regular files since Linux 6.17, nothing before.
        if let Some(link) = found.link.to_str().filter(|link| !link.starts_with('/')) {
            match link {
                "anon_inode:[eventfd]" => return Self::eventfd(found, id),
                "anon_inode:[signalfd]" => return Self::signalfd(found, id),
                "anon_inode:[timerfd]" => return Self::timerfd(found, id),
                "anon_inode:[eventpoll]" => return Self::epoll(found, id),
                "anon_inode:inotify" => return Self::inotify(found, id),
                "anon_inode:[pidfd]" => return self.pidfd(found, id),
                _ => {}
            }
            if !link.starts_with("pipe:[") && !link.starts_with("socket:[") {
                let kind = link.trim_start_matches("anon_inode:").trim_matches(['[', ']']);
                return Err(refuse_descriptor(
                    found,
                    kind,
                    "is of a kind that memckpt does not capture: close it first",
                ));
            }
        }
        match found.file_type() {
            libc::S_IFIFO => self.pipe(found, id),
            libc::S_IFSOCK => self.socket(found, id),
            libc::S_IFCHR => self.character_device(found, id),
            libc::S_IFREG if Self::is_memfd(found) => self.memfd(found, id),
            libc::S_IFREG | libc::S_IFDIR => self.path_file(found, id),
            libc::S_IFBLK => Err(refuse_descriptor(
                found,
                "block device",
                "has no content that a checkpoint could hold: close it first",
            )),
            libc::S_IFLNK => Err(refuse_descriptor(
                found,
                "symbolic link opened with O_PATH",
                "cannot be opened again as it was: close it first",
            )),
            other => Err(refuse_descriptor(
                found,
                format!("file of type {other:#o}"),
                "is of a kind that memckpt does not capture: close it first",
            )),
        }
    }

    /// What can be decided only when all descriptors are known.
    pub(super) fn connect(&mut self) -> Result<(), DumpError> {
        self.take_messages()?;
        self.note_outer_ends();
        self.outer_unix_peers()?;
        self.outer_terminals()
    }

    /// All that was found, and what the user should know.
    pub(super) fn finish(mut self) -> (OpenFiles, Vec<String>) {
        self.out.files = peers_first(self.out.files);
        (self.out, self.notes)
    }
}

fn resemblance(found: &Descriptor) -> Resemblance {
    Resemblance { inode: Inode::of(&found.stat), flags: found.info.file_flags(), pos: found.info.pos }
}

/// Who is told of the events of `found`.
pub(super) fn owner(found: &Descriptor) -> Result<FownEntry, DumpError> {
    let owner = found.owner()?;
    Ok(FownEntry {
        uid: owner.uids.0,
        euid: owner.uids.1,
        signum: owner.signal,
        pid_type: owner.kind,
        // A group is told by its negative number in fcntl(F_GETOWN), but not in F_GETOWN_EX.
        pid: owner.id.unsigned_abs(),
    })
}
