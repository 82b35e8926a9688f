//! A child that makes system calls and touches memory on command, and sleeps in read(2) otherwise.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::addr::{CHUNK_SIZE, Chunk};

const TOUCH: u64 = 1;
const SYSCALL: u64 = 2;
const STORM: u64 = 3;

/// A command: what, and seven numbers.
type Command = [u64; 8];

pub(super) struct Victim {
    pub(super) pid: i32,
    commands: OwnedFd,
    answers: OwnedFd,
}

fn pipe() -> (OwnedFd, OwnedFd) {
    let mut fds = [0; 2];
    // SAFETY: pipe2 fills in two new descriptors, which are ours.
    unsafe {
        assert_eq!(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC), 0);
        (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
    }
}

fn read_exact(fd: RawFd, bytes: &mut [u8]) -> bool {
    let mut done = 0;
    while done < bytes.len() {
        // SAFETY: the rest of the buffer.
        let n = unsafe { libc::read(fd, bytes[done..].as_mut_ptr().cast(), bytes.len() - done) };
        if n <= 0 {
            return false;
        }
        done += n as usize;
    }
    true
}

/// The child: nothing here allocates or locks, as the parent has threads.
fn serve(commands: RawFd, answers: RawFd) -> ! {
    let mut command: Command = [0; 8];
    loop {
        // SAFETY: a command is plain numbers; the parent asks only for what its own child can do.
        unsafe {
            let bytes =
                std::slice::from_raw_parts_mut(command.as_mut_ptr().cast::<u8>(), size_of::<Command>());
            if !read_exact(commands, bytes) {
                libc::_exit(0);
            }
            let [what, a, b, c, d, e, f, g] = command;
            let answer: i64 = match what {
                TOUCH => {
                    (a as *mut u8).write_volatile(1);
                    0
                }
                SYSCALL => {
                    let result = libc::syscall(a as i64, b, c, d, e, f, g);
                    if result == -1 { -i64::from(*libc::__errno_location()) } else { result }
                }
                STORM => {
                    for i in 0..b {
                        ((a + i * CHUNK_SIZE) as *mut u8).write_volatile(1);
                    }
                    0
                }
                _ => libc::_exit(1),
            };
            libc::write(answers, (&raw const answer).cast(), 8);
        }
    }
}

impl Victim {
    pub(super) fn start() -> Self {
        let (commands, command_end) = pipe();
        let (answer_end, answers) = pipe();
        // SAFETY: the child only runs `serve`, which is async-signal-safe.
        let pid = unsafe {
            let pid = libc::fork();
            if pid == 0 {
                // Not to outlive a parent that panics; the parent's ends of the pipes are copies here.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                serve(commands.as_raw_fd(), answers.as_raw_fd());
            }
            pid
        };
        assert!(pid > 0, "fork: {}", io::Error::last_os_error());
        Self { pid, commands: command_end, answers: answer_end }
    }

    /// Sends a command without waiting for its answer.
    fn send(&self, command: Command) {
        // SAFETY: writes a live array.
        let n =
            unsafe { libc::write(self.commands.as_raw_fd(), command.as_ptr().cast(), size_of::<Command>()) };
        assert_eq!(n as usize, size_of::<Command>());
    }

    fn answer(&self) -> i64 {
        let mut bytes = [0; 8];
        assert!(read_exact(self.answers.as_raw_fd(), &mut bytes), "the victim died");
        i64::from_ne_bytes(bytes)
    }

    fn ask(&self, command: Command) -> i64 {
        self.send(command);
        self.answer()
    }

    pub(super) fn touch(&self, address: u64) {
        self.ask([TOUCH, address, 0, 0, 0, 0, 0, 0]);
    }

    /// Result, or negative errno.
    pub(super) fn syscall<const N: usize>(&self, call: i64, args: [u64; N]) -> i64 {
        let mut command = [SYSCALL, call as u64, 0, 0, 0, 0, 0, 0];
        command[2..2 + N].copy_from_slice(&args);
        self.ask(command)
    }

    /// As [`Self::syscall`], of one that must work.
    pub(super) fn ok<const N: usize>(&self, call: i64, args: [u64; N]) -> u64 {
        let result = self.syscall(call, args);
        u64::try_from(result).unwrap_or_else(|_| {
            panic!("system call {call} of the victim: {}", io::Error::from_raw_os_error(-result as i32))
        })
    }

    /// Starts to touch one page in each of `chunks` chunks.
    pub(super) fn start_storm(&self, address: u64, chunks: u64) {
        self.send([STORM, address, chunks, 0, 0, 0, 0, 0]);
    }

    pub(super) fn end_storm(&self) {
        self.answer();
    }

    pub(super) fn send_exec(&self, path: u64, argv: u64) {
        self.send([SYSCALL, libc::SYS_execve as u64, path, argv, argv + 8, 0, 0, 0]);
    }

    /// `chunks` chunks of private memory in small pages, aligned to a chunk.
    pub(super) fn arena(&self, chunks: u64) -> Arena {
        let len = (chunks + 1) * CHUNK_SIZE;
        let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE) as u64;
        let at = self.ok(libc::SYS_mmap, [0, len, prot, flags, u64::MAX, 0]);
        self.syscall(libc::SYS_madvise, [at, len, libc::MADV_NOHUGEPAGE as u64]);
        Arena { start: at.next_multiple_of(CHUNK_SIZE), chunks }
    }

    pub(super) fn kill(&self) {
        // SAFETY: our own child, not waited for yet.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
    }

    pub(super) fn wait(&self) {
        // SAFETY: our own child; no status wanted.
        unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), 0) };
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        self.kill();
        self.wait();
    }
}

#[derive(Clone, Copy)]
pub(super) struct Arena {
    pub(super) start: u64,
    pub(super) chunks: u64,
}

impl Arena {
    /// An address in chunk number `chunk`.
    pub(super) fn at(self, chunk: u64) -> u64 {
        assert!(chunk < self.chunks);
        self.start + chunk * CHUNK_SIZE
    }

    /// Which of the arena's chunks are in `touched`, by number.
    pub(super) fn of(self, touched: &[Chunk]) -> Vec<u64> {
        let first = self.start / CHUNK_SIZE;
        touched
            .iter()
            .map(|c| u64::from(c.0))
            .filter(|c| (first..first + self.chunks).contains(c))
            .map(|c| c - first)
            .collect()
    }
}
