//! Pages that the kernel writes whenever a thread returns to user mode: its rseq(2) area gets the number of the CPU.
//!
//! One thread does run while the target is frozen, in the parasite:
//!
//! ```text
//! memckpt                          the infected thread
//! scan: the page is clean
//! infect                           returns to user mode on another CPU: the kernel writes its rseq area
//! cure, clear the dirty bits
//! the page was inherited: the write is lost
//! ```
//!
//! So these pages always count as dirty, and are read after the cure, when nothing of the target runs any more.

use crate::addr::{Addr, AddrRange};
use crate::plan::GrabRun;
use crate::range_set::RangeSet;
use crate::target::ThreadRegisters;
use crate::tracker::dirty::{PageFlags, PageRun};

/// The pages that hold the rseq area of a thread.
pub(super) fn pages(threads: &[ThreadRegisters]) -> RangeSet {
    threads
        .iter()
        .filter_map(|thread| thread.rseq)
        .map(|rseq| AddrRange::with_len(Addr(rseq.address), u64::from(rseq.size)).page_aligned())
        .collect()
}

/// `states` with the pages of `restless` dirty.
pub(super) fn dirtied(states: Vec<PageRun>, restless: &RangeSet) -> Vec<PageRun> {
    split(
        states,
        restless,
        |run| run.range,
        |run, range, inside| PageRun {
            range,
            flags: if inside { run.flags | PageFlags::DIRTY } else { run.flags },
        },
    )
}

/// `runs` with the pages of `restless` in runs of their own, which are read from outside.
pub(super) fn set_apart(runs: Vec<GrabRun>, restless: &RangeSet) -> Vec<GrabRun> {
    split(
        runs,
        restless,
        |run| run.range,
        |run, range, inside| GrabRun { range, readable: run.readable && !inside, ..run },
    )
}

/// Cuts each run at the borders of `set`, and makes each piece anew, knowing whether it lies inside.
fn split<T: Copy>(
    runs: Vec<T>,
    set: &RangeSet,
    range_of: impl Fn(&T) -> AddrRange,
    make: impl Fn(T, AddrRange, bool) -> T,
) -> Vec<T> {
    let mut pieces = Vec::with_capacity(runs.len());
    for run in runs {
        let range = range_of(&run);
        if !set.overlaps(range) {
            pieces.push(run);
            continue;
        }
        let mut parts: Vec<(AddrRange, bool)> = set.within(range).map(|part| (part, true)).collect();
        parts.extend(set.outside(range).into_iter().map(|part| (part, false)));
        parts.sort_unstable();
        pieces.extend(parts.into_iter().map(|(part, inside)| make(run, part, inside)));
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restless_pages_are_dirty_and_set_apart_and_nothing_else_changes() {
        let restless: RangeSet = [AddrRange::new(0x2000, 0x3000)].into_iter().collect();
        let states = vec![
            PageRun { range: AddrRange::new(0x1000, 0x4000), flags: PageFlags::PRESENT },
            PageRun { range: AddrRange::new(0x5000, 0x6000), flags: PageFlags::PRESENT },
        ];
        let flags: Vec<_> =
            dirtied(states, &restless).into_iter().map(|r| (r.range.start.0, r.flags)).collect();
        let present = PageFlags::PRESENT;
        let dirty = present | PageFlags::DIRTY;
        assert_eq!(flags, [(0x1000, present), (0x2000, dirty), (0x3000, present), (0x5000, present)]);

        let run = GrabRun { range: AddrRange::new(0x2000, 0x5000), readable: true, lazy: true };
        let apart: Vec<_> =
            set_apart(vec![run], &restless).into_iter().map(|r| (r.range, r.readable)).collect();
        assert_eq!(apart, [(AddrRange::new(0x2000, 0x3000), false), (AddrRange::new(0x3000, 0x5000), true)]);
    }
}
