//! The frames of the kernel's zero pages, learnt from mappings of our own that stay mapped.
//!
//! Before Linux 6.7 nothing names a zero page, and of the huge one not every later kernel says PFNZERO.

use std::sync::OnceLock;

use super::pagemap::{Pagemap, PagemapEntry};
use super::pagemap_scan::{Categories, Query, Scanner};
use crate::addr::{Addr, AddrRange, PAGE_SIZE};

/// Bytes in a huge page.
const HUGE: u64 = 2 << 20;

/// Frames of zero pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroFrames {
    /// The one small page; `None` when frames are hidden from us (no CAP_SYS_ADMIN).
    small: Option<u64>,
    /// The first of the huge page's 512; `None` also where huge pages are off.
    huge: Option<u64>,
    /// PAGEMAP_SCAN says PFNZERO of the huge one as well.
    huge_is_reported: bool,
}

impl ZeroFrames {
    /// The frames of this machine, looked up at the first call.
    #[must_use]
    pub fn get() -> Self {
        static FRAMES: OnceLock<ZeroFrames> = OnceLock::new();
        *FRAMES.get_or_init(learn)
    }

    /// Whether page frames, and so swap types, can be seen at all.
    #[must_use]
    pub fn frames_are_visible(&self) -> bool {
        self.small.is_some()
    }

    /// Whether a present page is a zero page, or part of one.
    #[must_use]
    pub fn is_zero(&self, entry: PagemapEntry) -> bool {
        let frame = entry.frame();
        entry.has(PagemapEntry::PRESENT)
            && (self.small == Some(frame)
                || self.huge.is_some_and(|first| (first..first + HUGE / PAGE_SIZE).contains(&frame)))
    }

    /// Whether huge pages that PAGEMAP_SCAN reports without PFNZERO may be zero pages all the same.
    #[must_use]
    pub fn huge_needs_a_look(&self) -> bool {
        self.huge.is_some() && !self.huge_is_reported
    }
}

fn learn() -> ZeroFrames {
    let mut frames = ZeroFrames::default();
    let Ok(pagemap) = Pagemap::open(std::process::id() as i32) else { return frames };
    let visible = |addr: Addr| pagemap.entry(addr).ok().map(PagemapEntry::frame).filter(|&frame| frame != 0);
    if let Some(page) = map_and_read(PAGE_SIZE, libc::MADV_NOHUGEPAGE) {
        frames.small = visible(page);
    }
    // Twice the size: somewhere in it lies a whole huge page.
    let Some(huge) = map_and_read(2 * HUGE, libc::MADV_HUGEPAGE) else { return frames };
    frames.huge = visible(huge).filter(|&frame| {
        // A small zero page (huge pages off), or fragments: no huge page.
        let last = huge.saturating_add(HUGE - PAGE_SIZE);
        frame % (HUGE / PAGE_SIZE) == 0 && visible(last) == Some(frame + HUGE / PAGE_SIZE - 1)
    });
    if frames.huge.is_some() {
        let range = AddrRange::with_len(huge, HUGE);
        let query = Query { any_of: Categories::PRESENT, report: Categories::PFNZERO, ..Query::default() };
        let scanned = Scanner::default().scan(&pagemap, range, &query, |region| {
            frames.huge_is_reported = region.categories().contains(Categories::PFNZERO);
        });
        // Without the ioctl there is nothing to misreport.
        if scanned.is_err() {
            frames.huge_is_reported = false;
        }
    }
    frames
}

/// Maps memory for ever and reads one byte of it; gives the address that was read: aligned to its half if that is huge.
fn map_and_read(len: u64, advice: i32) -> Option<Addr> {
    // SAFETY: a new mapping of our own, kept until we end; the byte read lies inside it; madvise changes no content.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let start = libc::mmap(std::ptr::null_mut(), len as usize, libc::PROT_READ, flags, -1, 0);
        if start == libc::MAP_FAILED {
            return None;
        }
        // EINVAL without huge pages in the kernel: then the page read is a small one.
        libc::madvise(start, len as usize, advice);
        let align = if len > HUGE { HUGE } else { PAGE_SIZE };
        let at = (start as u64).next_multiple_of(align);
        (at as *const u8).read_volatile();
        Some(Addr(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::puppet::{Puppet, skip};

    #[test]
    fn a_page_read_is_zero_and_a_page_written_is_not() {
        let frames = ZeroFrames::get();
        if !frames.frames_are_visible() {
            return skip(
                "a_page_read_is_zero_and_a_page_written_is_not",
                "page frames are hidden (CAP_SYS_ADMIN)",
            );
        }
        let puppet = Puppet::start().unwrap();
        let range = puppet.map(2 * PAGE_SIZE).unwrap();
        assert_eq!(puppet.load(range).unwrap(), 0);
        puppet.fill(AddrRange::with_len(range.start, PAGE_SIZE), 1).unwrap();
        let entries = Pagemap::open(puppet.pid()).unwrap().entries(range).unwrap();
        assert_eq!(entries.iter().map(|&e| frames.is_zero(e)).collect::<Vec<_>>(), [false, true]);
    }
}
