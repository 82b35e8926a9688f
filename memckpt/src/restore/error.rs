//! Why a restore did not come about. Nothing of the tree is left behind then.

use std::path::PathBuf;

use crate::image::ChainError;
use crate::kernel::SyscallError;
use crate::kernel::maps::MapsError;
use crate::kernel::process::ProcessError;

/// Why a restore did not come about.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// An image is missing or damaged.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// An image that must be there is not.
    #[error("{}: {file} is missing{hint}", path.display())]
    Missing {
        /// The directory.
        path: PathBuf,
        /// The file.
        file: String,
        /// What may be the reason.
        hint: &'static str,
    },
    /// The checkpoint holds something that cannot be made again here.
    #[error("cannot be restored: {0}")]
    Refused(#[from] Refusal),
    /// A system call failed.
    #[error(transparent)]
    Syscall(#[from] SyscallError),
    /// A layout cannot be read.
    #[error(transparent)]
    Maps(#[from] MapsError),
    /// `/proc` cannot be read.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A process that was being made ended, or did not do what it was told.
    #[error("process {tid}, while it was being made: {what}")]
    Task {
        /// Its thread.
        tid: i32,
        /// What happened.
        what: String,
    },
}

/// What cannot be made again here, why, and the way out.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// A PID or TID belongs to somebody.
    #[error(
        "process {pid} of the checkpoint needs its ID, which {state} has now: end that, or restore in another PID namespace"
    )]
    PidTaken {
        /// The ID.
        pid: i32,
        /// Who has it.
        state: String,
    },
    /// A file.
    #[error("{what} of process {pid} {reason}")]
    File {
        /// The process.
        pid: i32,
        /// Which file.
        what: String,
        /// Why, and what to do.
        reason: String,
    },
    /// Part of a process's state.
    #[error("process {pid}: {what}")]
    State {
        /// The process.
        pid: i32,
        /// What it is, and why it cannot be.
        what: String,
    },
    /// The whole checkpoint.
    #[error("{0}")]
    Checkpoint(String),
}
