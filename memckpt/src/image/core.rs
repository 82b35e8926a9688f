//! `core-TID.img`: the registers and the extended state of a thread.

mod xsave;

use super::magic::ImageKind;
use super::proto::{
    CoreEntry, CredsEntry, March, RlimitEntry, RseqEntry, SaEntry, SeccompMode, SiginfoEntry,
    SignalQueueEntry, TaskCoreEntry, TaskRlimitsEntry, TaskTimersEntry, ThreadCoreEntry, ThreadInfoX86,
    ThreadSasEntry, UserDesc, UserX86Regs, UserX86RegsMode,
};
use super::record::Image;

pub use xsave::{XsaveError, XsaveLayout};

/// A registered restartable-sequences area (rseq(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rseq {
    /// Where `struct rseq` is.
    pub pointer: u64,
    /// Its registered size.
    pub size: u32,
    /// The signature before abort handlers.
    pub signature: u32,
}

/// A thread as it stood still.
#[derive(Clone, Debug)]
pub struct ThreadState<'a> {
    /// PTRACE_GETREGSET, NT_PRSTATUS.
    pub regs: libc::user_regs_struct,
    /// PTRACE_GETREGSET, NT_X86_XSTATE: the XSAVE area in its standard format.
    pub xstate: &'a [u8],
    /// Blocked signals.
    pub blocked: u64,
    /// set_tid_address(2); 0 where it is not known.
    pub clear_tid_addr: u64,
    /// Address and length of the robust futex list.
    pub robust_list: (u64, u32),
    /// rseq(2), where it is registered.
    pub rseq: Option<Rseq>,
    /// Alternate signal stack: address, size, flags.
    pub sigaltstack: Option<(u64, u64, u32)>,
    /// nice value, scheduling policy and real-time priority.
    pub sched: Option<(i32, u32, u32)>,
    /// Credentials, where they are recorded.
    pub creds: Option<CredsEntry>,
    /// `/proc/PID/task/TID/comm`
    pub comm: String,
    /// The signal that it gets when its parent ends; 0 for none.
    pub pdeath_signal: u32,
    /// Pending signals, each a siginfo_t; `None` where they are not recorded.
    pub pending: Option<Vec<Vec<u8>>>,
    /// seccomp(2) mode, and the number of its newest filter in `seccomp.img`; `None` where it is not recorded.
    pub seccomp: Option<(SeccompMode, Option<u32>)>,
}

/// What belongs to the process; in its leader's core image.
#[derive(Clone, Debug, Default)]
pub struct TaskState {
    /// `/proc/PID/comm`
    pub comm: String,
    /// `/proc/PID/personality`
    pub personality: u32,
    /// Field 9 of `/proc/PID/stat`: kernel flags.
    pub flags: u32,
    /// Blocked signals of the leader.
    pub blocked: u64,
    /// Soft and hard limits, by number.
    pub rlimits: Vec<(u64, u64)>,
    /// `/proc/PID/oom_score_adj`
    pub oom_score_adj: Option<i32>,
    /// `/proc/PID/loginuid`
    pub loginuid: Option<u32>,
    /// Signal handlers, of all signals but SIGKILL and SIGSTOP; none where they are not recorded.
    pub sigactions: Vec<SaEntry>,
    /// Interval timers and POSIX timers, where they are recorded.
    pub timers: Option<TaskTimersEntry>,
    /// Signals pending for the process, each a siginfo_t; `None` where they are not recorded.
    pub pending: Option<Vec<Vec<u8>>>,
    /// PR_GET_CHILD_SUBREAPER
    pub child_subreaper: bool,
    /// The signal that has stopped it, if it is stopped.
    pub stopped_by: Option<i32>,
}

/// CRIU's number for a task that runs.
const TASK_ALIVE: u32 = 1;
/// CRIU's number for a task that a signal has stopped.
const TASK_STOPPED: u32 = 3;
/// CRIU's number for a zombie.
pub(super) const TASK_DEAD: u32 = 2;
/// The first of the three TLS entries of the GDT on x86-64 (GDT_ENTRY_TLS_MIN).
const FIRST_TLS_ENTRY: u32 = 12;

/// Sets the registers as a restored thread needs them: a system call that was interrupted to stop the thread is made
/// again, or returns EINTR, as the kernel does when no handler runs (arch_do_signal_or_restart(), arch/x86/kernel/signal.c).
/// What ERESTART_RESTARTBLOCK would continue with does not survive the kernel that knows it; a wait without end, or until a point
/// in time, is the same when it is made again.
fn settle_system_call(regs: &mut libc::user_regs_struct) {
    const ERESTARTSYS: i64 = 512;
    const ERESTARTNOINTR: i64 = 513;
    const ERESTARTNOHAND: i64 = 514;
    const ERESTART_RESTARTBLOCK: i64 = 516;
    /// `syscall` and `int 0x80` are two bytes.
    const SYSCALL_LEN: u64 = 2;

    if (regs.orig_rax as i64) < 0 {
        return;
    }
    let again = match -(regs.rax as i64) {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => true,
        ERESTART_RESTARTBLOCK => is_the_same_again(regs),
        _ => return,
    };
    if again {
        regs.rax = regs.orig_rax;
        regs.rip = regs.rip.wrapping_sub(SYSCALL_LEN);
    } else {
        regs.rax = i64::from(-libc::EINTR) as u64;
    }
}

/// Whether a call that restart_syscall(2) continues waits no longer if it is made again from the start.
fn is_the_same_again(regs: &libc::user_regs_struct) -> bool {
    match regs.orig_rax as i64 {
        // The timeout, in milliseconds; do_restart_poll() in fs/select.c.
        libc::SYS_poll => (regs.rdx as i32) < 0,
        // Timeouts of all but FUTEX_WAIT are points in time; futex_wait_restart() in kernel/futex/waitwake.c.
        libc::SYS_futex => regs.rsi as i32 & libc::FUTEX_CMD_MASK == libc::FUTEX_WAIT_BITSET,
        _ => false,
    }
}

fn gpregs(mut regs: libc::user_regs_struct) -> UserX86Regs {
    settle_system_call(&mut regs);
    UserX86Regs {
        r15: regs.r15,
        r14: regs.r14,
        r13: regs.r13,
        r12: regs.r12,
        bp: regs.rbp,
        bx: regs.rbx,
        r11: regs.r11,
        r10: regs.r10,
        r9: regs.r9,
        r8: regs.r8,
        ax: regs.rax,
        cx: regs.rcx,
        dx: regs.rdx,
        si: regs.rsi,
        di: regs.rdi,
        orig_ax: regs.orig_rax,
        ip: regs.rip,
        cs: regs.cs,
        flags: regs.eflags,
        sp: regs.rsp,
        ss: regs.ss,
        fs_base: regs.fs_base,
        gs_base: regs.gs_base,
        ds: regs.ds,
        es: regs.es,
        fs: regs.fs,
        gs: regs.gs,
        mode: Some(UserX86RegsMode::Native as i32),
    }
}

/// The core image of a thread; `task` for the leader only.
///
/// # Errors
/// The extended state is too short to be an XSAVE area.
pub fn core_entry(
    thread: &ThreadState<'_>,
    task: Option<&TaskState>,
    layout: &XsaveLayout,
) -> Result<CoreEntry, XsaveError> {
    let empty_tls =
        |n| UserDesc { entry_number: n, read_exec_only: true, seg_not_present: true, ..Default::default() };
    Ok(CoreEntry {
        mtype: March::X8664 as i32,
        thread_info: Some(ThreadInfoX86 {
            clear_tid_addr: thread.clear_tid_addr,
            gpregs: gpregs(thread.regs),
            fpregs: layout.fpregs(thread.xstate)?,
            // 64-bit tasks reach thread-local storage through fs_base; entries of the GDT are for 32-bit code.
            tls: (FIRST_TLS_ENTRY..FIRST_TLS_ENTRY + 3).map(empty_tls).collect(),
        }),
        tc: task.map(task_core),
        ids: None,
        thread_core: Some(ThreadCoreEntry {
            futex_rla: thread.robust_list.0,
            futex_rla_len: thread.robust_list.1,
            sched_nice: thread.sched.map(|(nice, ..)| nice),
            sched_policy: thread.sched.map(|(_, policy, _)| policy),
            sched_prio: thread.sched.and_then(|(.., priority)| (priority != 0).then_some(priority)),
            blk_sigset: Some(thread.blocked),
            sas: thread.sigaltstack.map(|(ss_sp, ss_size, ss_flags)| ThreadSasEntry {
                ss_sp,
                ss_size,
                ss_flags,
            }),
            creds: thread.creds.clone(),
            comm: Some(thread.comm.clone()),
            rseq_entry: thread.rseq.map(|rseq| RseqEntry {
                rseq_abi_pointer: rseq.pointer,
                rseq_abi_size: rseq.size,
                signature: rseq.signature,
                rseq_cs_pointer: None,
            }),
            cg_set: Some(1),
            pdeath_sig: (thread.pdeath_signal != 0).then_some(thread.pdeath_signal),
            signals_p: thread.pending.as_deref().map(signal_queue),
            seccomp_mode: thread.seccomp.map(|(mode, _)| mode as i32),
            seccomp_filter: thread.seccomp.and_then(|(_, filter)| filter),
            ..Default::default()
        }),
    })
}

fn task_core(task: &TaskState) -> TaskCoreEntry {
    let rlimits = task.rlimits.iter().map(|&(cur, max)| RlimitEntry { cur, max }).collect();
    TaskCoreEntry {
        task_state: if task.stopped_by.is_some() { TASK_STOPPED } else { TASK_ALIVE },
        exit_code: 0,
        personality: task.personality,
        flags: task.flags,
        blk_sigset: task.blocked,
        comm: task.comm.clone(),
        rlimits: Some(TaskRlimitsEntry { rlimits }),
        oom_score_adj: task.oom_score_adj,
        loginuid: task.loginuid,
        timers: task.timers.clone(),
        signals_s: task.pending.as_deref().map(signal_queue),
        sigactions: task.sigactions.clone(),
        child_subreaper: Some(task.child_subreaper),
        stop_signo: task.stopped_by.map(|signal| signal as u32),
        ..Default::default()
    }
}

fn signal_queue(infos: &[Vec<u8>]) -> SignalQueueEntry {
    SignalQueueEntry {
        signals: infos.iter().map(|siginfo| SiginfoEntry { siginfo: siginfo.clone() }).collect(),
    }
}

/// The core image of a process that has ended with `exit_code`, as wait(2) tells it, and was not waited for.
#[must_use]
pub fn zombie(comm: &str, exit_code: i32) -> CoreEntry {
    CoreEntry {
        mtype: March::X8664 as i32,
        tc: Some(TaskCoreEntry {
            task_state: TASK_DEAD,
            exit_code: exit_code as u32,
            comm: comm.to_owned(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The content of `core-TID.img`.
#[must_use]
pub fn encode(entry: &CoreEntry) -> Vec<u8> {
    Image::new(ImageKind::Core).with(entry).into_bytes()
}

#[cfg(test)]
mod tests;
