//! `/proc/PID/map_files`: the object behind a mapping, whether or not it still has a path or a descriptor (proc(5),
//! Linux 3.3; for any process with CAP_CHECKPOINT_RESTORE in the initial user namespace, 5.9).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::SyscallError;
use crate::addr::{Addr, AddrRange, PAGE_SIZE};

/// The object behind a mapping, open to be read.
#[derive(Debug)]
pub struct MappedObject {
    file: File,
    path: String,
}

impl MappedObject {
    /// Opens what process `pid` has mapped at exactly `vma`.
    ///
    /// # Errors
    /// ENOENT: no such mapping, or nothing behind it. EPERM: too few rights.
    pub fn open(pid: i32, vma: AddrRange) -> Result<Self, SyscallError> {
        let path = format!("/proc/{pid}/map_files/{:x}-{:x}", vma.start.get(), vma.end.get());
        Self::open_path(path)
    }

    /// Opens the object that a link of /proc leads to: `/proc/PID/fd/FD` does as well.
    ///
    /// # Errors
    /// open(2) fails.
    pub fn open_path(path: String) -> Result<Self, SyscallError> {
        match File::open(&path) {
            Ok(file) => Ok(Self { file, path }),
            Err(e) => Err(SyscallError::new("open", path, e)),
        }
    }

    /// Its length in bytes.
    ///
    /// # Errors
    /// fstat(2) fails.
    pub fn len(&self) -> Result<u64, SyscallError> {
        Ok(self.file.metadata().map_err(|e| self.error("fstat", e))?.len())
    }

    /// The link that it was opened by.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Whether it consists of huge pages.
    ///
    /// # Errors
    /// fstatfs(2) fails.
    pub fn is_hugetlb(&self) -> Result<bool, SyscallError> {
        let stat = nix::sys::statfs::fstatfs(&self.file).map_err(|e| self.error("fstatfs", e.into()))?;
        Ok(stat.filesystem_type() == nix::sys::statfs::HUGETLBFS_MAGIC)
    }

    /// Its inode number; 0 if it cannot be asked.
    #[must_use]
    pub fn inode(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        self.file.metadata().map_or(0, |m| m.ino())
    }

    /// Whether it has no byte.
    ///
    /// # Errors
    /// As [`Self::len`].
    pub fn is_empty(&self) -> Result<bool, SyscallError> {
        Ok(self.len()? == 0)
    }

    /// The ranges of offsets, of whole pages, that hold anything: pages in memory and in swap (shmem_file_llseek,
    /// mm/shmem.c). What is not in them reads as zeroes.
    ///
    /// # Errors
    /// lseek(2) fails.
    pub fn extents(&self) -> Result<Vec<AddrRange>, SyscallError> {
        let mut extents: Vec<AddrRange> = Vec::new();
        let mut at = 0;
        loop {
            let start = match lseek(&self.file, at, Whence::SeekData) {
                Ok(start) => start,
                Err(Errno::ENXIO) => return Ok(extents),
                Err(errno) => return Err(self.error("lseek", errno.into())),
            };
            let end =
                lseek(&self.file, start, Whence::SeekHole).map_err(|e| self.error("lseek", e.into()))?;
            at = end;
            let found =
                AddrRange::new(start as u64 & !(PAGE_SIZE - 1), (end as u64).next_multiple_of(PAGE_SIZE));
            match extents.last_mut() {
                Some(last) if last.end >= found.start => last.end = found.end,
                _ => extents.push(found),
            }
        }
    }

    /// Fills `buffer` from offset `at` on; zeroes behind the end.
    ///
    /// # Errors
    /// pread(2) fails.
    pub fn read_at(&self, at: Addr, mut buffer: &mut [u8]) -> Result<(), SyscallError> {
        let mut offset = at.get();
        while !buffer.is_empty() {
            match self.file.read_at(buffer, offset) {
                Ok(0) => break,
                Ok(n) => {
                    buffer = &mut buffer[n..];
                    offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.error("pread", e)),
            }
        }
        buffer.fill(0);
        Ok(())
    }

    fn error(&self, call: &'static str, source: io::Error) -> SyscallError {
        SyscallError::new(call, self.path.clone(), source)
    }
}

impl AsFd for MappedObject {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::puppet::Puppet;

    #[test]
    fn shared_memory_is_read_where_it_holds_something() {
        let puppet = Puppet::start().unwrap();
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let range = puppet.mmap(Addr(0), 64 * PAGE_SIZE, prot, flags, -1).unwrap();
        let page = |n: u64| AddrRange::with_len(range.start.saturating_add(n * PAGE_SIZE), PAGE_SIZE);
        for n in [3, 4, 60] {
            puppet.fill(page(n), n as u8).unwrap();
        }
        let object = MappedObject::open(puppet.pid(), range).unwrap();
        assert_eq!((object.len().unwrap(), object.is_empty().unwrap()), (64 * PAGE_SIZE, false));
        let extents = object.extents().unwrap();
        assert_eq!(
            extents,
            [AddrRange::new(3 * PAGE_SIZE, 5 * PAGE_SIZE), AddrRange::new(60 * PAGE_SIZE, 61 * PAGE_SIZE)]
        );
        let mut bytes = vec![9; 2 * PAGE_SIZE as usize];
        object.read_at(Addr(4 * PAGE_SIZE), &mut bytes).unwrap();
        assert!(bytes[0] == 4 && bytes[4096..].iter().all(|b| *b == 0));
        bytes.fill(9);
        object.read_at(Addr(63 * PAGE_SIZE), &mut bytes).unwrap();
        assert!(bytes.iter().all(|b| *b == 0), "behind the end");
        assert!(MappedObject::open(puppet.pid(), page(3)).is_err());
    }
}
