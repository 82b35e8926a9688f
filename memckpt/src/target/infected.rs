//! Talking to the parasite.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use super::adopt;
use super::blob::{IoVec, Parameters, SEGMENT_LEN, op};
use super::commit::{Host, put_back_memory};
use super::cure;
use super::freeze::Frozen;
use super::robust;
use super::stops::{self, StopError};
use crate::kernel::{SyscallError, pidfd};

/// Why a command brought nothing.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The target was killed.
    #[error("the target is gone")]
    Gone,
    /// The parasite does not answer.
    #[error("the parasite did not answer in time")]
    Timeout,
    /// A system call failed in the target.
    #[error("in the target: {0}")]
    InTarget(#[source] SyscallError),
    /// A call of ours failed.
    #[error(transparent)]
    Call(#[from] SyscallError),
}

impl From<StopError> for CommandError {
    fn from(e: StopError) -> Self {
        match e {
            StopError::Gone => Self::Gone,
            StopError::Timeout => Self::Timeout,
            StopError::Call(e) => Self::Call(e),
        }
    }
}

/// A frozen process with a parasite that waits for commands.
///
/// [`Infected::cure`] puts everything back; dropping it does the same. If we are killed, the parasite closes what it
/// opened, unmaps itself and goes back to what its thread was doing.
pub struct Infected<'f> {
    pub(super) frozen: &'f mut Frozen,
    /// None once cured.
    pub(super) host: Option<Host>,
    pub(super) pipes: Vec<super::grab::Pipe>,
    sequence: u32,
}

impl std::fmt::Debug for Infected<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Infected").field("frozen", &self.frozen).finish_non_exhaustive()
    }
}

impl<'f> Infected<'f> {
    pub(super) fn new(frozen: &'f mut Frozen, host: Host) -> Self {
        Self { frozen, host: Some(host), pipes: Vec::new(), sequence: 0 }
    }

    /// The process.
    #[must_use]
    pub fn frozen(&self) -> &Frozen {
        self.frozen
    }

    /// A userfaultfd(2) of the target, made by it with UFFD_USER_MODE_ONLY, which needs no privilege (Linux 5.11). The
    /// target keeps no copy: its tracking ends when the last copy of ours is closed.
    ///
    /// # Errors
    /// Where the kernel has none, or the target may not have one.
    pub fn userfaultfd(&mut self) -> Result<OwnedFd, CommandError> {
        let number = self.call(op::USERFAULTFD, "userfaultfd")?;
        let fd = self.take(number as i32)?;
        self.close_all()?;
        Ok(fd)
    }

    /// A copy of one of the target's descriptors.
    pub(super) fn take(&self, number: i32) -> Result<OwnedFd, CommandError> {
        Ok(pidfd::getfd(&self.host()?.injection.pidfd, number)?)
    }

    /// Closes everything that the parasite has open.
    pub(super) fn close_all(&mut self) -> Result<(), CommandError> {
        self.pipes.clear();
        self.command(op::CLOSE).map(drop)
    }

    pub(super) fn host(&self) -> Result<&Host, CommandError> {
        self.host.as_ref().ok_or(CommandError::Gone)
    }

    pub(super) fn parameters(&self) -> Result<*mut Parameters, CommandError> {
        Ok(self.host()?.injection.segment.parameters())
    }

    /// The parasite listens: what was needed to get there is taken back.
    pub(super) fn settle(&mut self) -> Result<(), CommandError> {
        let pid = self.frozen.pid;
        let p = self.parameters()?;
        let host = self.host.as_mut().ok_or(CommandError::Gone)?;
        // SAFETY: the parasite is done with it.
        host.injection.segment.removed = unsafe { (&raw const (*p).rmid_result).read_volatile() } == 0;
        put_back_memory(pid, host);
        Ok(())
    }

    /// Has the target unmap what killed memckpts left in it and no thread uses any more.
    pub(super) fn unmap_leftovers(&mut self) -> Result<(), CommandError> {
        for address in self.host()?.injection.leftovers.clone() {
            if !adopt::is_left_alone(self.frozen.pid, address) {
                continue;
            }
            let p = self.parameters()?;
            // SAFETY: the parasite reads it only after the command.
            unsafe { (*p).unmap = IoVec { base: address, len: SEGMENT_LEN as u64 } };
            self.call(op::UNMAP, "munmap")?;
        }
        Ok(())
    }

    /// A command whose result is that of a system call.
    pub(super) fn call(&mut self, operation: u32, name: &'static str) -> Result<i64, CommandError> {
        let result = self.command(operation)?;
        if result < 0 {
            let errno = std::io::Error::from_raw_os_error(-result as i32);
            let object = format!("process {}", self.frozen.pid);
            return Err(CommandError::InTarget(SyscallError::new(name, object, errno)));
        }
        Ok(result)
    }

    /// Has the parasite do something; what it said.
    pub(super) fn command(&mut self, operation: u32) -> Result<i64, CommandError> {
        self.submit(operation)?;
        self.finish()
    }

    /// Gives a command without waiting for its end.
    pub(super) fn submit(&mut self, operation: u32) -> Result<(), CommandError> {
        let p = self.parameters()?;
        self.sequence += 1;
        // SAFETY: the segment is attached as long as there is a host.
        unsafe {
            (*p).command.store(self.sequence << 8 | operation, Ordering::Release);
            robust::wake(&raw const (*p).lock);
        }
        Ok(())
    }

    /// Waits for the end of the command given last.
    pub(super) fn finish(&mut self) -> Result<i64, CommandError> {
        let p = self.parameters()?;
        // SAFETY: as above.
        let command = unsafe { (*p).command.load(Ordering::Relaxed) };
        self.wait_for(command)?;
        // SAFETY: as above; the parasite has written it before the state.
        Ok(unsafe { (&raw const (*p).result).read_volatile() })
    }

    /// Waits for a state.
    pub(super) fn wait_for(&mut self, wanted: u32) -> Result<(), CommandError> {
        /// A first answer takes some ten microseconds; a stop by somebody else's signal is looked for after this.
        const PATIENCE_MICROS: i64 = 1000;
        let host = self.host()?;
        let p = host.injection.segment.parameters();
        // SAFETY: as above.
        let (state, lock): (&AtomicU32, *const AtomicU32) = unsafe { (&(*p).state, &raw const (*p).lock) };
        let end = Instant::now() + self.frozen.timeout;
        let (mut stopped, mut micros) = (false, 100);
        loop {
            let now = state.load(Ordering::Acquire);
            if now == wanted {
                return Ok(());
            }
            robust::wait(state, now, micros);
            if state.load(Ordering::Acquire) == wanted {
                return Ok(());
            }
            // The parasite may have looked just before the command came, and sleep since.
            robust::wake(lock);
            micros = (micros * 2).min(20_000);
            if micros > PATIENCE_MICROS || stopped {
                if stops::keep_running(host.tid)? {
                    // One stop follows another: SIGSTOP, the group stop, SIGCONT's notice.
                    (stopped, micros) = (true, 100);
                }
                if Instant::now() >= end {
                    return Err(CommandError::Timeout);
                }
            }
        }
    }
}

impl Drop for Infected<'_> {
    fn drop(&mut self) {
        if let Some(host) = self.host.take() {
            cure::abandon(self.frozen, host);
        }
    }
}
