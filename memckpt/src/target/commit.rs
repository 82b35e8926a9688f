//! From a frozen process to one with a listening parasite. Killed at any point, we leave a thread that finds home.

use std::io;
use std::sync::atomic::Ordering;

use super::blob::{Parameters, Registers, STATE_READY};
use super::freeze::Frozen;
use super::infected::{CommandError, Infected};
use super::injection::{AMX_STATE, InfectRefusal, Injection, PLACES, has_shadow_stack};
use super::registers::{Interrupted, ThreadRegisters};
use super::robust::RobustLock;
use super::stack::Place;
use super::stops::{self, StopError};
use super::{chain, proc, seccomp};
use crate::addr::Addr;
use crate::kernel::SyscallError;
use crate::kernel::ptrace;

/// The selector of 64-bit user code.
const USER_CS_64: u64 = 0x33;

/// Why a frozen process could not be infected. Unless it is gone, it stands frozen as before.
#[derive(Debug, thiserror::Error)]
pub enum InfectError {
    /// It should not be.
    #[error(transparent)]
    Refused(#[from] InfectRefusal),
    /// It was prepared for another process.
    #[error("prepared for process {0}")]
    OtherProcess(i32),
    /// The target unloaded or mapped something since [`Injection::prepare`].
    #[error("its layout changed since the preparation")]
    LayoutChanged,
    /// The target may not attach the segment.
    #[error("shmat in the target: {0}")]
    Attach(#[source] io::Error),
    /// The thread ended or was killed.
    #[error("the thread is gone")]
    Gone,
    /// It did not answer in time.
    #[error("the thread did not get into the parasite in time")]
    Timeout,
    /// Another call failed.
    #[error(transparent)]
    Call(#[from] SyscallError),
}

impl From<StopError> for InfectError {
    fn from(e: StopError) -> Self {
        match e {
            StopError::Gone => Self::Gone,
            StopError::Timeout => Self::Timeout,
            StopError::Call(e) => Self::Call(e),
        }
    }
}

impl From<CommandError> for InfectError {
    fn from(e: CommandError) -> Self {
        match e {
            CommandError::Gone => Self::Gone,
            CommandError::Timeout => Self::Timeout,
            CommandError::Call(e) | CommandError::InTarget(e) => Self::Call(e),
        }
    }
}

/// The thread that the parasite runs on, and all that is needed to put it back.
pub(super) struct Host {
    pub(super) tid: i32,
    /// Registers to go home with: the thread's own, or at its rseq abort handler.
    pub(super) home: libc::user_regs_struct,
    pub(super) xstate: Vec<u8>,
    pub(super) sigmask: u64,
    pub(super) place: Place,
    /// What lay at `place`.
    pub(super) saved: Vec<u8>,
    /// Its seccomp filters, which can be read of a stopped thread only.
    pub(super) filters: Vec<Vec<libc::sock_filter>>,
    // Dropped before the segment that it lies in.
    pub(super) lock: RobustLock,
    pub(super) injection: Injection,
}

struct Chosen {
    registers: ThreadRegisters,
    home: libc::user_regs_struct,
    place: Place,
    saved: Vec<u8>,
}

impl Frozen {
    /// Gets the parasite running on one of the threads; the others stand on.
    ///
    /// # Errors
    /// See [`InfectError`].
    pub fn infect(&mut self, injection: Injection) -> Result<Infected<'_>, InfectError> {
        let threads = self.threads().to_vec();
        self.infect_one_of(injection, &threads)
    }

    /// Gets the parasite running on thread `tid`: for what only the thread itself can be asked.
    ///
    /// # Errors
    /// See [`InfectError`].
    pub fn infect_thread(&mut self, injection: Injection, tid: i32) -> Result<Infected<'_>, InfectError> {
        self.infect_one_of(injection, &[tid])
    }

    fn infect_one_of(&mut self, injection: Injection, threads: &[i32]) -> Result<Infected<'_>, InfectError> {
        if injection.pid != self.pid {
            return Err(InfectError::OtherProcess(injection.pid));
        }
        if !injection.gadgets.still_there(self.pid) || !injection.address_is_free() {
            return Err(InfectError::LayoutChanged);
        }
        let Chosen { registers, home, place, saved } = choose(self, &injection, threads)?;
        let filtered = proc::status(self.pid, registers.tid).is_ok_and(|s| s.field("Seccomp") == Some("2"));
        let filters = if filtered { seccomp::filters(registers.tid)? } else { Vec::new() };
        let p = injection.segment.parameters();
        // SAFETY: the segment lives in `host` from here, and the lock is dropped first.
        let lock = unsafe { RobustLock::take(&raw const (*p).lock, (&raw mut (*p).robust_node).cast()) }?;
        let host = Host {
            tid: registers.tid,
            home,
            xstate: registers.xstate.clone(),
            sigmask: registers.sigmask,
            place,
            saved,
            filters,
            lock,
            injection,
        };
        // SAFETY: nobody else has the segment attached yet.
        host.describe(unsafe { &mut *p });
        let deadline = self.deadline();
        enter(self.pid, &host, deadline)?;
        self.parked = Some(registers);
        let mut infected = Infected::new(self, host);
        infected.wait_for(STATE_READY)?;
        infected.settle()?;
        infected.unmap_leftovers()?;
        Ok(infected)
    }
}

impl Host {
    fn describe(&self, p: &mut Parameters) {
        let injection = &self.injection;
        p.address = injection.address;
        p.length = super::blob::SEGMENT_LEN as u64;
        p.syscall_gadget = injection.gadgets.syscall;
        p.sigreturn_gadget = injection.gadgets.sigreturn;
        p.frame = self.place.frame;
        p.frame_xsave = self.place.xsave;
        p.signal_mask = self.sigmask;
        p.xfeatures = injection.xfeatures;
        p.xsave_len = injection.xsave_len;
        p.registers = Registers::from(&self.home);
        let how = Interrupted::of(&self.home);
        p.restart_block = u32::from(how == Interrupted::Block);
        p.restart_ip = if how == Interrupted::Repeat { self.home.rip.wrapping_sub(2) } else { 0 };
        p.state.store(0, Ordering::Release);
        p.command.store(0, Ordering::Release);
    }
}

/// shmat by the chosen thread, then the parasite.
fn enter(pid: i32, host: &Host, deadline: std::time::Instant) -> Result<(), InfectError> {
    let tid = host.tid;
    let injection = &host.injection;
    // Drops the temporary mask of a sigsuspend or ppoll: with it, a signal could be taken between the commit and our
    // death, and the call made anew as if it had not been.
    ptrace::set_signal_mask(tid, host.sigmask)?;
    proc::write_memory(pid, host.place.region.start.get(), &chain::bytes(host))
        .map_err(|e| SyscallError::new("write", format!("/proc/{pid}/mem"), e))?;
    let mut regs = host.home;
    regs.rip = injection.gadgets.syscall;
    regs.rsp = host.place.chain;
    regs.rax = libc::SYS_shmat as u64;
    regs.rdi = injection.segment.id() as u64;
    regs.rsi = injection.address;
    regs.rdx = libc::SHM_EXEC as u64;
    regs.orig_rax = u64::MAX;
    // The commit. Before it nothing has happened; after it the chain brings the thread home if we do not, and after
    // that the parasite.
    ptrace::set_registers(tid, &regs)?;
    ptrace::set_signal_mask(tid, u64::MAX)?;
    stops::to_syscall_stop(tid, deadline)?;
    stops::to_syscall_stop(tid, deadline)?;
    let mut regs = ptrace::registers(tid)?;
    let result = regs.rax;
    if result == injection.address {
        regs.rip = injection.address;
        regs.orig_rax = u64::MAX;
        ptrace::set_registers(tid, &regs)?;
        return Ok(ptrace::resume(tid, 0)?);
    }
    // With the registers of the interrupted call and an interrupt pending, the kernel restarts that call as after any
    // signal.
    ptrace::interrupt(tid)?;
    ptrace::set_signal_mask(tid, host.sigmask)?;
    ptrace::set_registers(tid, &host.home)?;
    ptrace::resume(tid, 0)?;
    stops::to_event_stop(tid, deadline)?;
    put_back_memory(pid, host);
    Err(InfectError::Attach(io::Error::from_raw_os_error((result as i64).wrapping_neg() as i32)))
}

/// Writes back what lay where the frame was.
pub(super) fn put_back_memory(pid: i32, host: &Host) {
    if let Err(error) = proc::write_memory(pid, host.place.region.start.get(), &host.saved) {
        // Dead memory by all that we know.
        tracing::warn!(pid, %error, "bytes below a stack not put back");
    }
}

/// The thread to use: one whose call is simply made anew first, one in user mode or behind a finished call next, and
/// one that needs its restart block last, since that does not survive our death.
fn choose(frozen: &Frozen, injection: &Injection, eligible: &[i32]) -> Result<Chosen, InfectError> {
    let all: Vec<_> =
        frozen.threads().iter().filter_map(|&tid| Some((tid, ptrace::registers(tid).ok()?))).collect();
    let stack_pointers: Vec<u64> = all.iter().map(|(_, regs)| regs.rsp).collect();
    // A parasite whose memckpt was killed still needs its frame; beyond it, the stack pointer is at the frame.
    let nobody_goes_home = !all.iter().any(|(_, regs)| PLACES.contains(Addr(regs.rip)));
    let mut candidates: Vec<_> = all
        .iter()
        .filter(|(tid, _)| eligible.contains(tid))
        .map(|(tid, regs)| {
            let how = match Interrupted::of(regs) {
                Interrupted::Repeat => 0,
                Interrupted::No | Interrupted::Finished => 1,
                Interrupted::Block => 2,
            };
            let own = injection.stacks.on_own(regs.rsp, injection.xsave_len);
            ((how, own.is_none()), *tid, regs, own)
        })
        .collect();
    candidates.sort_by_key(|&(rank, ..)| rank);
    let mut refusal = InfectRefusal::NoStack;
    for (_, tid, regs, own) in candidates {
        if regs.cs != USER_CS_64 {
            refusal = InfectRefusal::Not64Bit;
            continue;
        }
        if let Some(reason) = refuses(frozen.pid, tid, injection)? {
            refusal = reason;
            continue;
        }
        let places = match own {
            Some(place) => vec![place],
            None => injection.stacks.on_main(&stack_pointers, injection.xsave_len),
        };
        let Some((place, saved)) = places.into_iter().find_map(|place| {
            let mut saved = vec![0; place.region.len() as usize];
            let read = proc::read_memory(frozen.pid, place.region.start.get(), &mut saved).ok()?;
            if own.is_none() && nobody_goes_home && chain::is_abandoned(&saved, &place, injection.gadgets) {
                // What lay there before was zeroes.
                saved.fill(0);
            }
            let dead = own.is_some() || saved.iter().all(|&byte| byte == 0);
            (read == saved.len() && dead).then_some((place, saved))
        }) else {
            continue;
        };
        let registers = ThreadRegisters::read(tid)?;
        if uses_amx(&registers.xstate) {
            refusal = InfectRefusal::Amx;
            continue;
        }
        // The parasite's system calls end a restartable sequence, too.
        let home = registers.outside_sequences(frozen.pid);
        return Ok(Chosen { registers, home, place, saved });
    }
    Err(refusal.into())
}

/// What only a stopped thread can be asked.
fn refuses(pid: i32, tid: i32, injection: &Injection) -> Result<Option<InfectRefusal>, InfectError> {
    let Ok(status) = proc::status(pid, tid) else { return Ok(None) };
    if has_shadow_stack(&status) {
        return Ok(Some(InfectRefusal::ShadowStack));
    }
    match status.field("Seccomp") {
        None | Some("0") => Ok(None),
        Some("1") => Ok(Some(InfectRefusal::SeccompStrict)),
        Some(_) => {
            let gadgets = injection.gadgets;
            let calls = seccomp::calls(injection.address, gadgets.syscall, gadgets.sigreturn);
            match seccomp::filters(tid) {
                Ok(filters) => Ok(seccomp::forbidden(&filters, &calls).map(InfectRefusal::SeccompForbids)),
                Err(_) => Ok(Some(InfectRefusal::SeccompUnreadable)),
            }
        }
    }
}

/// Whether AMX tiles are not in their initial state: XSTATE_BV, the first word behind the legacy area. The area's length
/// says nothing: ptrace gives room for all that the processor has.
fn uses_amx(xstate: &[u8]) -> bool {
    let in_use = xstate.get(512..520).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
    in_use.is_some_and(|bits| bits & AMX_STATE != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tiles_in_use_stand_in_the_way() {
        // As on a processor with AMX, whose XSAVE area is that long.
        let mut xstate = vec![0; 11008];
        xstate[512] = 7;
        assert!(!uses_amx(&xstate));
        xstate[514] = 4;
        assert!(uses_amx(&xstate));
    }
}
