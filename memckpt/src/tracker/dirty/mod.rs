//! What changed since the last clear: one interface, three sources.

mod runs;
mod soft_dirty;
mod uffd_wp;
mod untracked;
mod walk;
mod witness;

#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;

use bitflags::bitflags;
use serde::{Deserialize, Serialize};

use crate::addr::{AddrRange, PageCount};
use crate::kernel::SyscallError;
use crate::kernel::maps::MapsError;

pub use soft_dirty::SoftDirty;
pub use uffd_wp::UffdWp;
pub use untracked::Untracked;
pub use witness::{Verdict, Witness};

bitflags! {
    /// What a page is now.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct PageFlags: u8 {
        /// In memory.
        const PRESENT = 1 << 0;
        /// Swapped or being migrated: it has content, which a read brings back.
        const SWAPPED = 1 << 1;
        /// Changed since the last clear, or nobody can say that it did not.
        const DIRTY = 1 << 2;
        /// A page of a file or of shared memory; in a private mapping: not yet copied on write.
        const FILE = 1 << 3;
        /// The kernel's zero page, small or huge. Never together with FILE.
        const ZERO = 1 << 4;
        /// In a guard region (MADV_GUARD_INSTALL): no content, a read faults. Never together with another flag.
        const GUARD = 1 << 5;
    }
}

/// Pages next to each other that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// Their addresses.
    pub range: AddrRange,
    /// What they are.
    pub flags: PageFlags,
}

/// How changes are tracked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrackerKind {
    /// Soft-dirty bits (CONFIG_MEM_SOFT_DIRTY).
    SoftDirty,
    /// Asynchronous write protection by userfaultfd (Linux 6.7).
    UffdWp,
}

impl TrackerKind {
    /// The name on the command line and in files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::SoftDirty => "soft-dirty",
            Self::UffdWp => "uffd-wp",
        }
    }
}

impl fmt::Display for TrackerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A word that names no tracker.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("no tracker is called {0:?}: soft-dirty and uffd-wp are")]
pub struct UnknownTracker(String);

impl FromStr for TrackerKind {
    type Err = UnknownTracker;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        [Self::SoftDirty, Self::UffdWp]
            .into_iter()
            .find(|kind| kind.name() == word)
            .ok_or_else(|| UnknownTracker(word.to_owned()))
    }
}

/// Why the state of pages could not be read or cleared.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// A system call failed.
    #[error(transparent)]
    Syscall(#[from] SyscallError),
    /// The layout could not be read.
    #[error(transparent)]
    Maps(MapsError),
    /// The address space is gone: the process exited, or executed another program.
    #[error("the address space of process {pid} no longer exists")]
    Gone {
        /// The process.
        pid: i32,
    },
}

impl From<MapsError> for DirtyError {
    fn from(error: MapsError) -> Self {
        match error {
            MapsError::Syscall(error) => Self::Syscall(error),
            MapsError::Gone { pid } => Self::Gone { pid },
            MapsError::Malformed { .. } => Self::Maps(error),
        }
    }
}

/// A source of truth about changed pages.
///
/// Ranges given to it are page-aligned, sorted and do not overlap; one range a VMA is best.
pub trait DirtySource: Send {
    /// How it tracks; `None`: it does not, everything is dirty always.
    fn kind(&self) -> Option<TrackerKind>;

    /// The states of the pages in `ranges` that are present, swapped or guards, as sorted runs that never reach over
    /// the end of one range. A page in no run has no content now: nothing there can be inherited.
    ///
    /// Adds to `entries` the pages that the kernel was asked to look at.
    ///
    /// # Errors
    /// [`DirtyError::Gone`], or a system call failed; nothing is known then.
    fn scan(&mut self, ranges: &[AddrRange], entries: &mut PageCount) -> Result<Vec<PageRun>, DirtyError>;

    /// Makes the pages of `ranges` clean: from now on only what is written reads dirty. A source may clear more than
    /// `ranges` (soft-dirty: the whole process). With the process running, writes between a scan and this are lost.
    ///
    /// # Errors
    /// A system call failed; part may be cleared, so the epoch is broken.
    fn clear(&mut self, ranges: &[AddrRange]) -> Result<(), DirtyError>;
}

/// Opens the source of `kind` for process `pid`.
///
/// # Errors
/// No such process, or too few rights.
pub fn open(kind: Option<TrackerKind>, pid: i32) -> Result<Box<dyn DirtySource>, DirtyError> {
    Ok(match kind {
        Some(TrackerKind::SoftDirty) => Box::new(SoftDirty::open(pid)?),
        Some(TrackerKind::UffdWp) => Box::new(UffdWp::open(pid)?),
        None => Box::new(Untracked::open(pid)?),
    })
}
