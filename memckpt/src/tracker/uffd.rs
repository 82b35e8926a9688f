//! The userfaultfd that write-protects a target asynchronously.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::addr::AddrRange;
use crate::kernel::SyscallError;
use crate::kernel::pagemap::Pagemap;
use crate::kernel::pagemap_scan::{Categories, Query, Scanner};
use crate::kernel::userfaultfd::{self, UffdFeatures};

/// The target's userfaultfd, held by us alone. When the last copy is closed, tracking is off and every protection gone.
#[derive(Debug)]
pub struct WriteProtect {
    fd: OwnedFd,
    pagemap: Pagemap,
    scanner: Scanner,
}

impl WriteProtect {
    /// Takes a userfaultfd that process `pid` has just created for itself, and does the handshake for asynchronous
    /// protection (Linux 6.7).
    ///
    /// # Errors
    /// EINVAL: this kernel lacks a feature, or the handshake was done before. No pagemap: no such process.
    pub fn adopt(fd: OwnedFd, pid: i32) -> Result<Self, SyscallError> {
        userfaultfd::handshake(fd.as_fd(), UffdFeatures::ASYNC_WP)?;
        Ok(Self { fd, pagemap: Pagemap::open(pid)?, scanner: Scanner::default() })
    }

    /// Tracks `range`: from now on all its pages read written, until they are protected
    /// ([`crate::tracker::dirty::UffdWp`]'s clear).
    ///
    /// # Errors
    /// As [`userfaultfd::register`]: EINVAL and EPERM for what cannot be tracked, EBUSY when it is tracked by another.
    pub fn register(&mut self, range: AddrRange) -> Result<(), SyscallError> {
        userfaultfd::register(self.fd.as_fd(), range)?;
        // A page moved here by mremap may bring an old protection bit, on a writable PTE: it would read unwritten and
        // never fault (move_ptes clears the bit since 6.13). Writing protection anew would not touch such a page.
        let stale = Query {
            all_of: Categories::WRITTEN,
            inverted: Categories::WRITTEN,
            any_of: Categories::PRESENT | Categories::SWAPPED,
            report: Categories::WRITTEN,
            ..Query::default()
        };
        let mut found = Vec::new();
        self.scanner.scan(&self.pagemap, range, &stale, |region| found.push(region.range()))?;
        found.into_iter().try_for_each(|range| userfaultfd::write_protect(self.fd.as_fd(), range, false))
    }
}

impl AsFd for WriteProtect {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
