//! The watch session: the agent, the model, the dirty source and the epoch of one target, and who may use them.
//!
//! A checkpoint's client freezes the target, collects, scans and clears the dirty state itself, commits, and thaws.
//! If it goes away in between, its transaction ends: the touches flipped away are merged back, and the epoch goes on
//! only where something other than that client vouches that nothing was cleared.

mod attach;
mod events;
mod held;
mod info;
mod record;
#[cfg(test)]
mod record_tests;
mod sample;
mod serve;
mod tracking;
mod translate;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::addr::{AddrRange, PageCount};
use crate::kernel::SyscallError;
use crate::kernel::maps::{MapsError, MapsFile, Vma};
use crate::kernel::process::{self, TargetId};
use crate::target::FreezeError;
use crate::tracker::agent::{AgentError, HintMode, HookChoice};
use crate::tracker::control::ControlError;
use crate::tracker::dirty::{DirtyError, PageFlags, TrackerKind};
use crate::tracker::epoch::{CheckpointId, Epoch, SessionId};

pub use info::{Collected, SessionInfo, Touched};
pub use record::{Ending, EventSource, Notice, Observed, Record, RecordError};
pub use sample::{End, Sample, Summary};
pub use serve::{ServeOptions, end_signals, serve};

use events::AgentEvents;
use sample::Rate;
use tracking::Tracking;

/// How to attach.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// The dirty source; the best that works where `None`.
    pub tracker: Option<TrackerKind>,
    /// Which hooks.
    pub hooks: HookChoice,
    /// The bound of each freeze of the session's own.
    pub freeze_timeout: Duration,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self { tracker: None, hooks: HookChoice::Auto, freeze_timeout: Duration::from_secs(10) }
    }
}

/// Why a session could not begin or go on.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// A process that cannot be watched.
    #[error("process {pid} cannot be watched: {reason}")]
    Target {
        /// The process.
        pid: i32,
        /// Why.
        reason: String,
    },
    /// A system call failed.
    #[error(transparent)]
    Syscall(#[from] SyscallError),
    /// The layout could not be read.
    #[error(transparent)]
    Layout(#[from] MapsError),
    /// The agent failed.
    #[error("the eBPF agent")]
    Agent(#[from] AgentError),
    /// The target could not be frozen.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// The dirty source that was asked for does not work.
    #[error("{tracker} cannot track this process: {reason}")]
    Tracker {
        /// The dirty source.
        tracker: TrackerKind,
        /// Why.
        reason: String,
    },
    /// The dirty source failed.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    /// A call that does not fit the state of the session.
    #[error("{0}")]
    Transaction(String),
    /// The control socket failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The runtime failed.
    #[error("{call}: {source}")]
    Runtime {
        /// The call.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl SessionError {
    /// Whether it only says that the address space is gone: the target is exiting, or in exec.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        let gone = |e: &SyscallError| matches!(e.errno(), Some(libc::ESRCH | libc::ENOENT));
        match self {
            Self::Layout(e) | Self::Dirty(DirtyError::Maps(e)) => match e {
                MapsError::Gone { .. } => true,
                MapsError::Syscall(e) => gone(e),
                MapsError::Malformed { .. } => false,
            },
            Self::Dirty(DirtyError::Gone { .. }) => true,
            Self::Dirty(DirtyError::Syscall(e)) | Self::Syscall(e) => gone(e),
            _ => false,
        }
    }
}

impl From<RecordError<MapsError>> for SessionError {
    fn from(error: RecordError<MapsError>) -> Self {
        match error {
            RecordError::Layout(e) => Self::Layout(e),
            other => Self::Transaction(other.to_string()),
        }
    }
}

/// An error and everything that caused it, in one line.
fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Transparent errors repeat their source.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// A session attached to its target. Dropping it detaches the agent and undoes the tracking.
#[derive(Debug)]
pub struct Session {
    id: SessionId,
    target: TargetId,
    pidfd: OwnedFd,
    options: SessionOptions,
    record: Record<AgentEvents, MapsFile>,
    tracking: Tracking,
    notes: Vec<String>,
    /// Counts the address spaces that it was attached to.
    attachment: u64,
    /// When the watched mm was torn down although the process lives: it is exiting, or in exec.
    mm_gone: Option<Instant>,
    ended: Option<End>,
    rate: Rate,
    started: Instant,
}

/// How long a process may take from the end of its mm to its own end.
const EXIT_GRACE: Duration = Duration::from_millis(200);

impl Session {
    /// Readable once the target has ended.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Readable when layout events wait; `None` without an agent. Another one after each [`Self::attachment`].
    #[must_use]
    pub fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.record.events().map(AgentEvents::ring_fd)
    }

    /// Moves whenever the session was attached to another address space.
    #[must_use]
    pub fn attachment(&self) -> u64 {
        self.attachment
    }

    /// Whether the target has exited.
    #[must_use]
    pub fn target_is_gone(&self) -> bool {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
    }

    /// What made the session end by itself, if anything.
    #[must_use]
    pub fn ended(&self) -> Option<End> {
        self.ended.clone()
    }

    /// Who it is and where it stands.
    ///
    /// # Errors
    /// None at present.
    pub fn info(&mut self) -> Result<SessionInfo, SessionError> {
        let epoch = self.record.epoch();
        Ok(SessionInfo {
            session: self.id.clone(),
            pid: std::process::id().cast_signed(),
            epoch: epoch.number(),
            epoch_checkpoint: epoch.checkpoint().cloned(),
            broken: epoch.broken().map(ToString::to_string),
            tracker: self.tracking.kind(),
            hint_mode: self.hint_mode(),
            target: self.target,
            losses: self.record.losses(),
            notes: self.notes.clone(),
        })
    }

    fn events_tell_clears(&self) -> bool {
        self.record.events().is_some_and(AgentEvents::tell_clears)
    }

    fn hint_mode(&self) -> HintMode {
        self.record.events().map_or(HintMode::None, EventSource::hint_mode)
    }

    /// The layout now, with the number that names it.
    ///
    /// # Errors
    /// The target is gone, or the layout cannot be read.
    pub fn layout(&mut self) -> Result<(u64, Vec<Vma>), SessionError> {
        self.refresh(false)?;
        let (generation, vmas) = self.record.give_layout();
        Ok((generation, vmas.to_vec()))
    }

    /// Opens a transaction on `connection`: the client has frozen the target and has the layout `generation`.
    ///
    /// # Errors
    /// Another transaction is open, the target called exec, or the layout cannot be read.
    pub fn collect(&mut self, connection: u64, generation: u64) -> Result<Collected, SessionError> {
        if !self.record.is_busy() {
            if let Err(why) = self.tracking.vouch() {
                self.record.break_off(why);
            }
            // Ranges that came since the last look are registered now: they scan as dirty, and are tracked from the
            // clear on.
            self.refresh(true)?;
        }
        let mut notices = Vec::new();
        let collected = self.record.collect(connection, generation, &mut notices);
        self.heed(&notices);
        Ok(collected?)
    }

    /// Whether pages of the target may be pinned, or have been at any time before.
    ///
    /// # Errors
    /// The target is gone.
    pub fn may_be_pinned(&self) -> Result<bool, SessionError> {
        let agent = self.record.events();
        agent.map_or(Ok(true), |a| a.may_be_pinned().map_err(SessionError::Agent))
    }

    /// The client took `checkpoint` and cleared the dirty state, the target still frozen.
    ///
    /// # Errors
    /// No transaction is open on `connection`.
    pub fn commit(
        &mut self,
        connection: u64,
        checkpoint: CheckpointId,
        carry: &[AddrRange],
    ) -> Result<Epoch, SessionError> {
        if !self.record.is_taken_by(connection) {
            return Err(SessionError::Transaction(RecordError::<MapsError>::Idle.to_string()));
        }
        let tell = self.events_tell_clears();
        let armed = self.tracking.arm(self.record.model().vmas(), self.target.pid, tell);
        let mut notices = Vec::new();
        let epoch = self.record.commit(connection, checkpoint, carry, &mut notices)?;
        self.heed(&notices);
        if let Err(why) = armed {
            self.record.break_off(why);
        }
        Ok(epoch)
    }

    /// Ends the transaction on `connection` without a checkpoint.
    ///
    /// # Errors
    /// No transaction is open there.
    pub fn abort(&mut self, connection: u64, ending: Ending) -> Result<(), SessionError> {
        let mut notices = Vec::new();
        let aborted = self.record.abort(connection, ending, &mut notices);
        self.heed(&notices);
        Ok(aborted?)
    }

    /// `connection` was closed; a transaction on it ends.
    ///
    /// # Errors
    /// None at present.
    pub fn vanished(&mut self, connection: u64) -> Result<(), SessionError> {
        if !self.record.is_taken_by(connection) {
            return Ok(());
        }
        let proven_untouched = self.tracking.is_untouched(self.events_tell_clears());
        self.abort(connection, Ending::Vanished { proven_untouched })
    }

    /// Takes in events, and follows an exec.
    ///
    /// # Errors
    /// The session cannot go on.
    pub fn look(&mut self) -> Result<Option<End>, SessionError> {
        // A transaction sees the world as it was at its beginning.
        if self.record.is_busy() {
            return Ok(None);
        }
        if self.mm_gone.is_some() {
            // Nothing to look at until it has ended or is another.
        } else {
            let mut notices = Vec::new();
            self.record.absorb(&mut notices);
            self.heed(&notices);
        }
        if self.mm_gone.is_some_and(|since| since.elapsed() > EXIT_GRACE) && !self.target_is_gone() {
            self.follow_exec();
        }
        Ok(self.ended())
    }

    /// [`Self::update`], the target running or not, and what it says is heeded.
    fn refresh(&mut self, frozen: bool) -> Result<(), SessionError> {
        let mut notices = Vec::new();
        let updated = self.update(frozen, &mut notices);
        if updated.as_ref().is_err_and(SessionError::is_gone) {
            notices.push(Notice::Exit);
        }
        self.heed(&notices);
        updated
    }

    /// Brings the model up to date. `frozen`: no thread of the target can run, and new ranges are registered; until then they scan as
    /// dirty, as they would if they were.
    fn update(&mut self, frozen: bool, notices: &mut Vec<Notice>) -> Result<(), SessionError> {
        if self.record.is_busy() {
            return Err(SessionError::Transaction(RecordError::<MapsError>::Busy.to_string()));
        }
        self.record.update(frozen, notices)?;
        if !frozen || notices.iter().any(|n| matches!(n, Notice::Exec | Notice::Exit)) {
            return Ok(());
        }
        let renewed = self.record.take_renewed();
        let new = self.tracking.register_new(self.record.model().vmas(), &renewed);
        if !new.is_empty() {
            // What is registered is joined with neighbours that are.
            new.iter().for_each(|range| self.record.mark_stale(range));
            self.record.update(frozen, notices)?;
        }
        Ok(())
    }

    fn heed(&mut self, notices: &[Notice]) {
        for notice in notices {
            match notice {
                Notice::Userfaultfd => self.ended = Some(End::Userfaultfd),
                Notice::Exec => {
                    // Follow at the next look: it is over soon.
                    self.mm_gone = Instant::now().checked_sub(EXIT_GRACE).or(Some(Instant::now()));
                }
                Notice::Exit => {
                    self.mm_gone.get_or_insert_with(Instant::now);
                }
            }
        }
    }

    fn follow_exec(&mut self) {
        // A checkpoint that met the exec holds the target: it is over soon, and nothing of the old record may be inherited by it.
        let pid = self.target.pid;
        let is_held = || process::tracer_pid(pid).is_ok_and(|tracer| tracer.is_some());
        if is_held() {
            return;
        }
        let since = self.mm_gone.take();
        match self.reattach() {
            // It came in between.
            Err(_) if is_held() => self.mm_gone = since,
            Err(e) if !self.target_is_gone() => {
                self.ended = Some(End::Exec { reason: with_sources(&e) });
            }
            _ => {}
        }
    }

    /// How things stand, for showing.
    ///
    /// # Errors
    /// The target is gone, or its layout or dirty state cannot be read.
    pub fn sample(&mut self) -> Result<Sample, SessionError> {
        // Between collect and commit the model stays as it was given out.
        if !self.record.is_busy() {
            self.refresh(false)?;
        }
        let epoch = self.record.epoch().number();
        let dirty = match self.tracking.source() {
            Some(source) => Some(count_dirty(source, &self.record.worth_reading(Tracking::is_trackable))?),
            None => None,
        };
        let dirty_rate = dirty.and_then(|d| self.rate.update(epoch, d, self.started.elapsed()));
        let agent = self.record.events();
        Ok(Sample {
            time: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64()),
            pid: self.target.pid,
            vmas: self.record.model().vmas().len(),
            resident: resident(self.target.pid)?,
            dirty,
            dirty_rate,
            chunks_touched: agent.map_or(0, |a| a.current().len()),
            events: self.record.events_seen(),
            losses: self.record.losses().total(),
            generation: agent.map_or(0, EventSource::generation),
            tracker: self.tracking.kind(),
            hint_mode: self.hint_mode(),
            epoch,
            broken: self.record.epoch().broken().map(ToString::to_string),
        })
    }

    /// What it was, at its end.
    #[must_use]
    pub fn summary(&self, end: End, ran: Duration) -> Summary {
        Summary {
            pid: self.target.pid,
            end,
            seconds: ran.as_secs_f64(),
            epoch: self.record.epoch().number(),
            events: self.record.events_seen(),
            losses: self.record.losses().total(),
        }
    }
}

/// statm's second number, proc(5).
fn resident(pid: i32) -> Result<PageCount, SyscallError> {
    let path = format!("/proc/{pid}/statm");
    let text = std::fs::read_to_string(&path).map_err(|e| SyscallError::new("read", &path, e))?;
    let pages = text.split(' ').nth(1).and_then(|n| n.parse().ok());
    pages.map(PageCount).ok_or_else(|| SyscallError::new("read", path, io::ErrorKind::InvalidData))
}

fn count_dirty(
    source: &mut dyn crate::tracker::dirty::DirtySource,
    ranges: &[AddrRange],
) -> Result<PageCount, DirtyError> {
    let runs = source.scan(ranges, &mut PageCount::default())?;
    let held = PageFlags::PRESENT | PageFlags::SWAPPED;
    let dirty = runs.iter().filter(|run| {
        run.flags.contains(PageFlags::DIRTY)
            && run.flags.intersects(held)
            && !run.flags.intersects(PageFlags::FILE)
    });
    Ok(dirty.map(|run| run.range.pages()).sum())
}
