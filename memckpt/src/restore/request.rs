//! What is to be restored, and how.

use std::os::fd::RawFd;
use std::path::PathBuf;

use super::stub::Parent;

/// What is to be restored, and how.
#[derive(Clone, Debug)]
pub struct Request {
    /// The directory of the checkpoint.
    pub images_dir: PathBuf,
    /// Where the tree finds its files: this becomes its root directory. It has its own `/proc`.
    pub root: Option<PathBuf>,
    /// Whose child the root becomes.
    pub parent: Parent,
    /// Compare all pages with their checksums before anything runs.
    pub verify: bool,
    /// Leave the tree stopped, as by SIGSTOP.
    pub leave_stopped: bool,
    /// The session and the group of the root are ours, where it leads no session.
    pub shell_job: bool,
    /// Restore established TCP connections.
    pub tcp_established: bool,
    /// Resources outside of the tree that may be connected to again, as the dump has named them: `unix[INODE]`.
    pub external: Vec<String>,
    /// Descriptors of ours that the tree gets in the place of its own.
    pub inherited: Vec<Inherited>,
}

/// A descriptor of ours that the tree gets in the place of one that leads out of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inherited {
    /// Ours.
    pub fd: RawFd,
    /// What it takes the place of: `pipe:[INODE]`, as the dump has named it.
    pub resource: String,
}
