//! What the user asks of a dump.

use std::fmt;
use std::path::PathBuf;
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
}
