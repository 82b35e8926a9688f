//! What is read of `/proc/PID` and of its memory while it stands: little, and one call each.

use std::fs;
use std::io;

/// The threads of a process.
pub(super) fn threads(pid: i32) -> io::Result<Vec<i32>> {
    let entries = fs::read_dir(format!("/proc/{pid}/task"))?;
    let tids = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
    Ok(tids.collect())
}

/// `/proc/PID/task/TID/status`.
pub(super) fn status(pid: i32, tid: i32) -> io::Result<Status> {
    fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).map(Status)
}

/// The text of a status file.
pub(super) struct Status(String);

impl Status {
    /// The value behind `name:`, if there is such a line.
    pub(super) fn field(&self, name: &str) -> Option<&str> {
        self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
    }

    /// A signal set.
    pub(super) fn signals(&self, name: &str) -> u64 {
        self.field(name).and_then(|v| u64::from_str_radix(v, 16).ok()).unwrap_or(0)
    }

    /// The first number of a value.
    pub(super) fn number(&self, name: &str) -> Option<u64> {
        self.field(name)?.split_whitespace().next()?.parse().ok()
    }

    /// The letter of the state.
    pub(super) fn state(&self) -> char {
        self.field("State").and_then(|s| s.chars().next()).unwrap_or('?')
    }
}

/// When a process started, in clock ticks since boot: with the PID it names a process for good.
pub(super) fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before the last parenthesis may hold anything; starttime is field 22, the 20th behind it.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// Copies from another process's memory as far as it is mapped and readable; how much.
pub(super) fn read_memory(pid: i32, address: u64, into: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: into.len() };
    // SAFETY: writes at most the length of `into` to it.
    let n = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Writes all of `from` to another process's memory. Unlike `/proc/PID/mem` this honours protections.
pub(super) fn write_memory(pid: i32, address: u64, from: &[u8]) -> io::Result<()> {
    let local = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: from.len() };
    // SAFETY: reads `from`; the other process's memory is not ours to be unsound about.
    let n = unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) };
    match usize::try_from(n) {
        Ok(n) if n == from.len() => Ok(()),
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_lines_by_their_whole_name() {
        let status =
            Status("Name:\tx\nState:\tS (sleeping)\nSigPnd:\t0000000000000401\nVmSize:\t  12 kB\n".into());
        assert_eq!(status.state(), 'S');
        assert_eq!(status.signals("SigPnd"), 0x401);
        assert_eq!(status.signals("Sig"), 0);
        assert_eq!(status.number("VmSize"), Some(12));
    }

    #[test]
    fn this_process_has_started() {
        let me = std::process::id() as i32;
        assert!(start_time(me).is_some_and(|t| t > 0));
        assert!(threads(me).is_ok_and(|t| t.contains(&me)));
    }
}
