//! The state of a frozen process and its threads that is neither memory nor descriptors.
//!
//! Three sources: `/proc`, ptrace(2), and system calls that the process itself makes, one infected thread after the other, for
//! what nothing else tells.

mod asked;
mod creds;
mod seccomp;
mod timers;

use crate::image::core::{self, Rseq};
use crate::image::mm::MmNumbers;
use crate::image::proto::{CredsEntry, SaEntry, SeccompMode, TaskTimersEntry};
use crate::image::pstree;
use crate::kernel::ptrace::{self, Queue};
use crate::kernel::scheduling::{self, Attributes};
use crate::target::{Frozen, InfectError, Injection, ThreadRegisters};

use super::error::DumpError;
use super::request::{Afterwards, Request};
use super::{Refusal, state};

use asked::OfThread;
pub(super) use seccomp::Filters;

/// What is kept of a thread.
#[derive(Debug)]
pub(super) struct ThreadState {
    /// Outside of any restartable sequence: restoring runs other code on the thread first.
    regs: libc::user_regs_struct,
    own: OfThread,
    creds: CredsEntry,
    sched: Attributes,
    pending: Vec<Vec<u8>>,
    comm: String,
    seccomp: (SeccompMode, Option<u32>),
}

/// A process and its threads, the leader first.
#[derive(Debug)]
pub(super) struct State {
    /// For the leader's core image.
    pub(super) task: core::TaskState,
    pub(super) mm: MmNumbers,
    pub(super) auxv: Vec<u64>,
    /// PR_GET_THP_DISABLE
    pub(super) thp_disabled: bool,
    pub(super) process: pstree::Process,
    threads: Vec<ThreadState>,
}

/// What the system calls of a process say of it as a whole.
#[derive(Debug, Default)]
struct OfProcess {
    sigactions: Vec<SaEntry>,
    timers: TaskTimersEntry,
    brk: u64,
    dumpable: i32,
    child_subreaper: bool,
    thp_disabled: bool,
}

/// Injections for each thread of a process.
#[derive(Debug, Default)]
pub(super) struct Injections(Vec<Injection>);

impl Injections {
    /// As many as `first` and its like are needed, before the freeze.
    pub(super) fn prepare(first: &Injection, threads: usize) -> Result<Self, DumpError> {
        let more = (0..threads).map(|_| first.another()).collect::<Result<_, _>>();
        Ok(Self(more.map_err(InfectError::Refused)?))
    }

    /// One of them; made now where there are more threads than there were.
    pub(super) fn take(&mut self, pid: i32) -> Result<Injection, InfectError> {
        match self.0.pop() {
            Some(injection) => Ok(injection),
            None => Ok(Injection::prepare(pid)?),
        }
    }
}

/// Has thread `tid` say what only it can say, and of the process if that is not known yet.
fn ask(
    frozen: &mut Frozen,
    injections: &mut Injections,
    tid: i32,
    asked: &mut Option<OfProcess>,
) -> Result<OfThread, DumpError> {
    let mut parasite = frozen.infect_thread(injections.take(frozen.pid())?, tid)?;
    let own = OfThread::ask(&mut parasite)?;
    if asked.is_none() {
        *asked = Some(OfProcess::ask(&mut parasite)?);
    }
    parasite.cure()?;
    Ok(own)
}

/// Why a thread cannot be asked, where that is no failure: it cannot have a parasite, or its seccomp filters allow the parasite
/// less than it needs.
fn cannot_be_asked(error: DumpError) -> Result<String, DumpError> {
    match error {
        DumpError::Infect(
            error @ (InfectError::Refused(_) | InfectError::LayoutChanged | InfectError::Attach(_)),
        ) => Ok(error.to_string()),
        DumpError::Syscall(error) if error.errno() == Some(libc::EPERM) => {
            Ok(format!("a seccomp filter does not allow it to be asked: {error}"))
        }
        error => Err(error),
    }
}

impl State {
    /// Everything of a frozen process below `ppid`. With `injections` its threads run a few system calls each, and stand as
    /// before afterwards; without, what only they can tell is left out.
    pub(super) fn take(
        frozen: &mut Frozen,
        ppid: i32,
        mut injections: Option<&mut Injections>,
        registers: &[ThreadRegisters],
        filters: &mut Filters,
        request: &Request,
        notes: &mut Vec<String>,
    ) -> Result<Self, DumpError> {
        let pid = frozen.pid();
        let stopped_by = frozen.stopped_by();
        let mut threads = Vec::with_capacity(registers.len());
        let mut asked = None;
        for thread in registers {
            let tid = thread.tid;
            let regs = thread.outside_sequences(pid);
            let own = match &mut injections {
                Some(injections) => match ask(frozen, injections, tid, &mut asked) {
                    Ok(own) => own,
                    Err(error) => {
                        let reason = cannot_be_asked(error)?;
                        if request.afterwards == Afterwards::Ended {
                            return Err(Refusal::CannotAsk { pid, reason }.into());
                        }
                        let note = format!(
                            "process {pid}: signal handlers, timers and alternate stacks are not in the checkpoint: {reason}"
                        );
                        if !notes.contains(&note) {
                            notes.push(note);
                        }
                        OfThread::unknown()
                    }
                },
                None => OfThread::unknown(),
            };
            threads.push(ThreadState {
                regs,
                creds: creds::of(tid, own.securebits)?,
                sched: scheduling::attributes(tid)?,
                pending: ptrace::pending(tid, Queue::Thread)?,
                comm: state::comm(pid, tid)?,
                seccomp: filters.of(tid)?,
                own,
            });
        }
        let mut mm = state::mm_numbers(pid)?;
        let mut task = state::task(pid)?;
        task.stopped_by = stopped_by;
        task.pending = Some(ptrace::pending(pid, Queue::Shared)?);
        let mut thp_disabled = false;
        if let Some(asked) = asked {
            task.sigactions = asked.sigactions;
            task.timers = Some(asked.timers);
            task.child_subreaper = asked.child_subreaper;
            mm.brk = asked.brk;
            mm.dumpable = Some(asked.dumpable);
            thp_disabled = asked.thp_disabled;
        }
        let process = state::process(pid, ppid, registers.iter().map(|r| r.tid).collect())?;
        Ok(Self { task, mm, auxv: state::auxv(pid)?, thp_disabled, process, threads })
    }

    /// For the core image of the `n`-th thread, whose registers are `registers`.
    pub(super) fn thread<'a>(
        &self,
        n: usize,
        registers: &'a ThreadRegisters,
    ) -> Option<core::ThreadState<'a>> {
        let thread = self.threads.get(n)?;
        let OfThread { sas, tid_address, pdeath_signal, .. } = thread.own;
        Some(core::ThreadState {
            regs: thread.regs,
            xstate: &registers.xstate,
            blocked: registers.sigmask,
            clear_tid_addr: tid_address,
            robust_list: (registers.robust_list.head, registers.robust_list.len as u32),
            rseq: registers.rseq.map(|r| Rseq { pointer: r.address, size: r.size, signature: r.signature }),
            sigaltstack: Some(sas),
            sched: Some((thread.sched.nice, thread.sched.policy, thread.sched.priority)),
            creds: Some(thread.creds.clone()),
            comm: thread.comm.clone(),
            pdeath_signal,
            pending: Some(thread.pending.clone()),
            seccomp: Some(thread.seccomp),
        })
    }
}
