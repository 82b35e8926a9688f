//! What became of a layout that somebody has.

use serde::{Deserialize, Serialize};

use crate::kernel::maps::Vma;
use crate::range_set::RangeSet;

use super::EVERYTHING;

/// How a layout differs from an earlier one: small where little has happened, however many VMAs there are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relayout {
    /// Where. A VMA lies in it whole or not at all, in both layouts.
    ranges: RangeSet,
    /// What is there now, in order.
    vmas: Vec<Vma>,
}

impl Relayout {
    /// That in `ranges` there is now what `vmas` have there.
    pub(super) fn within(ranges: RangeSet, vmas: &[Vma]) -> Self {
        let vmas = vmas.iter().filter(|vma| ranges.overlaps(vma.range)).cloned().collect();
        Self { ranges, vmas }
    }

    /// That it is `vmas`, whatever it was.
    #[must_use]
    pub fn whole(vmas: Vec<Vma>) -> Self {
        Self { ranges: [EVERYTHING].into_iter().collect(), vmas }
    }

    /// The layout now, which was `before`.
    #[must_use]
    pub fn apply(self, before: &[Vma]) -> Vec<Vma> {
        let there_still = before.iter().filter(|vma| !self.ranges.overlaps(vma.range)).cloned();
        let mut vmas: Vec<Vma> = self.vmas;
        vmas.extend(there_still);
        vmas.sort_unstable_by_key(|vma: &Vma| vma.range.start);
        vmas
    }
}
