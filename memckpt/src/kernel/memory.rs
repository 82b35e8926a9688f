//! Another process's memory: `/proc/PID/mem`, which reads and writes through any protection (FOLL_FORCE), and
//! process_vm_readv(2), which honours protections and needs no descriptor.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use super::SyscallError;
use crate::addr::{Addr, AddrRange};

/// Most ranges that one process_vm_readv takes (IOV_MAX, UIO_MAXIOV).
const IOV_MAX: usize = 1024;

/// An open `/proc/PID/mem`. It stays with the address space that the process had when it was opened.
#[derive(Debug)]
pub struct ProcMem {
    pid: i32,
    file: File,
}

impl ProcMem {
    /// Opens the memory of `pid` for reading and writing.
    ///
    /// # Errors
    /// No such process, or no right to trace it.
    pub fn open(pid: i32) -> Result<Self, SyscallError> {
        let path = format!("/proc/{pid}/mem");
        let file = OpenOptions::new().read(true).write(true).open(&path);
        Ok(Self { pid, file: file.map_err(|e| SyscallError::new("open", path, e))? })
    }

    /// Fills `buffer` from `addr` on.
    ///
    /// # Errors
    /// EIO where nothing is mapped or a guard page lies; also when the address space is gone (a read of 0 bytes).
    pub fn read_at(&self, addr: Addr, buffer: &mut [u8]) -> Result<(), SyscallError> {
        self.file.read_exact_at(buffer, addr.get()).map_err(|e| self.error("pread", addr, e))
    }

    /// Whether the address space is gone: the process has ended, or called exec since (mem_rw(), fs/proc/base.c, reads
    /// nothing then). `addr`: any address of it.
    #[must_use]
    pub fn is_gone(&self, addr: Addr) -> bool {
        self.file.read_at(&mut [0], addr.get()).is_ok_and(|read| read == 0)
    }

    /// Writes `bytes` from `addr` on; into a private mapping whatever its protection.
    ///
    /// # Errors
    /// As [`Self::read_at`].
    pub fn write_at(&self, addr: Addr, bytes: &[u8]) -> Result<(), SyscallError> {
        self.file.write_all_at(bytes, addr.get()).map_err(|e| self.error("pwrite", addr, e))
    }

    fn error(&self, call: &'static str, addr: Addr, error: std::io::Error) -> SyscallError {
        SyscallError::new(call, format!("/proc/{}/mem at {addr:#x}", self.pid), error)
    }
}

/// Reads `ranges` of `pid`, one behind the other, into `buffer`. Gives the number of bytes read: fewer than asked for
/// when a page cannot be read (unmapped, PROT_NONE); everything before that page is there.
///
/// # Errors
/// The very first page cannot be read (EFAULT), no such process (ESRCH), too few rights (EPERM).
pub fn vm_read(pid: i32, ranges: &[AddrRange], buffer: &mut [u8]) -> Result<usize, SyscallError> {
    let mut done = 0;
    for batch in ranges.chunks(IOV_MAX) {
        let mut remote = Vec::with_capacity(batch.len());
        let mut asked = 0;
        for range in batch {
            let len = (range.len() as usize).min(buffer.len() - done - asked);
            remote.push(libc::iovec { iov_base: range.start.get() as *mut libc::c_void, iov_len: len });
            asked += len;
        }
        if asked == 0 {
            break;
        }
        let target = &mut buffer[done..done + asked];
        let local = libc::iovec { iov_base: target.as_mut_ptr().cast(), iov_len: target.len() };
        // SAFETY: the kernel writes only into `local`, which is `target`; remote addresses are the other process's, and
        // bad ones are an error and no more.
        let n = unsafe {
            libc::process_vm_readv(
                pid,
                &raw const local,
                1,
                remote.as_ptr(),
                remote.len() as libc::c_ulong,
                0,
            )
        };
        if n < 0 {
            if done > 0 {
                break;
            }
            return Err(SyscallError::last("process_vm_readv", format!("process {pid}")));
        }
        done += n as usize;
        if (n as usize) < asked {
            break;
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PAGE_SIZE;
    use crate::kernel::puppet::Puppet;

    #[test]
    fn reads_stop_at_the_first_bad_page_and_mem_goes_through_protections() {
        let puppet = Puppet::start().unwrap();
        let range = puppet.map(4 * PAGE_SIZE).unwrap();
        puppet.fill(range, 5).unwrap();
        let third = range.start.saturating_add(2 * PAGE_SIZE);
        puppet.syscall(libc::SYS_mprotect, &[third.get(), PAGE_SIZE, 0]).unwrap();

        let mut buffer = vec![0; 4 * PAGE_SIZE as usize];
        assert_eq!(vm_read(puppet.pid(), &[range], &mut buffer).unwrap(), 2 * PAGE_SIZE as usize);
        assert_eq!((buffer[0], buffer[PAGE_SIZE as usize]), (5, 5));
        let error = vm_read(puppet.pid(), &[AddrRange::with_len(third, PAGE_SIZE)], &mut buffer).unwrap_err();
        assert_eq!(error.errno(), Some(libc::EFAULT));

        let mem = ProcMem::open(puppet.pid()).unwrap();
        let mut byte = [0];
        mem.read_at(third, &mut byte).unwrap();
        assert_eq!(byte, [5]);
        mem.write_at(third, &[6]).unwrap();
        mem.read_at(third, &mut byte).unwrap();
        assert_eq!(byte, [6]);
        assert!(mem.read_at(Addr(0), &mut byte).is_err());
    }

    #[test]
    fn many_ranges_take_several_calls() {
        let puppet = Puppet::start().unwrap();
        let range = puppet.map(3000 * PAGE_SIZE).unwrap();
        puppet.fill(range, 9).unwrap();
        let pages: Vec<AddrRange> =
            (0..3000).map(|i| AddrRange::with_len(range.start.saturating_add(i * PAGE_SIZE), 1)).collect();
        let mut buffer = vec![0; 3000];
        assert_eq!(vm_read(puppet.pid(), &pages, &mut buffer).unwrap(), 3000);
        assert!(buffer.iter().all(|&b| b == 9));
    }
}
