//! A task that is being made: it stands in a ptrace stop, and runs the restorer when told to.

use std::io;

use crate::kernel::SyscallError;
use crate::kernel::ptrace;
use crate::kernel::ptrace::made::{self, Event};
use crate::target::{Answers, Buffer, Calls};

use super::arena::Arena;
use super::error::RestoreError;

/// A thread of a task that is being made. Ends with us: PTRACE_O_EXITKILL.
#[derive(Clone, Copy, Debug)]
pub(super) struct Task<'a> {
    tid: i32,
    arena: &'a Arena,
}

impl<'a> Task<'a> {
    /// Takes hold of a child of ours that waits in [`super::stub`].
    pub(super) fn seize(pid: i32, arena: &'a Arena) -> Result<Self, RestoreError> {
        made::seize(pid)?;
        ptrace::interrupt(pid)?;
        let task = Self { tid: pid, arena };
        task.expect(Event::Stop)?;
        Ok(task)
    }

    pub(super) const fn tid(&self) -> i32 {
        self.tid
    }

    /// Where a buffer of a list of calls will be.
    pub(super) fn address(&self, buffer: Buffer) -> u64 {
        self.arena.data() + buffer.offset() as u64
    }

    /// Makes the calls, one after the other. All must succeed.
    pub(super) fn run(&self, calls: &Calls) -> Result<Answers, RestoreError> {
        let (answers, children) = self.make(calls)?;
        debug_assert!(children.is_empty());
        Ok(answers)
    }

    /// Makes calls that end with a clone3(2); gives the new task, which is stopped.
    pub(super) fn fork(&self, calls: &Calls) -> Result<(Answers, Task<'a>), RestoreError> {
        let (answers, children) = self.make(calls)?;
        match children[..] {
            [tid] => {
                let child = Task { tid, arena: self.arena };
                child.expect(Event::Stop)?;
                Ok((answers, child))
            }
            _ => Err(self.failed("clone3 made no task")),
        }
    }

    /// Sets it to work on a list; how many calls that has.
    fn start(&self, calls: &Calls) -> Result<usize, RestoreError> {
        let count = self.arena.write(calls)?;
        let mut regs = ptrace::registers(self.tid)?;
        (regs.rip, regs.rbx, regs.r12) = (self.arena.code(), self.arena.list(), count as u64);
        // A call that the stop has interrupted is not made again.
        regs.orig_rax = u64::MAX;
        ptrace::set_registers(self.tid, &regs)?;
        ptrace::resume(self.tid, 0)?;
        Ok(count)
    }

    fn make(&self, calls: &Calls) -> Result<(Answers, Vec<i32>), RestoreError> {
        let count = self.start(calls)?;
        let mut children = Vec::new();
        loop {
            match self.wait()? {
                Event::Signal(libc::SIGTRAP) => break,
                Event::Forked => {
                    children.push(made::message(self.tid)? as i32);
                    ptrace::resume(self.tid, 0)?;
                }
                // Somebody's SIGSTOP, or the like: it is not there yet to be stopped.
                Event::Signal(signal) if !is_fault(signal) => ptrace::resume(self.tid, 0)?,
                Event::Stop => ptrace::resume(self.tid, 0)?,
                other => return Err(self.failed(format!("{other:?} where it should make system calls"))),
            }
        }
        let left = ptrace::registers(self.tid)?.r12 as usize;
        let (results, data) =
            self.arena.read(count.saturating_sub(left) + usize::from(left > 0), calls.data().len());
        let answers = Answers::of(calls, &results, data, self.tid);
        if left > 0 {
            answers.last()?;
        }
        Ok((answers, children))
    }

    /// Makes one call, and comes not back from it into the restorer: it can unmap that. No signal is needed to stop it.
    pub(super) fn call_itself(
        &self,
        name: &'static str,
        number: i64,
        args: [u64; 6],
    ) -> Result<(), RestoreError> {
        let mut regs = ptrace::registers(self.tid)?;
        (regs.rip, regs.rax, regs.orig_rax) = (self.arena.syscall(), number as u64, u64::MAX);
        (regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9) =
            (args[0], args[1], args[2], args[3], args[4], args[5]);
        ptrace::set_registers(self.tid, &regs)?;
        for _entry_and_exit in 0..2 {
            ptrace::resume_to_syscall(self.tid, 0)?;
            self.expect(Event::Syscall)?;
        }
        let result = ptrace::registers(self.tid)?.rax as i64;
        if (-4095..0).contains(&result) {
            let error = io::Error::from_raw_os_error(-result as i32);
            return Err(SyscallError::new(name, format!("process {}", self.tid), error).into());
        }
        Ok(())
    }

    /// Ends it, as wait(2) says by `code`.
    pub(super) fn end(&self, code: u32) -> Result<(), RestoreError> {
        let signal = code as i32 & 0x7f;
        let mut calls = Calls::new();
        if signal == 0 {
            let status = u64::from(code >> 8 & 0xff);
            calls.call("exit_group", libc::SYS_exit_group, [status.into()]);
        } else {
            let action = calls.zeroes(32);
            let none = calls.zeroes(8);
            if !matches!(signal, libc::SIGKILL | libc::SIGSTOP) {
                let args = [(signal as u64).into(), action.into(), 0.into(), 8.into()];
                calls.call("rt_sigaction", libc::SYS_rt_sigaction, args);
            }
            let set = libc::SIG_SETMASK as u64;
            calls.call(
                "rt_sigprocmask",
                libc::SYS_rt_sigprocmask,
                [set.into(), none.into(), 0.into(), 8.into()],
            );
            calls.call("kill", libc::SYS_kill, [(self.tid as u64).into(), (signal as u64).into()]);
        }
        self.start(&calls)?;
        loop {
            match made::wait(self.tid)? {
                Event::Ended(_) => return Ok(()),
                Event::Signal(taken) if taken == signal => ptrace::resume(self.tid, signal)?,
                Event::Stop => ptrace::resume(self.tid, 0)?,
                other => return Err(self.failed(format!("{other:?} where it should end"))),
            }
        }
    }

    fn expect(&self, wanted: Event) -> Result<(), RestoreError> {
        loop {
            match self.wait()? {
                event if event == wanted => return Ok(()),
                Event::Signal(signal) if !is_fault(signal) => match wanted {
                    Event::Syscall => ptrace::resume_to_syscall(self.tid, 0)?,
                    _ => ptrace::resume(self.tid, 0)?,
                },
                other => return Err(self.failed(format!("{other:?} instead of {wanted:?}"))),
            }
        }
    }

    fn wait(&self) -> Result<Event, RestoreError> {
        match made::wait(self.tid)? {
            Event::Ended(how) => Err(self.failed(format!("it ended ({how})"))),
            event => Ok(event),
        }
    }

    fn failed(&self, what: impl Into<String>) -> RestoreError {
        RestoreError::Task { tid: self.tid, what: what.into() }
    }
}

/// Whether a signal comes of what the task itself does.
const fn is_fault(signal: i32) -> bool {
    matches!(
        signal,
        libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGFPE | libc::SIGSYS | libc::SIGTRAP
    )
}
