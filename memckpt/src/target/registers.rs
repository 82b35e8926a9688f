//! What a thread holds beside memory.

use super::proc;
use crate::kernel::SyscallError;
use crate::kernel::ptrace::{self, RobustList, RseqConfig};

/// The system call was interrupted and is to be repeated with its own arguments (include/linux/errno.h:
/// ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND).
const RESTART_CALL: std::ops::RangeInclusive<i64> = -514..=-512;
/// ERESTART_RESTARTBLOCK: to be continued by restart_syscall.
const RESTART_BLOCK: i64 = -516;
/// Length of the `syscall` instruction.
const SYSCALL_LEN: u64 = 2;

/// The state of a stopped thread.
#[derive(Clone, Debug)]
pub struct ThreadRegisters {
    /// Which thread.
    pub tid: i32,
    /// The general registers, as they are: `rax` may still be one of the kernel's -512 to -516.
    pub regs: libc::user_regs_struct,
    /// The extended state: an XSAVE area in the standard format, the mask of its features at byte 464.
    pub xstate: Vec<u8>,
    /// Blocked signals, bit 0 for signal 1.
    pub sigmask: u64,
    /// The list of robust futexes.
    pub robust_list: RobustList,
    /// Where restartable sequences are registered.
    pub rseq: Option<RseqConfig>,
}

/// How the call that a thread was stopped in goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interrupted {
    /// The thread was in user mode.
    No,
    /// A system call with a final result.
    Finished,
    /// To be repeated.
    Repeat,
    /// To be continued by restart_syscall.
    Block,
}

impl Interrupted {
    pub(super) fn of(regs: &libc::user_regs_struct) -> Self {
        match (regs.orig_rax as i64, regs.rax as i64) {
            (..0, _) => Self::No,
            (_, ax) if RESTART_CALL.contains(&ax) => Self::Repeat,
            (_, RESTART_BLOCK) => Self::Block,
            _ => Self::Finished,
        }
    }
}

/// Registers with which the interrupted call is made anew.
pub(super) fn repeating(regs: &libc::user_regs_struct) -> libc::user_regs_struct {
    let mut again = *regs;
    again.rax = regs.orig_rax;
    again.rip = regs.rip.wrapping_sub(SYSCALL_LEN);
    again.orig_rax = u64::MAX;
    again
}

impl ThreadRegisters {
    pub(super) fn read(tid: i32) -> Result<Self, SyscallError> {
        let rseq = match ptrace::rseq(tid) {
            // Linux before 5.13, or without CONFIG_RSEQ.
            Err(e) if e.errno() == Some(libc::EIO) => None,
            rseq => rseq?,
        };
        Ok(Self {
            tid,
            regs: ptrace::registers(tid)?,
            xstate: ptrace::extended_state(tid)?,
            sigmask: ptrace::signal_mask(tid)?,
            robust_list: ptrace::robust_list(tid)?,
            rseq,
        })
    }

    /// The general registers with which this thread of the stopped process `pid` can go on after other code has run on it: at the
    /// abort handler if it was in a restartable sequence (rseq(2)), as going back into its middle would break what it promises.
    #[must_use]
    pub fn outside_sequences(&self, pid: i32) -> libc::user_regs_struct {
        let mut regs = self.regs;
        if let Some(abort) = self.abort_handler(pid) {
            regs.rip = abort;
        }
        regs
    }

    fn abort_handler(&self, pid: i32) -> Option<u64> {
        /// Offset of rseq_cs in struct rseq; struct rseq_cs is two 32-bit words, start, length, abort address.
        const RSEQ_CS: u64 = 8;
        let config = self.rseq?;
        if Interrupted::of(&self.regs) != Interrupted::No {
            return None;
        }
        let word = |address: u64| {
            let mut bytes = [0; 8];
            let read = proc::read_memory(pid, address, &mut bytes).ok()?;
            (read == bytes.len()).then_some(u64::from_le_bytes(bytes))
        };
        let section = word(config.address + RSEQ_CS).filter(|&address| address != 0)?;
        let (start, len, abort) = (word(section + 8)?, word(section + 16)?, word(section + 24)?);
        (self.regs.rip.wrapping_sub(start) < len).then_some(abort)
    }
}

/// The general registers with which the thread can go on elsewhere: an interrupted call is repeated, one that only this
/// kernel's restart block could continue fails with EINTR.
pub(super) fn resumable(regs: &libc::user_regs_struct) -> libc::user_regs_struct {
    match Interrupted::of(regs) {
        Interrupted::No | Interrupted::Finished => *regs,
        Interrupted::Repeat => repeating(regs),
        Interrupted::Block => {
            let mut failed = *regs;
            failed.rax = i64::from(-libc::EINTR) as u64;
            failed
        }
    }
}

/// Missing in libc.
const SYS_IO_PGETEVENTS: i64 = 333;

/// Whether the kernel gives EINTR to this call after *any* stop, handler or not, although no time of its own has
/// begun to run: then it can be made anew and nobody sees the stop.
pub(super) fn endless_and_never_restarted(regs: &libc::user_regs_struct) -> bool {
    if regs.rax as i64 != i64::from(-libc::EINTR) {
        return false;
    }
    match regs.orig_rax as i64 {
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => (regs.r10 as i32) < 0,
        libc::SYS_epoll_pwait2 | libc::SYS_semtimedop => regs.r10 == 0,
        libc::SYS_rt_sigtimedwait => regs.rdx == 0,
        libc::SYS_semop => true,
        libc::SYS_io_getevents | SYS_IO_PGETEVENTS => regs.r8 == 0,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regs(orig_rax: i64, rax: i64) -> libc::user_regs_struct {
        // SAFETY: plain integers.
        let mut regs: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        regs.orig_rax = orig_rax as u64;
        regs.rax = rax as u64;
        regs.rip = 0x1002;
        regs
    }

    #[test]
    fn tells_the_four_cases_apart() {
        assert_eq!(Interrupted::of(&regs(-1, -512)), Interrupted::No);
        assert_eq!(Interrupted::of(&regs(0, 5)), Interrupted::Finished);
        assert_eq!(Interrupted::of(&regs(0, -4)), Interrupted::Finished);
        for restart in [-512, -513, -514] {
            assert_eq!(Interrupted::of(&regs(0, restart)), Interrupted::Repeat);
        }
        assert_eq!(Interrupted::of(&regs(35, -516)), Interrupted::Block);
    }

    #[test]
    fn repeats_at_the_instruction() {
        let again = repeating(&regs(0, -512));
        assert_eq!((again.rip, again.rax, again.orig_rax), (0x1000, 0, u64::MAX));
    }

    #[test]
    fn only_waits_without_end_are_repeated() {
        let mut call = regs(libc::SYS_epoll_wait, -4);
        call.r10 = 0xffff_ffff;
        assert!(endless_and_never_restarted(&call));
        call.r10 = 100;
        assert!(!endless_and_never_restarted(&call));
        assert!(!endless_and_never_restarted(&regs(libc::SYS_read, -4)));
        assert!(!endless_and_never_restarted(&regs(libc::SYS_semop, 0)));
    }
}
