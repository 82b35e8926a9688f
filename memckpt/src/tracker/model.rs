//! The live VMA model: equal to `/proc/PID/maps`, kept so by asking the kernel again where events say so.
//!
//! Events are hints: they mark ranges stale and [`VmaModel::sync`] asks the kernel for those, widened to the VMAs that
//! overlap or touch them. Where the mm was write-locked more often than events explain, everything is read again.
//! Beside the layout the model keeps what the epoch must not inherit: see [`VmaModel::changed`].

mod change;
mod layout;
mod locks;
#[cfg(test)]
mod property;
mod relayout;

use crate::addr::AddrRange;
use crate::kernel::maps::Vma;
use crate::range_set::RangeSet;

pub use change::{Change, EVERYTHING};
use change::{Move, Moves, Sticky};
use layout::Layout;
use locks::Accounts;
pub use locks::Explains;
pub use relayout::Relayout;

/// Where the layout is read: the kernel, or a fake one in tests.
pub trait LayoutSource {
    /// Why a read failed.
    type Error: std::error::Error + Send + Sync + 'static;
    /// The VMAs that overlap `range`, whole, in order.
    ///
    /// # Errors
    /// The target is gone, or the kernel refused.
    fn query(&mut self, range: AddrRange) -> Result<Vec<Vma>, Self::Error>;
    /// All VMAs, in order.
    ///
    /// # Errors
    /// As for [`Self::query`].
    fn read_all(&mut self) -> Result<Vec<Vma>, Self::Error>;
    /// Whether a query costs less than reading everything.
    fn can_query(&self) -> bool {
        true
    }
}

/// What one [`VmaModel::sync`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Synced {
    /// What was asked again; [`EVERYTHING`] for a whole read.
    pub asked: Vec<AddrRange>,
    /// Whether any VMA differs from before, in whatever field.
    pub moved: bool,
}

/// The layout of one mm, and what happened to it in this epoch.
#[derive(Clone, Debug)]
pub struct VmaModel {
    layout: Layout,
    revision: u64,
    /// The revision that was given out last, and where VMAs have been found different since.
    given: u64,
    moved: RangeSet,
    stale: RangeSet,
    /// Write locks of the mm at the last sync, and those that events since then account for.
    generation: Option<u64>,
    accounts: Accounts,
    /// A whole read was needed since the last one with all threads stopped: such a read may have been too early.
    unsettled: bool,
    changed: RangeSet,
    /// Where VMAs may be other ones than at the last [`VmaModel::take_renewed`].
    renewed: RangeSet,
    doubtful: Sticky,
    nonlinear: Sticky,
    moves: Moves,
}

impl Default for VmaModel {
    fn default() -> Self {
        Self::new()
    }
}

impl VmaModel {
    /// A model that knows nothing yet: all is stale.
    #[must_use]
    pub fn new() -> Self {
        Self {
            layout: Layout::default(),
            revision: 0,
            given: 0,
            moved: RangeSet::new(),
            stale: [EVERYTHING].into_iter().collect(),
            generation: None,
            accounts: Accounts::default(),
            unsettled: true,
            changed: RangeSet::new(),
            renewed: RangeSet::new(),
            doubtful: Sticky::default(),
            nonlinear: Sticky::default(),
            moves: Moves::default(),
        }
    }

    /// A model of another mm, that knows nothing of it yet. No revision of it is one of this model.
    #[must_use]
    pub fn successor(&self) -> Self {
        let revision = self.revision + 1;
        Self { revision, given: revision, ..Self::new() }
    }

    /// The VMAs as of the last sync.
    #[must_use]
    pub fn vmas(&self) -> &[Vma] {
        self.layout.vmas()
    }

    /// Moves whenever a sync finds any VMA different.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Gives out the layout as of the last sync, with the revision that names it to [`Self::since`].
    pub fn give(&mut self) -> (u64, &[Vma]) {
        self.given = self.revision;
        self.moved = RangeSet::new();
        (self.revision, self.layout.vmas())
    }

    /// What became, as of the last sync, of the layout that `revision` names; `None` where it is the same.
    #[must_use]
    pub fn since(&self, revision: u64) -> Option<Relayout> {
        if revision == self.revision {
            None
        } else if revision == self.given {
            Some(Relayout::within(self.moved.clone(), self.vmas()))
        } else {
            Some(Relayout::whole(self.vmas().to_vec()))
        }
    }

    /// Ranges whose memory may be another than when the epoch began: nothing in them may be inherited.
    ///
    /// mprotect is not among them, though a merge that it causes may lose VM_SOFTDIRTY (until 6.19): a VMA that bears
    /// this flag came into being after the clear that began the epoch, and so is in this set by itself.
    #[must_use]
    pub fn changed(&self) -> &RangeSet {
        &self.changed
    }

    /// Ranges whose pages the kernel may drop without an event (MADV_FREE), over epochs, until unmapped or dropped.
    #[must_use]
    pub fn doubtful(&self) -> RangeSet {
        self.doubtful.set()
    }

    /// Ranges where remap_file_pages was seen, until unmapped.
    #[must_use]
    pub fn nonlinear(&self) -> RangeSet {
        self.nonlinear.set()
    }

    /// Takes in one event. `explains`: which write locks of the mm did no more than what `change` says.
    pub fn apply(&mut self, change: Change, explains: Explains) {
        self.accounts.add(explains);
        match change {
            Change::Replaced(range) => {
                self.mark_stale(range);
                self.renew(range);
                self.gone(range);
            }
            Change::Unclear(range) => {
                self.mark_stale(range);
                self.renew(range);
            }
            Change::Moved { from, to } => self.moved(from.page_aligned(), to.page_aligned()),
            Change::MaybeMoved { from, to, exact } => {
                for range in [from, to] {
                    self.mark_stale(range);
                    self.renew(range);
                }
                self.follow(Move { from: from.page_aligned(), to: to.page_aligned(), exact });
            }
            Change::Attributes(range) => self.mark_stale(range),
            Change::Dropped(range) => {
                self.changed.insert(range.page_aligned());
                self.doubtful.gone(range.page_aligned());
            }
            Change::Written(range) => self.changed.insert(range.page_aligned()),
            Change::Freed(range) => {
                for place in self.moves.places(range.page_aligned()).iter() {
                    self.doubtful.mark(place);
                }
            }
            Change::Nonlinear(range) => {
                self.mark_stale(range);
                self.renew(range);
                for place in self.moves.places(range.page_aligned()).iter() {
                    self.nonlinear.mark(place);
                }
            }
            Change::Everything => self.forget(),
        }
    }

    /// Events were lost: all is stale, and nothing of this epoch may be inherited.
    pub fn forget(&mut self) {
        self.stale.insert(EVERYTHING);
        self.renew(EVERYTHING);
    }

    fn renew(&mut self, range: AddrRange) {
        self.changed.insert(range.page_aligned());
        self.renewed.insert(range.page_aligned());
    }

    /// Takes the ranges where VMAs may be other ones than at the last call: what was tied to a VMA (a userfaultfd's
    /// registration) may be gone there. Not so where only contents changed.
    pub fn take_renewed(&mut self) -> RangeSet {
        std::mem::take(&mut self.renewed)
    }

    /// `range` must be asked again although no event said so (the session itself changed it).
    pub fn mark_stale(&mut self, range: AddrRange) {
        self.stale.insert(range.page_aligned());
    }

    fn gone(&mut self, range: AddrRange) {
        // A first page given in part (brk) lives on; a last one goes whole (munmap rounds its length up).
        let range = AddrRange { start: range.start.page_ceil(), end: range.end.page_ceil() };
        self.doubtful.gone(range);
        self.nonlinear.gone(range);
    }

    fn moved(&mut self, from: AddrRange, to: AddrRange) {
        self.mark_stale(from);
        self.mark_stale(to);
        if from.start == to.start {
            // Grown or shrunk in place: only the tail is another.
            let (short, long) = (from.end.min(to.end), from.end.max(to.end));
            let tail = AddrRange { start: short, end: long };
            self.renew(tail);
            self.gone(tail);
            return;
        }
        self.renew(from);
        self.renew(to);
        self.gone(to);
        self.follow(Move { from, to, exact: true });
    }

    fn follow(&mut self, a_move: Move) {
        self.doubtful.follow(&a_move);
        self.nonlinear.follow(&a_move);
        self.moves.push(a_move);
    }

    /// Asks the kernel for what is stale and compares. `generation`: the mm's count of write locks, read *before* the
    /// events just applied were drained; `None` without such a count: then everything is read.
    /// `frozen`: no thread of the target can run.
    ///
    /// # Errors
    /// As `source`; the ranges stay stale.
    pub fn sync<S: LayoutSource>(
        &mut self,
        source: &mut S,
        generation: Option<u64>,
        frozen: bool,
    ) -> Result<Synced, S::Error> {
        let explained = self.accounts.settle(self.generation, generation);
        if !explained {
            self.unsettled = true;
        }
        // A write lock that no event explains may have been taken before a change that came after our read.
        if !explained || (frozen && self.unsettled) {
            self.stale.insert(EVERYTHING);
        }
        let synced = self.ask(source)?;
        self.generation = generation;
        if frozen {
            self.unsettled = false;
            self.doubtful.only_mapped(self.layout.vmas());
            self.nonlinear.only_mapped(self.layout.vmas());
        }
        Ok(synced)
    }

    fn ask<S: LayoutSource>(&mut self, source: &mut S) -> Result<Synced, S::Error> {
        let mut synced = Synced::default();
        if !self.stale.is_empty() && !source.can_query() {
            self.stale.insert(EVERYTHING);
        }
        while let Some(&range) = self.stale.as_slice().first() {
            let (hull, mut fresh) = if range == EVERYTHING {
                (EVERYTHING, source.read_all()?)
            } else {
                self.widened(source, range)?
            };
            let torn = layout::untangle(&mut fresh);
            let old = self.layout.replace(hull, fresh.clone());
            if old != fresh {
                synced.moved = true;
                self.moved.insert(layout::narrowed(hull, &old, &fresh));
            }
            for range in layout::differences(&old, &fresh) {
                self.renew(range);
            }
            synced.asked.push(hull);
            self.stale.remove(hull);
            if torn && hull != EVERYTHING {
                self.stale.insert(EVERYTHING);
            }
        }
        if synced.moved {
            self.revision += 1;
        }
        Ok(synced)
    }

    /// Asks for `range` widened until neither the model's nor the kernel's VMAs are cut by its borders.
    fn widened<S: LayoutSource>(
        &self,
        source: &mut S,
        range: AddrRange,
    ) -> Result<(AddrRange, Vec<Vma>), S::Error> {
        let mut hull = self.layout.hull(range);
        loop {
            let fresh = source.query(hull)?;
            let mut wider = hull;
            for vma in &fresh {
                wider.start = wider.start.min(vma.range.start);
                wider.end = wider.end.max(vma.range.end);
            }
            if self.layout.is_cut_by(wider) {
                wider = self.layout.hull(wider);
            }
            if wider == hull {
                return Ok((hull, fresh));
            }
            hull = wider;
        }
    }

    /// A new epoch begins now, with all threads stopped; `generation` as it is now, after the clear (which takes the
    /// write lock itself).
    pub fn begin_epoch(&mut self, generation: Option<u64>) {
        self.changed = RangeSet::new();
        self.moves.clear();
        self.doubtful.next_epoch();
        self.nonlinear.next_epoch();
        self.generation = generation;
        let _ = self.accounts.settle(generation, generation);
    }
}
