//! A process's state beyond its memory, as far as a checkpoint holds it yet: read from /proc.

use crate::image::core::{Rseq, TaskState, ThreadState};
use crate::image::mm::MmNumbers;
use crate::image::proto::TaskKobjIdsEntry;
use crate::image::pstree::Process;
use crate::kernel::maps::Vma;
use crate::kernel::{SyscallError, status};
use crate::target::ThreadRegisters;

use super::error::DumpError;

fn read(path: String) -> Result<Vec<u8>, SyscallError> {
    std::fs::read(&path).map_err(|e| SyscallError::new("read", path, e))
}

fn text(path: String) -> Result<String, SyscallError> {
    read(path).map(|bytes| String::from_utf8_lossy(&bytes).trim_end().to_owned())
}

/// Microseconds since boot.
pub(super) fn uptime_us() -> Result<u64, SyscallError> {
    let text = text("/proc/uptime".into())?;
    let seconds = text.split(' ').next().and_then(|s| s.parse::<f64>().ok()).unwrap_or(0.0);
    Ok((seconds * 1e6) as u64)
}

/// The process in its tree. `threads` come leader first.
pub(super) fn process(pid: i32, threads: Vec<i32>) -> Result<Process, DumpError> {
    let stat = status::stat(pid)?;
    Ok(Process { pid, pgid: stat.pgid, sid: stat.sid, threads })
}

/// CRIU wants a number for each kind of object that tasks can share; a single process shares none.
pub(super) fn kernel_objects() -> TaskKobjIdsEntry {
    TaskKobjIdsEntry { vm_id: 1, files_id: 1, fs_id: 1, sighand_id: 1, ..TaskKobjIdsEntry::default() }
}

/// Where the address space has its parts: `/proc/PID/stat`, proc(5).
pub(super) fn mm_numbers(pid: i32, vmas: &[Vma]) -> Result<MmNumbers, SyscallError> {
    let stat = text(format!("/proc/{pid}/stat"))?;
    let fields: Vec<u64> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_ascii_whitespace().map(|f| f.parse().unwrap_or(0)).collect())
        .unwrap_or_default();
    // The first field behind the name is number 3.
    let field = |number: usize| fields.get(number - 3).copied().unwrap_or(0);
    let start_brk = field(47);
    let heap_end = vmas.iter().filter(|v| v.name == "[heap]").map(|v| v.range.end.get()).max();
    Ok(MmNumbers {
        start_code: field(26),
        end_code: field(27),
        start_data: field(45),
        end_data: field(46),
        start_stack: field(28),
        start_brk,
        brk: heap_end.unwrap_or(start_brk),
        arg_start: field(48),
        arg_end: field(49),
        env_start: field(50),
        env_end: field(51),
        dumpable: None,
    })
}

/// The auxiliary vector, without its end marker.
pub(super) fn auxv(pid: i32) -> Result<Vec<u64>, SyscallError> {
    let bytes = read(format!("/proc/{pid}/auxv"))?;
    let mut words: Vec<u64> =
        bytes.chunks_exact(8).map(|b| u64::from_ne_bytes(b.try_into().unwrap_or_default())).collect();
    while words.len() >= 2 && words.ends_with(&[0, 0]) {
        words.truncate(words.len() - 2);
    }
    Ok(words)
}

/// What belongs to the process as a whole.
pub(super) fn task(pid: i32) -> Result<TaskState, DumpError> {
    let stat = status::stat(pid)?;
    Ok(TaskState {
        comm: stat.comm,
        personality: u32::from_str_radix(&text(format!("/proc/{pid}/personality"))?, 16).unwrap_or(0),
        flags: stat.flags as u32,
        blocked: status::status(pid)?.sig_blocked,
        rlimits: rlimits(pid)?,
        oom_score_adj: text(format!("/proc/{pid}/oom_score_adj"))?.parse().ok(),
        loginuid: None,
    })
}

/// include/uapi/asm-generic/resource.h; libc's constant is deprecated for not being fixed.
const RLIM_NLIMITS: libc::__rlimit_resource_t = 16;

/// Soft and hard limits in the order of their numbers, from prlimit(2).
fn rlimits(pid: i32) -> Result<Vec<(u64, u64)>, SyscallError> {
    (0..RLIM_NLIMITS)
        .map(|resource| {
            let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: no new limit is given, and the old one goes to `limit`, which lives across the call.
            let rc = unsafe { libc::prlimit64(pid, resource, std::ptr::null(), &raw mut limit) };
            if rc < 0 {
                return Err(SyscallError::last("prlimit64", format!("process {pid}")));
            }
            Ok((limit.rlim_cur, limit.rlim_max))
        })
        .collect()
}

/// A thread as it stood still.
pub(super) fn thread<'a>(pid: i32, registers: &'a ThreadRegisters) -> Result<ThreadState<'a>, DumpError> {
    let tid = registers.tid;
    Ok(ThreadState {
        regs: registers.regs,
        xstate: &registers.xstate,
        blocked: registers.sigmask,
        clear_tid_addr: 0,
        robust_list: (registers.robust_list.head, registers.robust_list.len as u32),
        rseq: registers.rseq.map(|r| Rseq { pointer: r.address, size: r.size, signature: r.signature }),
        sigaltstack: None,
        sched: None,
        creds: None,
        comm: text(format!("/proc/{pid}/task/{tid}/comm")).unwrap_or_default(),
    })
}
