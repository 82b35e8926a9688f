//! ptrace(2) of threads that were seized (PTRACE_SEIZE, Linux 3.4), and waitid(2) to look at their stops.
//!
//! All calls but [`seize`] and [`interrupt`] need the thread in a ptrace stop, and all must come from the thread that
//! seized it.

use std::io;
use std::mem::{MaybeUninit, size_of};

use super::SyscallError;

pub mod made;

/// Where the glibc headers lag behind include/uapi/linux/ptrace.h.
const PTRACE_PEEKSIGINFO: libc::c_uint = 0x4209;
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
/// include/uapi/linux/elf.h
const NT_PRSTATUS: usize = 1;
const NT_X86_XSTATE: usize = 0x202;
/// More than any XSAVE area so far; AMX's tiles are 8 KiB of it.
const XSTATE_MAX: usize = 32 << 10;

/// What a thread stands in, as waitid sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// PTRACE_EVENT_STOP: an interrupt, or a group stop (then the signal is the stopping one).
    Event {
        /// SIGTRAP, or the signal that stopped the process.
        signal: i32,
    },
    /// Entry to or exit from a system call (PTRACE_O_TRACESYSGOOD).
    Syscall,
    /// About to take this signal; going on without naming it loses it.
    Signal(i32),
    /// Gone.
    Exited,
}

/// struct ptrace_rseq_configuration (Linux 5.13).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RseqConfig {
    /// Address of the thread's struct rseq; 0: none registered.
    pub address: u64,
    /// Its size in bytes.
    pub size: u32,
    /// The word before each abort handler.
    pub signature: u32,
    /// Registration flags.
    pub flags: u32,
    pad: u32,
}

/// A thread's list of robust futexes, get_robust_list(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RobustList {
    /// Address of its head; 0: none.
    pub head: u64,
    /// Size of the head.
    pub len: u64,
}

fn call(
    name: &'static str,
    request: libc::c_uint,
    tid: i32,
    addr: usize,
    data: usize,
) -> Result<i64, SyscallError> {
    // SAFETY: the callers below pass, for each request, pointers to memory of the size that the request takes.
    let rc = unsafe { libc::ptrace(request, tid, addr as *mut libc::c_void, data as *mut libc::c_void) };
    if rc == -1 { Err(SyscallError::last(name, format!("thread {tid}"))) } else { Ok(rc) }
}

/// Attaches to a thread without stopping it; system call stops will be told apart (PTRACE_O_TRACESYSGOOD).
///
/// # Errors
/// EPERM where the thread is traced already, dead, or not ours to trace; ESRCH where it is gone.
pub fn seize(tid: i32) -> Result<(), SyscallError> {
    let options = libc::PTRACE_O_TRACESYSGOOD as usize;
    call("ptrace(PTRACE_SEIZE)", libc::PTRACE_SEIZE, tid, 0, options).map(drop)
}

/// Asks a seized thread to stop. Any stop answers, so after another kind of stop ask again.
///
/// # Errors
/// ESRCH where the thread is gone or not ours.
pub fn interrupt(tid: i32) -> Result<(), SyscallError> {
    call("ptrace(PTRACE_INTERRUPT)", libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Lets a stopped thread go on, taking `signal` (0: none).
///
/// # Errors
/// ESRCH where the thread is gone or not stopped.
pub fn resume(tid: i32, signal: i32) -> Result<(), SyscallError> {
    call("ptrace(PTRACE_CONT)", libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

/// As [`resume`], up to the next entry to or exit from a system call.
///
/// # Errors
/// As [`resume`].
pub fn resume_to_syscall(tid: i32, signal: i32) -> Result<(), SyscallError> {
    call("ptrace(PTRACE_SYSCALL)", libc::PTRACE_SYSCALL, tid, 0, signal as usize).map(drop)
}

/// Lets a stopped thread go for good, taking `signal` (0: none).
///
/// # Errors
/// ESRCH where the thread is gone or not stopped.
pub fn detach(tid: i32, signal: i32) -> Result<(), SyscallError> {
    call("ptrace(PTRACE_DETACH)", libc::PTRACE_DETACH, tid, 0, signal as usize).map(drop)
}

/// The general registers of a stopped thread.
///
/// # Errors
/// ESRCH where the thread is gone or not stopped.
pub fn registers(tid: i32) -> Result<libc::user_regs_struct, SyscallError> {
    let mut regs = MaybeUninit::<libc::user_regs_struct>::zeroed();
    let mut iov = libc::iovec { iov_base: regs.as_mut_ptr().cast(), iov_len: size_of_val(&regs) };
    call("ptrace(PTRACE_GETREGSET)", libc::PTRACE_GETREGSET, tid, NT_PRSTATUS, (&raw mut iov).addr())?;
    // SAFETY: plain integers, zeroed at first.
    Ok(unsafe { regs.assume_init() })
}

/// Sets them, all at once. `orig_rax` is -1 for a thread that shall not restart a system call.
///
/// # Errors
/// ESRCH where the thread is gone or not stopped, EIO for impossible values.
pub fn set_registers(tid: i32, regs: &libc::user_regs_struct) -> Result<(), SyscallError> {
    let mut iov = libc::iovec { iov_base: (&raw const *regs).cast_mut().cast(), iov_len: size_of_val(regs) };
    call("ptrace(PTRACE_SETREGSET)", libc::PTRACE_SETREGSET, tid, NT_PRSTATUS, (&raw mut iov).addr())
        .map(drop)
}

/// The extended state (FPU, SSE, AVX, ...) of a stopped thread: an XSAVE area in the standard format, with the mask
/// of its features at byte 464.
///
/// # Errors
/// ESRCH where the thread is gone or not stopped, ENODEV on a processor without XSAVE.
pub fn extended_state(tid: i32) -> Result<Vec<u8>, SyscallError> {
    let mut state = vec![0; XSTATE_MAX];
    let mut iov = libc::iovec { iov_base: state.as_mut_ptr().cast(), iov_len: state.len() };
    let name = "ptrace(PTRACE_GETREGSET, NT_X86_XSTATE)";
    call(name, libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, (&raw mut iov).addr())?;
    state.truncate(iov.iov_len);
    Ok(state)
}

/// Sets it to what [`extended_state`] returned.
///
/// # Errors
/// As [`extended_state`]; EINVAL or EFAULT for what is not such an area.
pub fn set_extended_state(tid: i32, state: &[u8]) -> Result<(), SyscallError> {
    let mut iov = libc::iovec { iov_base: state.as_ptr().cast_mut().cast(), iov_len: state.len() };
    let name = "ptrace(PTRACE_SETREGSET, NT_X86_XSTATE)";
    call(name, libc::PTRACE_SETREGSET, tid, NT_X86_XSTATE, (&raw mut iov).addr()).map(drop)
}

/// A stopped thread's signal mask, bit 0 for signal 1. Inside ppoll, sigsuspend and the like it is the one that the
/// call will put back.
///
/// # Errors
/// ESRCH where the thread is gone or not stopped.
pub fn signal_mask(tid: i32) -> Result<u64, SyscallError> {
    let mut mask = 0u64;
    call("ptrace(PTRACE_GETSIGMASK)", PTRACE_GETSIGMASK, tid, size_of::<u64>(), (&raw mut mask).addr())?;
    Ok(mask)
}

/// Sets it; the mask of a ppoll or sigsuspend is dropped, which is harmless where the call is restarted.
///
/// # Errors
/// ESRCH where the thread is gone or not stopped.
pub fn set_signal_mask(tid: i32, mask: u64) -> Result<(), SyscallError> {
    let data = (&raw const mask).addr();
    call("ptrace(PTRACE_SETSIGMASK)", PTRACE_SETSIGMASK, tid, size_of::<u64>(), data).map(drop)
}

/// Where a stopped thread's restartable sequences are registered, if they are.
///
/// # Errors
/// ESRCH where the thread is gone or not stopped, EIO before Linux 5.13.
pub fn rseq(tid: i32) -> Result<Option<RseqConfig>, SyscallError> {
    let mut config = RseqConfig::default();
    let name = "ptrace(PTRACE_GET_RSEQ_CONFIGURATION)";
    let data = (&raw mut config).addr();
    call(name, PTRACE_GET_RSEQ_CONFIGURATION, tid, size_of::<RseqConfig>(), data)?;
    Ok((config.address != 0).then_some(config))
}

/// A stopped thread's seccomp filter number `index`, newest first; none past the last.
///
/// # Errors
/// EACCES without CAP_SYS_ADMIN or from inside a filter of one's own.
pub fn seccomp_filter(tid: i32, index: usize) -> Result<Option<Vec<libc::sock_filter>>, SyscallError> {
    let name = "ptrace(PTRACE_SECCOMP_GET_FILTER)";
    let len = match call(name, PTRACE_SECCOMP_GET_FILTER, tid, index, 0) {
        Err(e) if e.errno() == Some(libc::ENOENT) => return Ok(None),
        len => len?,
    };
    let mut filter = vec![libc::sock_filter { code: 0, jt: 0, jf: 0, k: 0 }; len as usize];
    call(name, PTRACE_SECCOMP_GET_FILTER, tid, index, filter.as_mut_ptr().addr())?;
    Ok(Some(filter))
}

/// Where a signal waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// For one thread.
    Thread,
    /// For any thread of the process (PTRACE_PEEKSIGINFO_SHARED).
    Shared,
}

/// What came with each pending signal of a stopped thread, or of its process, in order: siginfo_t as the kernel lays it out
/// (PTRACE_PEEKSIGINFO, Linux 3.10).
///
/// # Errors
/// ESRCH where the thread is gone or not stopped.
pub fn pending(tid: i32, queue: Queue) -> Result<Vec<Vec<u8>>, SyscallError> {
    /// struct ptrace_peeksiginfo_args.
    #[repr(C)]
    struct Args {
        offset: u64,
        flags: u32,
        count: i32,
    }
    const SIGINFO: usize = size_of::<libc::siginfo_t>();
    const BATCH: usize = 32;
    let mut all = Vec::new();
    loop {
        let flags = u32::from(queue == Queue::Shared);
        let args = Args { offset: all.len() as u64, flags, count: BATCH as i32 };
        let mut infos = vec![0u8; BATCH * SIGINFO];
        let (address, data) = ((&raw const args).addr(), infos.as_mut_ptr().addr());
        let got = call("ptrace(PTRACE_PEEKSIGINFO)", PTRACE_PEEKSIGINFO, tid, address, data)? as usize;
        all.extend(infos.chunks_exact(SIGINFO).take(got).map(<[u8]>::to_vec));
        if got < BATCH {
            return Ok(all);
        }
    }
}

/// A thread's robust list; needs the right to trace it, not a stop.
///
/// # Errors
/// ESRCH where the thread is gone, EPERM where it is not ours to look at.
pub fn robust_list(tid: i32) -> Result<RobustList, SyscallError> {
    let mut list = RobustList::default();
    // SAFETY: the kernel writes one pointer and one length.
    let rc = unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut list.head, &raw mut list.len) };
    if rc == 0 { Ok(list) } else { Err(SyscallError::last("get_robust_list", format!("thread {tid}"))) }
}

/// The stop that a traced thread stands in, if it does, *without consuming it*: were we killed between consuming a
/// signal-delivery-stop and going on, the signal would be lost.
///
/// # Errors
/// ECHILD where the thread is not ours.
pub fn peek(tid: i32) -> Result<Option<Stop>, SyscallError> {
    wait(tid, libc::WSTOPPED | libc::WEXITED | libc::WNOWAIT | libc::WNOHANG)
}

/// Takes note of the exit of a traced thread, so that its parent hears of it.
///
/// # Errors
/// ECHILD where the thread is not ours.
pub fn reap(tid: i32) -> Result<(), SyscallError> {
    wait(tid, libc::WEXITED | libc::WNOHANG).map(drop)
}

fn wait(tid: i32, flags: i32) -> Result<Option<Stop>, SyscallError> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: waitid writes one siginfo_t.
    let rc = unsafe { libc::waitid(libc::P_PID, tid as libc::id_t, info.as_mut_ptr(), flags | libc::__WALL) };
    if rc != 0 {
        return Err(SyscallError::new("waitid", format!("thread {tid}"), io::Error::last_os_error()));
    }
    // SAFETY: plain integers, zeroed at first; si_pid stays 0 where there was nothing to report.
    let (info, pid, status) = unsafe {
        let info = info.assume_init();
        (info, info.si_pid(), info.si_status())
    };
    if pid == 0 {
        return Ok(None);
    }
    let stop = match info.si_code {
        libc::CLD_TRAPPED | libc::CLD_STOPPED => match (status >> 8, status & 0xff) {
            (libc::PTRACE_EVENT_STOP, signal) => Stop::Event { signal },
            (_, signal) if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
            (_, signal) => Stop::Signal(signal & 0x7f),
        },
        _ => Stop::Exited,
    };
    Ok(Some(stop))
}
