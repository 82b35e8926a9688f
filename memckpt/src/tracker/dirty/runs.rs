//! Collects runs of pages, clipped to the ranges asked for.

use super::{PageFlags, PageRun};
use crate::addr::AddrRange;

/// Takes states in order of addresses and joins neighbours that are alike, but never over the end of an asked range.
pub(super) struct Runs<'a> {
    ranges: &'a [AddrRange],
    /// The first range that may still get pages.
    at: usize,
    /// The range that the last run lies in.
    last_in: usize,
    found: Vec<PageRun>,
}

impl<'a> Runs<'a> {
    pub(super) fn of(ranges: &'a [AddrRange]) -> Self {
        Self { ranges, at: 0, last_in: usize::MAX, found: Vec::new() }
    }

    /// The pages of `range` are `flags`; no flags, no run.
    pub(super) fn push(&mut self, range: AddrRange, flags: PageFlags) {
        if flags.is_empty() {
            return;
        }
        while let Some(asked) = self.ranges.get(self.at) {
            if let Some(part) = asked.intersection(range) {
                self.join(part, flags);
            }
            if asked.end >= range.end {
                return;
            }
            self.at += 1;
        }
    }

    fn join(&mut self, range: AddrRange, flags: PageFlags) {
        match self.found.last_mut() {
            Some(last) if self.last_in == self.at && last.flags == flags && last.range.end == range.start => {
                last.range.end = range.end;
            }
            _ => self.found.push(PageRun { range, flags }),
        }
        self.last_in = self.at;
    }

    pub(super) fn finish(self) -> Vec<PageRun> {
        self.found
    }
}

/// Joins ranges that touch, so that one call looks at as much as it can.
pub(super) fn spans(ranges: &[AddrRange]) -> impl Iterator<Item = AddrRange> + '_ {
    ranges.chunk_by(|a, b| a.end == b.start).filter_map(|touching| {
        let span = AddrRange { start: touching.first()?.start, end: touching.last()?.end };
        (!span.is_empty()).then_some(span)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn sorted(lengths: &[(u64, u64)]) -> Vec<AddrRange> {
        let mut at = 0;
        lengths
            .iter()
            .map(|&(gap, len)| {
                let range = AddrRange::new(at + gap, at + gap + len);
                at = range.end.get();
                range
            })
            .collect()
    }

    proptest! {
        #[test]
        fn every_page_keeps_its_state_inside_the_ranges_and_no_other_is_reported(
            asked in prop::collection::vec((0u64..3, 1u64..20), 0..12),
            states in prop::collection::vec((0u64..3, 1u64..9, 0u8..4), 0..40),
        ) {
            let ranges = sorted(&asked);
            let regions = sorted(&states.iter().map(|&(gap, len, _)| (gap, len)).collect::<Vec<_>>());
            let mut runs = Runs::of(&ranges);
            let mut expected = BTreeMap::new();
            for (region, &(_, _, bits)) in regions.iter().zip(&states) {
                let flags = PageFlags::from_bits_truncate(bits);
                runs.push(*region, flags);
                for page in region.start.get()..region.end.get() {
                    if !flags.is_empty() && ranges.iter().any(|r| r.contains(crate::addr::Addr(page))) {
                        expected.insert(page, flags);
                    }
                }
            }
            let found = runs.finish();
            let pages: BTreeMap<u64, PageFlags> = found
                .iter()
                .flat_map(|run| (run.range.start.get()..run.range.end.get()).map(|page| (page, run.flags)))
                .collect();
            prop_assert_eq!(&pages, &expected);
            prop_assert!(found.windows(2).all(|w| w[0].range.end <= w[1].range.start));
            for run in &found {
                prop_assert!(ranges.iter().any(|r| r.intersection(run.range) == Some(run.range)));
            }
            // As few runs as there can be.
            for w in found.windows(2) {
                let same_range = ranges.iter().any(|r| r.overlaps(w[0].range) && r.overlaps(w[1].range));
                prop_assert!(w[0].range.end < w[1].range.start || w[0].flags != w[1].flags || !same_range);
            }
        }

        #[test]
        fn spans_hold_the_same_pages(asked in prop::collection::vec((0u64..2, 1u64..20), 0..12)) {
            let ranges = sorted(&asked);
            let joined: Vec<AddrRange> = spans(&ranges).collect();
            let pages = |ranges: &[AddrRange]| -> Vec<u64> { ranges.iter().flat_map(|r| r.start.get()..r.end.get()).collect() };
            prop_assert_eq!(pages(&joined), pages(&ranges));
            prop_assert!(joined.windows(2).all(|w| w[0].end < w[1].start));
        }
    }
}
