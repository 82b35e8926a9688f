//! Reads page states through PAGEMAP_SCAN, or through pagemap where the kernel has no such ioctl.

use super::runs::{Runs, spans};
use super::{DirtyError, PageFlags, PageRun};
use crate::addr::{Addr, AddrRange, CHUNK_SIZE, PAGE_SIZE, PageCount};
use crate::kernel::SyscallError;
use crate::kernel::pagemap::{Pagemap, PagemapEntry};
use crate::kernel::pagemap_scan::{self, Categories, Query, Region, ScanFlags, Scanner};
use crate::kernel::zero_page::ZeroFrames;

/// Words read at once: 512 KiB of them, for 256 MiB of addresses.
const WORDS: usize = 64 << 10;
/// What every scan reports of a page, where the kernel knows it.
const STATE: Categories = Categories::PRESENT
    .union(Categories::SWAPPED)
    .union(Categories::FILE)
    .union(Categories::PFNZERO)
    .union(Categories::HUGE)
    .union(Categories::GUARD);

/// What makes a page dirty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DirtyBy {
    /// Its soft-dirty bit, or its VMA's.
    SoftDirty,
    /// It is not write-protected. Only with PAGEMAP_SCAN.
    Written,
    /// Being there.
    Being,
}

impl DirtyBy {
    fn category(self) -> Categories {
        match self {
            Self::SoftDirty => Categories::SOFT_DIRTY,
            Self::Written => Categories::WRITTEN,
            Self::Being => Categories::empty(),
        }
    }
}

/// A reader of page states with its buffers.
#[derive(Debug)]
pub(super) struct Walk {
    pagemap: Pagemap,
    /// The scanner and what it may be asked for, where there is the ioctl.
    scanner: Option<(Scanner, Categories)>,
    regions: Vec<Region>,
    words: Vec<PagemapEntry>,
    zero: ZeroFrames,
}

impl Walk {
    pub(super) fn open(pid: i32) -> Result<Self, SyscallError> {
        let scanner = pagemap_scan::supported().map(|known| (Scanner::default(), known));
        let words = if scanner.is_some() { Vec::new() } else { vec![PagemapEntry::default(); WORDS] };
        Ok(Self {
            pagemap: Pagemap::open(pid)?,
            scanner,
            regions: Vec::new(),
            words,
            zero: ZeroFrames::get(),
        })
    }

    /// As [`Self::open`], but reads pagemap although there may be something faster.
    #[cfg(test)]
    pub(super) fn open_reading(pid: i32) -> Result<Self, SyscallError> {
        let words = vec![PagemapEntry::default(); WORDS];
        Ok(Self { scanner: None, words, ..Self::open(pid)? })
    }

    pub(super) fn pid(&self) -> i32 {
        self.pagemap.pid()
    }

    /// Reads the states of all pages of `ranges`.
    pub(super) fn runs(
        &mut self,
        ranges: &[AddrRange],
        by: DirtyBy,
        entries: &mut PageCount,
    ) -> Result<Vec<PageRun>, DirtyError> {
        let mut runs = Runs::of(ranges);
        let scans = self.scanner.as_ref().is_some_and(|(_, known)| known.contains(by.category()));
        for span in spans(ranges) {
            let walked = if scans {
                self.scan(span, by, ScanFlags::empty(), &mut runs, entries)
            } else {
                self.read(span, by, &mut runs, entries)
            };
            walked.map_err(|e| self.explain(e))?;
        }
        self.still_there()?;
        Ok(runs.finish())
    }

    /// A kernel may say ESRCH of an address space that is gone (PAGEMAP_SCAN, seen on 6.12).
    pub(super) fn explain(&self, error: SyscallError) -> DirtyError {
        if error.errno() == Some(libc::ESRCH) { DirtyError::Gone { pid: self.pid() } } else { error.into() }
    }

    /// Another kernel finds nothing there and reports no error (seen on 6.18): ask afterwards.
    pub(super) fn still_there(&self) -> Result<(), DirtyError> {
        if self.pagemap.is_alive()? { Ok(()) } else { Err(DirtyError::Gone { pid: self.pid() }) }
    }

    /// Scans one span; nothing is pushed when it fails.
    pub(super) fn scan(
        &mut self,
        span: AddrRange,
        by: DirtyBy,
        flags: ScanFlags,
        runs: &mut Runs<'_>,
        entries: &mut PageCount,
    ) -> Result<(), SyscallError> {
        let Some((scanner, known)) = &mut self.scanner else {
            let none = std::io::Error::from_raw_os_error(libc::ENOTTY);
            return Err(SyscallError::new(
                "ioctl(PAGEMAP_SCAN)",
                format!("/proc/{}/pagemap", self.pagemap.pid()),
                none,
            ));
        };
        let query = Query {
            flags,
            any_of: Categories::PRESENT | Categories::SWAPPED,
            report: (STATE | by.category()) & *known,
            ..Query::default()
        };
        let mut regions = std::mem::take(&mut self.regions);
        regions.clear();
        let scanned = scanner.scan(&self.pagemap, span, &query, |region| regions.push(region));
        let pushed = scanned.and_then(|()| {
            *entries += span.pages();
            regions.iter().try_for_each(|region| self.push_region(*region, by, runs, entries))
        });
        self.regions = regions;
        pushed
    }

    /// Protects every page of `range` that has content and is not protected; VMAs that are not tracked are passed over.
    pub(super) fn protect(&mut self, range: AddrRange) -> Result<(), SyscallError> {
        let Some((scanner, known)) = &mut self.scanner else { return Ok(()) };
        // Only what has content: a protected hole would cost page tables and a PTE marker that reads as swapped, and a
        // page that appears in a hole later is not protected, so dirty, anyway. No guards either.
        let guard = Categories::GUARD & *known;
        let query = Query {
            flags: ScanFlags::WP_MATCHING,
            all_of: Categories::WRITTEN | guard,
            any_of: Categories::PRESENT | Categories::SWAPPED,
            inverted: guard,
            report: Categories::WRITTEN,
        };
        scanner.scan(&self.pagemap, range, &query, drop)
    }

    fn push_region(
        &self,
        region: Region,
        by: DirtyBy,
        runs: &mut Runs<'_>,
        entries: &mut PageCount,
    ) -> Result<(), SyscallError> {
        let (range, is) = (region.range(), region.categories());
        let dirty = if by == DirtyBy::Being || is.contains(by.category()) {
            PageFlags::DIRTY
        } else {
            PageFlags::empty()
        };
        if is.contains(Categories::GUARD) {
            runs.push(range, PageFlags::GUARD);
        } else if is.contains(Categories::PRESENT) {
            let page = PageFlags::PRESENT | dirty;
            if is.contains(Categories::PFNZERO) {
                runs.push(range, page | PageFlags::ZERO);
            } else if is.contains(Categories::FILE) {
                runs.push(range, page | PageFlags::FILE);
            } else if is.contains(Categories::HUGE) && self.zero.huge_needs_a_look() {
                self.push_huge(range, page, runs, entries)?;
            } else {
                runs.push(range, page);
            }
        } else if self.zero.frames_are_visible() {
            self.push_swapped(range, dirty, runs, entries)?;
        } else {
            // It may be a mere marker: what is in doubt is dumped.
            runs.push(range, PageFlags::SWAPPED | PageFlags::DIRTY);
        }
        Ok(())
    }

    /// Huge pages of which some may be the huge zero page: their frames tell.
    fn push_huge(
        &self,
        range: AddrRange,
        page: PageFlags,
        runs: &mut Runs<'_>,
        entries: &mut PageCount,
    ) -> Result<(), SyscallError> {
        let mut at = range.start;
        while at < range.end {
            let next = Addr((at.get() / CHUNK_SIZE + 1) * CHUNK_SIZE).min(range.end);
            *entries += PageCount(1);
            let zero = self.zero.is_zero(self.pagemap.entry(at)?);
            runs.push(AddrRange { start: at, end: next }, if zero { page | PageFlags::ZERO } else { page });
            at = next;
        }
        Ok(())
    }

    /// "Swapped" pages: real ones, and PTE markers, which have no content. A write-protected page of a file mapping
    /// that was dropped (MADV_DONTNEED, truncation) leaves a marker that reads swapped and unwritten
    /// (zap_install_uffd_wp_if_needed, mm/memory.c).
    fn push_swapped(
        &self,
        range: AddrRange,
        dirty: PageFlags,
        runs: &mut Runs<'_>,
        entries: &mut PageCount,
    ) -> Result<(), SyscallError> {
        let mut words = vec![PagemapEntry::default(); (range.pages().get() as usize).min(WORDS)];
        let mut at = range.start;
        while at < range.end {
            let want = ((range.end.get() - at.get()) / PAGE_SIZE).min(words.len() as u64) as usize;
            let n = self.pagemap.read(at, &mut words[..want])?;
            *entries += PageCount(n as u64);
            if n == 0 {
                break;
            }
            for word in &words[..n] {
                let page = AddrRange::with_len(at, PAGE_SIZE);
                runs.push(page, self.state(*word, dirty));
                at = page.end;
            }
        }
        Ok(())
    }

    /// Reads one span's words.
    fn read(
        &mut self,
        span: AddrRange,
        by: DirtyBy,
        runs: &mut Runs<'_>,
        entries: &mut PageCount,
    ) -> Result<(), SyscallError> {
        if self.words.is_empty() {
            self.words = vec![PagemapEntry::default(); WORDS];
        }
        let mut words = std::mem::take(&mut self.words);
        let mut at = span.start;
        let mut failed = Ok(());
        while at < span.end {
            let want = ((span.end.get() - at.get()) / PAGE_SIZE).min(words.len() as u64) as usize;
            match self.pagemap.read(at, &mut words[..want]) {
                // Gone, which the caller finds out, or beyond the last address that a process can have.
                Ok(0) => break,
                Ok(n) => {
                    *entries += PageCount(n as u64);
                    self.push_words(at, &words[..n], by, runs);
                    at = at.saturating_add(n as u64 * PAGE_SIZE);
                }
                Err(e) => {
                    failed = Err(e);
                    break;
                }
            }
        }
        self.words = words;
        failed
    }

    fn push_words(&self, start: Addr, words: &[PagemapEntry], by: DirtyBy, runs: &mut Runs<'_>) {
        let mut at = start;
        for alike in words.chunk_by(|a, b| self.look_alike(*a, *b)) {
            let range = AddrRange::with_len(at, alike.len() as u64 * PAGE_SIZE);
            at = range.end;
            let Some(&word) = alike.first() else { continue };
            let dirty = by == DirtyBy::Being || word.has(PagemapEntry::SOFT_DIRTY);
            runs.push(range, self.state(word, if dirty { PageFlags::DIRTY } else { PageFlags::empty() }));
        }
    }

    /// Whether two words give the same flags, without working them out for every hole.
    fn look_alike(&self, a: PagemapEntry, b: PagemapEntry) -> bool {
        const HAS_CONTENT: u64 = PagemapEntry::PRESENT | PagemapEntry::SWAPPED | PagemapEntry::GUARD;
        if (a.0 | b.0) & HAS_CONTENT == 0 {
            return true;
        }
        (a.0 ^ b.0) & !PagemapEntry::FRAME & !(1 << 56) & !PagemapEntry::UFFD_WP == 0
            && self.state(a, PageFlags::empty()) == self.state(b, PageFlags::empty())
    }

    fn state(&self, word: PagemapEntry, dirty: PageFlags) -> PageFlags {
        if word.is_guard() {
            PageFlags::GUARD
        } else if word.has(PagemapEntry::PRESENT) {
            // pagemap says FILE of the huge zero page (pagemap_pmd_range, 6.1).
            let kind = if self.zero.is_zero(word) {
                PageFlags::ZERO
            } else if word.has(PagemapEntry::FILE) {
                PageFlags::FILE
            } else {
                PageFlags::empty()
            };
            PageFlags::PRESENT | kind | dirty
        } else if word.has(PagemapEntry::SWAPPED) && !word.is_marker() {
            let hidden = if self.zero.frames_are_visible() { PageFlags::empty() } else { PageFlags::DIRTY };
            PageFlags::SWAPPED | dirty | hidden
        } else {
            PageFlags::empty()
        }
    }
}
