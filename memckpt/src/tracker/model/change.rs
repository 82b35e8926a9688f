//! What one event means for the model, and marks that outlive an epoch.

use std::collections::VecDeque;

use crate::addr::{Addr, AddrRange, PAGE_SIZE};
use crate::kernel::maps::Vma;
use crate::range_set::RangeSet;

/// Every page but the very last, which nothing can be mapped to; the kernel's own half (`[vsyscall]`) is included.
pub const EVERYTHING: AddrRange = AddrRange::new(0, u64::MAX - (PAGE_SIZE - 1));

/// What an observed event did, or may have done, to the layout or the contents of ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// What was mapped here is gone, or something new is: mmap, munmap, brk, shmat, shmdt, stack growth.
    Replaced(AddrRange),
    /// Something was tried here that may be done in part: neither what was nor what is can be relied on.
    Unclear(AddrRange),
    /// mremap took the pages of `from` to `to`. In place where both start at one address.
    Moved {
        /// The range before.
        from: AddrRange,
        /// The range after.
        to: AddrRange,
    },
    /// mremap may have taken the pages of `from` to `to`.
    MaybeMoved {
        /// The range before.
        from: AddrRange,
        /// The range after, or one around it.
        to: AddrRange,
        /// Whether `to` is just the range after.
        exact: bool,
    },
    /// Protection, flags or name may differ; contents do not: mprotect, mlock, most madvise calls.
    Attributes(AddrRange),
    /// Contents were dropped, the mapping stays: MADV_DONTNEED, MADV_REMOVE.
    Dropped(AddrRange),
    /// The kernel may drop contents at any later time without an event: MADV_FREE.
    Freed(AddrRange),
    /// Contents were written by something that the dirty source may not see.
    Written(AddrRange),
    /// remap_file_pages was seen here.
    Nonlinear(AddrRange),
    /// Nothing is known any more: events were lost, or an unknown one arrived.
    Everything,
}

/// Moves remembered to follow marks whose event arrives after the move's: system calls of two threads may reach the
/// ring in another order than the kernel did them, but only while both run.
const MOVES_KEPT: usize = 256;

/// Ranges marked by events, over epochs, until the memory is gone.
///
/// "Gone" takes back marks of earlier epochs only: inside one epoch the order of two threads' events proves nothing,
/// but at its end every thread stood still, and so all events of that epoch had arrived.
#[derive(Clone, Debug, Default)]
pub(super) struct Sticky {
    earlier: RangeSet,
    current: RangeSet,
}

impl Sticky {
    /// Marks `range`.
    pub(super) fn mark(&mut self, range: AddrRange) {
        self.current.insert(range);
    }

    /// The memory in `range` is gone.
    pub(super) fn gone(&mut self, range: AddrRange) {
        self.earlier.remove(range);
    }

    /// A new epoch begins, all threads standing still.
    pub(super) fn next_epoch(&mut self) {
        let current = std::mem::take(&mut self.current);
        self.earlier.union(&current);
    }

    /// Forgets marks of earlier epochs where `layout` has nothing mapped, as all threads stand still.
    pub(super) fn only_mapped(&mut self, layout: &[Vma]) {
        if !self.earlier.is_empty() {
            let mapped: RangeSet = layout.iter().map(|v| v.range).collect();
            self.earlier = self.earlier.intersection(&mapped);
        }
    }

    /// Marks, where a move went to, what is marked where it came from.
    pub(super) fn follow(&mut self, a_move: &Move) {
        let from = a_move.from;
        let marked: Vec<_> = self.earlier.within(from).chain(self.current.within(from)).collect();
        for part in marked {
            if let Some(moved) = a_move.place(part) {
                self.current.insert(moved);
            }
        }
    }

    /// All marked ranges.
    #[must_use]
    pub(super) fn set(&self) -> RangeSet {
        let mut all = self.earlier.clone();
        all.union(&self.current);
        all
    }
}

/// Pages went from one range to another, or into it somewhere.
#[derive(Clone, Copy, Debug)]
pub(super) struct Move {
    pub(super) from: AddrRange,
    pub(super) to: AddrRange,
    pub(super) exact: bool,
}

impl Move {
    /// Where `part` may be after it.
    fn place(&self, part: AddrRange) -> Option<AddrRange> {
        let part = part.intersection(self.from)?;
        if !self.exact {
            return Some(self.to);
        }
        let offset = part.start.get() - self.from.start.get();
        let start = Addr(self.to.start.get().checked_add(offset)?);
        AddrRange::with_len(start, part.len()).intersection(self.to)
    }
}

/// The latest moves, oldest first.
#[derive(Clone, Debug, Default)]
pub(super) struct Moves(VecDeque<Move>);

impl Moves {
    /// Remembers a move; the oldest is forgotten where there are too many.
    pub(super) fn push(&mut self, a_move: Move) {
        if self.0.len() == MOVES_KEPT {
            self.0.pop_front();
        }
        self.0.push_back(a_move);
    }

    /// A new epoch begins.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// `range`, and everywhere its pages may have been moved since.
    #[must_use]
    pub(super) fn places(&self, range: AddrRange) -> RangeSet {
        let mut places: RangeSet = [range].into_iter().collect();
        for a_move in &self.0 {
            let moved: Vec<_> = places.within(a_move.from).filter_map(|part| a_move.place(part)).collect();
            moved.into_iter().for_each(|part| places.insert(part));
        }
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn r(start: u64, end: u64) -> AddrRange {
        AddrRange::new(start << 12, end << 12)
    }

    #[test]
    fn gone_takes_back_only_marks_of_earlier_epochs() {
        let mut marks = Sticky::default();
        marks.mark(r(1, 5));
        marks.gone(r(1, 3));
        assert_eq!(marks.set().as_slice(), [r(1, 5)]);
        marks.next_epoch();
        marks.gone(r(1, 3));
        marks.mark(r(7, 8));
        assert_eq!(marks.set().as_slice(), [r(3, 5), r(7, 8)]);
    }

    #[test]
    fn marks_follow_a_move() {
        let mut marks = Sticky::default();
        marks.mark(r(12, 14));
        marks.follow(&Move { from: r(10, 13), to: r(30, 33), exact: true });
        assert_eq!(marks.set().as_slice(), [r(12, 14), r(32, 33)]);
        marks.follow(&Move { from: r(13, 20), to: r(50, 60), exact: false });
        assert_eq!(marks.set().as_slice(), [r(12, 14), r(32, 33), r(50, 60)], "anywhere in it");
    }

    #[test]
    fn a_mark_that_arrives_late_follows_a_chain_of_moves() {
        let mut moves = Moves::default();
        moves.push(Move { from: r(10, 20), to: r(40, 50), exact: true });
        moves.push(Move { from: r(45, 46), to: r(90, 91), exact: true });
        assert_eq!(moves.places(r(14, 16)).as_slice(), [r(14, 16), r(44, 46), r(90, 91)]);
        moves.clear();
        assert_eq!(moves.places(r(14, 16)).as_slice(), [r(14, 16)]);
    }
}
