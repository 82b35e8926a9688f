//! Refusals of open files: which one, of what kind, why, and the way out.

use std::fmt;

use crate::dump::Refusal;
use crate::dump::error::DumpError;
use crate::kernel::descriptor::Descriptor;

/// Where a process has a file.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// A descriptor.
    Descriptor(i32),
    /// Its executable.
    Executable,
    /// Its working directory.
    WorkingDirectory,
    /// Its root.
    Root,
    /// A mapping that begins here.
    Mapping(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Descriptor(fd) => write!(f, "descriptor {fd}"),
            Self::Executable => f.write_str("the executable"),
            Self::WorkingDirectory => f.write_str("the working directory"),
            Self::Root => f.write_str("the root directory"),
            Self::Mapping(start) => write!(f, "the mapping at {start:#x}"),
        }
    }
}

/// Refuses a file of process `pid`.
pub(super) fn refuse(
    pid: i32,
    place: Place,
    kind: impl Into<String>,
    reason: impl Into<String>,
) -> DumpError {
    Refusal::File { pid, place: place.to_string(), kind: kind.into(), reason: reason.into() }.into()
}

/// Refuses what `descriptor` is.
pub(in crate::dump) fn refuse_descriptor(
    descriptor: &Descriptor,
    kind: impl Into<String>,
    reason: impl Into<String>,
) -> DumpError {
    refuse(descriptor.pid, Place::Descriptor(descriptor.fd), kind, reason)
}
