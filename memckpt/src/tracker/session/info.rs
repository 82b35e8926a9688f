//! What a session tells its clients.

use serde::{Deserialize, Serialize};

use crate::addr::AddrRange;
use crate::kernel::process::TargetId;
use crate::range_set::RangeSet;
use crate::tracker::agent::{HintMode, Losses};
use crate::tracker::dirty::TrackerKind;
use crate::tracker::epoch::{CheckpointId, Epoch, SessionId};
use crate::tracker::model::Relayout;

/// What a session is and where it stands.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SessionInfo {
    /// The session.
    pub session: SessionId,
    /// The session's process, in its own PID namespace.
    pub pid: i32,
    /// The running epoch.
    pub epoch: Epoch,
    /// The checkpoint whose clear began the epoch; `None` where the session's own clear did.
    pub epoch_checkpoint: Option<CheckpointId>,
    /// Why nothing of this epoch may be inherited, if so; [`Collected::broken`] is the final word.
    pub broken: Option<String>,
    /// What tells dirty pages; `None` where nothing does, and so nothing can be inherited.
    pub tracker: Option<TrackerKind>,
    /// Whether fault hints are complete.
    pub hint_mode: HintMode,
    /// The watched process.
    pub target: TargetId,
    /// Losses since the session began.
    pub losses: Losses,
    /// Weaker modes that the session runs in, each a sentence without a full stop.
    pub notes: Vec<String>,
}

/// Where the target may have faulted, or had pages dropped, since the epoch began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Touched {
    /// In these whole chunks and nowhere else: sorted, disjoint.
    Chunks(Vec<AddrRange>),
    /// That is not known: read everything.
    Everything {
        /// Why: incomplete hooks or losses.
        reason: String,
    },
}

/// What a checkpoint needs of its session, taken while the target stands still.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Collected {
    /// What became of the layout of the generation that the client named; `None` where it is the same.
    pub relayout: Option<Relayout>,
    /// The layout's generation now.
    pub generation: u64,
    /// Where pages may have changed.
    pub touched: Touched,
    /// Where memory may be other memory than at the epoch's start: inherit nothing.
    pub changed: RangeSet,
    /// Where the kernel may drop pages without an event (MADV_FREE): inherit nothing.
    pub doubtful: RangeSet,
    /// Where remap_file_pages was seen.
    pub nonlinear: RangeSet,
    /// Whether the target may have made an io_uring since the epoch began, though it may be gone again.
    pub made_io_uring: bool,
    /// Losses since the session began.
    pub losses: Losses,
    /// Why nothing at all of this epoch may be inherited, if so.
    pub broken: Option<String>,
}
