//! A write by another process that is under way for as long as a test wants.

use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::{Result, ensure};

/// A page of ours whose first access waits.
#[derive(Debug)]
pub struct Gate {
    uffd: OwnedFd,
    page: u64,
}

impl Gate {
    /// A new one; `None` where the kernel does not let faults of its own wait.
    #[must_use]
    pub fn new() -> Option<Self> {
        const UFFDIO_API: u64 = 0xC018_AA3F;
        const UFFDIO_REGISTER: u64 = 0xC020_AA00;
        // SAFETY: a new descriptor and a new mapping; the structures are those of linux/userfaultfd.h.
        unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) as i32;
            if fd < 0 {
                return None;
            }
            let uffd = OwnedFd::from_raw_fd(fd);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let page = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, flags, -1, 0) as u64;
            let api = libc::ioctl(fd, UFFDIO_API, [0xAAu64, 0, 0].as_mut_ptr());
            let registered = libc::ioctl(fd, UFFDIO_REGISTER, [page, 4096, 1, 0].as_mut_ptr());
            (api == 0 && registered == 0).then_some(Self { uffd, page })
        }
    }

    /// Writes the page to `address` in process `pid`, by a call that waits inside until the gate opens. What it returned.
    #[must_use]
    pub fn write_to(&self, pid: i32, address: u64) -> std::thread::JoinHandle<isize> {
        let page = self.page;
        std::thread::spawn(move || {
            let local = libc::iovec { iov_base: page as *mut _, iov_len: 4096 };
            let remote = libc::iovec { iov_base: address as *mut _, iov_len: 4096 };
            // SAFETY: reads our own mapped page; writes into another process.
            unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) }
        })
    }

    /// Lets accesses go on, with a page full of `byte`.
    ///
    /// # Errors
    ///
    /// When nobody waits any more, or the kernel refuses.
    pub fn open(&self, byte: u8) -> Result<()> {
        const UFFDIO_COPY: u64 = 0xC028_AA03;
        let page = [byte; 4096];
        let mut copy = [self.page, page.as_ptr() as u64, 4096, 0, 0];
        // SAFETY: fills our own registered page from `page`.
        let result = unsafe { libc::ioctl(self.uffd.as_raw_fd(), UFFDIO_COPY, copy.as_mut_ptr()) };
        ensure!(result == 0, "UFFDIO_COPY: {}", std::io::Error::last_os_error());
        Ok(())
    }
}
