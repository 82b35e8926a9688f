//! The unbroken record: events, losses, the model and the epoch, and the one transaction that may be open on them.
//!
//! Everything here is bookkeeping over two traits, and so is tested without a kernel.

use crate::addr::{AddrRange, Chunk};
use crate::kernel::maps::Vma;
use crate::range_set::RangeSet;
use crate::tracker::agent::{HintMode, Losses};
use crate::tracker::epoch::{Broken, CheckpointId, Epoch, EpochState};
use crate::tracker::model::{Change, EVERYTHING, Explains, LayoutSource, VmaModel};
use crate::tracker::session::info::{Collected, Touched};

/// What one event of the agent means to a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observed {
    /// The layout or contents changed.
    Layout {
        /// How.
        change: Change,
        /// What of the generation's movement that accounts for.
        explains: Explains,
    },
    /// The target called exec: the mm that was watched is gone.
    Exec,
    /// The watched mm was torn down.
    Exit,
    /// Somebody wrote to the target's clear_refs.
    ClearRefs,
    /// The target made a userfaultfd.
    Userfaultfd,
    /// The target made an io_uring.
    IoUring,
}

/// The record's view of the eBPF agent.
pub trait EventSource {
    /// Moves whenever the layout may be about to change.
    fn generation(&self) -> u64;
    /// What was lost so far.
    fn losses(&self) -> Losses;
    /// Appends what the events that have arrived mean.
    fn drain(&mut self, events: &mut Vec<Observed>);
    /// Ranges that calls of others may still be writing. A call that is not among them is over, or has an event that was
    /// not drained before.
    fn being_written(&mut self) -> Vec<AddrRange>;
    /// Whether touches are complete.
    fn hint_mode(&self) -> HintMode;
    /// Begins a new buffer of touches; when it returns nothing writes to the old one any more.
    fn flip(&mut self);
    /// Chunks in the buffer before the last flip, in order.
    fn previous(&self) -> Vec<Chunk>;
    /// Chunks in the running buffer, in order.
    fn current(&self) -> Vec<Chunk>;
    /// Marks chunks in the running buffer.
    fn carry(&mut self, chunks: &[Chunk]);
    /// Empties the buffer before the last flip.
    fn clear_previous(&mut self);
}

/// Something that a session must act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The watched mm is gone by exec.
    Exec,
    /// The watched mm is gone.
    Exit,
    /// The target made a userfaultfd.
    Userfaultfd,
}

/// Why a call of the record failed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError<L> {
    /// The layout could not be read.
    #[error("the layout: {0}")]
    Layout(#[source] L),
    /// A transaction is open already.
    #[error("another checkpoint of this process is being taken")]
    Busy,
    /// The watched address space is gone (exec or exit).
    #[error("the process called exec, or ended")]
    Gone,
    /// No transaction is open.
    #[error("no checkpoint is being taken on this connection")]
    Idle,
}

/// A checkpoint between collect and commit.
#[derive(Debug)]
struct Transaction {
    connection: u64,
    /// Losses before the flip: what comes later is the next epoch's.
    losses: Losses,
    /// What others' calls, begun before the scan, may write after it.
    being_written: Vec<AddrRange>,
    /// Somebody, presumably the client, cleared the dirty bits meanwhile.
    cleared: bool,
}

/// What became of a transaction that was not committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The client says that it cleared nothing.
    Untouched,
    /// The client says that clearing had begun.
    Cleared,
    /// The client went away. `proven_untouched`: the dirty bits are known to be as they were.
    Vanished {
        /// Whether something other than the client vouches for the dirty bits.
        proven_untouched: bool,
    },
}

/// See the module's description.
#[derive(Debug)]
pub struct Record<E, L> {
    events: Option<E>,
    layout: L,
    model: VmaModel,
    epoch: EpochState,
    /// The target may have made an io_uring since the epoch began.
    made_io_uring: bool,
    /// Losses when the epoch began.
    baseline: Losses,
    /// Losses already answered by forgetting.
    forgotten: Losses,
    transaction: Option<Transaction>,
    /// Whether writes to clear_refs harm the dirty source.
    clear_refs_matter: bool,
    /// What breaks every epoch of this session.
    standing: Option<Broken>,
    seen: u64,
}

type Fallible<T, L> = Result<T, RecordError<<L as LayoutSource>::Error>>;

impl<E: EventSource, L: LayoutSource> Record<E, L> {
    /// A record that begins now. `standing`: what breaks every epoch of it, such as that there are no `events`.
    pub fn new(events: Option<E>, layout: L, clear_refs_matter: bool, standing: Option<Broken>) -> Self {
        let mut epoch = EpochState::default();
        if let Some(why) = standing.clone() {
            epoch.break_off(why);
        }
        Self {
            events,
            layout,
            model: VmaModel::new(),
            epoch,
            standing,
            made_io_uring: false,
            baseline: Losses::default(),
            forgotten: Losses::default(),
            transaction: None,
            clear_refs_matter,
            seen: 0,
        }
    }

    /// The model as of the last sync.
    #[must_use]
    pub fn model(&self) -> &VmaModel {
        &self.model
    }

    /// See [`VmaModel::give`].
    pub fn give_layout(&mut self) -> (u64, &[Vma]) {
        self.model.give()
    }

    /// The running epoch.
    #[must_use]
    pub fn epoch(&self) -> &EpochState {
        &self.epoch
    }

    /// The agent.
    #[must_use]
    pub fn events(&self) -> Option<&E> {
        self.events.as_ref()
    }

    /// The agent.
    pub fn events_mut(&mut self) -> Option<&mut E> {
        self.events.as_mut()
    }

    /// Events taken in since the record began.
    #[must_use]
    pub fn events_seen(&self) -> u64 {
        self.seen
    }

    /// Whether a transaction is open.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.transaction.is_some()
    }

    /// Breaks the running epoch.
    pub fn break_off(&mut self, why: Broken) {
        self.epoch.break_off(why);
    }

    /// Breaks this epoch and every later one.
    pub fn break_for_good(&mut self, why: Broken) {
        self.epoch.break_off(why.clone());
        self.standing.get_or_insert(why);
    }

    /// Goes on with another mm, after an exec: the model starts anew and the next epoch begins.
    pub fn restart(&mut self, events: Option<E>, layout: L, standing: Option<Broken>) {
        self.events = events;
        self.standing = standing;
        self.layout = layout;
        self.model = self.model.successor();
        self.transaction = None;
        self.baseline = Losses::default();
        self.forgotten = Losses::default();
    }

    /// Losses so far.
    #[must_use]
    pub fn losses(&self) -> Losses {
        self.events.as_ref().map_or_else(Losses::default, E::losses)
    }

    /// Takes in what arrived, without asking the kernel for anything. Notices are appended.
    pub fn absorb(&mut self, notices: &mut Vec<Notice>) {
        let Some(events) = &mut self.events else { return };
        let mut observed = Vec::new();
        events.drain(&mut observed);
        let losses = events.losses();
        self.seen += observed.len() as u64;
        observed.into_iter().for_each(|event| self.take_in(event, notices));
        if is_record_lossy(&losses, &self.forgotten) {
            self.forgotten = losses;
            self.model.forget();
        }
    }

    /// Takes in what arrived and brings the model up to date. `frozen`: no thread of the target can run.
    /// Notices are appended; returned are the ranges that were asked again.
    ///
    /// # Errors
    /// The layout could not be read (the target is gone).
    pub fn update(&mut self, frozen: bool, notices: &mut Vec<Notice>) -> Fallible<Vec<AddrRange>, L> {
        // Before the drain: what moves it later is seen by the next update.
        let generation = self.events.as_ref().map(E::generation);
        self.absorb(notices);
        if notices.iter().any(|n| matches!(n, Notice::Exec | Notice::Exit)) {
            return Ok(Vec::new());
        }
        let synced = self.model.sync(&mut self.layout, generation, frozen).map_err(RecordError::Layout)?;
        Ok(synced.asked)
    }

    fn take_in(&mut self, event: Observed, notices: &mut Vec<Notice>) {
        match event {
            Observed::Layout { change, explains } => self.model.apply(change, explains),
            Observed::Exec => {
                self.epoch.break_off(Broken::Exec);
                notices.push(Notice::Exec);
            }
            Observed::Exit => notices.push(Notice::Exit),
            Observed::Userfaultfd => notices.push(Notice::Userfaultfd),
            Observed::IoUring => self.made_io_uring = true,
            Observed::ClearRefs => match &mut self.transaction {
                Some(transaction) => transaction.cleared = true,
                None if self.clear_refs_matter => self.epoch.break_off(Broken::ForeignClear),
                None => {}
            },
        }
    }

    /// See [`VmaModel::take_renewed`].
    pub fn take_renewed(&mut self) -> RangeSet {
        self.model.take_renewed()
    }

    /// The session itself changed `range` (uffd-wp registration splits and merges VMAs): ask again.
    pub fn mark_stale(&mut self, range: AddrRange) {
        self.model.mark_stale(range);
    }

    /// Begins epoch 1, or the epoch after an exec: the session itself has cleared the dirty state, frozen.
    /// What it did to the target before, its own userfaultfd included, is among the notices.
    pub fn begin(&mut self, first: bool, notices: &mut Vec<Notice>) {
        self.drain_own(notices);
        if let Some(events) = &mut self.events {
            let losses = events.losses();
            events.flip();
            events.clear_previous();
            self.forgotten = losses;
            self.baseline = losses;
        }
        if first {
            self.seen = 0;
        } else {
            self.next_epoch(None);
        }
        self.model.begin_epoch(self.events.as_ref().map(E::generation));
    }

    /// What the kernel may drop without an event at any later time, by what was done before the record began: MADV_FREE.
    pub fn freed_before(&mut self, ranges: &[AddrRange]) {
        for range in ranges {
            self.model.apply(Change::Freed(*range), Explains::Nothing);
        }
    }

    fn next_epoch(&mut self, checkpoint: Option<CheckpointId>) -> Epoch {
        let epoch = self.epoch.begin_next(checkpoint);
        if let Some(why) = self.standing.clone() {
            self.epoch.break_off(why);
        }
        epoch
    }

    /// Takes what arrived while the session or the client itself cleared: clear_refs among it is no foreign one.
    fn drain_own(&mut self, notices: &mut Vec<Notice>) {
        let Some(events) = &mut self.events else { return };
        let mut observed = Vec::new();
        events.drain(&mut observed);
        self.seen += observed.len() as u64;
        for event in observed {
            match event {
                Observed::ClearRefs => {}
                // Movements without a number may be those before the generation was last read.
                Observed::Layout { change, explains: Explains::Moves(_) } => {
                    self.model.apply(change, Explains::Nothing);
                }
                other => self.take_in(other, notices),
            }
        }
    }

    /// Opens the transaction of `connection`, the target being frozen, and says what a checkpoint needs.
    ///
    /// # Errors
    /// One is open already; the agent failed; the layout could not be read.
    pub fn collect(
        &mut self,
        connection: u64,
        generation: u64,
        notices: &mut Vec<Notice>,
    ) -> Fallible<Collected, L> {
        if self.transaction.is_some() {
            return Err(RecordError::Busy);
        }
        self.update(true, notices)?;
        if notices.iter().any(|n| matches!(n, Notice::Exec | Notice::Exit)) {
            return Err(RecordError::Gone);
        }
        // After the drain: what begins from here on has an event, which the commit brings into the next epoch.
        let being_written = self.events.as_mut().map_or_else(Vec::new, E::being_written);
        let before = self.losses();
        let (touched, after) = match &mut self.events {
            None => (Touched::Everything { reason: "no events are observed".to_owned() }, before),
            Some(events) => {
                events.flip();
                let after = events.losses();
                let lost = after.since(&self.baseline).total();
                let touched = match events.hint_mode() {
                    HintMode::Complete if lost == 0 => Touched::Chunks(ranges(&events.previous())),
                    HintMode::Complete => {
                        Touched::Everything { reason: format!("{lost} events lost since the epoch began") }
                    }
                    weaker => Touched::Everything { reason: format!("hints are {weaker}") },
                };
                (touched, after)
            }
        };
        self.transaction = Some(Transaction { connection, losses: before, being_written, cleared: false });
        let mut changed = self.model.changed().clone();
        if is_record_lossy(&after, &self.forgotten) {
            // Lost between the drain and now.
            changed.insert(EVERYTHING);
            self.made_io_uring = true;
        }
        Ok(Collected {
            relayout: self.model.since(generation),
            generation: self.model.revision(),
            touched,
            changed,
            doubtful: self.model.doubtful(),
            nonlinear: self.model.nonlinear(),
            made_io_uring: self.made_io_uring,
            losses: after,
            broken: self.epoch.broken().map(ToString::to_string),
        })
    }

    /// Ends the transaction of `connection`: `checkpoint` was taken and the dirty state cleared, the target still
    /// frozen. `carry`: what is still dirty.
    ///
    /// # Errors
    /// No transaction is open there; the agent failed.
    pub fn commit(
        &mut self,
        connection: u64,
        checkpoint: CheckpointId,
        carry: &[AddrRange],
        notices: &mut Vec<Notice>,
    ) -> Fallible<Epoch, L> {
        let transaction = self.take_transaction(connection)?;
        if let Some(events) = &mut self.events {
            events.clear_previous();
            let chunks: Vec<Chunk> = carry.iter().flat_map(|r| r.chunks()).collect();
            events.carry(&chunks);
        }
        let generation = self.events.as_ref().map(E::generation);
        self.forgotten = transaction.losses;
        self.baseline = transaction.losses;
        self.model.begin_epoch(generation);
        self.made_io_uring = false;
        let epoch = self.next_epoch(Some(checkpoint));
        // What others did to the target while it stood still (a write by process_vm_writev, say) may have come after
        // the scan: it belongs to the new epoch.
        self.drain_own(notices);
        for range in transaction.being_written {
            self.model.apply(Change::Written(range), Explains::Nothing);
        }
        Ok(epoch)
    }

    /// Ends the transaction of `connection` without a checkpoint; what was flipped away is touched again.
    ///
    /// # Errors
    /// No transaction is open there; the agent failed.
    pub fn abort(&mut self, connection: u64, ending: Ending, notices: &mut Vec<Notice>) -> Fallible<(), L> {
        // While it is still open, so that a clear is told from a foreign one.
        if let Err(e) = self.update(false, notices) {
            tracing::debug!("at the end of a transaction: {e}");
        }
        let transaction = self.take_transaction(connection)?;
        match ending {
            Ending::Cleared => self.epoch.break_off(Broken::AbortedAfterClear),
            Ending::Vanished { proven_untouched: false } => self.epoch.break_off(Broken::ClientVanished),
            Ending::Untouched | Ending::Vanished { .. } if transaction.cleared && self.clear_refs_matter => {
                self.epoch.break_off(Broken::ForeignClear);
            }
            Ending::Untouched | Ending::Vanished { .. } => {}
        }
        if let Some(events) = &mut self.events {
            let chunks = events.previous();
            events.carry(&chunks);
            events.clear_previous();
        }
        Ok(())
    }

    /// Whether `connection` has the open transaction.
    #[must_use]
    pub fn is_taken_by(&self, connection: u64) -> bool {
        self.transaction.as_ref().is_some_and(|t| t.connection == connection)
    }

    fn take_transaction(&mut self, connection: u64) -> Fallible<Transaction, L> {
        match self.transaction.take() {
            Some(transaction) if transaction.connection == connection => Ok(transaction),
            other => {
                self.transaction = other;
                Err(RecordError::Idle)
            }
        }
    }

    /// Where a look at the dirty pages of the running epoch must go, within the VMAs that `worth` picks: in what was
    /// touched, or in all of them.
    pub fn worth_reading(&self, worth: impl Fn(&Vma) -> bool) -> Vec<AddrRange> {
        let vmas = self.model.vmas().iter().filter(|v| worth(v)).map(|v| v.range);
        match &self.events {
            // Losses matter little here: this is for showing.
            Some(events) if events.hint_mode() == HintMode::Complete => {
                let mut touched: RangeSet = events.current().into_iter().map(Chunk::range).collect();
                touched.union(self.model.changed());
                vmas.flat_map(|v| touched.within(v).collect::<Vec<_>>()).collect()
            }
            _ => vmas.collect(),
        }
    }
}

/// Whether more than fault hints was lost between the two readings.
fn is_record_lossy(now: &Losses, before: &Losses) -> bool {
    let Losses { ring, high_addr: _, flip, map_full, collapse: _, recursion, nmissed } = now.since(before);
    ring + flip + map_full + recursion + nmissed > 0
}

/// Chunks in order as ranges, neighbours joined.
fn ranges(chunks: &[Chunk]) -> Vec<AddrRange> {
    let set: RangeSet = chunks.iter().map(|c| c.range()).collect();
    set.as_slice().to_vec()
}
