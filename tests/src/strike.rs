//! Killing a program at a system call of one's choice.

use std::collections::BTreeSet;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::command::Memckpt;

/// Runs `command` until one of its threads begins or ends a system call of which `here` says so, and kills it there with
/// SIGKILL. Whether that came; otherwise it has ended well.
///
/// # Errors
///
/// When it cannot be started, or fails.
pub fn killed_at(
    command: &mut Command,
    mut here: impl FnMut(&libc::user_regs_struct) -> bool,
) -> Result<bool> {
    // SAFETY: ptrace is async-signal-safe.
    unsafe { command.pre_exec(|| ptrace::traceme().map_err(Into::into)) };
    let child = command.spawn()?;
    let leader = Pid::from_raw(i32::try_from(child.id())?);
    waitpid(leader, None)?;
    let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(leader, options)?;
    ptrace::syscall(leader, None)?;
    let (mut killed, mut threads) = (false, BTreeSet::from([leader]));
    loop {
        // Other children are other threads' of this process.
        let status = match waitpid(None, Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD)) {
            Err(Errno::EINTR) => continue,
            status => status?,
        };
        let (thread, signal) = match status {
            WaitStatus::Exited(pid, 0) if pid == leader => return Ok(killed),
            WaitStatus::Signaled(pid, Signal::SIGKILL, _) if pid == leader && killed => return Ok(true),
            WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..) if pid == leader => {
                bail!("{status:?}")
            }
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) => continue,
            WaitStatus::PtraceSyscall(thread) => {
                if !killed && ptrace::getregs(thread).is_ok_and(|regs| here(&regs)) {
                    kill(leader, Signal::SIGKILL)?;
                    killed = true;
                }
                (thread, None)
            }
            // A new thread begins with one.
            WaitStatus::Stopped(thread, signal) => (thread, (!threads.insert(thread)).then_some(signal)),
            WaitStatus::PtraceEvent(thread, ..) => (thread, None),
            other => bail!("{other:?}"),
        };
        match ptrace::syscall(thread, signal) {
            // It was killed meanwhile.
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Runs what `command` makes over and over, killed at the first moment of which `is_moment` says so, then at the second, and so
/// on, until there is none left; `unhurt` looks each time. How many moments there were.
///
/// # Errors
///
/// As [`killed_at`], and what `unhurt` says.
pub fn at_each_moment(
    mut command: impl FnMut(u64) -> Result<Memckpt>,
    is_moment: impl Fn(&libc::user_regs_struct) -> bool,
    mut unhurt: impl FnMut() -> Result<()>,
) -> Result<u64> {
    for moment in 0.. {
        let mut left = moment;
        let killed = killed_at(command(moment)?.command(), |regs| {
            let is_it = is_moment(regs) && left == 0;
            left -= u64::from(is_moment(regs) && left > 0);
            is_it
        })?;
        unhurt().with_context(|| format!("killed at moment {moment}"))?;
        if !killed {
            return Ok(moment);
        }
    }
    bail!("there is no end of it")
}
