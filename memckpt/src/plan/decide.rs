//! Which pages are saved, which are inherited.
//!
//! Three steps. [`must_scan`]: what the kernel has to be asked about. [`to_dump`], while the target stands still:
//! what has to be read out of it, in time proportional to what was scanned. [`compose`], after the thaw: the whole
//! new checkpoint, in time that may grow with the parent's.
//!
//! A page is inherited only if every one of these holds, and is saved otherwise: its area is tracked; the dirty
//! source's word counts at all; it was present or swapped in this scan and called clean, or no hint has asked for a
//! scan of it; its range has been the same mapping since the epoch began; nothing may have dropped it unseen; the
//! parent really holds it.

use crate::addr::AddrRange;
use crate::range_set::RangeSet;
use crate::tracker::dirty::{PageFlags, PageRun};

use super::pages::{Area, Handling, PageAction, PlannedRun};

/// All that decides about pages.
#[derive(Clone, Copy, Debug)]
pub struct Evidence<'a> {
    /// The layout, sorted.
    pub areas: &'a [Area],
    /// The ranges that were really scanned in this freeze.
    pub scanned: &'a RangeSet,
    /// The pages found there, sorted; pages that are neither present nor swapped may be left out.
    pub pages: &'a [PageRun],
    /// The pages that the parent and its parents really hold; `None` without a parent.
    pub parent: Option<&'a RangeSet>,
    /// Ranges whose mapping changed since the epoch began.
    pub changed: &'a RangeSet,
    /// Ranges that may lose pages with no event, as after MADV_FREE.
    pub doubtful: &'a RangeSet,
    /// The dirty source has tracked the epoch that began with the parent, without a break.
    pub tracking: bool,
}

/// Pages to read out of the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrabRun {
    /// Their addresses.
    pub range: AddrRange,
    /// PROT_READ: vmsplice(2) works. The rest is read through `/proc/PID/mem`.
    pub readable: bool,
    /// They may be restored on first access.
    pub lazy: bool,
}

/// Evidence that does not allow a decision. Each is a mistake of the caller's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Pages were not scanned that nothing is known of.
    #[error("{0} was not scanned, and nothing allows to inherit it")]
    NotScanned(AddrRange),
    /// Two states of one page, or unsorted runs or areas.
    #[error("{0} is described twice")]
    Twice(AddrRange),
}

impl<'a> Evidence<'a> {
    /// The parent, where anything may be inherited from it at all.
    fn usable_parent(&self) -> Option<&'a RangeSet> {
        self.parent.filter(|_| self.tracking)
    }

    /// The parts of `range`, a clean range of a tracked area, that may be inherited.
    fn inheritable(&self, range: AddrRange) -> Vec<AddrRange> {
        let Some(parent) = self.usable_parent() else { return Vec::new() };
        parent
            .within(range)
            .flat_map(|part| self.changed.outside(part))
            .flat_map(|part| self.doubtful.outside(part))
            .collect()
    }

    /// What happens to each scanned page that is saved or inherited, in order.
    fn decide_scanned(&self, mut emit: impl FnMut(AddrRange, PageAction, &Area)) {
        for run in self.pages {
            if !run.flags.intersects(PageFlags::PRESENT | PageFlags::SWAPPED)
                || run.flags.intersects(PageFlags::FILE | PageFlags::ZERO)
            {
                continue;
            }
            for area in overlapping(self.areas, run.range) {
                let Some(part) = area.range.intersection(run.range) else { continue };
                if matches!(area.handling, Handling::Whole | Handling::Nothing) {
                    continue;
                }
                let clean = area.handling == Handling::Tracked && !run.flags.contains(PageFlags::DIRTY);
                // What a source says beyond what it was asked is not relied on.
                for part in self.scanned.within(part) {
                    let inherited = if clean { self.inheritable(part) } else { Vec::new() };
                    let mut at = part.start;
                    for inherited in inherited {
                        emit_some(
                            AddrRange { start: at, end: inherited.start },
                            PageAction::Dump,
                            area,
                            &mut emit,
                        );
                        emit(inherited, PageAction::Inherit, area);
                        at = inherited.end;
                    }
                    emit_some(AddrRange { start: at, end: part.end }, PageAction::Dump, area, &mut emit);
                }
            }
        }
    }
}

fn emit_some(
    range: AddrRange,
    action: PageAction,
    area: &Area,
    emit: &mut impl FnMut(AddrRange, PageAction, &Area),
) {
    if !range.is_empty() {
        emit(range, action, area);
    }
}

/// The areas that share an address with `range`, in order.
fn overlapping(areas: &[Area], range: AddrRange) -> impl Iterator<Item = &Area> {
    let from = areas.partition_point(|area| area.range.end <= range.start);
    areas[from..].iter().take_while(move |area| area.range.start < range.end)
}

/// What has to be scanned for a checkpoint. `touched` are the ranges that hints name; `None` when there are no
/// hints that are complete, and everything is read. The evidence's `scanned` and `pages` do not matter yet.
#[must_use]
pub fn must_scan(evidence: &Evidence<'_>, touched: Option<&[AddrRange]>) -> RangeSet {
    let scannable = |area: &&Area| matches!(area.handling, Handling::Tracked | Handling::Always);
    let areas = evidence.areas.iter().filter(scannable);
    let Some(touched) = touched.filter(|_| evidence.usable_parent().is_some()) else {
        return areas.map(|area| area.range).collect();
    };
    let doubted = evidence.changed.iter().chain(evidence.doubtful.iter());
    let mut scan: RangeSet =
        areas.filter(|area| area.handling == Handling::Always).map(|area| area.range).collect();
    for range in touched.iter().copied().chain(doubted) {
        for area in overlapping(evidence.areas, range).filter(scannable) {
            if let Some(part) = area.range.intersection(range) {
                scan.insert(part);
            }
        }
    }
    scan
}

/// What has to be read out of the target, sorted.
///
/// # Errors
/// A page is described twice.
pub fn to_dump(evidence: &Evidence<'_>) -> Result<Vec<GrabRun>, PlanError> {
    let grab = |range, area: &Area| GrabRun { range, readable: area.readable, lazy: area.lazy };
    let mut runs: Vec<GrabRun> = evidence
        .areas
        .iter()
        .filter(|area| area.handling == Handling::Whole)
        .map(|area| grab(area.range, area))
        .collect();
    evidence.decide_scanned(|range, action, area| {
        if action == PageAction::Dump {
            runs.push(grab(range, area));
        }
    });
    join(runs)
}

/// The whole new checkpoint, sorted: what [`to_dump`] gave, and what is left to the parent.
///
/// # Errors
/// A page is described twice, or was not scanned and may not be inherited unseen.
pub fn compose(evidence: &Evidence<'_>) -> Result<Vec<PlannedRun>, PlanError> {
    let planned = |range, action, area: &Area| PlannedRun { range, action, lazy: area.lazy };
    let mut runs = Vec::new();
    for area in evidence.areas {
        match area.handling {
            Handling::Nothing => continue,
            Handling::Whole => {
                runs.push(planned(area.range, PageAction::Dump, area));
                continue;
            }
            Handling::Tracked | Handling::Always => {}
        }
        for unseen in evidence.scanned.outside(area.range) {
            let doubted = evidence.changed.overlaps(unseen) || evidence.doubtful.overlaps(unseen);
            match evidence.usable_parent() {
                Some(parent) if area.handling == Handling::Tracked && !doubted => {
                    runs.extend(parent.within(unseen).map(|part| planned(part, PageAction::Inherit, area)));
                }
                _ => return Err(PlanError::NotScanned(unseen)),
            }
        }
    }
    evidence.decide_scanned(|range, action, area| runs.push(planned(range, action, area)));
    join(runs)
}

/// The guard regions (MADV_GUARD_INSTALL): those that were scanned, and of what no hint has asked for a scan of, those `before`,
/// in the parent. To install or remove one is an event, which has its range scanned.
#[must_use]
pub fn guards(evidence: &Evidence<'_>, before: &RangeSet) -> RangeSet {
    let mut guards: RangeSet = match evidence.usable_parent() {
        Some(_) => evidence.areas.iter().flat_map(|area| before.within(area.range)).collect(),
        None => RangeSet::new(),
    };
    guards.subtract(evidence.scanned);
    let scanned = evidence.pages.iter().filter(|run| run.flags.contains(PageFlags::GUARD));
    guards.union(&scanned.flat_map(|run| evidence.scanned.within(run.range)).collect());
    guards
}

/// A run that can be joined with the next one.
trait Run: Copy {
    fn range(&mut self) -> &mut AddrRange;
    /// Whether the two differ in nothing but their addresses.
    fn alike(&self, other: &Self) -> bool;
}

impl Run for GrabRun {
    fn range(&mut self) -> &mut AddrRange {
        &mut self.range
    }
    fn alike(&self, other: &Self) -> bool {
        (self.readable, self.lazy) == (other.readable, other.lazy)
    }
}

impl Run for PlannedRun {
    fn range(&mut self) -> &mut AddrRange {
        &mut self.range
    }
    fn alike(&self, other: &Self) -> bool {
        (self.action, self.lazy) == (other.action, other.lazy)
    }
}

/// Sorts runs and joins neighbours that are alike.
fn join<T: Run>(mut runs: Vec<T>) -> Result<Vec<T>, PlanError> {
    runs.sort_by_cached_key(|run| { *run }.range().start);
    let mut joined: Vec<T> = Vec::with_capacity(runs.len());
    for mut run in runs {
        let this = *run.range();
        if let Some(last) = joined.last_mut() {
            if last.range().end > this.start {
                return Err(PlanError::Twice(this));
            }
            if last.range().end == this.start && last.alike(&run) {
                last.range().end = this.end;
                continue;
            }
        }
        joined.push(run);
    }
    Ok(joined)
}

#[cfg(test)]
mod tests;
