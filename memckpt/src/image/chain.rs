//! A checkpoint and its parents, read as one.

mod member;
mod stored;
mod verify;

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::AT_FDCWD;

use crate::addr::{Addr, AddrRange, PageCount};
use crate::range_set::RangeSet;

use super::checksums::ChecksumsError;
use super::files;
use super::magic::PARENT;
use super::meta::MetaError;
use super::pagemap::PagemapFlags;
use super::record::RecordError;

pub use member::{Ghost, Member};
pub use stored::StoredPages;
pub use verify::KnownChecksums;

/// A chain that cannot be used. Every variant names the member at fault.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// A directory cannot be opened.
    #[error("{}: cannot be opened: {source}", path.display())]
    Open {
        /// The directory.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A directory without `inventory.img`.
    #[error("{}: holds no complete checkpoint (no inventory.img)", .0.display())]
    Incomplete(PathBuf),
    /// The parents lead back to a directory of the chain.
    #[error("{}: is its own ancestor", .0.display())]
    Cycle(PathBuf),
    /// A file cannot be read.
    #[error("{}: {file}: {source}", path.display())]
    Read {
        /// The directory.
        path: PathBuf,
        /// The file.
        file: String,
        /// The reason.
        source: io::Error,
    },
    /// A file is damaged.
    #[error("{}: {source}", path.display())]
    Damaged {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        source: RecordError,
    },
    /// `memckpt.json` is damaged or too new.
    #[error("{}: {source}", path.display())]
    Meta {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        source: MetaError,
    },
    /// The checksums are damaged, too new, or those of other pages.
    #[error("{}: {source}. To restore without them: --no-verify", path.display())]
    Checksums {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        source: ChecksumsError,
    },
    /// Pages are not what they were when they were written.
    #[error("{}: {file}: the pages at {range} are not those that were written: their checksum differs. Restore another checkpoint, or take them as they are with --no-verify", path.display())]
    Changed {
        /// The directory.
        path: PathBuf,
        /// The pages file.
        file: String,
        /// Where: addresses, or offsets in shared memory.
        range: AddrRange,
    },
    /// The pages file is missing or shorter than the pagemap says.
    #[error("{}: {file} has {has} bytes where the pagemap counts {needed}", path.display())]
    PagesTooShort {
        /// The directory.
        path: PathBuf,
        /// The pages file.
        file: String,
        /// What the pagemap says.
        needed: u64,
        /// How long the file is; 0 when missing.
        has: u64,
    },
    /// A page is said to be in the parent and is not there.
    #[error("{}: the page at {address} should be in the parent and is not", path.display())]
    MissingInParent {
        /// The directory whose pagemap says so.
        path: PathBuf,
        /// The first such page.
        address: Addr,
    },
    /// The parent by its `parent` link is not the checkpoint that `memckpt.json` names.
    #[error("{}: was made on top of checkpoint {expected}, but {} holds {found}", path.display(), parent.display())]
    WrongParent {
        /// The directory.
        path: PathBuf,
        /// Its parent directory.
        parent: PathBuf,
        /// The checkpoint it was made on.
        expected: String,
        /// The checkpoint that is there.
        found: String,
    },
    /// It is not clear which process is meant.
    #[error("{}: holds the memory of {} processes; name one", path.display(), pids.len())]
    WhichProcess {
        /// The directory.
        path: PathBuf,
        /// Those it has.
        pids: Vec<i32>,
    },
    /// A page asked for is in no member.
    #[error("the checkpoint {} has no page at {address}", path.display())]
    NotHeld {
        /// The youngest directory.
        path: PathBuf,
        /// The page.
        address: Addr,
    },
}

/// A run of pages and where its bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldRun {
    /// Its addresses.
    pub range: AddrRange,
    /// Which member has the bytes: an index into [`Chain::members`].
    pub member: usize,
    /// Where they begin in that member's pages file.
    pub offset: u64,
}

impl HeldRun {
    fn part(&self, range: AddrRange) -> Option<Self> {
        let range = self.range.intersection(range)?;
        let offset = self.offset + (range.start.get() - self.range.start.get());
        Some(Self { range, member: self.member, offset })
    }
}

/// The memory of one process, put together from a checkpoint and its parents.
#[derive(Debug)]
pub struct Chain {
    members: Vec<Member>,
    pid: i32,
    runs: Vec<HeldRun>,
}

impl Chain {
    /// Opens the checkpoint in `path` and all its parents, and checks that every page of it can be found. The
    /// process is the root of the tree that it holds.
    ///
    /// # Errors
    /// A member is missing, incomplete, damaged or its own ancestor; or it holds several processes and no tree.
    pub fn open(path: &Path) -> Result<Self, ChainError> {
        Self::open_at(AT_FDCWD, path, path, None)
    }

    /// The same, for process `pid`.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_task(path: &Path, pid: i32) -> Result<Self, ChainError> {
        Self::open_at(AT_FDCWD, path, path, Some(pid))
    }

    /// Opens `path` relative to `base`; messages call it `name`.
    pub(super) fn open_at(
        base: impl AsFd,
        path: &Path,
        name: &Path,
        pid: Option<i32>,
    ) -> Result<Self, ChainError> {
        let open_error =
            |path: &Path, errno: Errno| ChainError::Open { path: path.to_owned(), source: errno.into() };
        let mut seen = HashMap::new();
        let mut members: Vec<Member> = Vec::new();
        let mut fd = files::open_dir(base, path, true).map_err(|errno| open_error(name, errno))?;
        let mut name = name.to_owned();
        let mut pid = pid;
        loop {
            let identity = files::identity(&fd).map_err(|errno| open_error(&name, errno))?;
            if seen.insert(identity, members.len()).is_some() {
                return Err(ChainError::Cycle(name));
            }
            // The link itself says whether there is a parent; opening it says whether that is still there.
            let parent = match nix::fcntl::readlinkat(&fd, PARENT) {
                Ok(link) => {
                    let parent_name = name.join(&link);
                    let parent_fd = files::open_dir(&fd, Path::new(PARENT), true)
                        .map_err(|errno| open_error(&parent_name, errno))?;
                    let parent_name = files::resolved(&parent_fd).unwrap_or(parent_name);
                    Some((parent_fd, parent_name))
                }
                Err(Errno::ENOENT) => None,
                Err(errno) => return Err(open_error(&name.join(PARENT), errno)),
            };
            let member = Member::open(fd, identity, name, pid)?;
            pid = Some(member.pid());
            members.push(member);
            let Some((parent_fd, parent_name)) = parent else { break };
            (fd, name) = (parent_fd, parent_name);
        }
        for pair in members.windows(2) {
            check_parent(&pair[0], &pair[1])?;
        }
        let runs = resolve(&members)?;
        Ok(Self { pid: pid.unwrap_or_default(), members, runs })
    }

    /// A process without any page, of no checkpoint.
    #[cfg(test)]
    pub(crate) fn empty() -> Self {
        Self { members: Vec::new(), pid: 0, runs: Vec::new() }
    }

    /// Its members, youngest first. There is at least one.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The checkpoint itself.
    #[must_use]
    pub fn youngest(&self) -> &Member {
        &self.members[0]
    }

    /// The process whose memory it is.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// All pages, sorted, with where their bytes are.
    #[must_use]
    pub fn runs(&self) -> &[HeldRun] {
        &self.runs
    }

    /// The pages that it holds: what a next checkpoint can leave to this one.
    #[must_use]
    pub fn held(&self) -> RangeSet {
        self.runs.iter().map(|run| run.range).collect()
    }

    /// How many pages it holds.
    #[must_use]
    pub fn pages(&self) -> PageCount {
        self.runs.iter().map(|run| run.range.pages()).sum()
    }

    /// Where the bytes at `addr` are: a run that begins there.
    #[must_use]
    pub fn lookup(&self, addr: Addr) -> Option<HeldRun> {
        let at = self.runs.partition_point(|run| run.range.end <= addr);
        let run = self.runs.get(at)?;
        run.part(AddrRange { start: addr, end: run.range.end }).filter(|part| part.range.start == addr)
    }

    /// The parts of `range` that it holds, in order.
    pub fn within(&self, range: AddrRange) -> impl Iterator<Item = HeldRun> + '_ {
        within(&self.runs, range)
    }

    /// Reads the bytes of `range`, all of which must be held, into the beginning of `buffer`.
    ///
    /// # Errors
    /// A page is not held, or the pages file cannot be read.
    ///
    /// # Panics
    /// `buffer` is shorter than `range`.
    pub fn read(&self, range: AddrRange, buffer: &mut [u8]) -> Result<(), ChainError> {
        let mut at = range.start;
        let not_held = |address| ChainError::NotHeld { path: self.youngest().path().to_owned(), address };
        for run in self.within(range) {
            if run.range.start != at {
                return Err(not_held(at));
            }
            let from = (at.get() - range.start.get()) as usize;
            self.read_run(&run, &mut buffer[from..from + run.range.len() as usize])?;
            at = run.range.end;
        }
        if at < range.end { Err(not_held(at)) } else { Ok(()) }
    }

    /// Reads the bytes of a run of this chain.
    ///
    /// # Errors
    /// The pages file cannot be read.
    pub fn read_run(&self, run: &HeldRun, buffer: &mut [u8]) -> Result<(), ChainError> {
        self.members[run.member].read(run.offset, buffer)
    }
}

fn within(runs: &[HeldRun], range: AddrRange) -> impl Iterator<Item = HeldRun> + '_ {
    let from = runs.partition_point(|run| run.range.end <= range.start);
    runs[from..]
        .iter()
        .take_while(move |run| run.range.start < range.end)
        .filter_map(move |run| run.part(range))
}

/// Where both sides say which checkpoint they are, they must agree.
fn check_parent(child: &Member, parent: &Member) -> Result<(), ChainError> {
    let expected = child.meta().and_then(|meta| meta.parent.as_ref());
    let found = parent.meta().map(|meta| &meta.id);
    match (expected, found) {
        (Some(expected), Some(found)) if expected != found => Err(ChainError::WrongParent {
            path: child.path().to_owned(),
            parent: parent.path().to_owned(),
            expected: expected.to_string(),
            found: found.to_string(),
        }),
        _ => Ok(()),
    }
}

/// From the oldest member up: what each holds, with inherited runs replaced by those of its parent.
fn resolve(members: &[Member]) -> Result<Vec<HeldRun>, ChainError> {
    let mut held: Vec<HeldRun> = Vec::new();
    for (index, member) in members.iter().enumerate().rev() {
        let mut own = Vec::new();
        for run in member.pagemap().runs() {
            if run.flags.contains(PagemapFlags::PRESENT) {
                own.push(HeldRun { range: run.range, member: index, offset: run.offset });
                continue;
            }
            let mut at = run.range.start;
            for part in within(&held, run.range) {
                if part.range.start != at {
                    break;
                }
                at = part.range.end;
                own.push(part);
            }
            if at < run.range.end {
                return Err(ChainError::MissingInParent { path: member.path().to_owned(), address: at });
            }
        }
        held = own;
    }
    Ok(held)
}

#[cfg(test)]
mod tests;
