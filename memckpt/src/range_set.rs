//! A set of addresses as sorted, disjoint, non-adjacent ranges.

use serde::{Deserialize, Serialize};

use crate::addr::{Addr, AddrRange, PageCount};

/// A set of addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RangeSet {
    ranges: Vec<AddrRange>,
}

impl RangeSet {
    /// The empty set.
    #[must_use]
    pub const fn new() -> Self {
        Self { ranges: Vec::new() }
    }

    /// The ranges, sorted, disjoint and not adjacent.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = AddrRange> + '_ {
        self.ranges.iter().copied()
    }

    /// The ranges as a slice.
    #[must_use]
    pub fn as_slice(&self) -> &[AddrRange] {
        &self.ranges
    }

    /// Whether the set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// How many pages the set holds.
    #[must_use]
    pub fn pages(&self) -> PageCount {
        self.iter().map(AddrRange::pages).sum()
    }

    /// Adds `range`; touching neighbours are joined.
    pub fn insert(&mut self, range: AddrRange) {
        if range.is_empty() {
            return;
        }
        // The common case of building in order.
        if let Some(last) = self.ranges.last_mut()
            && range.start >= last.start
            && range.start <= last.end
        {
            last.end = last.end.max(range.end);
            return;
        }
        if self.ranges.last().is_none_or(|last| last.end < range.start) {
            self.ranges.push(range);
            return;
        }
        let from = self.ranges.partition_point(|r| r.end < range.start);
        let to = self.ranges.partition_point(|r| r.start <= range.end);
        let mut joined = range;
        if from < to {
            joined.start = joined.start.min(self.ranges[from].start);
            joined.end = joined.end.max(self.ranges[to - 1].end);
        }
        self.ranges.splice(from..to, [joined]);
    }

    /// Takes `range` out.
    pub fn remove(&mut self, range: AddrRange) {
        if range.is_empty() {
            return;
        }
        let from = self.ranges.partition_point(|r| r.end <= range.start);
        let to = self.ranges.partition_point(|r| r.start < range.end);
        if from >= to {
            return;
        }
        let left = AddrRange { start: self.ranges[from].start, end: range.start };
        let right = AddrRange { start: range.end, end: self.ranges[to - 1].end };
        self.ranges.splice(from..to, [left, right].into_iter().filter(|r| !r.is_empty()));
    }

    /// Whether `addr` is in the set.
    #[must_use]
    pub fn contains(&self, addr: Addr) -> bool {
        let at = self.ranges.partition_point(|r| r.end <= addr);
        self.ranges.get(at).is_some_and(|r| r.contains(addr))
    }

    /// Whether the set and `range` share an address.
    #[must_use]
    pub fn overlaps(&self, range: AddrRange) -> bool {
        let at = self.ranges.partition_point(|r| r.end <= range.start);
        self.ranges.get(at).is_some_and(|r| r.overlaps(range))
    }

    /// The parts of `range` that are in the set, in order.
    pub fn within(&self, range: AddrRange) -> impl Iterator<Item = AddrRange> + '_ {
        let from = self.ranges.partition_point(|r| r.end <= range.start);
        self.ranges[from..]
            .iter()
            .take_while(move |r| r.start < range.end)
            .filter_map(move |r| r.intersection(range))
    }

    /// The parts of `range` that are not in the set, in order.
    #[must_use]
    pub fn outside(&self, range: AddrRange) -> Vec<AddrRange> {
        let mut rest = Vec::new();
        let mut at = range.start;
        for r in self.within(range) {
            if at < r.start {
                rest.push(AddrRange { start: at, end: r.start });
            }
            at = r.end;
        }
        if at < range.end {
            rest.push(AddrRange { start: at, end: range.end });
        }
        rest
    }

    /// Adds all of `other`.
    pub fn union(&mut self, other: &Self) {
        for r in other.iter() {
            self.insert(r);
        }
    }

    /// Takes all of `other` out.
    pub fn subtract(&mut self, other: &Self) {
        for r in other.iter() {
            self.remove(r);
        }
    }

    /// The addresses in both.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        self.iter().flat_map(|r| other.within(r)).collect()
    }
}

impl Extend<AddrRange> for RangeSet {
    fn extend<I: IntoIterator<Item = AddrRange>>(&mut self, iter: I) {
        for r in iter {
            self.insert(r);
        }
    }
}

impl FromIterator<AddrRange> for RangeSet {
    fn from_iter<I: IntoIterator<Item = AddrRange>>(iter: I) -> Self {
        let mut set = Self::new();
        set.extend(iter);
        set
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn model(ops: &[(bool, u64, u64)]) -> (RangeSet, BTreeSet<u64>) {
        let (mut set, mut reference) = (RangeSet::new(), BTreeSet::new());
        for &(add, start, len) in ops {
            let range = AddrRange::new(start, start + len);
            if add {
                set.insert(range);
                reference.extend(start..start + len);
            } else {
                set.remove(range);
                (start..start + len).for_each(|a| {
                    reference.remove(&a);
                });
            }
        }
        (set, reference)
    }

    proptest! {
        #[test]
        fn behaves_as_a_set_of_addresses(
            ops in prop::collection::vec((any::<bool>(), 0u64..200, 0u64..40), 0..60),
            probe in (0u64..220, 0u64..60),
        ) {
            let (set, reference) = model(&ops);
            let members: BTreeSet<u64> = set.iter().flat_map(|r| r.start.0..r.end.0).collect();
            prop_assert_eq!(&members, &reference);
            prop_assert!(set.as_slice().windows(2).all(|w| w[0].end < w[1].start));
            let range = AddrRange::new(probe.0, probe.0 + probe.1);
            let inside: Vec<u64> = set.within(range).flat_map(|r| r.start.0..r.end.0).collect();
            let outside: Vec<u64> = set.outside(range).iter().flat_map(|r| r.start.0..r.end.0).collect();
            prop_assert_eq!(inside, (range.start.0..range.end.0).filter(|a| reference.contains(a)).collect::<Vec<_>>());
            prop_assert_eq!(outside, (range.start.0..range.end.0).filter(|a| !reference.contains(a)).collect::<Vec<_>>());
            prop_assert_eq!(set.overlaps(range), (range.start.0..range.end.0).any(|a| reference.contains(&a)));
        }
    }
}
