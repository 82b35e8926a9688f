//! Where the restorer can lie: in a hole that all address spaces have in common.

use crate::addr::{Addr, AddrRange};

/// Room that is left on both sides: the kernel keeps 1 MiB free below a stack that grows (stack_guard_gap, mm/mmap.c).
const MARGIN: u64 = 4 << 20;
/// Not lower: mmap_min_addr, and where programs that are not position-independent lie.
const LOWEST: u64 = 0x1000_0000;

/// The lowest hole of `len` bytes that no range of `taken` comes near to, below `end`.
pub(super) fn hole(taken: impl IntoIterator<Item = AddrRange>, len: u64, end: u64) -> Option<AddrRange> {
    let mut taken: Vec<AddrRange> = taken.into_iter().collect();
    taken.sort_unstable();
    let mut at = LOWEST;
    for range in taken {
        if range.start.get() >= at.saturating_add(len + MARGIN) {
            break;
        }
        at = at.max(range.end.get().saturating_add(MARGIN));
    }
    (at.checked_add(len)? <= end).then(|| AddrRange::with_len(Addr(at), len))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_lowest_hole_is_taken() {
        let end = 1 << 47;
        assert_eq!(hole([], 0x1000, end), Some(AddrRange::with_len(Addr(LOWEST), 0x1000)));
        let low = AddrRange::new(0x40_0000, 0x2000_0000);
        assert_eq!(hole([low], 0x1000, end), Some(AddrRange::with_len(Addr(0x2000_0000 + MARGIN), 0x1000)));
        assert_eq!(hole([AddrRange::new(0, end)], 0x1000, end), None);
        assert_eq!(hole([AddrRange::new(0, u64::MAX)], 0x1000, end), None);
    }

    proptest! {
        #[test]
        fn it_is_clear_of_everything(
            ranges in prop::collection::vec((0u64..1 << 35, 1u64..1 << 30), 0..30),
            len in 1u64..64,
        ) {
            let taken: Vec<_> =
                ranges.iter().map(|(start, len)| AddrRange::with_len(Addr(start * 4096), len * 4096)).collect();
            if let Some(found) = hole(taken.iter().copied(), len * 4096, 1 << 47) {
                prop_assert_eq!(found.len(), len * 4096);
                let around = AddrRange::new(found.start.get() - MARGIN, found.end.get() + MARGIN);
                prop_assert!(taken.iter().all(|range| !range.overlaps(around)));
            }
        }
    }
}
