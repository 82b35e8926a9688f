//! What the user asks of a dump.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::tracker::dirty::TrackerKind;

/// Which of the two commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Memory only; the target keeps running and stays tracked.
    PreDump,
    /// Memory and the other state.
    Dump,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PreDump => "pre-dump",
            Self::Dump => "dump",
        })
    }
}

/// How pages leave the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageMode {
    /// A parasite vmsplices them into pipes.
    Splice,
    /// They are read through `/proc/PID/mem`; needs nothing inside the target.
    Read,
}

impl fmt::Display for PageMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Splice => "splice",
            Self::Read => "read",
        })
    }
}

/// What becomes of the target after a successful dump. After a failed one it always lives on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Afterwards {
    /// It runs on.
    Running,
    /// It is stopped, as by SIGSTOP.
    Stopped,
    /// It is killed.
    Ended,
}

/// Which CRIU shall be able to restore, where versions differ (docs/images.md).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CriuVersion {
    /// 3.17, as in Debian 12.
    V3_17,
    /// 4.2.
    #[default]
    V4_2,
}

/// What a dump does about open files.
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// How many bytes of a deleted file are kept.
    pub ghost_limit: u64,
    /// Terminals are captured.
    pub shell_job: bool,
    /// Established TCP connections are captured.
    pub tcp_established: bool,
    /// File locks are captured.
    pub file_locks: bool,
    /// What the user provides again at restore, by CRIU's names: `pipe:[INODE]`, `unix[INODE]`.
    pub external: Vec<String>,
    /// Whose images are written.
    pub criu_version: CriuVersion,
}

impl FileOptions {
    /// CRIU's own limit: 1 MiB.
    pub const GHOST_LIMIT: u64 = 1 << 20;

    /// Whether the user provides `name` again.
    #[must_use]
    pub fn is_external(&self, name: &str) -> bool {
        self.external.iter().any(|given| given == name)
    }
}

impl Default for FileOptions {
    fn default() -> Self {
        Self {
            ghost_limit: Self::GHOST_LIMIT,
            shell_job: false,
            tcp_established: false,
            file_locks: false,
            external: Vec::new(),
            criu_version: CriuVersion::default(),
        }
    }
}

/// One checkpoint to take.
#[derive(Clone, Debug)]
pub struct Request {
    /// The process.
    pub pid: i32,
    /// Pre-dump or dump.
    pub kind: Kind,
    /// Where the images go; must exist and hold no checkpoint.
    pub images_dir: PathBuf,
    /// Where `stats-dump` goes, if not to the images.
    pub work_dir: Option<PathBuf>,
    /// The parent checkpoint, relative to `images_dir`.
    pub prev_images_dir: Option<PathBuf>,
    /// Take a full checkpoint where the parent cannot be trusted, instead of failing.
    pub or_full: bool,
    /// How pages leave the target.
    pub page_mode: PageMode,
    /// Leave the target tracked.
    pub track_mem: bool,
    /// What becomes of the target.
    pub afterwards: Afterwards,
    /// How long the target's threads may take to stop.
    pub timeout: Duration,
    /// Which dirty source a newly started session uses; `None`: the best this kernel has.
    pub tracker: Option<TrackerKind>,
    /// Checkpoint a process in which remap_file_pages(2) was observed.
    pub allow_emulated_nonlinear: bool,
    /// Check, frozen, that nothing would be inherited that has changed.
    pub audit: bool,
    /// Open files; a pre-dump has none.
    pub files: FileOptions,
    /// A cgroup, all of whose processes must be in the tree.
    pub cgroup: Option<PathBuf>,
    /// Gets a zero byte once the target has been let go, and is closed.
    pub status_fd: Option<Arc<OwnedFd>>,
}

impl Request {
    /// Whether nothing but the checkpoint will be left.
    #[must_use]
    pub fn ends_the_tree(&self) -> bool {
        self.kind == Kind::Dump && self.afterwards == Afterwards::Ended
    }

    /// The target has been let go: says so to whoever waits for it.
    pub(super) fn tell_release(&self) {
        if let Some(Err(error)) = self.status_fd.as_ref().map(|fd| nix::unistd::write(fd, &[0])) {
            tracing::warn!(%error, "nobody listens at --status-fd");
        }
    }
}
