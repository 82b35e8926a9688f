//! The one error shape of a failed system call.

use std::io;

/// A system call, or a read of a kernel file, that failed: which call, on what, why.
#[derive(Debug, thiserror::Error)]
#[error("{call} on {object}: {source}")]
pub struct SyscallError {
    /// The call, as its manual page names it: `ioctl(PAGEMAP_SCAN)`, `ptrace(PTRACE_SEIZE)`, `read`.
    pub call: &'static str,
    /// What it was made on: `/proc/12/pagemap`, `thread 12`.
    pub object: String,
    /// The errno.
    #[source]
    pub source: io::Error,
}

impl SyscallError {
    /// `call` failed on `object` with `source`.
    pub fn new(call: &'static str, object: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self { call, object: object.into(), source: source.into() }
    }

    /// `call` failed on `object`, with the calling thread's errno.
    pub fn last(call: &'static str, object: impl Into<String>) -> Self {
        Self::new(call, object, io::Error::last_os_error())
    }

    /// The errno, where there is one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}
