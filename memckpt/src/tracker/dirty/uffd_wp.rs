//! Asynchronous write protection by userfaultfd, read by PAGEMAP_SCAN (Linux 6.7).

use super::runs::{Runs, spans};
use super::walk::{DirtyBy, Walk};
use super::{DirtyError, DirtySource, PageRun, TrackerKind};
use crate::addr::{AddrRange, PageCount};
use crate::kernel::maps::MapsFile;
use crate::kernel::pagemap_scan::ScanFlags;

/// Changes by write protection. Somebody else, the watch session, holds the userfaultfd and registers VMAs
/// ([`crate::tracker::uffd::WriteProtect`]); a VMA that is not registered is dirty as a whole.
#[derive(Debug)]
pub struct UffdWp {
    walk: Walk,
    maps: MapsFile,
}

impl UffdWp {
    /// Opens the pagemap and the maps of `pid`.
    ///
    /// # Errors
    /// No such process, or too few rights.
    pub fn open(pid: i32) -> Result<Self, DirtyError> {
        Ok(Self { walk: Walk::open(pid)?, maps: MapsFile::open(pid)? })
    }

    /// Scans `range`, which may hold VMAs that are not tracked: one of those fails the whole.
    fn scan_vma_by_vma(
        &mut self,
        range: AddrRange,
        runs: &mut Runs<'_>,
        entries: &mut PageCount,
    ) -> Result<(), DirtyError> {
        for vma in self.maps.query(range)? {
            let Some(part) = vma.range.intersection(range) else { continue };
            if !self.scan_tracked(part, runs, entries)? {
                let scanned = self.walk.scan(part, DirtyBy::Being, ScanFlags::empty(), runs, entries);
                scanned.map_err(|e| self.walk.explain(e))?;
            }
        }
        Ok(())
    }

    /// Scans `range`; `false`, and nothing pushed, when not all of it is tracked.
    fn scan_tracked(
        &mut self,
        range: AddrRange,
        runs: &mut Runs<'_>,
        entries: &mut PageCount,
    ) -> Result<bool, DirtyError> {
        match self.walk.scan(range, DirtyBy::Written, ScanFlags::CHECK_WPASYNC, runs, entries) {
            Ok(()) => Ok(true),
            Err(e) if e.errno() == Some(libc::EPERM) => Ok(false),
            Err(e) => Err(self.walk.explain(e)),
        }
    }
}

impl DirtySource for UffdWp {
    fn kind(&self) -> Option<TrackerKind> {
        Some(TrackerKind::UffdWp)
    }

    fn scan(&mut self, ranges: &[AddrRange], entries: &mut PageCount) -> Result<Vec<PageRun>, DirtyError> {
        let mut runs = Runs::of(ranges);
        for span in spans(ranges) {
            if !self.scan_tracked(span, &mut runs, entries)? {
                self.scan_vma_by_vma(span, &mut runs, entries)?;
            }
        }
        self.walk.still_there()?;
        Ok(runs.finish())
    }

    /// Protects all pages of `ranges` that have content; in VMAs that are not registered this does nothing.
    fn clear(&mut self, ranges: &[AddrRange]) -> Result<(), DirtyError> {
        for span in spans(ranges) {
            self.walk.protect(span).map_err(|e| self.walk.explain(e))?;
        }
        self.walk.still_there()
    }
}
