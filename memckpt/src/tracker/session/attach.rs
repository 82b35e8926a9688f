//! Attaching: the agent, the dirty source, one short freeze, the first clear.

use std::time::Instant;

use super::events::AgentEvents;
use super::held::Held;
use super::record::{Notice, Record};
use super::sample::Rate;
use super::tracking::Tracking;
use super::{Session, SessionError, SessionOptions, with_sources};
use crate::addr::AddrRange;
use crate::kernel::maps::MapsFile;
use crate::kernel::process::TargetId;
use crate::kernel::{SyscallError, features, lru, page_flags, pidfd, process, smaps};
use crate::range_set::RangeSet;
use crate::tracker::agent::{Agent, AgentOptions, Sabotage};
use crate::tracker::dirty::TrackerKind;
use crate::tracker::epoch::{Broken, SessionId};

/// What is ready before the freeze.
struct Prepared {
    layout: MapsFile,
    events: Option<AgentEvents>,
    tracker: Option<TrackerKind>,
    standing: Option<Broken>,
    notes: Vec<String>,
}

impl Session {
    /// Attaches to process `pid`: hooks the kernel, freezes the process for a moment to set up tracking and to clear
    /// its dirty state, and so begins epoch 1. What does not work here is in [`super::SessionInfo::notes`].
    ///
    /// # Errors
    /// The process cannot be watched, or what `options` ask for by name does not work.
    pub fn attach(pid: i32, options: &SessionOptions) -> Result<Self, SessionError> {
        let (target, pidfd) = identify(pid)?;
        let prepared = Prepared::new(pid, options)?;
        let id = SessionId::random().map_err(|e| SyscallError::new("getrandom", "no object", e))?;
        let clear_refs_matter = prepared.tracker == Some(TrackerKind::SoftDirty);
        let Prepared { layout, events, standing, notes, tracker } = prepared;
        let mut session = Self {
            id,
            target,
            pidfd,
            options: options.clone(),
            record: Record::new(events, layout, clear_refs_matter, standing),
            tracking: Tracking::Nothing,
            notes,
            attachment: 1,
            mm_gone: None,
            ended: None,
            rate: Rate::default(),
            started: Instant::now(),
        };
        session.arm(tracker, true)?;
        Ok(session)
    }

    /// Attaches to the address space that the target has after an exec.
    pub(super) fn reattach(&mut self) -> Result<(), SessionError> {
        // The old userfaultfd's mm is gone with it.
        self.tracking = Tracking::Nothing;
        let prepared = Prepared::new(self.target.pid, &self.options)?;
        let Prepared { layout, events, standing, notes, tracker } = prepared;
        self.record.restart(events, layout, standing);
        self.notes = notes;
        self.attachment += 1;
        self.arm(tracker, false)
    }

    /// Freezes, sets up the dirty source, clears, and begins an epoch.
    fn arm(&mut self, tracker: Option<TrackerKind>, first: bool) -> Result<(), SessionError> {
        let pid = self.target.pid;
        let mut notices = Vec::new();
        let wants_userfaultfd = tracker == Some(TrackerKind::UffdWp);
        let (held, made) = Held::freeze(pid, self.options.freeze_timeout, wants_userfaultfd)?;
        self.tracking = match (tracker, made) {
            (Some(TrackerKind::SoftDirty), _) => Tracking::soft_dirty(pid)?,
            (_, Some(Ok(fd))) => Tracking::uffd_wp(pid, fd)?,
            (_, Some(Err(reason))) => {
                if let Some(tracker) = self.options.tracker {
                    return Err(SessionError::Tracker { tracker, reason });
                }
                self.notes
                    .push(format!("no dirty tracking, so that every checkpoint is a full one: {reason}"));
                self.record.break_for_good(Broken::NoTracker(reason));
                Tracking::Nothing
            }
            (_, None) => Tracking::Nothing,
        };
        if let (Some(fd), Some(events)) = (self.tracking.userfaultfd(), self.record.events_mut()) {
            events.set_userfaultfd(fd);
        }
        self.update(true, &mut notices)?;
        let vmas = self.record.model().vmas().to_vec();
        let ranges: Vec<AddrRange> =
            vmas.iter().filter(|v| Tracking::is_trackable(v)).map(|v| v.range).collect();
        self.tracking.clear(pid, &ranges)?;
        let armed = self.tracking.arm(&vmas, pid, self.events_tell_clears());
        self.record.begin(first, &mut notices);
        if let Err(why) = armed {
            self.record.break_off(why);
        }
        drop(held);
        // The one that it was made to create is ours.
        let tells = self.record.events().is_some_and(AgentEvents::tell_userfaultfds);
        let mut ours = usize::from(wants_userfaultfd && tells);
        notices.retain(|n| {
            let is_ours = *n == Notice::Userfaultfd && ours > 0;
            ours -= usize::from(is_ours);
            !is_ours
        });
        self.heed(&notices);
        self.doubt_what_was_freed()
    }

    /// What was given to the kernel with MADV_FREE before anybody watched goes without an event. It is looked for once the target
    /// has stood still, so that no call is under way which the agent has not seen, and before there is a checkpoint to inherit
    /// from: what goes until then, no checkpoint has.
    fn doubt_what_was_freed(&mut self) -> Result<(), SessionError> {
        let pid = self.target.pid;
        let freed: RangeSet = match lru::drain() {
            Ok(()) => {
                let vmas = smaps::lazily_freed(pid)?;
                page_flags::lazily_freed(pid, &vmas).unwrap_or_else(|_| vmas.into_iter().collect())
            }
            Err(error) => {
                self.notes.push(format!("memory without a file is taken whole each time: {error}"));
                let vmas = self.record.model().vmas().iter();
                vmas.filter(|vma| !vma.shared && vma.is_anonymous()).map(|vma| vma.range).collect()
            }
        };
        self.record.freed_before(freed.as_slice());
        Ok(())
    }
}

impl Prepared {
    fn new(pid: i32, options: &SessionOptions) -> Result<Self, SessionError> {
        let mut notes = Vec::new();
        let mut standing = None;
        let tracker = choose(options, &mut notes)?;
        if tracker.is_none() {
            standing = Some(Broken::NoTracker("this kernel has neither soft-dirty nor uffd-wp".to_owned()));
        }
        let layout = MapsFile::open(pid)?;
        // A dropped page of a protected range reads as gone or as written, whenever that happened.
        let dropped_pages_show = tracker == Some(TrackerKind::UffdWp);
        let sabotage = Sabotage::from_environment()?;
        if let Some(warning) = sabotage.warning() {
            tracing::error!("{warning}");
            notes.push(warning);
        }
        let plain = AgentOptions::default();
        let how = AgentOptions {
            choice: options.hooks,
            dropped_pages_show,
            ring_bytes: sabotage.ring_bytes.unwrap_or(plain.ring_bytes),
            without: sabotage.without,
        };
        let events = match Agent::attach_with(pid, how) {
            Ok(agent) => Some(AgentEvents::new(agent)),
            // Asked for by name, or not.
            Err(e @ crate::tracker::agent::AgentError::Choice { .. }) => return Err(e.into()),
            Err(e) => {
                let reason = with_sources(&e);
                notes.push(format!("no eBPF agent, so that every checkpoint is a full one: {reason}"));
                standing.get_or_insert(Broken::NoEvents(reason));
                None
            }
        };
        if let Some(gaps) = events.as_ref().and_then(AgentEvents::gaps) {
            notes.push(format!("the record of changes has gaps, so that every checkpoint is full: {gaps}"));
            standing.get_or_insert(Broken::NoEvents(gaps));
        }
        if let Some(events) = &events {
            let mode = super::EventSource::hint_mode(events);
            if mode != super::HintMode::Complete {
                notes.push(format!("every checkpoint reads the state of every page: hints are {mode}"));
            }
        }
        Ok(Self { layout, events, tracker, standing, notes })
    }
}

/// The dirty source to use.
fn choose(options: &SessionOptions, notes: &mut Vec<String>) -> Result<Option<TrackerKind>, SessionError> {
    let soft_dirty = features::soft_dirty();
    let uffd_wp = features::uffd_wp();
    let works = |kind| match kind {
        TrackerKind::SoftDirty => &soft_dirty,
        TrackerKind::UffdWp => &uffd_wp,
    };
    if let Some(tracker) = options.tracker {
        return match works(tracker) {
            Ok(()) => Ok(Some(tracker)),
            Err(reason) => Err(SessionError::Tracker { tracker, reason: reason.clone() }),
        };
    }
    let best = [TrackerKind::SoftDirty, TrackerKind::UffdWp].into_iter().find(|&kind| works(kind).is_ok());
    if best.is_none() {
        let reasons = [&soft_dirty, &uffd_wp].map(|r| r.as_ref().err().cloned().unwrap_or_default());
        notes.push(format!(
            "no dirty tracking, so that every checkpoint is a full one: soft-dirty: {}; uffd-wp: {}",
            reasons[0], reasons[1]
        ));
    }
    Ok(best)
}

/// The process, held by a descriptor, if it is one that can be watched.
fn identify(pid: i32) -> Result<(TargetId, std::os::fd::OwnedFd), SessionError> {
    let refused = |reason: &str| SessionError::Target { pid, reason: reason.to_owned() };
    let fact = |fact: Result<bool, process::ProcessError>| fact.map_err(|e| refused(&e.to_string()));
    let target = TargetId::of(pid).map_err(|_| refused("no such process"))?;
    let held = pidfd::open(pid).map_err(|e| match e.errno() {
        Some(libc::EINVAL | libc::ENOENT) => refused("a thread, not a process"),
        _ => e.into(),
    })?;
    if fact(process::is_kernel_thread(pid))? {
        return Err(refused("a kernel thread"));
    }
    if matches!(process::state(pid), Ok('Z' | 'X')) {
        return Err(refused("a zombie"));
    }
    let own = std::process::id().cast_signed();
    let ancestors = process::ancestors().map_err(|e| refused(&e.to_string()))?;
    if pid == own || ancestors.contains(&pid) {
        return Err(refused("memckpt itself or an ancestor of it"));
    }
    if process::bitness(pid).map_err(|e| refused(&e.to_string()))? == process::Bitness::Bits32 {
        return Err(refused("a 32-bit program"));
    }
    if let Some(tracer) = process::tracer_pid(pid).map_err(|e| refused(&e.to_string()))? {
        return Err(refused(&format!("already traced, by process {tracer}")));
    }
    // The PID may have been used again between the two: the descriptor is of whatever it is now.
    if !target.still_alive() {
        return Err(refused("no such process"));
    }
    Ok((target, held))
}
