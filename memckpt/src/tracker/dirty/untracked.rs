//! No tracking: every page that is there counts as changed.

use super::walk::{DirtyBy, Walk};
use super::{DirtyError, DirtySource, PageRun, TrackerKind};
use crate::addr::{AddrRange, PageCount};

/// Everything is dirty: for full dumps without a tracker.
#[derive(Debug)]
pub struct Untracked {
    walk: Walk,
}

impl Untracked {
    /// Opens the pagemap of `pid`.
    ///
    /// # Errors
    /// No such process, or too few rights.
    pub fn open(pid: i32) -> Result<Self, DirtyError> {
        Ok(Self { walk: Walk::open(pid)? })
    }

    /// As [`Self::open`], but reads pagemap although there may be PAGEMAP_SCAN.
    #[cfg(test)]
    pub(super) fn open_reading(pid: i32) -> Result<Self, DirtyError> {
        Ok(Self { walk: Walk::open_reading(pid)? })
    }
}

impl DirtySource for Untracked {
    fn kind(&self) -> Option<TrackerKind> {
        None
    }

    fn scan(&mut self, ranges: &[AddrRange], entries: &mut PageCount) -> Result<Vec<PageRun>, DirtyError> {
        self.walk.runs(ranges, DirtyBy::Being, entries)
    }

    /// Does nothing.
    fn clear(&mut self, _ranges: &[AddrRange]) -> Result<(), DirtyError> {
        Ok(())
    }
}
