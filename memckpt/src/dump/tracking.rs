//! What the watch session contributes to a dump: where to look, and whether the parent may be trusted.

use crate::addr::{Chunk, PageCount};
use crate::image::CheckpointMeta;
use crate::image::meta::MetaProcess;
use crate::kernel::maps::{self, Vma};
use crate::range_set::RangeSet;
use crate::tracker::agent::HintMode;
use crate::tracker::control::{self, BackgroundOptions, ControlError, SessionClient};
use crate::tracker::dirty::{self, DirtySource, PageFlags, TrackerKind};
use crate::tracker::epoch::{CheckpointId, Epoch};
use crate::tracker::model::Relayout;
use crate::tracker::session::{Collected, SessionInfo, Touched};

use super::error::DumpError;
use super::request::Request;

/// A dump's hold on the session of its target, or the knowledge that there is none.
pub(super) struct Tracking {
    session: Option<Attached>,
    source: Box<dyn DirtySource>,
}

struct Attached {
    client: SessionClient,
    info: SessionInfo,
    generation: u64,
    transaction: Transaction,
}

/// How far a checkpoint got with its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transaction {
    /// Nothing to take back.
    None,
    /// Collected: the session holds the hints of two epochs.
    Collected,
    /// The dirty state is being cleared: the parent is of no use any more.
    Clearing,
}

/// A checkpoint that fails gives the session its hints back, and says whether the dirty state was lost.
impl Drop for Attached {
    fn drop(&mut self) {
        let cleared = match self.transaction {
            Transaction::None => return,
            Transaction::Collected => false,
            Transaction::Clearing => true,
        };
        if let Err(e) = self.client.abort(cleared) {
            tracing::warn!(
                "the session was not told of the failure, and takes the next checkpoint for a full one: {e}"
            );
        }
    }
}

/// What is known of the target at the freeze.
pub(super) struct Known {
    /// The layout, if it changed since [`Tracking::layout`].
    pub(super) relayout: Option<Relayout>,
    /// Only here can a page have changed; `None`: anywhere.
    pub(super) touched: Option<RangeSet>,
    /// Not the mapping any more that it was when the epoch began.
    pub(super) changed: RangeSet,
    /// The kernel may drop these pages without a further sign (MADV_FREE).
    pub(super) doubtful: RangeSet,
    /// remap_file_pages(2) was seen here.
    pub(super) nonlinear: RangeSet,
    /// The target may have made an io_uring since the epoch began.
    pub(super) made_io_uring: bool,
    /// Why nothing can be inherited, if so.
    pub(super) broken: Option<String>,
    /// Why everything is scanned, if so.
    pub(super) full_scan: Option<String>,
    /// Events and faults lost since the session began.
    pub(super) losses: u64,
}

impl Tracking {
    /// Joins the target's session, if there is one.
    pub(super) fn find(pid: i32, wanted: Option<TrackerKind>) -> Result<Self, DumpError> {
        match SessionClient::connect(pid)? {
            Some(client) => Self::join(client, pid, wanted),
            None => Self::none(pid),
        }
    }

    /// Without a session, whether or not there is one: for a process that was just born.
    pub(super) fn none(pid: i32) -> Result<Self, DumpError> {
        Ok(Self { session: None, source: dirty::open(None, pid)? })
    }

    /// Starts a session where the request wants the target tracked and there is none.
    pub(super) fn start(self, pid: i32, request: &Request) -> Result<Self, DumpError> {
        if self.session.is_some() || !request.track_mem {
            return Ok(self);
        }
        let options = BackgroundOptions { tracker: request.tracker, ..BackgroundOptions::default() };
        let client = control::start_background(pid, &options)?;
        tracing::warn!(
            "started a background session that tracks process {pid}; `memckpt watch {pid} --stop` ends it"
        );
        Self::join(client, pid, request.tracker)
    }

    fn join(mut client: SessionClient, pid: i32, wanted: Option<TrackerKind>) -> Result<Self, DumpError> {
        let info = client.hello()?;
        if let (Some(wanted), Some(runs)) = (wanted, info.tracker)
            && wanted != runs
        {
            tracing::warn!("the running session tracks with {runs}, not with {wanted}");
        }
        let source = dirty::open(info.tracker, pid)?;
        Ok(Self {
            session: Some(Attached { client, info, generation: 0, transaction: Transaction::None }),
            source,
        })
    }

    /// The session's description, if there is one.
    pub(super) fn info(&self) -> Option<&SessionInfo> {
        self.session.as_ref().map(|s| &s.info)
    }

    /// The truth about changed pages, if anything tracks the target.
    pub(super) fn tracker(&self) -> Option<TrackerKind> {
        self.info().and_then(|i| i.tracker)
    }

    /// Why `parent`, which says `then` of the process, does not belong to the epoch being tracked, if it does not.
    pub(super) fn mismatch(&self, parent: &CheckpointMeta, then: &MetaProcess) -> Option<String> {
        let Some(info) = self.info() else {
            return Some("no session has tracked the process since the parent was taken".to_owned());
        };
        if (then.target.pid, then.target.start_time) != (info.target.pid, info.target.start_time) {
            let of = then.target.pid;
            return Some(format!("the parent is of process {of} as it was before, or of another one"));
        }
        if then.session.as_ref() != Some(&info.session) {
            return Some(
                "the parent was taken in another session, and nothing tracked the process in between"
                    .to_owned(),
            );
        }
        match &info.epoch_checkpoint {
            Some(began) if *began == parent.id => None,
            // Only a checkpoint or an exec begins an epoch after the first.
            None if info.epoch > Epoch::FIRST => {
                Some("the process has called exec since the parent was taken".to_owned())
            }
            _ => Some(format!(
                "the epoch being tracked ({}) began with another checkpoint, not with this parent",
                info.epoch
            )),
        }
    }

    /// The layout before the freeze.
    pub(super) fn layout(&mut self, pid: i32) -> Result<Vec<Vma>, DumpError> {
        match &mut self.session {
            Some(session) => {
                let (generation, vmas) = session.client.layout()?;
                session.generation = generation;
                Ok(vmas)
            }
            None => Ok(maps::read(pid)?),
        }
    }

    /// All threads stand still: what does the session know?
    pub(super) fn collect(&mut self, pid: i32) -> Result<Known, DumpError> {
        let Some(session) = &mut self.session else {
            return Ok(Known {
                relayout: Some(Relayout::whole(maps::read(pid)?)),
                touched: None,
                changed: RangeSet::new(),
                doubtful: RangeSet::new(),
                nonlinear: RangeSet::new(),
                made_io_uring: true,
                broken: Some("nothing tracks the process".to_owned()),
                full_scan: Some("nothing tracks the process".to_owned()),
                losses: 0,
            });
        };
        session.transaction = Transaction::Collected;
        let Collected {
            relayout, touched, changed, doubtful, nonlinear, made_io_uring, losses, broken, ..
        } = session.client.collect(session.generation)?;
        let (touched, full_scan) = match touched {
            Touched::Chunks(ranges) => (Some(ranges.into_iter().collect()), None),
            Touched::Everything { reason } => (None, Some(reason)),
        };
        let losses = losses.total();
        Ok(Known {
            relayout,
            touched,
            changed,
            doubtful,
            nonlinear,
            made_io_uring,
            broken,
            full_scan,
            losses,
        })
    }

    /// The truth about changed pages.
    pub(super) fn source(&mut self) -> &mut dyn DirtySource {
        &mut *self.source
    }

    /// What the user should know of the session.
    pub(super) fn notes(&self) -> impl Iterator<Item = String> + '_ {
        self.info().into_iter().flat_map(|i| i.notes.iter().cloned())
    }

    /// The pages are safe: clears the dirty state of `ranges` and begins the next epoch, whose parent is `checkpoint`.
    ///
    /// Pages pinned at a clear stay dirty *and writable* (docs/soundness.md, row 4): their later writes fault no more
    /// and leave no hint. So the pages that were dirty are read once more, and a chunk that still holds one stays
    /// touched; unless no page of the target was ever pinned, as the kernel says after the clear. Where hints are not
    /// complete nothing is skipped anyway.
    pub(super) fn begin_epoch(
        &mut self,
        checkpoint: &CheckpointId,
        ranges: &RangeSet,
        were_dirty: &RangeSet,
        entries: &mut PageCount,
    ) -> Result<Option<Epoch>, DumpError> {
        let Some(session) = &mut self.session else { return Ok(None) };
        session.transaction = Transaction::Clearing;
        self.source.clear(ranges.as_slice())?;
        let mut carry = RangeSet::new();
        if session.info.hint_mode == HintMode::Complete && session.client.may_be_pinned()? {
            let still = self.source.scan(were_dirty.as_slice(), entries)?;
            let dirty = still.iter().filter(|run| run.flags.contains(PageFlags::DIRTY));
            carry.extend(dirty.flat_map(|run| run.range.chunks()).map(Chunk::range));
        }
        let epoch = session.client.commit(checkpoint.clone(), carry.as_slice())?;
        session.transaction = Transaction::None;
        Ok(Some(epoch))
    }

    /// Ends the session: nobody asked for the target to stay tracked.
    pub(super) fn end(self, pid: i32) -> Result<(), ControlError> {
        if self.session.is_none() {
            return Ok(());
        }
        drop(self);
        SessionClient::connect(pid)?.map_or(Ok(()), SessionClient::stop)
    }

    /// No epoch begins with this checkpoint: the session goes on as if it had not been taken.
    pub(super) fn keep_epoch(&mut self) -> Result<(), DumpError> {
        if let Some(session) = &mut self.session {
            session.client.abort(false)?;
            session.transaction = Transaction::None;
        }
        Ok(())
    }
}
