//! Putting the thread back that the parasite ran on.

use std::time::Instant;

use super::blob::{SEGMENT_LEN, op};
use super::commit::{Host, put_back_memory};
use super::freeze::Frozen;
use super::infected::{CommandError, Infected};
use super::stops::{self, StopError};
use crate::kernel::SyscallError;
use crate::kernel::ptrace;

/// Why a thread could not be put back by us. The parasite then goes home by itself.
#[derive(Debug, thiserror::Error)]
pub enum CureError {
    /// The parasite did not get ready to leave.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The thread did not get where it should.
    #[error("thread {tid}: {reason}")]
    Thread {
        /// Which thread.
        tid: i32,
        /// What happened instead.
        reason: String,
    },
    /// Another call failed.
    #[error(transparent)]
    Call(#[from] SyscallError),
}

impl Infected<'_> {
    /// Unmaps the parasite and puts its thread's registers, extended state and signal mask back, exactly: the kernel
    /// then restarts the call that the freeze interrupted, restart block and all.
    ///
    /// # Errors
    /// See [`CureError`]: the process is unhurt, but the thread may run already.
    pub fn cure(mut self) -> Result<(), CureError> {
        self.pipes.clear();
        // Closes descriptors, and builds the frame that the thread would go home by if we died from here on.
        self.command(op::HOME)?;
        let deadline = self.frozen.deadline();
        let host = self.host()?;
        take_home(host, deadline).map_err(|e| match e {
            StopError::Call(e) => CureError::Call(e),
            e => CureError::Thread { tid: host.tid, reason: e.to_string() },
        })?;
        put_back_memory(self.frozen.pid, host);
        self.frozen.parked = None;
        self.host = None;
        Ok(())
    }
}

fn take_home(host: &Host, deadline: Instant) -> Result<(), StopError> {
    let tid = host.tid;
    let call = StopError::from_call;
    ptrace::interrupt(tid).map_err(call)?;
    stops::to_event_stop(tid, deadline)?;
    // Wherever it listened: munmap by the gadget, whose `ret` finds the frame home.
    let mut regs = host.home;
    regs.rip = host.injection.gadgets.syscall;
    regs.rsp = host.place.frame;
    regs.rax = libc::SYS_munmap as u64;
    regs.rdi = host.injection.address;
    regs.rsi = SEGMENT_LEN as u64;
    regs.orig_rax = u64::MAX;
    ptrace::set_registers(tid, &regs).map_err(call)?;
    stops::to_syscall_stop(tid, deadline)?;
    stops::to_syscall_stop(tid, deadline)?;
    // Only in an event stop does the kernel look at what is to be restarted.
    ptrace::interrupt(tid).map_err(call)?;
    ptrace::resume(tid, 0).map_err(call)?;
    stops::to_event_stop(tid, deadline)?;
    // Up to the last of these the frame would do the same.
    ptrace::set_extended_state(tid, &host.xstate).map_err(call)?;
    ptrace::set_signal_mask(tid, host.sigmask).map_err(call)?;
    ptrace::set_registers(tid, &host.home).map_err(call)
}

/// Lets the parasite go home by itself, as it would if we had died, and stops its thread again.
pub(super) fn abandon(frozen: &mut Frozen, mut host: Host) {
    let deadline = frozen.deadline();
    host.lock.release();
    let left = stops::poll_until(deadline, || {
        stops::keep_running(host.tid)?;
        Ok(host.injection.address_is_free().then_some(()))
    })
    .and_then(|()| {
        ptrace::interrupt(host.tid).map_err(StopError::from_call)?;
        stops::to_event_stop(host.tid, deadline)
    });
    if let Err(error) = left {
        tracing::warn!(tid = host.tid, %error, "the parasite's thread runs on by itself");
    }
    frozen.parked = None;
}
