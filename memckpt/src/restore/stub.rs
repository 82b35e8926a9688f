//! The first process: a copy of ourselves that does nothing until it is taken hold of.

use std::io;

use crate::kernel::SyscallError;

/// Whose child the root of the tree becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parent {
    /// Ours.
    Us,
    /// That of ours (CLONE_PARENT).
    Ours,
}

/// struct clone_args, version 1 (Linux 5.5, with set_tid).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct CloneArgs {
    pub(super) flags: u64,
    pub(super) pidfd: u64,
    pub(super) child_tid: u64,
    pub(super) parent_tid: u64,
    pub(super) exit_signal: u64,
    pub(super) stack: u64,
    pub(super) stack_size: u64,
    pub(super) tls: u64,
    pub(super) set_tid: u64,
    pub(super) set_tid_size: u64,
}

impl CloneArgs {
    /// As the kernel reads them.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let words = [
            self.flags,
            self.pidfd,
            self.child_tid,
            self.parent_tid,
            self.exit_signal,
            self.stack,
            self.stack_size,
            self.tls,
            self.set_tid,
            self.set_tid_size,
        ];
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }
}

/// Forks process `pid`, which waits. All signals but those that tell of faults are blocked in it.
pub(super) fn fork(pid: i32, parent: Parent) -> Result<(), SyscallError> {
    let set_tid = [pid];
    let args = CloneArgs {
        flags: match parent {
            Parent::Us => 0,
            Parent::Ours => libc::CLONE_PARENT as u64,
        },
        // With CLONE_PARENT it is the caller's.
        exit_signal: match parent {
            Parent::Us => libc::SIGCHLD as u64,
            Parent::Ours => 0,
        },
        set_tid: set_tid.as_ptr().addr() as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    let mask = Blocked::all()?;
    // SAFETY: like fork(2). The child of a process with several threads may make system calls only, and makes no others.
    let rc = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    if rc == 0 {
        wait_to_be_seized();
    }
    let error = io::Error::last_os_error();
    drop(mask);
    if rc < 0 {
        return Err(SyscallError::new("clone3", format!("process {pid}"), error));
    }
    Ok(())
}

fn wait_to_be_seized() -> ! {
    // SAFETY: system calls that touch no memory. Should we end before it is seized, so does it.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        loop {
            libc::pause();
        }
    }
}

/// Signals blocked in this thread; as before, when dropped.
struct Blocked(libc::sigset_t);

impl Blocked {
    fn all() -> Result<Self, SyscallError> {
        // SAFETY: plain data, which sigfillset and pthread_sigmask write.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            // A task that runs the restorer says by SIGTRAP that it is done.
            libc::sigdelset(&raw mut all, libc::SIGTRAP);
            match libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) {
                0 => Ok(Self(before)),
                errno => Err(SyscallError::new(
                    "pthread_sigmask",
                    "this thread",
                    io::Error::from_raw_os_error(errno),
                )),
            }
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: the mask that was there.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}
