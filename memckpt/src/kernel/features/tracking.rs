//! Tries what tracking needs, on a child.

use std::os::fd::{AsFd, OwnedFd};

use crate::addr::{AddrRange, PAGE_SIZE};
use crate::kernel::clear_refs::clear_soft_dirty;
use crate::kernel::memory::ProcMem;
use crate::kernel::pagemap::{Pagemap, PagemapEntry};
use crate::kernel::pagemap_scan::{self, Categories, Query, ScanFlags, Scanner};
use crate::kernel::pidfd;
use crate::kernel::puppet::Puppet;
use crate::kernel::userfaultfd::{self, UFFD_USER_MODE_ONLY, UffdFeatures};
use crate::kernel::zero_page::ZeroFrames;

pub(super) fn say(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Two pages, both written, in a child.
fn two_pages() -> Result<(Puppet, AddrRange, AddrRange), String> {
    let puppet = Puppet::start().map_err(|e| format!("starting a child: {e}"))?;
    let range = puppet.map(2 * PAGE_SIZE).map_err(say)?;
    puppet.fill(range, 1).map_err(say)?;
    let first = AddrRange::with_len(range.start, PAGE_SIZE);
    Ok((puppet, first, AddrRange::with_len(first.end, PAGE_SIZE)))
}

pub(super) fn soft_dirty() -> Result<(), String> {
    let (puppet, first, second) = two_pages()?;
    let pagemap = Pagemap::open(puppet.pid()).map_err(say)?;
    let is_dirty =
        |page: AddrRange| pagemap.entry(page.start).map(|e| e.has(PagemapEntry::SOFT_DIRTY)).map_err(say);
    if !is_dirty(first)? {
        return Err("a page just written reads clean (no CONFIG_MEM_SOFT_DIRTY)".to_owned());
    }
    clear_soft_dirty(puppet.pid()).map_err(say)?;
    if is_dirty(first)? || is_dirty(second)? {
        return Err("pages stay dirty after clear_refs".to_owned());
    }
    puppet.fill(first, 2).map_err(say)?;
    match (is_dirty(first)?, is_dirty(second)?) {
        (true, false) => Ok(()),
        (false, _) => Err("a page written after the clear reads clean".to_owned()),
        (true, true) => Err("a page not written after the clear reads dirty".to_owned()),
    }
}

pub(super) fn witness() -> Result<(), String> {
    super::soft_dirty().map_err(|_| "no soft-dirty".to_owned())?;
    let (puppet, page, _) = two_pages()?;
    let protection = libc::PROT_READ as u64;
    puppet.syscall(libc::SYS_mprotect, &[page.start.get(), PAGE_SIZE, protection]).map_err(say)?;
    clear_soft_dirty(puppet.pid()).map_err(say)?;
    ProcMem::open(puppet.pid()).and_then(|mem| mem.write_at(page.start, &[1])).map_err(say)?;
    let entry = Pagemap::open(puppet.pid()).and_then(|pagemap| pagemap.entry(page.start)).map_err(say)?;
    if entry.has(PagemapEntry::SOFT_DIRTY) { Ok(()) } else { Err("a rewritten page reads clean".to_owned()) }
}

pub(super) fn pagemap_scan() -> Result<(), String> {
    if pagemap_scan::supported().is_none() {
        return Err("the ioctl is refused".to_owned());
    }
    let (puppet, first, second) = two_pages()?;
    let pagemap = Pagemap::open(puppet.pid()).map_err(say)?;
    let query = Query { any_of: Categories::PRESENT, report: Categories::PRESENT, ..Query::default() };
    let mut found = 0;
    Scanner::default()
        .scan(&pagemap, AddrRange { end: second.end, ..first }, &query, |region| {
            found += region.range().pages().get();
        })
        .map_err(say)?;
    if found == 2 { Ok(()) } else { Err(format!("2 pages are there, {found} were found")) }
}

/// A userfaultfd of the child, taken from it.
pub(crate) fn take_userfaultfd(puppet: &Puppet) -> Result<OwnedFd, String> {
    let flags = (libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) as u64;
    let theirs = puppet.syscall(libc::SYS_userfaultfd, &[flags]).map_err(|e| format!("userfaultfd: {e}"))?;
    let ours = pidfd::open(puppet.pid()).and_then(|fd| pidfd::getfd(fd, theirs as i32)).map_err(say)?;
    puppet.syscall(libc::SYS_close, &[theirs]).map_err(say)?;
    Ok(ours)
}

pub(super) fn uffd_wp_async() -> Result<(), String> {
    let (puppet, first, second) = two_pages()?;
    let both = AddrRange { end: second.end, ..first };
    let uffd = take_userfaultfd(&puppet)?;
    userfaultfd::handshake(uffd.as_fd(), UffdFeatures::ASYNC_WP).map_err(say)?;
    userfaultfd::register(uffd.as_fd(), both).map_err(say)?;
    let pagemap = Pagemap::open(puppet.pid()).map_err(say)?;
    let mut scanner = Scanner::default();
    let mut written = |flags: ScanFlags| {
        let mut pages = Vec::new();
        let query = Query {
            flags,
            all_of: Categories::WRITTEN | Categories::PRESENT,
            report: Categories::WRITTEN,
            ..Query::default()
        };
        scanner.scan(&pagemap, both, &query, |region| pages.push(region.range())).map_err(say).map(|()| pages)
    };
    written(ScanFlags::WP_MATCHING | ScanFlags::CHECK_WPASYNC)?;
    if !written(ScanFlags::CHECK_WPASYNC)?.is_empty() {
        return Err("pages read written right after they were protected".to_owned());
    }
    puppet.fill(first, 2).map_err(say)?;
    let found = written(ScanFlags::CHECK_WPASYNC)?;
    if found == [first] { Ok(()) } else { Err(format!("one page was written, the scan says {found:?}")) }
}

pub(super) fn dev_userfaultfd() -> Result<(), String> {
    let device = userfaultfd::open_device().map_err(say)?;
    userfaultfd::new_from_device(device.as_fd()).map(drop).map_err(say)
}

pub(super) fn page_frames() -> Result<(), String> {
    if ZeroFrames::get().frames_are_visible() { Ok(()) } else { Err("frame numbers read 0".to_owned()) }
}
