//! `pagemap-PID.img`: which pages a checkpoint holds, and where their bytes are.

use bitflags::bitflags;

use crate::addr::{Addr, AddrRange, PAGE_SIZE};

use super::magic::ImageKind;
use super::proto;
use super::record::{Image, RecordError, Records};

bitflags! {
    /// What a run of pages is.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct PagemapFlags: u32 {
        /// The pages are in the parent; no bytes here.
        const PARENT = 1;
        /// The pages may be restored on first access.
        const LAZY = 2;
        /// The bytes are in the pages file.
        const PRESENT = 4;
    }
}

/// A run of pages with the same flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagemapRun {
    /// Its addresses.
    pub range: AddrRange,
    /// Its flags.
    pub flags: PagemapFlags,
    /// Where its bytes begin in the pages file; meaningful with PRESENT only.
    pub offset: u64,
}

/// A pagemap image in memory: runs sorted by address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PagemapImage {
    pages_id: u32,
    runs: Vec<PagemapRun>,
    bytes: u64,
}

/// A run that cannot follow those already there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PagemapRunError {
    /// Empty or not of whole pages.
    #[error("{0} is not a range of whole pages")]
    Unaligned(AddrRange),
    /// Before, or inside, the run before.
    #[error("{0} does not follow the run before it")]
    Unsorted(AddrRange),
    /// Neither in the pages file nor in the parent.
    #[error("{0} is neither present nor in the parent")]
    Nowhere(AddrRange),
}

/// The most pages one entry may count, so that the 32-bit count that CRIU 3.17 reads is right too.
const MAX_ENTRY_PAGES: u64 = 1 << 31;

impl PagemapImage {
    /// An empty pagemap whose bytes go into `pages-ID.img`.
    #[must_use]
    pub fn new(pages_id: u32) -> Self {
        Self { pages_id, ..Self::default() }
    }

    /// Adds a run behind the last one. With PRESENT, its bytes follow those of the runs before it.
    ///
    /// # Errors
    /// The run is not of whole pages, overlaps or precedes the last one, or has neither PRESENT nor PARENT.
    pub fn push(&mut self, range: AddrRange, flags: PagemapFlags) -> Result<(), PagemapRunError> {
        if range.is_empty() || !range.start.is_page_aligned() || !range.end.is_page_aligned() {
            return Err(PagemapRunError::Unaligned(range));
        }
        if self.runs.last().is_some_and(|last| range.start < last.range.end) {
            return Err(PagemapRunError::Unsorted(range));
        }
        if !flags.intersects(PagemapFlags::PRESENT | PagemapFlags::PARENT) {
            return Err(PagemapRunError::Nowhere(range));
        }
        self.runs.push(PagemapRun { range, flags, offset: self.bytes });
        if flags.contains(PagemapFlags::PRESENT) {
            self.bytes = self.bytes.saturating_add(range.len());
        }
        Ok(())
    }

    /// Which pages file goes with it.
    #[must_use]
    pub fn pages_id(&self) -> u32 {
        self.pages_id
    }

    /// The runs, sorted.
    #[must_use]
    pub fn runs(&self) -> &[PagemapRun] {
        &self.runs
    }

    /// How many bytes the pages file must have.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The run that holds `addr`.
    #[must_use]
    pub fn find(&self, addr: Addr) -> Option<&PagemapRun> {
        let at = self.runs.partition_point(|run| run.range.end <= addr);
        self.runs.get(at).filter(|run| run.range.contains(addr))
    }

    /// The image file.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut image = Image::new(ImageKind::Pagemap).with(&proto::PagemapHead { pages_id: self.pages_id });
        for run in &self.runs {
            let mut start = run.range.start.get();
            while start < run.range.end.get() {
                let pages = ((run.range.end.get() - start) / PAGE_SIZE).min(MAX_ENTRY_PAGES);
                image.push(&proto::PagemapEntry {
                    vaddr: start,
                    compat_nr_pages: pages as u32,
                    in_parent: None,
                    flags: Some(run.flags.bits()),
                    nr_pages: Some(pages),
                });
                start += pages * PAGE_SIZE;
            }
        }
        image.into_bytes()
    }

    /// Reads the content of `file`.
    ///
    /// # Errors
    /// The file is damaged: framing, unaligned or unsorted entries, entries without bytes and without parent.
    pub fn decode(file: &str, bytes: &[u8]) -> Result<Self, RecordError> {
        let mut records = Records::open(file, ImageKind::Pagemap, bytes)?;
        let head: proto::PagemapHead = records.expect()?;
        let mut image = Self::new(head.pages_id);
        while let Some(entry) = records.next_record::<proto::PagemapEntry>()? {
            let pages = entry.nr_pages.unwrap_or(u64::from(entry.compat_nr_pages));
            let end = pages.checked_mul(PAGE_SIZE).and_then(|len| entry.vaddr.checked_add(len));
            let Some(end) = end else {
                return Err(
                    records.content_error(format!("{pages} pages from {:#x} wrap around", entry.vaddr))
                );
            };
            // Before CRIU had flags, `in_parent` was all there was to say.
            let flags = match entry.flags {
                Some(bits) => PagemapFlags::from_bits_retain(bits),
                None if entry.in_parent == Some(true) => PagemapFlags::PARENT,
                None => PagemapFlags::PRESENT,
            };
            image
                .push(AddrRange::new(entry.vaddr, end), flags)
                .map_err(|reason| records.content_error(reason.to_string()))?;
        }
        Ok(image)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn counts_are_written_for_both_generations_of_readers() {
        let mut map = PagemapImage::new(7);
        map.push(AddrRange::new(0x1000, 0x4000), PagemapFlags::PRESENT | PagemapFlags::LAZY).unwrap();
        let bytes = map.encode();
        let mut records = Records::open("f", ImageKind::Pagemap, &bytes).unwrap();
        assert_eq!(records.expect::<proto::PagemapHead>().unwrap().pages_id, 7);
        let entry: proto::PagemapEntry = records.expect().unwrap();
        assert_eq!(
            (entry.vaddr, entry.compat_nr_pages, entry.nr_pages, entry.flags),
            (0x1000, 3, Some(3), Some(6))
        );
    }

    #[test]
    fn old_entries_without_flags_or_wide_count_are_understood() {
        let bytes = Image::new(ImageKind::Pagemap)
            .with(&proto::PagemapHead { pages_id: 1 })
            .with(&proto::PagemapEntry { vaddr: 0x1000, compat_nr_pages: 2, ..Default::default() })
            .with(&proto::PagemapEntry {
                vaddr: 0x8000,
                compat_nr_pages: 1,
                in_parent: Some(true),
                ..Default::default()
            })
            .into_bytes();
        let map = PagemapImage::decode("f", &bytes).unwrap();
        assert_eq!(map.runs()[0].flags, PagemapFlags::PRESENT);
        assert_eq!(map.runs()[1].flags, PagemapFlags::PARENT);
        assert_eq!(map.bytes(), 0x2000);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let entry = |vaddr, pages, flags| {
            let bytes = Image::new(ImageKind::Pagemap)
                .with(&proto::PagemapHead { pages_id: 1 })
                .with(&proto::PagemapEntry {
                    vaddr: 0x2000,
                    nr_pages: Some(1),
                    flags: Some(4),
                    ..Default::default()
                })
                .with(&proto::PagemapEntry {
                    vaddr,
                    nr_pages: Some(pages),
                    flags: Some(flags),
                    ..Default::default()
                })
                .into_bytes();
            PagemapImage::decode("pagemap-1.img", &bytes).map_err(|e| e.to_string())
        };
        assert!(entry(0x3000, 1, 4).is_ok());
        for (vaddr, pages, flags) in [
            (0x2000, 1, 4),
            (0x3001, 1, 4),
            (0x3000, 0, 4),
            (0x3000, u64::MAX, 4),
            (u64::MAX - 0xfff, 2, 4),
            (0x3000, 1, 2),
        ] {
            let error = entry(vaddr, pages, flags).unwrap_err();
            assert!(error.starts_with("pagemap-1.img: record 2: "), "{error}");
        }
    }

    #[test]
    fn a_run_beyond_the_old_count_is_split() {
        let mut map = PagemapImage::new(1);
        map.push(AddrRange::new(0, (MAX_ENTRY_PAGES + 5) * PAGE_SIZE), PagemapFlags::PARENT).unwrap();
        let read = PagemapImage::decode("f", &map.encode()).unwrap();
        assert_eq!(read.runs().len(), 2);
        assert_eq!(read.runs()[1].range.pages().get(), 5);
    }

    proptest! {
        #[test]
        fn a_pagemap_comes_back(runs in prop::collection::vec((0u64..5, 1u64..9, any::<bool>()), 0..40)) {
            let mut map = PagemapImage::new(3);
            let mut at = 0x10000;
            for (gap, pages, parent) in runs {
                at += gap * PAGE_SIZE;
                let flags = if parent { PagemapFlags::PARENT } else { PagemapFlags::PRESENT };
                map.push(AddrRange::new(at, at + pages * PAGE_SIZE), flags).unwrap();
                at += pages * PAGE_SIZE;
            }
            let read = PagemapImage::decode("f", &map.encode()).unwrap();
            prop_assert_eq!(&read, &map);
            for run in map.runs() {
                prop_assert_eq!(read.find(run.range.start), Some(run));
                prop_assert_eq!(read.find(Addr(run.range.end.get() - 1)), Some(run));
            }
        }

        #[test]
        fn garbage_never_panics(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut bytes = ImageKind::Pagemap.header();
            bytes.extend_from_slice(&body);
            let _ = PagemapImage::decode("f", &bytes);
        }
    }
}
