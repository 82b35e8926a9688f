//! The agent and the maps file as the record sees them.

use std::os::fd::BorrowedFd;

use super::record::{EventSource, Observed};
use super::translate::translate;
use crate::addr::{AddrRange, Chunk};
use crate::kernel::maps::{MapsError, MapsFile, Vma};
use crate::tracker::agent::{Agent, AgentError, Buffer, Fact, HintMode, LayoutEvent, Losses};
use crate::tracker::model::LayoutSource;

/// Facts without which the record of changes is not unbroken.
const RECORD: [Fact; 3] = [Fact::LayoutCalls, Fact::Generation, Fact::ForeignWrites];

/// The eBPF agent as a source of events.
#[derive(Debug)]
pub(super) struct AgentEvents {
    agent: Agent,
    /// Number of the session's own userfaultfd.
    userfaultfd: Option<i32>,
    buffer: Vec<LayoutEvent>,
}

impl AgentEvents {
    pub(super) fn new(agent: Agent) -> Self {
        Self { agent, userfaultfd: None, buffer: Vec::new() }
    }

    pub(super) fn ring_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring's descriptor, open as long as the agent that is borrowed from.
        unsafe { BorrowedFd::borrow_raw(self.agent.events_fd()) }
    }

    /// Whether a write to the target's clear_refs is an event.
    pub(super) fn tell_clears(&self) -> bool {
        self.agent.hooks().knows(Fact::ForeignClears)
    }

    /// See [`Agent::may_be_pinned`].
    pub(super) fn may_be_pinned(&self) -> Result<bool, AgentError> {
        self.agent.may_be_pinned()
    }

    /// Whether a userfaultfd is an event when it is made. Otherwise it is when a range is registered with it.
    pub(super) fn tell_userfaultfds(&self) -> bool {
        !self.agent.hooks().layout_by_lock()
    }

    pub(super) fn set_userfaultfd(&mut self, fd: i32) {
        self.userfaultfd = Some(fd);
    }

    /// Why changes of the layout, or writes by others, may go unnoticed, if so.
    pub(super) fn gaps(&self) -> Option<String> {
        let gaps: Vec<_> =
            RECORD.into_iter().filter(|&f| !self.agent.hooks().knows(f)).map(|f| f.to_string()).collect();
        (!gaps.is_empty()).then(|| format!("not seen: {}", gaps.join(", ")))
    }
}

impl EventSource for AgentEvents {
    fn generation(&self) -> u64 {
        self.agent.generation()
    }

    fn losses(&self) -> Losses {
        self.agent.losses()
    }

    fn drain(&mut self, events: &mut Vec<Observed>) {
        self.agent.drain(&mut self.buffer);
        for event in self.buffer.drain(..) {
            tracing::trace!(?event);
            let ours = self.userfaultfd.filter(|_| self.agent.is_own(&event));
            translate(&event, ours, events);
        }
        // Only to keep the notes few: what is over is forgotten.
        let _ = self.agent.being_written();
    }

    fn being_written(&mut self) -> Vec<AddrRange> {
        self.agent.being_written()
    }

    fn hint_mode(&self) -> HintMode {
        self.agent.hooks().hint_mode()
    }

    fn flip(&mut self) {
        self.agent.flip();
    }

    fn previous(&self) -> Vec<Chunk> {
        self.agent.touched(Buffer::Previous)
    }

    fn current(&self) -> Vec<Chunk> {
        self.agent.touched(Buffer::Current)
    }

    fn carry(&mut self, chunks: &[Chunk]) {
        self.agent.carry(chunks.iter().copied());
    }

    fn clear_previous(&mut self) {
        self.agent.clear_previous();
    }
}

impl LayoutSource for MapsFile {
    type Error = MapsError;

    fn query(&mut self, range: AddrRange) -> Result<Vec<Vma>, MapsError> {
        MapsFile::query(self, range)
    }

    fn read_all(&mut self) -> Result<Vec<Vma>, MapsError> {
        self.read()
    }

    fn can_query(&self) -> bool {
        MapsFile::can_query(self)
    }
}
