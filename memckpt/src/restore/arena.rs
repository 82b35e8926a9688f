//! The memory that the tasks being made share with us: the restorer, and the list of system calls that it makes.

use std::io;

use crate::addr::{AddrRange, PAGE_SIZE};
use crate::kernel::SyscallError;
use crate::target::{Call, Calls};

use super::restorer;

/// Where the list begins; the restorer is before it.
const LIST: u64 = PAGE_SIZE;
/// How many calls it can hold.
pub(super) const CALL_MAX: usize = 1024;
/// Where the calls' buffers begin.
const DATA: u64 = LIST + (CALL_MAX * size_of::<Call>()) as u64;
/// Room for them.
pub(super) const DATA_LEN: usize = 256 << 10;
/// Length of the whole.
pub(super) const LEN: u64 = DATA + DATA_LEN as u64;

/// Mapped here, and at the same address in every task that we fork. Unmapped on drop, here.
#[derive(Debug)]
pub(super) struct Arena {
    range: AddrRange,
}

impl Arena {
    /// Maps it at `range`, which is [`LEN`] long and must be free.
    pub(super) fn map(range: AddrRange) -> Result<Self, SyscallError> {
        let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let at = std::ptr::with_exposed_provenance_mut(range.start.get() as usize);
        // SAFETY: a new mapping, which replaces nothing (MAP_FIXED_NOREPLACE, Linux 4.17).
        let got = unsafe { libc::mmap(at, range.len() as usize, prot, flags, -1, 0) };
        if got != at {
            let error = match got {
                libc::MAP_FAILED => io::Error::last_os_error(),
                _ => io::ErrorKind::AddrInUse.into(),
            };
            return Err(SyscallError::new("mmap", format!("{range}, for the restorer"), error));
        }
        let arena = Self { range };
        let code = restorer::code();
        // SAFETY: the page is ours, writable, and larger than the code.
        unsafe { at.cast::<u8>().copy_from_nonoverlapping(code.as_ptr(), code.len()) };
        Ok(arena)
    }

    pub(super) const fn range(&self) -> AddrRange {
        self.range
    }

    /// Where the restorer begins.
    pub(super) const fn code(&self) -> u64 {
        self.range.start.get()
    }

    /// A `syscall` instruction.
    pub(super) fn syscall(&self) -> u64 {
        self.code() + restorer::syscall()
    }

    /// Where the list begins.
    pub(super) const fn list(&self) -> u64 {
        self.range.start.get() + LIST
    }

    /// Where the buffers begin.
    pub(super) const fn data(&self) -> u64 {
        self.range.start.get() + DATA
    }

    /// Writes a list and its buffers. No task may be at work.
    pub(super) fn write(&self, calls: &Calls) -> Result<usize, SyscallError> {
        calls.fit("the restorer", CALL_MAX, DATA_LEN)?;
        let list = calls.resolved(self.data());
        // SAFETY: both fit, as was checked; the mapping lasts as long as `self`, and no task looks at it now.
        unsafe {
            self.at::<Call>(self.list()).copy_from_nonoverlapping(list.as_ptr(), list.len());
            self.at::<u8>(self.data()).copy_from_nonoverlapping(calls.data().as_ptr(), calls.data().len());
        }
        Ok(list.len())
    }

    /// What the first `count` calls returned, and what is in the first `len` bytes of the buffers.
    pub(super) fn read(&self, count: usize, len: usize) -> (Vec<i64>, Vec<u8>) {
        let mut data = vec![0; len.min(DATA_LEN)];
        // SAFETY: as in `write`.
        unsafe {
            let list = self.at::<Call>(self.list());
            let results =
                (0..count.min(CALL_MAX)).map(|n| (&raw const (*list.add(n)).result).read_volatile());
            let results = results.collect();
            data.as_mut_ptr().copy_from_nonoverlapping(self.at(self.data()), data.len());
            (results, data)
        }
    }

    /// Writes bytes where the buffers begin. No task may be at work.
    pub(super) fn write_data(&self, bytes: &[u8]) {
        let len = bytes.len().min(DATA_LEN);
        // SAFETY: as in `write`.
        unsafe { self.at::<u8>(self.data()).copy_from_nonoverlapping(bytes.as_ptr(), len) };
    }

    fn at<T>(&self, address: u64) -> *mut T {
        std::ptr::with_exposed_provenance_mut(address as usize)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`; nothing refers to it any more.
        unsafe { libc::munmap(self.at(self.range.start.get()), self.range.len() as usize) };
    }
}
