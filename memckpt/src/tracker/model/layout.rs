//! A sorted list of VMAs: widening a range to whole VMAs, replacing a part, and telling two layouts apart.

use crate::addr::{Addr, AddrRange};
use crate::kernel::maps::Vma;

/// VMAs sorted by address, disjoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Layout {
    vmas: Vec<Vma>,
}

impl Layout {
    /// The VMAs.
    #[must_use]
    pub(super) fn vmas(&self) -> &[Vma] {
        &self.vmas
    }

    /// The smallest range around `range` and every VMA that overlaps or touches it. Kernel VMAs split and merge only
    /// with their neighbours, so this is what one change in `range` can reach.
    #[must_use]
    pub(super) fn hull(&self, range: AddrRange) -> AddrRange {
        let (from, to) = self.reach(range);
        let mut hull = range;
        if from < to {
            hull.start = hull.start.min(self.vmas[from].range.start);
            hull.end = hull.end.max(self.vmas[to - 1].range.end);
        }
        hull
    }

    /// Whether a border of `range` lies inside a VMA.
    #[must_use]
    pub(super) fn is_cut_by(&self, range: AddrRange) -> bool {
        let cuts = |at: Addr| {
            let first = self.vmas.partition_point(|v| v.range.end <= at);
            self.vmas.get(first).is_some_and(|v| v.range.start < at)
        };
        cuts(range.start) || cuts(range.end)
    }

    /// Replaces the VMAs that overlap `hull` by `fresh` (sorted, disjoint) and returns the old ones.
    pub(super) fn replace(&mut self, hull: AddrRange, fresh: Vec<Vma>) -> Vec<Vma> {
        let from = self.vmas.partition_point(|v| v.range.end <= hull.start);
        let to = self.vmas.partition_point(|v| v.range.start < hull.end).max(from);
        self.vmas.splice(from..to, fresh).collect()
    }

    /// Indices of the VMAs that overlap or touch `range`.
    fn reach(&self, range: AddrRange) -> (usize, usize) {
        let from = self.vmas.partition_point(|v| v.range.end < range.start);
        let to = self.vmas.partition_point(|v| v.range.start <= range.end);
        (from, to)
    }
}

/// Makes kernel answers that were read while the target ran sorted and disjoint: an answer to a later query wins
/// nothing over an earlier one. Says whether anything was cut.
pub(super) fn untangle(vmas: &mut Vec<Vma>) -> bool {
    let mut cut = false;
    let mut end = Addr(0);
    vmas.retain_mut(|vma| {
        if vma.range.start < end {
            cut = true;
            let lost = end.get() - vma.range.start.get();
            vma.range.start = end;
            if !vma.is_anonymous() {
                vma.offset = vma.offset.saturating_add(lost);
            }
        }
        if vma.range.is_empty() {
            return false;
        }
        end = vma.range.end;
        true
    });
    cut
}

/// `hull` without the VMAs at both ends that are alike in `old` and `new`, which are all that is there.
#[must_use]
pub(super) fn narrowed(hull: AddrRange, old: &[Vma], new: &[Vma]) -> AddrRange {
    let alike = |(a, b): &(&Vma, &Vma)| a == b;
    let before = old.iter().zip(new).take_while(alike).count();
    let after = old[before..].iter().rev().zip(new[before..].iter().rev()).take_while(alike).count();
    AddrRange {
        start: before.checked_sub(1).map_or(hull.start, |last| new[last].range.end),
        end: after.checked_sub(1).map_or(hull.end, |_| new[new.len() - after].range.start),
    }
}

/// Ranges whose mapping differs between `old` and `new` (both sorted, disjoint): mapped in one only, or another
/// file, another place in the file, private or shared. Protection and VMA borders make no difference: contents stay.
#[must_use]
pub(super) fn differences(old: &[Vma], new: &[Vma]) -> Vec<AddrRange> {
    let mut found: Vec<AddrRange> = Vec::new();
    let (mut i, mut j) = (0, 0);
    let mut at = Addr(0);
    loop {
        while old.get(i).is_some_and(|v| v.range.end <= at) {
            i += 1;
        }
        while new.get(j).is_some_and(|v| v.range.end <= at) {
            j += 1;
        }
        let (a, b) = (old.get(i), new.get(j));
        let border =
            |vma: Option<&Vma>| vma.map(|v| if v.range.start > at { v.range.start } else { v.range.end });
        let Some(next) = [border(a), border(b)].into_iter().flatten().min() else { break };
        if identity(a, at) != identity(b, at) {
            match found.last_mut() {
                Some(last) if last.end == at => last.end = next,
                _ => found.push(AddrRange { start: at, end: next }),
            }
        }
        at = next;
    }
    found
}

/// What decides which memory an address is.
#[derive(PartialEq, Eq)]
struct Identity<'a> {
    shared: bool,
    dev: (u32, u32),
    inode: u64,
    offset: u64,
    special: Option<&'a str>,
}

fn identity(vma: Option<&Vma>, at: Addr) -> Option<Identity<'_>> {
    let vma = vma.filter(|v| v.range.contains(at))?;
    let offset =
        if vma.is_anonymous() { 0 } else { vma.offset.wrapping_add(at.get() - vma.range.start.get()) };
    Some(Identity { shared: vma.shared, dev: vma.dev, inode: vma.inode, offset, special: special(&vma.name) })
}

/// Names of mappings that the kernel itself puts there; other bracketed names (`[heap]`, `[stack]`, `[anon:x]`) come
/// and go over ordinary memory.
fn special(name: &str) -> Option<&str> {
    matches!(name, "[vdso]" | "[vvar]" | "[vvar_vclock]" | "[vsyscall]" | "[uprobes]").then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::maps::Prot;

    fn vma(start: u64, end: u64, inode: u64, offset: u64) -> Vma {
        Vma {
            range: AddrRange::new(start << 12, end << 12),
            prot: Prot::READ,
            shared: false,
            offset: offset << 12,
            dev: (0, u32::from(inode != 0)),
            inode,
            name: String::new(),
        }
    }

    fn r(start: u64, end: u64) -> AddrRange {
        AddrRange::new(start << 12, end << 12)
    }

    #[test]
    fn hull_takes_in_neighbours_that_only_touch() {
        let mut layout = Layout::default();
        layout.replace(r(0, 100), vec![vma(1, 3, 0, 0), vma(3, 5, 0, 0), vma(7, 9, 0, 0)]);
        assert_eq!(layout.hull(r(4, 5)), r(3, 5));
        assert_eq!(layout.hull(r(3, 4)), r(1, 5));
        assert_eq!(layout.hull(r(5, 7)), r(3, 9));
        assert_eq!(layout.hull(r(20, 21)), r(20, 21));
    }

    #[test]
    fn a_split_or_merge_or_new_protection_is_no_difference() {
        let mut right = vma(3, 5, 9, 2);
        right.prot = Prot::WRITE;
        assert_eq!(differences(&[vma(1, 5, 9, 0)], &[vma(1, 3, 9, 0), right]), []);
        assert_eq!(differences(&[vma(1, 3, 0, 0), vma(3, 5, 0, 0)], &[vma(1, 5, 0, 0)]), []);
    }

    #[test]
    fn what_is_alike_at_the_ends_is_left_out() {
        let hull = r(0, 20);
        let layout = |middle: &[Vma]| [&[vma(1, 3, 0, 0)], middle, &[vma(9, 11, 0, 0)]].concat();
        assert_eq!(narrowed(hull, &layout(&[vma(4, 5, 0, 0)]), &layout(&[])), r(3, 9));
        assert_eq!(narrowed(hull, &layout(&[]), &layout(&[vma(4, 5, 9, 0), vma(6, 7, 0, 0)])), r(3, 9));
        assert_eq!(narrowed(hull, &[vma(1, 3, 0, 0)], &layout(&[])), r(3, 20));
        assert_eq!(narrowed(hull, &[vma(9, 11, 0, 0)], &layout(&[])), r(0, 9));
        assert_eq!(narrowed(hull, &[], &layout(&[])), hull);
    }

    #[test]
    fn another_offset_or_file_or_a_hole_is_a_difference() {
        assert_eq!(differences(&[vma(1, 5, 9, 0)], &[vma(1, 5, 9, 1)]), [r(1, 5)]);
        assert_eq!(differences(&[vma(1, 5, 9, 0)], &[vma(1, 2, 9, 0), vma(4, 6, 9, 3)]), [r(2, 4), r(5, 6)]);
        assert_eq!(differences(&[], &[vma(4, 6, 0, 0)]), [r(4, 6)]);
        assert_eq!(differences(&[vma(4, 6, 0, 0)], &[]), [r(4, 6)]);
    }

    #[test]
    fn answers_that_overlap_are_cut() {
        let mut vmas = vec![vma(1, 4, 9, 0), vma(2, 6, 9, 1), vma(3, 5, 9, 2)];
        assert!(untangle(&mut vmas));
        assert_eq!(vmas, [vma(1, 4, 9, 0), vma(4, 6, 9, 3)]);
        assert!(!untangle(&mut vmas));
    }
}
