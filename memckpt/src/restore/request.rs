//! What is to be restored, and how.

use std::path::PathBuf;

use super::stub::Parent;

/// What is to be restored, and how.
#[derive(Clone, Debug)]
pub struct Request {
    /// The directory of the checkpoint.
    pub images_dir: PathBuf,
    /// Whose child the root becomes.
    pub parent: Parent,
    /// Leave the tree stopped, as by SIGSTOP.
    pub leave_stopped: bool,
    /// The session and the group of the root are ours, where it leads no session.
    pub shell_job: bool,
    /// Restore established TCP connections.
    pub tcp_established: bool,
    /// Resources outside of the tree that may be connected to again, as the dump has named them: `unix[INODE]`.
    pub external: Vec<String>,
}
