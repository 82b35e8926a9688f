//! ptrace(2) of tasks that we make ourselves: they and all that they fork are ours from their first instruction on, and end when we do.

use std::fmt;
use std::mem::MaybeUninit;

use super::super::SyscallError;
use super::call;

/// Dies with its tracer.
const EXITKILL: usize = 1 << 20;
/// Its seccomp filters do not count while it is traced (Linux 4.3, CONFIG_CHECKPOINT_RESTORE, CAP_SYS_ADMIN).
const SUSPEND_SECCOMP: usize = 1 << 21;

/// What a task did last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It stands in a PTRACE_EVENT_STOP: it is new, or was interrupted.
    Stop,
    /// It has made a task ([`message`] says which), and stands before the return from that call.
    Forked,
    /// It stands at the entry to or the exit from a system call.
    Syscall,
    /// It is about to take this signal.
    Signal(i32),
    /// It is gone.
    Ended(End),
}

/// How a task ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With this status.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "exit status {status}"),
            Self::Killed(signal) => write!(f, "killed by signal {signal}"),
        }
    }
}

/// Attaches to a child. From now on it ends when the thread that called this does.
///
/// # Errors
/// EPERM: it may not be traced, or seccomp may not be suspended (CAP_SYS_ADMIN).
pub fn seize(pid: i32) -> Result<(), SyscallError> {
    let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACEFORK | libc::PTRACE_O_TRACECLONE;
    let options = options as usize | EXITKILL | SUSPEND_SECCOMP;
    call("ptrace(PTRACE_SEIZE)", libc::PTRACE_SEIZE, pid, 0, options).map(drop)
}

/// Has a stopped task outlive us from now on. Its seccomp filters count again.
///
/// # Errors
/// ESRCH: it is gone.
pub fn let_live(tid: i32) -> Result<(), SyscallError> {
    call("ptrace(PTRACE_SETOPTIONS)", libc::PTRACE_SETOPTIONS, tid, 0, 0).map(drop)
}

/// The ID of the task that it has made ([`Event::Forked`]), in our PID namespace.
///
/// # Errors
/// ESRCH: it is gone.
pub fn message(tid: i32) -> Result<u64, SyscallError> {
    let mut message: libc::c_ulong = 0;
    call("ptrace(PTRACE_GETEVENTMSG)", libc::PTRACE_GETEVENTMSG, tid, 0, (&raw mut message).addr())?;
    Ok(message)
}

/// Waits for the next event of a task.
///
/// # Errors
/// ECHILD: it is not ours.
pub fn wait(tid: i32) -> Result<Event, SyscallError> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    loop {
        let flags = libc::WSTOPPED | libc::WEXITED | libc::__WALL;
        // SAFETY: waitid writes one siginfo_t.
        let rc = unsafe { libc::waitid(libc::P_PID, tid as libc::id_t, info.as_mut_ptr(), flags) };
        if rc == 0 {
            break;
        }
        let error = SyscallError::last("waitid", format!("thread {tid}"));
        if error.errno() != Some(libc::EINTR) {
            return Err(error);
        }
    }
    // SAFETY: plain integers, zeroed at first.
    let (code, status) = unsafe {
        let info = info.assume_init();
        (info.si_code, info.si_status())
    };
    Ok(match (code, status >> 8, status & 0xff) {
        (libc::CLD_EXITED, ..) => Event::Ended(End::Exited(status)),
        (libc::CLD_KILLED | libc::CLD_DUMPED, ..) => Event::Ended(End::Killed(status & 0x7f)),
        (_, libc::PTRACE_EVENT_STOP, _) => Event::Stop,
        (_, libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_CLONE, _) => Event::Forked,
        (_, _, signal) if signal == libc::SIGTRAP | 0x80 => Event::Syscall,
        (_, _, signal) => Event::Signal(signal & 0x7f),
    })
}
