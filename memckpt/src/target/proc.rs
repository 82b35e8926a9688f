//! What is read of `/proc/PID` and of its memory while it stands: little, and one call each.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

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

/// Copies from another process's memory as far as it is mapped; how much.
pub(super) fn read_memory(pid: i32, address: u64, into: &mut [u8]) -> io::Result<usize> {
    memory(pid, false)?.read_at(into, address)
}

/// Writes all of `from` to another process's memory.
pub(super) fn write_memory(pid: i32, address: u64, from: &[u8]) -> io::Result<()> {
    memory(pid, true)?.write_all_at(from, address)
}

/// Not process_vm_readv and process_vm_writev: they pin, and an mm that ever had a page pinned is never rid of the
/// flag (MMF_HAS_PINNED, see `tracker::agent::pins`); each of its clears has to be looked after.
fn memory(pid: i32, write: bool) -> io::Result<File> {
    OpenOptions::new().read(!write).write(write).open(format!("/proc/{pid}/mem"))
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
