//! Soft-dirty bits (Documentation/admin-guide/mm/soft-dirty.rst).

use super::walk::{DirtyBy, Walk};
use super::{DirtyError, DirtySource, PageRun, TrackerKind};
use crate::addr::{AddrRange, PageCount};
use crate::kernel::clear_refs::clear_soft_dirty;

/// Changes by soft-dirty bits: PAGEMAP_SCAN where the kernel has it (Linux 6.7), else pagemap.
///
/// A kernel without CONFIG_MEM_SOFT_DIRTY shows every page clean: use it only where the probe of
/// [`crate::kernel::features`] has passed.
#[derive(Debug)]
pub struct SoftDirty {
    walk: Walk,
}

impl SoftDirty {
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

impl DirtySource for SoftDirty {
    fn kind(&self) -> Option<TrackerKind> {
        Some(TrackerKind::SoftDirty)
    }

    fn scan(&mut self, ranges: &[AddrRange], entries: &mut PageCount) -> Result<Vec<PageRun>, DirtyError> {
        self.walk.runs(ranges, DirtyBy::SoftDirty, entries)
    }

    /// Clears the whole process, whatever `ranges` are.
    fn clear(&mut self, _ranges: &[AddrRange]) -> Result<(), DirtyError> {
        Ok(clear_soft_dirty(self.walk.pid())?)
    }
}
