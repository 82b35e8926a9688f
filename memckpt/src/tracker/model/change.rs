//! What one event means for the model, and marks that outlive an epoch.

use std::collections::VecDeque;

use crate::addr::{Addr, AddrRange, PAGE_SIZE};
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

    /// Marks, where `from` was moved to, what is marked in `from`.
    pub(super) fn follow(&mut self, from: AddrRange, to: AddrRange) {
        let marked: Vec<_> = self.earlier.within(from).chain(self.current.within(from)).collect();
        for part in marked {
            if let Some(moved) = translate(part, from, to) {
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

/// Where `part` of `from` is after `from` moved to `to`.
fn translate(part: AddrRange, from: AddrRange, to: AddrRange) -> Option<AddrRange> {
    let part = part.intersection(from)?;
    let offset = part.start.get() - from.start.get();
    let start = Addr(to.start.get().checked_add(offset)?);
    AddrRange::with_len(start, part.len()).intersection(to)
}

/// The latest moves, oldest first.
#[derive(Clone, Debug, Default)]
pub(super) struct Moves(VecDeque<(AddrRange, AddrRange)>);

impl Moves {
    /// Remembers a move; the oldest is forgotten where there are too many.
    pub(super) fn push(&mut self, from: AddrRange, to: AddrRange) {
        if self.0.len() == MOVES_KEPT {
            self.0.pop_front();
        }
        self.0.push_back((from, to));
    }

    /// A new epoch begins.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// `range`, and everywhere its pages may have been moved since.
    #[must_use]
    pub(super) fn places(&self, range: AddrRange) -> RangeSet {
        let mut places: RangeSet = [range].into_iter().collect();
        for &(from, to) in &self.0 {
            let moved: Vec<_> = places.within(from).filter_map(|part| translate(part, from, to)).collect();
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
        marks.follow(r(10, 13), r(30, 33));
        assert_eq!(marks.set().as_slice(), [r(12, 14), r(32, 33)]);
    }

    #[test]
    fn a_mark_that_arrives_late_follows_a_chain_of_moves() {
        let mut moves = Moves::default();
        moves.push(r(10, 20), r(40, 50));
        moves.push(r(45, 46), r(90, 91));
        assert_eq!(moves.places(r(14, 16)).as_slice(), [r(14, 16), r(44, 46), r(90, 91)]);
        moves.clear();
        assert_eq!(moves.places(r(14, 16)).as_slice(), [r(14, 16)]);
    }
}
