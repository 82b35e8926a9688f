//! A process's state beyond its memory, as far as a checkpoint holds it yet: read from /proc.

use crate::image::core::TaskState;
use crate::image::mm::MmNumbers;
use crate::image::pstree::Process;
use crate::kernel::{SyscallError, process, status};

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

/// The process in its tree, below `parent` (0 for the root). `threads` come leader first.
pub(super) fn process(pid: i32, ppid: i32, threads: Vec<i32>) -> Result<Process, DumpError> {
    let stat = status::stat(pid)?;
    Ok(Process { pid, ppid, pgid: stat.pgid, sid: stat.sid, threads })
}

/// Where the address space has its parts: `/proc/PID/stat`, proc(5).
pub(super) fn mm_numbers(pid: i32) -> Result<MmNumbers, SyscallError> {
    let stat = text(format!("/proc/{pid}/stat"))?;
    let fields: Vec<u64> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_ascii_whitespace().map(|f| f.parse().unwrap_or(0)).collect())
        .unwrap_or_default();
    // The first field behind the name is number 3.
    let field = |number: usize| fields.get(number - 3).copied().unwrap_or(0);
    let start_brk = field(47);
    Ok(MmNumbers {
        start_code: field(26),
        end_code: field(27),
        start_data: field(45),
        end_data: field(46),
        start_stack: field(28),
        start_brk,
        brk: start_brk,
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
        // Without CONFIG_AUDIT there is no such file.
        loginuid: text(format!("/proc/{pid}/loginuid")).ok().and_then(|uid| uid.parse().ok()),
        ..TaskState::default()
    })
}

/// Soft and hard limits in the order of their numbers.
fn rlimits(pid: i32) -> Result<Vec<(u64, u64)>, DumpError> {
    let value = |limit: Option<u64>| limit.unwrap_or(libc::RLIM_INFINITY);
    let limits = process::resource_limits(pid)?;
    Ok(limits.into_iter().map(|limit| (value(limit.soft), value(limit.hard))).collect())
}

/// The name of a thread.
pub(super) fn comm(pid: i32, tid: i32) -> Result<String, SyscallError> {
    text(format!("/proc/{pid}/task/{tid}/comm"))
}
