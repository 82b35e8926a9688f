//! What only the process itself can be asked.

use crate::image::proto::{ItimerEntry, SaEntry, TaskTimersEntry};
use crate::target::{Answers, Arg, Buffer, Calls, Infected, Nth};

use super::OfProcess;
use super::timers;
use crate::dump::error::DumpError;

/// Signals are numbered 1 to 64 (include/uapi/asm-generic/signal.h).
const SIGNALS: i32 = 64;
/// The size of the kernel's sigset_t.
const SIGSET: u64 = 8;
/// struct kernel_sigaction of x86-64: handler, flags, restorer, mask.
const SIGACTION: usize = 32;
/// Missing in libc (linux/prctl.h).
const PR_GET_THP_DISABLE: u64 = 42;
const PR_GET_TID_ADDRESS: u64 = 40;

/// What the system calls of a thread say of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct OfThread {
    /// The alternate signal stack: address, size, flags (sigaltstack(2)).
    pub(super) sas: (u64, u64, u32),
    /// set_tid_address(2).
    pub(super) tid_address: u64,
    /// PR_GET_PDEATHSIG; 0 for none.
    pub(super) pdeath_signal: u32,
    /// PR_GET_SECUREBITS.
    pub(super) securebits: u32,
}

fn prctl(calls: &mut Calls, option: u64, argument: impl Into<Arg>) -> Nth {
    calls.call("prctl", libc::SYS_prctl, [option.into(), argument.into(), 0.into(), 0.into(), 0.into()])
}

impl OfThread {
    /// Of a thread that cannot be asked: what most threads have.
    pub(super) fn unknown() -> Self {
        Self { sas: (0, 0, libc::SS_DISABLE as u32), tid_address: 0, pdeath_signal: 0, securebits: 0 }
    }

    pub(super) fn ask(parasite: &mut Infected<'_>) -> Result<Self, DumpError> {
        let mut calls = Calls::new();
        let stack = calls.zeroes(size_of::<libc::stack_t>());
        let address = calls.zeroes(8);
        let signal = calls.zeroes(8);
        let asked = [
            calls.call("sigaltstack", libc::SYS_sigaltstack, [0.into(), stack.into()]),
            prctl(&mut calls, PR_GET_TID_ADDRESS, address),
            prctl(&mut calls, libc::PR_GET_PDEATHSIG as u64, signal),
        ];
        let securebits = prctl(&mut calls, libc::PR_GET_SECUREBITS as u64, 0);
        let answers = parasite.run(calls)?;
        for call in asked {
            answers.result(call)?;
        }
        Ok(Self {
            // struct stack_t: pointer, flags and padding, size. Whether it is in use is told by the stack pointer.
            sas: (answers.word(stack, 0), answers.word(stack, 2), answers.word(stack, 1) as u32),
            tid_address: answers.word(address, 0),
            pdeath_signal: answers.half(signal),
            securebits: answers.result(securebits)? as u32,
        })
    }
}

impl OfProcess {
    pub(super) fn ask(parasite: &mut Infected<'_>) -> Result<Self, DumpError> {
        let pid = parasite.frozen().pid();
        let mut calls = Calls::new();
        let actions: Vec<_> = (1..=SIGNALS)
            .filter(|signal| !matches!(*signal, libc::SIGKILL | libc::SIGSTOP))
            .map(|signal| {
                let buffer = calls.zeroes(SIGACTION);
                let args = [(signal as u64).into(), 0.into(), buffer.into(), SIGSET.into()];
                (calls.call("rt_sigaction", libc::SYS_rt_sigaction, args), buffer)
            })
            .collect();
        let itimers = [libc::ITIMER_REAL, libc::ITIMER_VIRTUAL, libc::ITIMER_PROF].map(|which| {
            let buffer = calls.zeroes(size_of::<libc::itimerval>());
            let args = [(which as u64).into(), buffer.into()];
            (calls.call("getitimer", libc::SYS_getitimer, args), buffer)
        });
        let subreaper = calls.zeroes(8);
        let got_subreaper = prctl(&mut calls, libc::PR_GET_CHILD_SUBREAPER as u64, subreaper);
        let dumpable = prctl(&mut calls, libc::PR_GET_DUMPABLE as u64, 0);
        let thp_disabled = prctl(&mut calls, PR_GET_THP_DISABLE, 0);
        let brk = calls.call("brk", libc::SYS_brk, [0.into()]);
        let answers = parasite.run(calls)?;
        answers.result(got_subreaper)?;
        let [real, virt, prof] = itimers;
        Ok(Self {
            sigactions: actions.iter().map(|a| sigaction(&answers, *a)).collect::<Result<_, _>>()?,
            timers: TaskTimersEntry {
                real: itimer(&answers, real)?,
                virt: itimer(&answers, virt)?,
                prof: itimer(&answers, prof)?,
                posix: timers::posix(pid, parasite)?,
            },
            brk: answers.result(brk)? as u64,
            dumpable: answers.result(dumpable)? as i32,
            child_subreaper: answers.half(subreaper) != 0,
            thp_disabled: answers.result(thp_disabled)? != 0,
        })
    }
}

fn sigaction(answers: &Answers, (call, buffer): (Nth, Buffer)) -> Result<SaEntry, DumpError> {
    answers.result(call)?;
    let word = |n| answers.word(buffer, n);
    Ok(SaEntry {
        sigaction: word(0),
        flags: word(1),
        restorer: word(2),
        mask: word(3),
        compat_sigaction: Some(false),
        mask_extended: None,
    })
}

fn itimer(answers: &Answers, (call, buffer): (Nth, Buffer)) -> Result<ItimerEntry, DumpError> {
    answers.result(call)?;
    let word = |n| answers.word(buffer, n);
    Ok(ItimerEntry { isec: word(0), iusec: word(1), vsec: word(2), vusec: word(3) })
}
