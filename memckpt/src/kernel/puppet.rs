//! A short-lived child that does what it is told: makes system calls, stores and loads bytes. The feature probes and
//! the tests try things on it, since some of them (clear_refs) change a whole process.

use std::ffi::CString;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::memory::ProcMem;
use crate::addr::{Addr, AddrRange, PAGE_SIZE};

const SYSCALL: u64 = 0;
const FILL: u64 = 1;
#[cfg(test)]
const LOAD: u64 = 2;

/// What to do, and up to seven arguments.
type Request = [u64; 8];

/// The child. Killed and reaped on drop; it also dies with the thread that started it.
#[derive(Debug)]
pub(crate) struct Puppet {
    pid: i32,
    wire: UnixStream,
    scratch: AddrRange,
}

impl Puppet {
    /// Forks the child.
    pub(crate) fn start() -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let (our_fd, their_fd) = (ours.as_raw_fd(), theirs.as_raw_fd());
        // SAFETY: the child runs `obey` only, which makes system calls and touches its own stack: safe after a fork
        // of a process with several threads (signal-safety(7)).
        let pid = unsafe { libc::fork() };
        match pid {
            -1 => return Err(io::Error::last_os_error()),
            0 => obey(our_fd, their_fd),
            _ => {}
        }
        let mut puppet = Self { pid, wire: ours, scratch: AddrRange::new(0, 0) };
        puppet.scratch = puppet.map(2 * PAGE_SIZE)?;
        Ok(puppet)
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Makes system call `number` in the child.
    pub(crate) fn syscall(&self, number: libc::c_long, args: &[u64]) -> io::Result<u64> {
        let mut request: Request = [0; 8];
        request[1] = number as u64;
        request[2..2 + args.len()].copy_from_slice(args);
        request[0] = SYSCALL;
        let result = self.ask(&request)? as i64;
        if (-4095..0).contains(&result) {
            return Err(io::Error::from_raw_os_error(-result as i32));
        }
        Ok(result as u64)
    }

    /// Maps `len` bytes of private anonymous memory, without huge pages.
    pub(crate) fn map(&self, len: u64) -> io::Result<AddrRange> {
        let range = self.mmap(
            Addr(0),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
        )?;
        // Without THP in the kernel EINVAL: as good.
        let _ = self.syscall(libc::SYS_madvise, &[range.start.get(), len, libc::MADV_NOHUGEPAGE as u64]);
        Ok(range)
    }

    /// mmap in the child.
    pub(crate) fn mmap(&self, at: Addr, len: u64, prot: i32, flags: i32, fd: i32) -> io::Result<AddrRange> {
        let start =
            self.syscall(libc::SYS_mmap, &[at.get(), len, prot as u64, flags as u64, fd as u64, 0])?;
        Ok(AddrRange::with_len(Addr(start), len))
    }

    /// Maps a file privately, readable and writable.
    #[cfg(test)]
    pub(crate) fn map_file(&self, path: &Path, len: u64) -> io::Result<AddrRange> {
        let fd = self.open(path)?;
        let range = self.mmap(Addr(0), len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE, fd)?;
        self.syscall(libc::SYS_close, &[fd as u64])?;
        Ok(range)
    }

    /// Opens a file for reading in the child.
    pub(crate) fn open(&self, path: &Path) -> io::Result<i32> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let at = self.place(path.as_bytes_with_nul())?;
        let fd =
            self.syscall(libc::SYS_openat, &[libc::AT_FDCWD as u64, at.get(), libc::O_RDONLY as u64, 0])?;
        Ok(fd as i32)
    }

    /// Puts bytes, less than a page of them, into the child's scratch memory.
    pub(crate) fn place(&self, bytes: &[u8]) -> io::Result<Addr> {
        ProcMem::open(self.pid)
            .and_then(|mem| mem.write_at(self.scratch.start, bytes))
            .map_err(io::Error::other)?;
        Ok(self.scratch.start)
    }

    /// Stores `byte` at the first address of every page of `range`.
    pub(crate) fn fill(&self, range: AddrRange, byte: u8) -> io::Result<()> {
        self.ask(&[FILL, range.start.get(), range.end.get(), u64::from(byte), 0, 0, 0, 0]).map(drop)
    }

    /// Reads the first byte of every page of `range`; gives the last.
    #[cfg(test)]
    pub(crate) fn load(&self, range: AddrRange) -> io::Result<u8> {
        self.ask(&[LOAD, range.start.get(), range.end.get(), 0, 0, 0, 0, 0]).map(|byte| byte as u8)
    }

    fn ask(&self, request: &Request) -> io::Result<u64> {
        let mut bytes = [0; 64];
        for (to, from) in bytes.chunks_exact_mut(8).zip(request) {
            to.copy_from_slice(&from.to_ne_bytes());
        }
        (&self.wire).write_all(&bytes)?;
        let mut answer = [0; 8];
        (&self.wire).read_exact(&mut answer)?;
        Ok(u64::from_ne_bytes(answer))
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        // SAFETY: both only take numbers; the child is ours and not yet reaped, so the number is still its.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), libc::__WALL);
        }
    }
}

/// The child's life. Only system calls: no allocation, no lock, no unwinding.
fn obey(their_fd: i32, fd: i32) -> ! {
    // SAFETY: runs in the forked child alone. Descriptors are its own copies; the reads and writes are of `request` and
    // `answer`, whole; stores and loads go where the parent, which is this same program, mapped memory for them.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::close(their_fd);
        loop {
            let mut request: Request = [0; 8];
            let n = libc::read(fd, request.as_mut_ptr().cast(), size_of::<Request>());
            if n != size_of::<Request>() as isize {
                libc::_exit(0);
            }
            let [what, a, b, c, d, e, f, g] = request;
            let mut answer = 0u64;
            match what {
                SYSCALL => {
                    let result = libc::syscall(a as libc::c_long, b, c, d, e, f, g);
                    answer = if result == -1 {
                        -i64::from(*libc::__errno_location()) as u64
                    } else {
                        result as u64
                    };
                }
                FILL => {
                    for at in (a..b).step_by(PAGE_SIZE as usize) {
                        (at as *mut u8).write_volatile(c as u8);
                    }
                }
                _ => {
                    for at in (a..b).step_by(PAGE_SIZE as usize) {
                        answer = u64::from((at as *const u8).read_volatile());
                    }
                }
            }
            libc::write(fd, (&raw const answer).cast(), size_of::<u64>());
        }
    }
}

/// Says that a test cannot run here, by name; the test harness counts these lines.
#[cfg(test)]
#[allow(clippy::print_stderr)]
pub(crate) fn skip(test: &str, reason: &str) {
    // Not eprintln!: the test harness would capture it. One write on a line of its own, so that lines stay whole.
    let _ = io::stderr().write_all(format!("\nmemckpt-test-skip: {test}: {reason}\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_does_as_told() {
        let puppet = Puppet::start().unwrap();
        assert_eq!(puppet.syscall(libc::SYS_getpid, &[]).unwrap(), puppet.pid() as u64);
        let range = puppet.map(3 * PAGE_SIZE).unwrap();
        puppet.fill(range, 7).unwrap();
        assert_eq!(puppet.load(range).unwrap(), 7);
        let error = puppet.syscall(libc::SYS_close, &[9999]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    }
}
