//! What belongs to a process as a whole.

use crate::image::proto::{EventpollFileEntry, ItimerEntry, PosixTimerEntry, SaEntry, TaskTimersEntry};

use super::batch::Batch;
use super::checkpoint::{Alive, Checkpoint, Process};
use super::error::{Refusal, RestoreError};
use super::files::Opened;
use super::thread::{signal_number, words};

/// The size of the kernel's sigset_t.
const SIGSET: u64 = 8;
/// Timers have numbers from 0 on, each one more than the last: to get a high one, all before it are made and deleted.
const MOST_TIMERS: u32 = 100_000;
/// Missing in libc (linux/prctl.h).
const PR_SET_THP_DISABLE: u64 = 41;
const PR_SET_MM_MAP: u64 = 14;

/// What needs our credentials still, and no thread but the first.
pub(super) fn prepare(
    process: &Process,
    alive: &Alive,
    files: &Opened,
    batch: &mut Batch<'_>,
) -> Result<(), RestoreError> {
    let pid = process.pid;
    batch.call("personality", libc::SYS_personality, [alive.task.personality.into()])?;
    let (root, cwd) = (files.number(pid, alive.fs.root_id)?, files.number(pid, alive.fs.cwd_id)?);
    batch.call("fchdir", libc::SYS_fchdir, [root as u64])?;
    batch.call_with("chroot", libc::SYS_chroot, b".\0", |at| [at])?;
    batch.call("fchdir", libc::SYS_fchdir, [cwd as u64])?;
    batch.call("umask", libc::SYS_umask, [alive.fs.umask.unwrap_or(0o22).into()])?;
    let reaper = u64::from(alive.task.child_subreaper.unwrap_or(false));
    batch.call(
        "prctl(PR_SET_CHILD_SUBREAPER)",
        libc::SYS_prctl,
        [libc::PR_SET_CHILD_SUBREAPER as u64, reaper],
    )?;
    if alive.mm.thp_disabled.unwrap_or(false) {
        batch.call("prctl(PR_SET_THP_DISABLE)", libc::SYS_prctl, [PR_SET_THP_DISABLE, 1, 0, 0, 0])?;
    }
    mm_map(pid, alive, files, batch)?;
    batch.flush()
}

/// The numbers that the kernel keeps of an address space, the auxiliary vector, and the executable (PR_SET_MM_MAP, Linux 3.18).
fn mm_map(pid: i32, alive: &Alive, files: &Opened, batch: &mut Batch<'_>) -> Result<(), RestoreError> {
    let mm = &alive.mm;
    let exe = files.number(pid, mm.exe_file_id)?;
    // AT_NULL ends it.
    let mut auxv = mm.mm_saved_auxv.clone();
    auxv.extend([0, 0]);
    let auxv = words(&auxv);
    let len = auxv.len() as u64;
    let fields = [
        mm.mm_start_code,
        mm.mm_end_code,
        mm.mm_start_data,
        mm.mm_end_data,
        mm.mm_start_brk,
        mm.mm_brk,
        mm.mm_start_stack,
        mm.mm_arg_start,
        mm.mm_arg_end,
        mm.mm_env_start,
        mm.mm_env_end,
    ];
    // struct prctl_mm_map: then the vector's address, its length and the descriptor, 32 bits each.
    let map = |at: u64| words(&[fields.as_slice(), &[at, len | (exe as u64) << 32]].concat());
    let size = (fields.len() as u64 + 2) * 8;
    batch.call_with_two("prctl(PR_SET_MM_MAP)", libc::SYS_prctl, &auxv, map, |_, map| {
        [libc::PR_SET_MM as u64, PR_SET_MM_MAP, map, size, 0]
    })
}

/// Gives the descriptors their numbers, and closes all others.
pub(super) fn descriptors(
    process: &Process,
    alive: &Alive,
    files: &Opened,
    batch: &mut Batch<'_>,
) -> Result<(), RestoreError> {
    let mut numbers: Vec<u64> = Vec::new();
    let mut there = files.there();
    for descriptor in &alive.descriptors {
        let id = descriptor.id;
        let ours = match there.number(id, batch)? {
            Some(number) => number,
            None => files.number(process.pid, id)?,
        };
        let cloexec = if descriptor.flags & 1 != 0 { libc::O_CLOEXEC as u64 } else { 0 };
        let number = i64::from(descriptor.fd);
        batch.call_for(number, "dup3", libc::SYS_dup3, [ours as u64, number as u64, cloexec])?;
        numbers.push(number as u64);
    }
    numbers.sort_unstable();
    let mut first = 0;
    for number in numbers {
        if first < number {
            batch.call("close_range", libc::SYS_close_range, [first, number - 1, 0])?;
        }
        first = number + 1;
    }
    batch.call("close_range", libc::SYS_close_range, [first, u64::from(u32::MAX), 0])?;
    batch.flush()
}

/// Has `process` say what the epolls watch that it has, by its descriptors.
pub(super) fn epolls(
    checkpoint: &Checkpoint,
    process: &Process,
    alive: &Alive,
    done: &mut Vec<u32>,
    batch: &mut Batch<'_>,
) -> Result<(), RestoreError> {
    for descriptor in &alive.descriptors {
        let Some(epoll) = checkpoint.file(process.pid, descriptor.id)?.epfd.as_ref() else { continue };
        let has = |fd: u32| alive.descriptors.iter().any(|d| d.fd == fd);
        if done.contains(&epoll.id) || !epoll.tfd.iter().all(|target| has(target.tfd)) {
            continue;
        }
        done.push(epoll.id);
        watch(epoll, descriptor.fd, batch)?;
    }
    batch.flush()
}

fn watch(epoll: &EventpollFileEntry, fd: u32, batch: &mut Batch<'_>) -> Result<(), RestoreError> {
    for target in &epoll.tfd {
        // struct epoll_event is packed: 32 bits, 64 bits.
        let mut event = target.events.to_ne_bytes().to_vec();
        event.extend(target.data.to_ne_bytes());
        let [fd, tfd] = [fd, target.tfd].map(u64::from);
        batch.call_with("epoll_ctl", libc::SYS_epoll_ctl, &event, |at| {
            [fd, libc::EPOLL_CTL_ADD as u64, tfd, at]
        })?;
    }
    Ok(())
}

/// Once all threads are there: timers, and what waits for the process. Signals are blocked, so none is taken.
pub(super) fn timers_and_signals(pid: i32, alive: &Alive, batch: &mut Batch<'_>) -> Result<(), RestoreError> {
    if let Some(timers) = &alive.task.timers {
        set_timers(pid, timers, batch)?;
    }
    // A child that has ended since it was made has told so: that was told before.
    ignore_chld(batch)?;
    for action in (1..).zip(&alive.task.sigactions) {
        let (signal, action) = number(action);
        if signal != libc::SIGTRAP {
            let args = |at| [signal as u64, at, 0, SIGSET];
            batch.call_with("rt_sigaction", libc::SYS_rt_sigaction, &sigaction(action), args)?;
        }
    }
    for signal in alive.task.signals_s.iter().flat_map(|queue| &queue.signals) {
        let number = signal_number(pid, &signal.siginfo)?;
        let args = |at| [pid as u64, number, at];
        batch.call_with("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, &signal.siginfo, args)?;
    }
    batch.flush()
}

/// The action of SIGTRAP, by which a task that runs the restorer says that it is done.
pub(super) fn trap_action(alive: &Alive) -> Option<Vec<u8>> {
    let mut actions = (1..).zip(&alive.task.sigactions).map(number);
    actions.find(|(signal, _)| *signal == libc::SIGTRAP).map(|(_, action)| sigaction(action))
}

/// The list leaves SIGKILL and SIGSTOP out.
fn number((nth, action): (i32, &SaEntry)) -> (i32, &SaEntry) {
    let past = |signal: i32, by: i32| if signal >= by { signal + 1 } else { signal };
    (past(past(nth, libc::SIGKILL), libc::SIGSTOP), action)
}

fn sigaction(action: &SaEntry) -> Vec<u8> {
    words(&[action.sigaction, action.flags, action.restorer, action.mask])
}

/// Ignoring a signal drops those that wait (sigaction(2)).
fn ignore_chld(batch: &mut Batch<'_>) -> Result<(), RestoreError> {
    for handler in [libc::SIG_IGN, libc::SIG_DFL] {
        let action = words(&[handler as u64, 0, 0, 0]);
        let args = |at| [libc::SIGCHLD as u64, at, 0, SIGSET];
        batch.call_with("rt_sigaction", libc::SYS_rt_sigaction, &action, args)?;
    }
    Ok(())
}

fn set_timers(pid: i32, timers: &TaskTimersEntry, batch: &mut Batch<'_>) -> Result<(), RestoreError> {
    let itimers = [
        (libc::ITIMER_REAL, &timers.real),
        (libc::ITIMER_VIRTUAL, &timers.virt),
        (libc::ITIMER_PROF, &timers.prof),
    ];
    for (which, timer) in itimers.into_iter().filter(|(_, timer)| **timer != ItimerEntry::default()) {
        let value = words(&armed([timer.isec, timer.iusec], [timer.vsec, timer.vusec]));
        batch.call_with("setitimer", libc::SYS_setitimer, &value, |at| [which as u64, at, 0])?;
    }
    let mut posix: Vec<&PosixTimerEntry> = timers.posix.iter().collect();
    posix.sort_unstable_by_key(|timer| timer.it_id);
    if let Some(last) = posix.last().filter(|last| last.it_id > MOST_TIMERS) {
        let what = format!("timer {} has too high a number to be made again", last.it_id);
        return Err(Refusal::State { pid, what }.into());
    }
    let mut next = 0;
    for timer in posix {
        while next <= timer.it_id {
            create(timer, batch)?;
            if next < timer.it_id {
                batch.call("timer_delete", libc::SYS_timer_delete, [next.into()])?;
            }
            next += 1;
        }
        let value = words(&armed([timer.isec, timer.insec], [timer.vsec, timer.vnsec]));
        let id = u64::from(timer.it_id);
        batch.call_with("timer_settime", libc::SYS_timer_settime, &value, |at| [id, 0, at, 0])?;
    }
    Ok(())
}

/// Interval and time to go, as the kernel takes them. A timer that has an interval and no time to go has expired, and its signal was
/// not taken yet (itimer_get_remtime, kernel/time/itimer.c): set so, it would never expire again.
fn armed(interval: [u64; 2], left: [u64; 2]) -> [u64; 4] {
    let left = if left == [0, 0] { interval } else { left };
    [interval[0], interval[1], left[0], left[1]]
}

fn create(timer: &PosixTimerEntry, batch: &mut Batch<'_>) -> Result<(), RestoreError> {
    // struct sigevent: value, signal, how, thread; 64 bytes. The number that it gets is written behind it.
    let mut event = words(&[
        timer.sival_ptr,
        u64::from(timer.si_signo) | u64::from(timer.it_sigev_notify) << 32,
        u64::from(timer.notify_thread_id.unwrap_or(0).cast_unsigned()),
    ]);
    event.resize(72, 0);
    // A clock of a process or thread has a negative number.
    let clock = timer.clock_id as i32 as u64;
    batch.call_with("timer_create", libc::SYS_timer_create, &event, |at| [clock, at, at + 64])
}

/// Resource limits: late, since they could hinder what comes before.
pub(super) fn limits(alive: &Alive, batch: &mut Batch<'_>) -> Result<(), RestoreError> {
    for (resource, limit) in (0u64..).zip(alive.task.rlimits.iter().flat_map(|limits| &limits.rlimits)) {
        let value = words(&[limit.cur, limit.max]);
        batch.call_with("prlimit", libc::SYS_prlimit64, &value, |at| [0, resource, at, 0])?;
    }
    Ok(())
}

/// Whether others may look at it; changed credentials reset that.
pub(super) fn dumpable(alive: &Alive, batch: &mut Batch<'_>) -> Result<(), RestoreError> {
    match alive.mm.dumpable {
        Some(dumpable @ (0 | 1)) => {
            let args = [libc::PR_SET_DUMPABLE as u64, dumpable as u64];
            batch.call("prctl(PR_SET_DUMPABLE)", libc::SYS_prctl, args)
        }
        _ => Ok(()),
    }
}
