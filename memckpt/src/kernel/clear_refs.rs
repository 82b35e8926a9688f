//! `/proc/PID/clear_refs`: the write that begins an epoch of soft-dirty tracking.

use std::fs::OpenOptions;
use std::io::Write;

use super::SyscallError;

/// Clears the soft-dirty bits of every page of `pid` and of its VMAs.
///
/// Costs O(resident); threads that fault wait for it. On a kernel without CONFIG_MEM_SOFT_DIRTY it succeeds and does
/// nothing: [`super::features`] finds that out.
///
/// # Errors
/// No such process, or no right to write the file.
pub fn clear_soft_dirty(pid: i32) -> Result<(), SyscallError> {
    let path = format!("/proc/{pid}/clear_refs");
    let mut file =
        OpenOptions::new().write(true).open(&path).map_err(|e| SyscallError::new("open", &path, e))?;
    // "4": Documentation/admin-guide/mm/soft-dirty.rst
    file.write_all(b"4").map_err(|e| SyscallError::new("write", path, e))
}
