//! Bringing one thread from stop to stop.

use std::thread;
use std::time::{Duration, Instant};

use crate::kernel::SyscallError;
use crate::kernel::ptrace::{self, Stop};

/// How a wait ended that did not bring what was waited for.
#[derive(Debug, thiserror::Error)]
pub(super) enum StopError {
    #[error("the thread is gone")]
    Gone,
    #[error("the time is up")]
    Timeout,
    #[error(transparent)]
    Call(#[from] SyscallError),
}

impl StopError {
    /// A call that fails because the thread is gone says so.
    pub(super) fn from_call(e: SyscallError) -> Self {
        if matches!(e.errno(), Some(libc::ESRCH | libc::ECHILD)) { Self::Gone } else { Self::Call(e) }
    }
}

/// Waits until `ready` has an answer: yielding at first, since a stop takes microseconds, then ever longer naps.
pub(super) fn poll_until<T>(
    deadline: Instant,
    mut ready: impl FnMut() -> Result<Option<T>, StopError>,
) -> Result<T, StopError> {
    let mut nap = Duration::from_micros(20);
    for attempt in 0u32.. {
        if let Some(answer) = ready()? {
            return Ok(answer);
        }
        if attempt < 100 {
            thread::yield_now();
            continue;
        }
        if Instant::now() >= deadline {
            break;
        }
        thread::sleep(nap);
        nap = (nap * 2).min(Duration::from_millis(2));
    }
    Err(StopError::Timeout)
}

/// Waits for the thread's next stop.
pub(super) fn next_stop(tid: i32, deadline: Instant) -> Result<Stop, StopError> {
    match poll_until(deadline, || ptrace::peek(tid).map_err(StopError::from_call))? {
        Stop::Exited => Err(StopError::Gone),
        stop => Ok(stop),
    }
}

/// Brings a thread that was asked to stop into an event stop; signals met on the way are passed on. The wait status is
/// never consumed.
pub(super) fn to_event_stop(tid: i32, deadline: Instant) -> Result<(), StopError> {
    loop {
        let signal = match next_stop(tid, deadline)? {
            Stop::Event { .. } => return Ok(()),
            Stop::Signal(signal) => signal,
            Stop::Syscall | Stop::Exited => 0,
        };
        // Any stop clears a pending interrupt: ask again before going on.
        ptrace::interrupt(tid).map_err(StopError::from_call)?;
        ptrace::resume(tid, signal).map_err(StopError::from_call)?;
    }
}

/// Lets a stopped thread run to its next system call stop. Every signal that can be is blocked by now: what still
/// comes is SIGSTOP (passed on, the group stop then sits out) and notices of it.
pub(super) fn to_syscall_stop(tid: i32, deadline: Instant) -> Result<(), StopError> {
    let mut signal = 0;
    loop {
        ptrace::resume_to_syscall(tid, signal).map_err(StopError::from_call)?;
        signal = match next_stop(tid, deadline)? {
            Stop::Syscall => return Ok(()),
            Stop::Signal(signal) => signal,
            Stop::Event { .. } | Stop::Exited => 0,
        };
    }
}

/// Lets a thread go on that a SIGSTOP or SIGCONT of somebody else has brought into a stop; whether it stood in one.
pub(super) fn keep_running(tid: i32) -> Result<bool, StopError> {
    let signal = match ptrace::peek(tid).map_err(StopError::from_call)? {
        None => return Ok(false),
        Some(Stop::Exited) => return Err(StopError::Gone),
        Some(Stop::Signal(signal)) => signal,
        Some(Stop::Event { .. } | Stop::Syscall) => 0,
    };
    ptrace::resume(tid, signal).map_err(StopError::from_call)?;
    Ok(true)
}
