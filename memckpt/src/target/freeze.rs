//! Stopping all threads of a process, for a bounded time.

use std::io;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use super::adopt::{self, Adopted};
use super::proc::{self, Status};
use super::registers::{self, ThreadRegisters};
use super::stops::{self, StopError};
use crate::kernel::ptrace::{self, Stop};
use crate::kernel::{SyscallError, process, status};

/// Why a process could not be frozen. Everything that was stopped runs again.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// No such process, or it ended.
    #[error("process {pid} is gone")]
    Gone {
        /// Which.
        pid: i32,
    },
    /// A thread cannot be seized: the process is traced already, or we may not.
    #[error("thread {tid} of process {pid}{traced} cannot be seized")]
    Seize {
        /// The process.
        pid: i32,
        /// The thread.
        tid: i32,
        /// Who traces it, as part of the sentence; empty: nobody.
        traced: String,
        /// What ptrace said.
        source: SyscallError,
    },
    /// A thread did not stop in time.
    #[error("thread {tid} of process {pid} did not stop within {timeout:?}: {reason}")]
    Timeout {
        /// The process.
        pid: i32,
        /// The thread.
        tid: i32,
        /// How long we waited.
        timeout: Duration,
        /// What it is doing.
        reason: String,
    },
    /// A thread is still in the parasite of a memckpt that was killed.
    #[error("process {pid} does not come out of what an earlier memckpt, which was killed, had put into it")]
    Abandoned {
        /// The process.
        pid: i32,
    },
    /// The threads of the process cannot be listed.
    #[error("/proc/{pid}/task")]
    Threads {
        /// The process.
        pid: i32,
        /// Why.
        source: io::Error,
    },
    /// Another call failed.
    #[error(transparent)]
    Call(#[from] SyscallError),
}

/// A process all of whose threads stand in ptrace stops.
///
/// Dropping it lets them go; so does the end of the thread that froze them, by whatever cause. A process that had been
/// stopped by a signal stays stopped.
#[derive(Debug)]
pub struct Frozen {
    pub(super) pid: i32,
    threads: Vec<i32>,
    /// Threads of the kernel's own that do its io_uring's work: they stand still, and have nothing that could be kept.
    workers: Vec<i32>,
    pub(super) timeout: Duration,
    /// The registers of the thread that the parasite runs on, meanwhile.
    pub(super) parked: Option<ThreadRegisters>,
    /// ptrace knows the thread that seized.
    _this_thread: PhantomData<*mut ()>,
}

impl Frozen {
    /// Stops all threads of `pid`, including those that are created meanwhile, within `timeout`, which is also the
    /// bound of each single thing that is later waited for while frozen.
    ///
    /// # Errors
    /// See [`FreezeError`]. A thread that did not stop in time stays attached until it stops or the calling thread
    /// ends: use [`super::on_tracer_thread`].
    pub fn freeze(pid: i32, timeout: Duration) -> Result<Self, FreezeError> {
        let deadline = Instant::now() + timeout;
        loop {
            let frozen = Self::stop(pid, timeout, deadline)?;
            if frozen.hide_the_stop()? {
                return Ok(frozen);
            }
            // A thread is just coming home from a memckpt that was killed.
            drop(frozen);
            if Instant::now() >= deadline {
                return Err(FreezeError::Abandoned { pid });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn stop(pid: i32, timeout: Duration, deadline: Instant) -> Result<Self, FreezeError> {
        let mut frozen = Self {
            pid,
            threads: Vec::new(),
            workers: Vec::new(),
            timeout,
            parked: None,
            _this_thread: PhantomData,
        };
        loop {
            let seized = frozen.seize_new_threads()?;
            if frozen.stop_all(deadline)? && seized == 0 {
                break;
            }
            if Instant::now() >= deadline {
                return Err(frozen.not_stopped(pid, "it creates threads faster than they can be stopped"));
            }
        }
        (frozen.workers, frozen.threads) = frozen.threads.drain(..).partition(|&tid| is_io_worker(tid));
        if frozen.threads.is_empty() { Err(FreezeError::Gone { pid }) } else { Ok(frozen) }
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its threads. A leader that has ended before its threads is not one of them.
    #[must_use]
    pub fn threads(&self) -> &[i32] {
        &self.threads
    }

    /// Whether the kernel has threads in the process that do the work of an io_uring. They outlive it by some seconds.
    #[must_use]
    pub fn has_io_workers(&self) -> bool {
        !self.workers.is_empty()
    }

    /// The signal that had stopped the process before it was frozen, if one had: SIGSTOP and its like.
    #[must_use]
    pub fn stopped_by(&self) -> Option<i32> {
        match ptrace::peek(*self.threads.first()?) {
            Ok(Some(Stop::Event { signal })) if signal != libc::SIGTRAP => Some(signal),
            _ => None,
        }
    }

    /// What a thread holds; of the thread that the parasite runs on, what it held before.
    ///
    /// # Errors
    /// Where ptrace or get_robust_list fails: the thread was killed.
    pub fn registers(&self, tid: i32) -> Result<ThreadRegisters, SyscallError> {
        match &self.parked {
            Some(parked) if parked.tid == tid => Ok(parked.clone()),
            _ => ThreadRegisters::read(tid),
        }
    }

    /// Lets the process go on.
    pub fn thaw(self) {}

    /// Leaves the process stopped, as by SIGSTOP, and untraced.
    ///
    /// # Errors
    /// Where the process was killed.
    pub fn leave_stopped(self) -> Result<(), SyscallError> {
        // Queued while everything stands: the first thread let go takes it before its next instruction.
        self.signal(libc::SIGSTOP)
    }

    /// Ends the process with SIGKILL. Its parent hears of it when the thread that froze it ends.
    ///
    /// # Errors
    /// Where it is gone already.
    pub fn kill(mut self) -> Result<(), SyscallError> {
        self.signal(libc::SIGKILL)?;
        let end = Instant::now() + Duration::from_secs(1);
        let ended = |tid: i32| {
            stops::poll_until(end, || match ptrace::peek(tid) {
                Ok(None | Some(Stop::Event { .. } | Stop::Signal(_) | Stop::Syscall)) => Ok(None),
                Ok(_) | Err(_) => Ok(Some(())),
            })
        };
        for &tid in self.threads.iter().filter(|tid| **tid != self.pid) {
            let _ended = ended(tid);
            let _reported = ptrace::reap(tid);
        }
        // The leader ends after its threads. Its exit is its parent's to collect, once this thread has ended.
        let _ended = ended(self.pid);
        self.threads.clear();
        Ok(())
    }

    /// The end of whatever is begun now.
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
    }

    fn signal(&self, signal: i32) -> Result<(), SyscallError> {
        // SAFETY: no memory is involved; the process cannot be another one, we trace it.
        if unsafe { libc::kill(self.pid, signal) } == 0 {
            Ok(())
        } else {
            Err(SyscallError::last("kill", format!("process {}", self.pid)))
        }
    }

    fn seize_new_threads(&mut self) -> Result<usize, FreezeError> {
        let pid = self.pid;
        let listed = proc::threads(pid).map_err(|source| match source.raw_os_error() {
            Some(libc::ENOENT | libc::ESRCH) => FreezeError::Gone { pid },
            _ => FreezeError::Threads { pid, source },
        })?;
        let before = self.threads.len();
        for tid in listed {
            if self.threads.contains(&tid) {
                continue;
            }
            match ptrace::seize(tid) {
                Ok(()) => {
                    self.threads.push(tid);
                    match ptrace::interrupt(tid) {
                        Err(e) if e.errno() != Some(libc::ESRCH) => return Err(e.into()),
                        _ => {}
                    }
                }
                Err(e) if e.errno() == Some(libc::ESRCH) => {}
                Err(source) => {
                    let status = proc::status(pid, tid);
                    if status.as_ref().is_ok_and(|s| matches!(s.state(), 'Z' | 'X')) || status.is_err() {
                        continue;
                    }
                    let tracer = status.ok().and_then(|s| s.number("TracerPid")).filter(|&t| t != 0);
                    let traced = tracer.map_or(String::new(), |t| format!(", traced by process {t},"));
                    return Err(FreezeError::Seize { pid, tid, traced, source });
                }
            }
        }
        Ok(self.threads.len() - before)
    }

    /// Whether every known thread stands in an event stop; those that have ended are struck off.
    fn stop_all(&mut self, deadline: Instant) -> Result<bool, FreezeError> {
        let mut ended = Vec::new();
        for &tid in &self.threads {
            match stops::to_event_stop(tid, deadline) {
                Ok(()) => {}
                Err(StopError::Gone) => {
                    let _reported = ptrace::reap(tid);
                    ended.push(tid);
                }
                Err(StopError::Timeout) => return Err(self.not_stopped(tid, "")),
                Err(StopError::Call(e)) => return Err(e.into()),
            }
        }
        self.threads.retain(|tid| !ended.contains(tid));
        Ok(ended.is_empty())
    }

    fn not_stopped(&self, tid: i32, reason: &str) -> FreezeError {
        let reason = if reason.is_empty() { obstacle(self.pid, tid) } else { reason.to_owned() };
        FreezeError::Timeout { pid: self.pid, tid, timeout: self.timeout, reason }
    }

    /// epoll_wait and its like fail with EINTR after any stop; where nothing else would have made them fail, they are
    /// made anew. Threads that a killed memckpt left in its parasite are put back; false where one is on its way.
    fn hide_the_stop(&self) -> Result<bool, SyscallError> {
        for &tid in &self.threads {
            let regs = ptrace::registers(tid)?;
            match adopt::thread(self.pid, tid, &regs)? {
                Adopted::NotOurs => {}
                Adopted::PutBack => continue,
                Adopted::OnItsWay => return Ok(false),
            }
            if !registers::endless_and_never_restarted(&regs) {
                continue;
            }
            if proc::status(self.pid, tid).is_ok_and(|s| deliverable(&s) == 0) {
                ptrace::set_registers(tid, &registers::repeating(&regs))?;
            }
        }
        Ok(true)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for &tid in self.threads.iter().chain(&self.workers) {
            if let Err(error) = ptrace::detach(tid, 0) {
                tracing::debug!(tid, %error, "not detached: released when this thread ends");
            }
        }
    }
}

/// PF_IO_WORKER of include/linux/sched.h (Linux 5.12): a thread that never sees user mode. ptrace(2) stops it, and refuses to
/// set anything of it.
fn is_io_worker(tid: i32) -> bool {
    const PF_IO_WORKER: u64 = 0x10;
    status::stat(tid).is_ok_and(|stat| stat.flags & PF_IO_WORKER != 0)
}

/// Pending signals that a thread would take at once.
fn deliverable(status: &Status) -> u64 {
    let pending = status.signals("SigPnd") | status.signals("ShdPnd");
    pending & !status.signals("SigBlk") & !status.signals("SigIgn")
}

/// Why a thread does not stop, in words.
fn obstacle(pid: i32, tid: i32) -> String {
    let state = proc::status(pid, tid).map_or('?', |s| s.state());
    let place = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/wchan")).unwrap_or_default();
    let place = place.trim_matches(['0', '\n']);
    match (state, place) {
        ('D', p) if p.contains("vfork") || p == "kernel_clone" || p == "_do_fork" => {
            let children = super::children(pid).unwrap_or_default();
            let child = children.into_iter().find(|&child| process::shares_mm(pid, child).unwrap_or(false));
            let child = child.map_or(String::new(), |child| {
                format!("; of the child, process {child}: {}", obstacle(child, child))
            });
            format!("it waits for its vfork child (state D, in {p}){child}")
        }
        ('D', "") => "it sleeps uninterruptibly (state D)".to_owned(),
        ('D', p) => format!("it sleeps uninterruptibly (state D, in {p})"),
        (state, "") => format!("it is in state {state}"),
        (state, p) => format!("it is in state {state}, in {p}"),
    }
}
