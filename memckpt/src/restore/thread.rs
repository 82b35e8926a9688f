//! What belongs to a thread: made by the thread itself, or set while it stands.

use crate::image::core::XsaveLayout;
use crate::image::proto::{CredsEntry, SeccompEntry, SeccompMode, UserX86Regs};
use crate::kernel::ptrace;

use super::batch::Batch;
use super::checkpoint::Thread;
use super::error::{Refusal, RestoreError};
use super::task::Task;

/// The size of the kernel's struct robust_list_head.
const ROBUST_LIST: u64 = 24;
/// Bytes of siginfo_t.
const SIGINFO: usize = 128;
/// May come with a policy.
const SCHED_RESET_ON_FORK: u32 = libc::SCHED_RESET_ON_FORK as u32;
/// Not in libc (linux/capability.h).
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
/// SECBIT_NO_SETUID_FIXUP: changes of users leave capabilities alone.
const NO_SETUID_FIXUP: u64 = 1 << 2;
/// The highest capability that there may be.
const CAPABILITIES: u32 = 64;

/// What must be there before the credentials are those of the thread.
pub(super) fn before_creds(pid: i32, thread: &Thread, batch: &mut Batch<'_>) -> Result<(), RestoreError> {
    let core = &thread.core;
    if core.futex_rla != 0 {
        batch.call("set_robust_list", libc::SYS_set_robust_list, [core.futex_rla, ROBUST_LIST])?;
    } else {
        batch.call("set_robust_list", libc::SYS_set_robust_list, [0, ROBUST_LIST])?;
    }
    batch.call("set_tid_address", libc::SYS_set_tid_address, [thread.arch.clear_tid_addr])?;
    if let Some(sas) = &core.sas {
        let stack = [sas.ss_sp, u64::from(sas.ss_flags), sas.ss_size];
        batch.call_with("sigaltstack", libc::SYS_sigaltstack, &words(&stack), |at| [at, 0])?;
    }
    if let Some(rseq) = core.rseq_entry.as_ref().filter(|rseq| rseq.rseq_abi_pointer != 0) {
        let args = [rseq.rseq_abi_pointer, rseq.rseq_abi_size.into(), 0, rseq.signature.into()];
        batch.call("rseq", libc::SYS_rseq, args)?;
    }
    if let Some(comm) = &core.comm {
        let mut name = comm.clone().into_bytes();
        name.push(0);
        let set = libc::PR_SET_NAME as u64;
        batch.call_with("prctl(PR_SET_NAME)", libc::SYS_prctl, &name, |at| [set, at])?;
    }
    schedule(core.sched_policy, core.sched_prio, core.sched_nice, batch)?;
    for signal in core.signals_p.iter().flat_map(|queue| &queue.signals) {
        let number = signal_number(pid, &signal.siginfo)?;
        let [tgid, tid] = [pid as u64, thread.tid as u64];
        batch.call_with("rt_tgsigqueueinfo", libc::SYS_rt_tgsigqueueinfo, &signal.siginfo, |at| {
            [tgid, tid, number, at]
        })?;
    }
    Ok(())
}

fn schedule(
    policy: Option<u32>,
    priority: Option<u32>,
    nice: Option<i32>,
    batch: &mut Batch<'_>,
) -> Result<(), RestoreError> {
    if let Some(policy) = policy.filter(|policy| policy & !SCHED_RESET_ON_FORK != libc::SCHED_OTHER as u32) {
        let priority = priority.unwrap_or(0).to_ne_bytes();
        batch.call_with("sched_setscheduler", libc::SYS_sched_setscheduler, &priority, |at| {
            [0, u64::from(policy), at]
        })?;
    }
    if let Some(nice) = nice {
        batch.call("setpriority", libc::SYS_setpriority, [u64::from(libc::PRIO_PROCESS), 0, nice as u64])?;
    }
    Ok(())
}

/// The number of a signal that waits.
pub(super) fn signal_number(pid: i32, siginfo: &[u8]) -> Result<u64, RestoreError> {
    let number = siginfo.first_chunk().map_or(0, |n| i32::from_ne_bytes(*n));
    let refused = |what: String| Err(Refusal::State { pid, what }.into());
    match number {
        _ if siginfo.len() != SIGINFO => refused(format!("a pending signal has {} bytes", siginfo.len())),
        libc::SIGTRAP => refused("a SIGTRAP is pending, which cannot be made pending again".into()),
        1..=64 => Ok(number as u64),
        _ => refused(format!("{number} is the number of no signal")),
    }
}

/// The credentials, and what must come after them.
pub(super) fn creds(
    thread: &Thread,
    filters: &SeccompEntry,
    pid: i32,
    batch: &mut Batch<'_>,
) -> Result<(), RestoreError> {
    // Without CAP_SYS_ADMIN only with no_new_privs.
    seccomp(thread, filters, pid, batch)?;
    if let Some(creds) = &thread.core.creds {
        change_creds(creds, batch)?;
        if creds.no_new_privs.unwrap_or(0) != 0 {
            let args = [libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0, 0];
            batch.call("prctl(PR_SET_NO_NEW_PRIVS)", libc::SYS_prctl, args)?;
        }
    }
    // Changed credentials clear it (commit_creds, kernel/cred.c). The first process has ours.
    let signal = u64::from(thread.core.pdeath_sig.unwrap_or(0));
    batch.call("prctl(PR_SET_PDEATHSIG)", libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as u64, signal])
}

fn change_creds(creds: &CredsEntry, batch: &mut Batch<'_>) -> Result<(), RestoreError> {
    let bits = |words: &[u32]| {
        u64::from(words.first().copied().unwrap_or(0)) | u64::from(words.get(1).copied().unwrap_or(0)) << 32
    };
    let secbits = |bits: u64| [libc::PR_SET_SECUREBITS as u64, bits, 0, 0, 0];
    batch.call("prctl(PR_SET_SECUREBITS)", libc::SYS_prctl, secbits(NO_SETUID_FIXUP))?;
    let groups: Vec<u8> = creds.groups.iter().flat_map(|group| group.to_ne_bytes()).collect();
    let count = creds.groups.len() as u64;
    batch.call_with("setgroups", libc::SYS_setgroups, &groups, |at| [count, at])?;
    let gids = [creds.gid, creds.egid, creds.sgid].map(u64::from);
    let uids = [creds.uid, creds.euid, creds.suid].map(u64::from);
    batch.call("setresgid", libc::SYS_setresgid, gids)?;
    batch.call("setfsgid", libc::SYS_setfsgid, [creds.fsgid.into()])?;
    batch.call("setresuid", libc::SYS_setresuid, uids)?;
    batch.call("setfsuid", libc::SYS_setfsuid, [creds.fsuid.into()])?;
    // These need CAP_SETPCAP, and so come before the capabilities.
    batch.call("prctl(PR_SET_SECUREBITS)", libc::SYS_prctl, secbits(creds.secbits.into()))?;
    let last = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap").ok();
    let last = last.and_then(|text| text.trim().parse().ok()).unwrap_or(CAPABILITIES - 1);
    let bounding = bits(&creds.cap_bnd);
    for capability in (0..=last).filter(|n| bounding & (1 << n) == 0) {
        let args = [libc::PR_CAPBSET_DROP as u64, u64::from(capability), 0, 0, 0];
        batch.call("prctl(PR_CAPBSET_DROP)", libc::SYS_prctl, args)?;
    }
    let header = [CAPABILITY_VERSION_3, 0];
    let word = |words: &[u32], n: usize| words.get(n).copied().unwrap_or(0);
    let sets = [0, 1].map(|n| [word(&creds.cap_eff, n), word(&creds.cap_prm, n), word(&creds.cap_inh, n)]);
    let sets: Vec<u8> = sets.iter().flatten().flat_map(|word| word.to_ne_bytes()).collect();
    let header = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
    batch.call_with_two("capset", libc::SYS_capset, &sets, |_| header, |sets, header| [header, sets])?;
    for capability in (0..=last).filter(|n| bits(&creds.cap_amb) & (1 << n) != 0) {
        let raise = [libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE].map(|n| n as u64);
        let args = [raise[0], raise[1], u64::from(capability), 0, 0];
        batch.call("prctl(PR_CAP_AMBIENT_RAISE)", libc::SYS_prctl, args)?;
    }
    Ok(())
}

/// Sets the registers, the extended state and the signal mask of a thread that does nothing more but go on.
pub(super) fn settle(task: &Task<'_>, thread: &Thread, layout: &XsaveLayout) -> Result<(), RestoreError> {
    let tid = task.tid();
    let mut state = ptrace::extended_state(tid)?;
    layout.fill(&thread.arch.fpregs, &mut state).map_err(|what| Refusal::State { pid: tid, what })?;
    ptrace::set_extended_state(tid, &state)?;
    ptrace::set_registers(tid, &registers(&thread.arch.gpregs))?;
    ptrace::set_signal_mask(tid, thread.core.blk_sigset.unwrap_or(0))?;
    Ok(())
}

fn registers(regs: &UserX86Regs) -> libc::user_regs_struct {
    libc::user_regs_struct {
        r15: regs.r15,
        r14: regs.r14,
        r13: regs.r13,
        r12: regs.r12,
        rbp: regs.bp,
        rbx: regs.bx,
        r11: regs.r11,
        r10: regs.r10,
        r9: regs.r9,
        r8: regs.r8,
        rax: regs.ax,
        rcx: regs.cx,
        rdx: regs.dx,
        rsi: regs.si,
        rdi: regs.di,
        // No system call is under way: what was interrupted was settled when it was dumped.
        orig_rax: u64::MAX,
        rip: regs.ip,
        cs: regs.cs,
        eflags: regs.flags,
        rsp: regs.sp,
        ss: regs.ss,
        fs_base: regs.fs_base,
        gs_base: regs.gs_base,
        ds: regs.ds,
        es: regs.es,
        fs: regs.fs,
        gs: regs.gs,
    }
}

/// The filters of a thread, the oldest first: each stands on the one before. They do not count as long as the thread is traced.
fn seccomp(
    thread: &Thread,
    filters: &SeccompEntry,
    pid: i32,
    batch: &mut Batch<'_>,
) -> Result<(), RestoreError> {
    /// SECCOMP_SET_MODE_STRICT and _FILTER of linux/seccomp.h.
    const STRICT: u64 = 0;
    const FILTER: u64 = 1;
    let mut chain = Vec::new();
    match thread.core.seccomp_mode.map(SeccompMode::try_from) {
        None | Some(Ok(SeccompMode::Disabled)) => {}
        Some(Ok(SeccompMode::Strict)) => {
            batch.call("seccomp", libc::SYS_seccomp, [STRICT, 0, 0])?;
        }
        Some(Ok(SeccompMode::Filter)) => {
            let mut next = thread.core.seccomp_filter;
            while let Some(number) = next {
                let filter = filters.seccomp_filters.get(number as usize);
                let Some(filter) = filter.filter(|_| chain.len() < filters.seccomp_filters.len()) else {
                    let what =
                        format!("seccomp filter {number} of thread {} is not in the images", thread.tid);
                    return Err(Refusal::State { pid, what }.into());
                };
                next = filter.prev;
                chain.push(filter);
            }
        }
        Some(Err(error)) => {
            let what = format!("thread {}: {error}", thread.tid);
            return Err(Refusal::State { pid, what }.into());
        }
    }
    for filter in chain.into_iter().rev() {
        let steps = filter.filter.len() as u64 / size_of::<libc::sock_filter>() as u64;
        // struct sock_fprog: a 16-bit count, padding, a pointer.
        let program = |at| words(&[steps & 0xffff, at]);
        let flags = u64::from(filter.flags.unwrap_or(0));
        batch.call_with_two("seccomp", libc::SYS_seccomp, &filter.filter, program, |_, program| {
            [FILTER, flags, program]
        })?;
    }
    Ok(())
}

/// As the kernel reads 64-bit words.
pub(super) fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
