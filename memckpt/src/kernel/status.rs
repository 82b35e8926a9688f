//! `/proc/PID/status` and `/proc/PID/stat` (proc(5)).

use super::SyscallError;
use super::process::ProcessError;

/// What memckpt needs of `/proc/PID/stat`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// The command's name, at most 15 bytes.
    pub comm: String,
    /// One letter: R, S, D, T (stopped), t (traced), Z, X, I, ...
    pub state: char,
    /// The parent.
    pub ppid: i32,
    /// Its process group.
    pub pgid: i32,
    /// Its session.
    pub sid: i32,
    /// Its controlling terminal, a device number; 0 for none.
    pub tty: i32,
    /// The group in that terminal's foreground; -1 for none.
    pub foreground: i32,
    /// PF_* of linux/sched.h.
    pub flags: u64,
    /// When it started, in clock ticks since boot.
    pub start_time: u64,
    /// As wait(2) would tell it; 0 while it lives, or where ptrace's check forbids.
    pub exit_code: i32,
}

/// What memckpt needs of `/proc/PID/status`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Its thread group: the process.
    pub tgid: i32,
    /// Who traces it; 0 for nobody.
    pub tracer_pid: i32,
    /// Real, effective, saved and file system user.
    pub uid: [u32; 4],
    /// Real, effective, saved and file system group.
    pub gid: [u32; 4],
    /// Its PID in each PID namespace, outermost first.
    pub ns_pid: Vec<i32>,
    /// Threads.
    pub threads: u32,
    /// 0 none, 1 strict, 2 filters.
    pub seccomp: u8,
    /// Whether it has a user shadow stack (x86_Thread_features, Linux 6.6).
    pub shadow_stack: bool,
    /// The file mode creation mask (Linux 4.7).
    pub umask: u32,
    /// Blocked signals of this thread.
    pub sig_blocked: u64,
    /// Signals pending for this thread.
    pub sig_pending: u64,
    /// Signals pending for the process.
    pub shared_pending: u64,
    /// Effective capabilities.
    pub cap_effective: u64,
    /// Resident memory in KiB.
    pub rss_kib: u64,
}

/// Reads `/proc/PID/stat`.
///
/// # Errors
/// [`ProcessError::NoSuchProcess`], or the file is not understood.
pub fn stat(pid: i32) -> Result<Stat, ProcessError> {
    let path = format!("/proc/{pid}/stat");
    let text = read(pid, &path)?;
    parse_stat(&text).ok_or(ProcessError::Malformed { path })
}

/// Reads `/proc/PID/status`; a thread ID does as well.
///
/// # Errors
/// [`ProcessError::NoSuchProcess`], or the file is not understood.
pub fn status(pid: i32) -> Result<Status, ProcessError> {
    let path = format!("/proc/{pid}/status");
    let text = read(pid, &path)?;
    parse_status(&text).ok_or(ProcessError::Malformed { path })
}

fn read(pid: i32, path: &str) -> Result<String, ProcessError> {
    match std::fs::read(path) {
        Ok(text) => Ok(String::from_utf8_lossy(&text).into_owned()),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
            Err(ProcessError::NoSuchProcess { pid })
        }
        Err(e) => Err(SyscallError::new("read", path, e).into()),
    }
}

fn parse_stat(text: &str) -> Option<Stat> {
    // comm is in parentheses and may hold parentheses and spaces itself.
    let (head, tail) = text.rsplit_once(')')?;
    let comm = head.split_once('(')?.1.to_owned();
    let fields: Vec<&str> = tail.split_ascii_whitespace().collect();
    // fields[0] is field 3 of proc(5).
    Some(Stat {
        comm,
        state: fields.first()?.chars().next()?,
        ppid: fields.get(1)?.parse().ok()?,
        pgid: fields.get(2)?.parse().ok()?,
        sid: fields.get(3)?.parse().ok()?,
        tty: fields.get(4)?.parse().ok()?,
        foreground: fields.get(5)?.parse().ok()?,
        flags: fields.get(6)?.parse().ok()?,
        start_time: fields.get(19)?.parse().ok()?,
        exit_code: fields.get(49).and_then(|code| code.parse().ok()).unwrap_or(0),
    })
}

fn parse_status(text: &str) -> Option<Status> {
    let mut status = Status::default();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        match key {
            "Tgid" => status.tgid = value.parse().ok()?,
            "TracerPid" => status.tracer_pid = value.parse().ok()?,
            "Uid" => status.uid = four(value)?,
            "Gid" => status.gid = four(value)?,
            "NSpid" => {
                status.ns_pid =
                    value.split_ascii_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
            }
            "Threads" => status.threads = value.parse().ok()?,
            "Seccomp" => status.seccomp = value.parse().ok()?,
            "x86_Thread_features" => {
                status.shadow_stack = value.split_ascii_whitespace().any(|f| f == "shstk");
            }
            "Umask" => status.umask = u32::from_str_radix(value, 8).ok()?,
            "SigBlk" => status.sig_blocked = u64::from_str_radix(value, 16).ok()?,
            "SigPnd" => status.sig_pending = u64::from_str_radix(value, 16).ok()?,
            "ShdPnd" => status.shared_pending = u64::from_str_radix(value, 16).ok()?,
            "CapEff" => status.cap_effective = u64::from_str_radix(value, 16).ok()?,
            "VmRSS" => status.rss_kib = value.split_ascii_whitespace().next()?.parse().ok()?,
            _ => {}
        }
    }
    (status.tgid != 0).then_some(status)
}

fn four(value: &str) -> Option<[u32; 4]> {
    let ids: Vec<u32> = value.split_ascii_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    ids.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_may_look_like_the_rest_of_the_line() {
        let text = "42 (a) R 1 (b)) S 7 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1 2 3\n";
        let stat = parse_stat(text).unwrap();
        assert_eq!(stat.comm, "a) R 1 (b)");
        assert_eq!((stat.state, stat.ppid, stat.flags, stat.start_time), ('S', 7, 4_194_560, 987_654));
        assert_eq!(parse_stat("42 (short) S 1"), None);
    }

    #[test]
    fn status_fields() {
        let text = "Name:\tx\nTgid:\t42\nTracerPid:\t9\nUid:\t1\t2\t3\t4\nGid:\t0\t0\t0\t0\nNSpid:\t42\t7\nThreads:\t3\n\
                    SigBlk:\t00000000000000ff\nSeccomp:\t2\nx86_Thread_features:\tshstk wrss \nCapEff:\t0000000000000020\nVmRSS:\t  12 kB\n";
        let status = parse_status(text).unwrap();
        assert_eq!((status.tgid, status.tracer_pid, status.threads, status.seccomp), (42, 9, 3, 2));
        assert_eq!((status.uid, status.ns_pid.as_slice()), ([1, 2, 3, 4], &[42, 7][..]));
        assert!(status.shadow_stack);
        assert_eq!((status.sig_blocked, status.cap_effective, status.rss_kib), (255, 32, 12));
        assert_eq!(parse_status("nonsense"), None);
    }
}
