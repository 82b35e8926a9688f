//! `/proc/PID/pagemap` (Documentation/admin-guide/mm/pagemap.rst): a 64-bit word for every page.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use super::SyscallError;
use crate::addr::{Addr, AddrRange, PAGE_SIZE};

/// The swap type of PTE markers (SWP_PTE_MARKER in linux/swap.h): the last of 32. No data is behind such an entry.
const SWP_PTE_MARKER: u64 = 31;
/// PTE_MARKER_GUARD in linux/swapops.h (Linux 6.13): a guard region.
const PTE_MARKER_GUARD: u64 = 1 << 2;

/// The word of one page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct PagemapEntry(pub u64);

impl PagemapEntry {
    /// The page is soft-dirty, or its VMA is (bit 55).
    pub const SOFT_DIRTY: u64 = 1 << 55;
    /// Write-protected by a userfaultfd (bit 57, Linux 5.13).
    pub const UFFD_WP: u64 = 1 << 57;
    /// In a guard region (bit 58, Linux 6.15).
    pub const GUARD: u64 = 1 << 58;
    /// A page of a file or of shared anonymous memory (bit 61).
    pub const FILE: u64 = 1 << 61;
    /// Swapped, migrating or a PTE marker (bit 62).
    pub const SWAPPED: u64 = 1 << 62;
    /// In memory (bit 63).
    pub const PRESENT: u64 = 1 << 63;
    /// The page frame, or the swap type and offset.
    pub const FRAME: u64 = (1 << 55) - 1;

    /// Whether all of `bits` are set.
    #[must_use]
    pub const fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }

    /// The page frame number; 0 without CAP_SYS_ADMIN.
    #[must_use]
    pub const fn frame(self) -> u64 {
        self.0 & Self::FRAME
    }

    /// Whether this "swapped" page is a PTE marker, which has no content: a remembered write protection, a guard, a
    /// poisoned page. Needs CAP_SYS_ADMIN to tell.
    #[must_use]
    pub const fn is_marker(self) -> bool {
        self.has(Self::SWAPPED) && self.0 & 31 == SWP_PTE_MARKER
    }

    /// Whether the page lies in a guard region (MADV_GUARD_INSTALL). Linux 6.13 and 6.14 need CAP_SYS_ADMIN to tell.
    #[must_use]
    pub const fn is_guard(self) -> bool {
        self.has(Self::GUARD) || self.is_marker() && self.frame() >> 5 & PTE_MARKER_GUARD != 0
    }
}

/// An open `/proc/PID/pagemap`. It stays with the address space that the process had when it was opened.
#[derive(Debug)]
pub struct Pagemap {
    pid: i32,
    file: File,
}

impl Pagemap {
    /// Opens the pagemap of `pid`.
    ///
    /// # Errors
    /// No such process, or no right to trace it.
    pub fn open(pid: i32) -> Result<Self, SyscallError> {
        let path = format!("/proc/{pid}/pagemap");
        let file = File::open(&path).map_err(|e| SyscallError::new("open", path, e))?;
        Ok(Self { pid, file })
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Reads the words of the pages from `start` on into `entries`; gives how many there were: fewer at the end of the
    /// address space, and 0 when the address space is gone.
    ///
    /// # Errors
    /// The read failed.
    pub fn read(&self, start: Addr, entries: &mut [PagemapEntry]) -> Result<usize, SyscallError> {
        // SAFETY: PagemapEntry is a transparent u64: any bytes are valid, and its memory may be seen as bytes.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(entries.as_mut_ptr().cast::<u8>(), size_of_val(entries))
        };
        let mut done = 0;
        while done < bytes.len() {
            match self.file.read_at(&mut bytes[done..], start.get() / PAGE_SIZE * 8 + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                Err(e) => {
                    return Err(SyscallError::new(
                        "pread",
                        format!("/proc/{}/pagemap at {start:#x}", self.pid),
                        e,
                    ));
                }
            }
        }
        Ok(done / 8)
    }

    /// The word of one page.
    ///
    /// # Errors
    /// The read failed, also because the address space is gone (ESRCH).
    pub fn entry(&self, addr: Addr) -> Result<PagemapEntry, SyscallError> {
        let mut entry = [PagemapEntry::default()];
        if self.read(addr.page_floor(), &mut entry)? == 0 {
            return Err(SyscallError::new(
                "pread",
                format!("/proc/{}/pagemap at {addr:#x}", self.pid),
                std::io::Error::from_raw_os_error(libc::ESRCH),
            ));
        }
        Ok(entry[0])
    }

    /// The words of all pages of `range`.
    ///
    /// # Errors
    /// As [`Self::entry`].
    pub fn entries(&self, range: AddrRange) -> Result<Vec<PagemapEntry>, SyscallError> {
        let mut entries = vec![PagemapEntry::default(); range.pages().get() as usize];
        let n = self.read(range.start, &mut entries)?;
        if n < entries.len() {
            let gone = std::io::Error::from_raw_os_error(libc::ESRCH);
            return Err(SyscallError::new("pread", format!("/proc/{}/pagemap at {range}", self.pid), gone));
        }
        Ok(entries)
    }

    /// Whether the address space is still there; a PAGEMAP_SCAN of one that is gone finds nothing and says nothing.
    ///
    /// # Errors
    /// The read failed.
    pub fn is_alive(&self) -> Result<bool, SyscallError> {
        Ok(self.read(Addr(0), &mut [PagemapEntry::default()])? == 1)
    }
}

impl AsFd for Pagemap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::puppet::Puppet;

    #[test]
    fn present_absent_and_gone() {
        let puppet = Puppet::start().unwrap();
        let range = puppet.map(3 * PAGE_SIZE).unwrap();
        let second = AddrRange::with_len(range.start.saturating_add(PAGE_SIZE), PAGE_SIZE);
        puppet.fill(second, 1).unwrap();
        let pagemap = Pagemap::open(puppet.pid()).unwrap();
        let present: Vec<bool> =
            pagemap.entries(range).unwrap().iter().map(|e| e.has(PagemapEntry::PRESENT)).collect();
        assert_eq!(present, [false, true, false]);
        assert!(pagemap.is_alive().unwrap());
        drop(puppet);
        assert!(!pagemap.is_alive().unwrap());
        assert_eq!(pagemap.entry(range.start).unwrap_err().errno(), Some(libc::ESRCH));
    }

    #[test]
    fn markers_and_guards_are_no_swap() {
        let swap = |kind: u64, offset: u64| PagemapEntry(PagemapEntry::SWAPPED | kind | offset << 5);
        assert!(!swap(0, 31).is_marker());
        assert!(swap(31, 1).is_marker() && !swap(31, 1).is_guard());
        assert!(swap(31, 4).is_guard());
        assert!(PagemapEntry(PagemapEntry::GUARD).is_guard());
        assert!(!PagemapEntry(PagemapEntry::PRESENT | 31 | 4 << 5).is_guard());
    }
}
