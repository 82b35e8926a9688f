//! The PAGEMAP_SCAN ioctl of `/proc/PID/pagemap` (Linux 6.7; Documentation/admin-guide/mm/pagemap.rst).

use std::os::fd::{AsFd, AsRawFd};
use std::sync::OnceLock;

use bitflags::bitflags;

use super::SyscallError;
use super::pagemap::Pagemap;
use crate::addr::{Addr, AddrRange, PAGE_SIZE};

/// `_IOWR('f', 16, struct pm_scan_arg)`
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
/// Most regions that one call gives.
const REGIONS: usize = 4096;

bitflags! {
    /// PAGE_IS_* of linux/fs.h.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Categories: u64 {
        /// Its VMA is write-protected asynchronously by a userfaultfd.
        const WPALLOWED = 1 << 0;
        /// Written since it was write-protected. Without a registered userfaultfd every page is.
        const WRITTEN = 1 << 1;
        /// A page of a file or of shared anonymous memory.
        const FILE = 1 << 2;
        /// In memory.
        const PRESENT = 1 << 3;
        /// Swapped, migrating, or a PTE marker (see [`super::pagemap::PagemapEntry::is_marker`]).
        const SWAPPED = 1 << 4;
        /// The zero page. Not every kernel says so of the huge zero page.
        const PFNZERO = 1 << 5;
        /// Part of a huge page.
        const HUGE = 1 << 6;
        /// Soft-dirty, or its VMA is. Never set on a kernel without soft-dirty.
        const SOFT_DIRTY = 1 << 7;
        /// In a guard region (Linux 6.15; EINVAL before).
        const GUARD = 1 << 8;
    }
}

bitflags! {
    /// PM_SCAN_* of linux/fs.h.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ScanFlags: u64 {
        /// Write-protect the pages that match, in the same step. VMAs without asynchronous protection are passed over.
        const WP_MATCHING = 1 << 0;
        /// Fail with EPERM at the first VMA without asynchronous protection.
        const CHECK_WPASYNC = 1 << 1;
    }
}

/// Pages next to each other that are alike: `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

impl Region {
    /// Its addresses.
    #[must_use]
    pub const fn range(&self) -> AddrRange {
        AddrRange::new(self.start, self.end)
    }

    /// What its pages have in common, of what was asked for.
    #[must_use]
    pub const fn categories(&self) -> Categories {
        Categories::from_bits_retain(self.categories)
    }
}

/// Which pages to report, and what to say about them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Query {
    /// What else to do.
    pub flags: ScanFlags,
    /// A page must have all of these.
    pub all_of: Categories,
    /// A page must have one of these; empty asks nothing.
    pub any_of: Categories,
    /// These are turned around before `all_of` and `any_of` look.
    pub inverted: Categories,
    /// Report these; pages are merged where these are alike.
    pub report: Categories,
}

/// The categories that this kernel's PAGEMAP_SCAN knows, found by asking for them; `None` without the ioctl.
#[must_use]
pub fn supported() -> Option<Categories> {
    static SUPPORTED: OnceLock<Option<Categories>> = OnceLock::new();
    *SUPPORTED.get_or_init(|| {
        let pagemap = Pagemap::open(std::process::id() as i32).ok()?;
        let mut scanner = Scanner { regions: vec![Region::default()] };
        let nothing = AddrRange::new(0, PAGE_SIZE);
        let newest_first = [
            Categories::all(),
            Categories::all() - Categories::GUARD,
            Categories::all() - Categories::GUARD - Categories::SOFT_DIRTY,
        ];
        newest_first.into_iter().find(|&report| {
            scanner
                .scan(&pagemap, nothing, &Query { any_of: report, report, ..Query::default() }, drop)
                .is_ok()
        })
    })
}

/// `struct pm_scan_arg`
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// A scanner with its buffer of regions, made once and used often.
#[derive(Debug)]
pub struct Scanner {
    regions: Vec<Region>,
}

impl Default for Scanner {
    fn default() -> Self {
        Self { regions: vec![Region::default(); REGIONS] }
    }
}

impl Scanner {
    /// Gives every region of `range` that matches `query` to `found`, in order. Regions may be split anywhere.
    ///
    /// # Errors
    /// ENOTTY: no PAGEMAP_SCAN. EINVAL: a category that this kernel does not know. EPERM: CHECK_WPASYNC met a VMA that
    /// is not tracked; regions before it have been given already. An address space that is gone is *not* an error
    /// ([`Pagemap::is_alive`] tells).
    pub fn scan(
        &mut self,
        pagemap: &Pagemap,
        range: AddrRange,
        query: &Query,
        mut found: impl FnMut(Region),
    ) -> Result<(), SyscallError> {
        let mut start = range.start;
        while start < range.end {
            let (count, walk_end) = self.call(pagemap, AddrRange { start, end: range.end }, query)?;
            self.regions[..count].iter().copied().for_each(&mut found);
            // Fewer regions than there was room for: the walk came to its end, whatever walk_end says. It can come back
            // short when the kernel's own buffer (512 regions) was flushed in between (do_pagemap_scan, seen on 6.18).
            let Some(last) = self.regions[..count].last().filter(|_| count == self.regions.len()) else {
                break;
            };
            start = Addr(walk_end.max(last.end));
        }
        Ok(())
    }

    fn call(
        &mut self,
        pagemap: &Pagemap,
        range: AddrRange,
        query: &Query,
    ) -> Result<(usize, u64), SyscallError> {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: query.flags.bits(),
            start: range.start.get(),
            end: range.end.get(),
            vec: self.regions.as_mut_ptr() as u64,
            vec_len: self.regions.len() as u64,
            category_inverted: query.inverted.bits(),
            category_mask: query.all_of.bits(),
            category_anyof_mask: query.any_of.bits(),
            return_mask: query.report.bits(),
            ..ScanArg::default()
        };
        loop {
            // SAFETY: the kernel reads and writes `size` bytes of `arg` and writes at most `vec_len` regions to `vec`;
            // both outlive the call.
            let count = unsafe { libc::ioctl(pagemap.as_fd().as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
            if count >= 0 {
                return Ok((count as usize, arg.walk_end));
            }
            let error = SyscallError::last(
                "ioctl(PAGEMAP_SCAN)",
                format!("/proc/{}/pagemap, {range}", pagemap.pid()),
            );
            if error.errno() != Some(libc::EINTR) {
                return Err(error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::puppet::{Puppet, skip};

    #[test]
    fn the_ioctl_number_fits_the_structs() {
        assert_eq!(size_of::<ScanArg>(), 96);
        assert_eq!(size_of::<Region>(), 24);
        assert_eq!(PAGEMAP_SCAN >> 16 & 0x3fff, 96);
    }

    #[test]
    fn no_region_is_lost_at_any_buffer_size() {
        let puppet = Puppet::start().unwrap();
        let range = puppet.map(3000 * PAGE_SIZE).unwrap();
        let page = |i: u64| AddrRange::with_len(range.start.saturating_add(i * PAGE_SIZE), PAGE_SIZE);
        let expected: Vec<AddrRange> = (0..1500).map(|i| page(2 * i)).collect();
        for p in &expected {
            puppet.fill(*p, 1).unwrap();
        }
        let pagemap = Pagemap::open(puppet.pid()).unwrap();
        let query = Query { any_of: Categories::PRESENT, report: Categories::PRESENT, ..Query::default() };
        for size in [1, 2, 3, 511, 512, 513, 1024, 1499, 1500, 1501, REGIONS] {
            let mut scanner = Scanner { regions: vec![Region::default(); size] };
            let mut found = Vec::new();
            match scanner.scan(&pagemap, range, &query, |r| found.push(r.range())) {
                Err(e) if e.errno() == Some(libc::ENOTTY) => {
                    return skip("no_region_is_lost_at_any_buffer_size", "no PAGEMAP_SCAN (Linux 6.7)");
                }
                other => other.unwrap(),
            }
            assert_eq!(found, expected, "with room for {size}");
        }
    }
}
