//! Facts about a process: which one it is, its threads, what it shares, what it may.

use std::time::Duration;

use std::fs::File;
use std::io::Read;

use serde::{Deserialize, Serialize};

use super::SyscallError;
use super::status::{stat, status};

/// PF_KTHREAD of linux/sched.h.
const PF_KTHREAD: u64 = 0x0020_0000;
const KCMP_VM: libc::c_int = 1;
const EM_X86_64: u16 = 62;

/// Why something about a process could not be found out.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// There is none of that number.
    #[error("no such process: {pid}")]
    NoSuchProcess {
        /// The number.
        pid: i32,
    },
    /// A system call failed.
    #[error(transparent)]
    Syscall(#[from] SyscallError),
    /// A file of /proc that is not what proc(5) describes.
    #[error("{path} is not understood")]
    Malformed {
        /// The file.
        path: String,
    },
}

/// One process for all time: a PID alone is used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TargetId {
    /// Its PID in our namespace.
    pub pid: i32,
    /// When it started, in clock ticks since boot.
    pub start_time: u64,
}

impl TargetId {
    /// Who `pid` is now.
    ///
    /// # Errors
    /// No such process.
    pub fn of(pid: i32) -> Result<Self, ProcessError> {
        Ok(Self { pid, start_time: start_time(pid)? })
    }

    /// How long ago it started, to about 10 ms; `None` where the clock cannot be read. CLOCK_BOOTTIME, as start times are
    /// (proc(5)).
    #[must_use]
    pub fn age(&self) -> Option<Duration> {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).ok()?;
        let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
        let start = Duration::from_secs_f64(self.start_time as f64 / ticks as f64);
        Some(Duration::from(now).saturating_sub(start))
    }

    /// Whether this very process still runs: not ended, no zombie, no other one under its number.
    #[must_use]
    pub fn still_alive(&self) -> bool {
        stat(self.pid)
            .is_ok_and(|now| now.start_time == self.start_time && !matches!(now.state, 'Z' | 'X' | 'x'))
    }
}

/// A soft and a hard limit, as in getrlimit(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResourceLimit {
    /// What is enforced; `None` is unlimited.
    pub soft: Option<u64>,
    /// How far `soft` may be raised; `None` is unlimited.
    pub hard: Option<u64>,
}

/// What a process's executable says about its word size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bitness {
    /// An x86-64 program.
    Bits64,
    /// An i386 or x32 program, or one for another machine (run by an emulator it would be the emulator).
    Bits32,
}

/// When `pid` started, in clock ticks since boot.
///
/// # Errors
/// No such process.
pub fn start_time(pid: i32) -> Result<u64, ProcessError> {
    Ok(stat(pid)?.start_time)
}

/// The state letter of `pid`.
///
/// # Errors
/// No such process.
pub fn state(pid: i32) -> Result<char, ProcessError> {
    Ok(stat(pid)?.state)
}

/// Who traces `pid`, if anybody.
///
/// # Errors
/// No such process.
pub fn tracer_pid(pid: i32) -> Result<Option<i32>, ProcessError> {
    Ok(Some(status(pid)?.tracer_pid).filter(|&tracer| tracer != 0))
}

/// Whether `pid` is a kernel thread.
///
/// # Errors
/// No such process.
pub fn is_kernel_thread(pid: i32) -> Result<bool, ProcessError> {
    Ok(stat(pid)?.flags & PF_KTHREAD != 0)
}

/// The thread IDs of `pid`, ascending. Complete only when none of them can run.
///
/// # Errors
/// No such process.
pub fn threads(pid: i32) -> Result<Vec<i32>, ProcessError> {
    let path = format!("/proc/{pid}/task");
    let failed = |e: std::io::Error| match e.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => ProcessError::NoSuchProcess { pid },
        _ => SyscallError::new("getdents64", &path, e).into(),
    };
    let mut tids = Vec::new();
    for entry in std::fs::read_dir(&path).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        tids.extend(name.to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    tids.sort_unstable();
    Ok(tids)
}

/// Whether two processes share one address space (clone with CLONE_VM without CLONE_THREAD).
///
/// # Errors
/// No such process, no right to trace both, or a kernel without kcmp(2).
pub fn shares_mm(pid: i32, other: i32) -> Result<bool, SyscallError> {
    // SAFETY: takes and gives numbers only.
    let result = unsafe { libc::syscall(libc::SYS_kcmp, pid, other, KCMP_VM, 0, 0) };
    if result < 0 {
        return Err(SyscallError::last("kcmp(KCMP_VM)", format!("processes {pid} and {other}")));
    }
    Ok(result == 0)
}

/// Whether `pid` runs a 64-bit program, by the head of its executable.
///
/// # Errors
/// No such process, or no right to read `/proc/PID/exe`; a kernel thread has none.
pub fn bitness(pid: i32) -> Result<Bitness, ProcessError> {
    let path = format!("/proc/{pid}/exe");
    let mut head = [0; 20];
    File::open(&path)
        .and_then(|mut file| file.read_exact(&mut head))
        .map_err(|e| SyscallError::new("read", &path, e))?;
    let machine = u16::from_le_bytes([head[18], head[19]]);
    // e_ident[EI_CLASS]: 2 is ELFCLASS64; x32 is ELFCLASS32 with the same machine.
    Ok(if head.starts_with(b"\x7fELF\x02") && machine == EM_X86_64 {
        Bitness::Bits64
    } else {
        Bitness::Bits32
    })
}

/// The resource limits of process `pid`, in the order of their numbers: `/proc/PID/limits`, which anybody may read. prlimit(2) asks
/// for CAP_SYS_RESOURCE where the process is another user's.
///
/// # Errors
/// The process is gone, or the file is not understood.
pub fn resource_limits(pid: i32) -> Result<Vec<ResourceLimit>, ProcessError> {
    /// How many there are (include/uapi/asm-generic/resource.h).
    const LIMITS: usize = 16;
    let path = format!("/proc/{pid}/limits");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
            return Err(ProcessError::NoSuchProcess { pid });
        }
        Err(e) => return Err(SyscallError::new("read", path, e).into()),
    };
    let limits: Option<Vec<ResourceLimit>> = text.lines().skip(1).map(parse_limit).collect();
    limits.filter(|limits| limits.len() == LIMITS).ok_or(ProcessError::Malformed { path })
}

/// A name of 25 columns, a soft and a hard limit, perhaps a unit.
fn parse_limit(line: &str) -> Option<ResourceLimit> {
    let mut values = line.get(25..)?.split_ascii_whitespace().map(|value| match value {
        "unlimited" => Some(None),
        value => value.parse().ok().map(Some),
    });
    Some(ResourceLimit { soft: values.next()??, hard: values.next()?? })
}

/// The ID of this boot: PIDs and start times mean nothing in another one.
///
/// # Errors
/// /proc cannot be read.
pub fn boot_id() -> Result<String, SyscallError> {
    let path = "/proc/sys/kernel/random/boot_id";
    let id = std::fs::read_to_string(path).map_err(|e| SyscallError::new("read", path, e))?;
    Ok(id.trim_end().to_owned())
}

/// The ancestors of this process, nearest first; those in our own PID namespace.
///
/// # Errors
/// /proc cannot be read.
pub fn ancestors() -> Result<Vec<i32>, ProcessError> {
    let mut found = Vec::new();
    let mut pid = stat(std::process::id() as i32)?.ppid;
    while pid > 0 && !found.contains(&pid) {
        found.push(pid);
        pid = stat(pid)?.ppid;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::puppet::Puppet;

    #[test]
    fn a_process_is_itself_until_it_ends() {
        let puppet = Puppet::start().unwrap();
        let id = TargetId::of(puppet.pid()).unwrap();
        assert!(id.still_alive());
        assert!(!TargetId { start_time: id.start_time + 1, ..id }.still_alive());
        drop(puppet);
        assert!(!id.still_alive());
        assert!(matches!(TargetId::of(id.pid), Err(ProcessError::NoSuchProcess { .. })));
    }

    #[test]
    fn facts_about_a_child() {
        let puppet = Puppet::start().unwrap();
        let pid = puppet.pid();
        assert_eq!(threads(pid).unwrap(), [pid]);
        assert_eq!(tracer_pid(pid).unwrap(), None);
        assert!(!is_kernel_thread(pid).unwrap());
        assert_eq!(bitness(pid).unwrap(), Bitness::Bits64);
        assert_eq!(status(pid).unwrap().ns_pid[0], pid);
        puppet
            .syscall(
                libc::SYS_setrlimit,
                &[u64::from(libc::RLIMIT_AS), puppet.place(&limits(1 << 40)).unwrap().get()],
            )
            .unwrap();
        assert_eq!(
            resource_limits(pid).unwrap()[libc::RLIMIT_AS as usize],
            ResourceLimit { soft: Some(1 << 40), hard: Some(1 << 40) }
        );
        let own = std::process::id() as i32;
        assert!(!shares_mm(own, pid).unwrap());
        assert!(shares_mm(own, own).unwrap());
        assert_eq!(boot_id().unwrap().len(), 36);
    }

    fn limits(value: u64) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&value.to_ne_bytes());
        bytes[8..].copy_from_slice(&value.to_ne_bytes());
        bytes
    }

    #[test]
    fn kthreadd_is_a_kernel_thread_where_it_can_be_seen() {
        match stat(2) {
            Ok(stat) if stat.comm == "kthreadd" => assert!(is_kernel_thread(2).unwrap()),
            _ => crate::kernel::puppet::skip(
                "kthreadd_is_a_kernel_thread_where_it_can_be_seen",
                "a PID namespace hides it",
            ),
        }
    }
}
