//! `--audit`: a checkpoint proves itself, the target standing still, before it takes a page.
//!
//! The layout that the session knows against `/proc/PID/maps`; what the hints narrowed the scan to against a scan of
//! everything, page for page; and the bytes of every page that is to be inherited against the chain.

use std::time::Duration;

use super::error::DumpError;
use super::layout::Layout;
use super::parent::Parent;
use super::restless;
use super::tracking::Tracking;
use crate::addr::{AddrRange, PAGE_SIZE, PageCount};
use crate::image::meta::AsyncIo;
use crate::image::{Audit, Wrong};
use crate::kernel::memory::ProcMem;
use crate::kernel::{maps, smaps};
use crate::plan::{self, Evidence, Handling, PageAction};
use crate::range_set::RangeSet;
use crate::target::{Frozen, ThreadRegisters};
use crate::tracker::dirty::{DirtySource, PageFlags};

/// How much is read at a time.
const BATCH: u64 = 256 * PAGE_SIZE;
/// Audits what `evidence`, narrowed by hints, decides.
///
/// # Errors
/// [`DumpError::Audit`] if anything is wrong; else what it looked at.
pub(super) fn check(
    pid: i32,
    layout: &Layout,
    evidence: &Evidence<'_>,
    source: &mut dyn DirtySource,
    restless: &RangeSet,
    parent: Option<&Parent>,
    memory: &ProcMem,
) -> Result<Audit, DumpError> {
    let mut audit = Audit::default();
    check_layout(pid, layout, &mut audit)?;

    let everything = plan::must_scan(evidence, None);
    // Not the checkpoint's own cost.
    let mut entries = PageCount::ZERO;
    let states = source.scan(everything.as_slice(), &mut entries)?;
    let states = restless::dirtied(states, restless);
    audit.pages_scanned = states.iter().map(|run| run.range.pages()).sum();
    let full = Evidence { scanned: &everything, pages: &states, ..*evidence };
    let narrowed = inherited(evidence)?;
    let dumped: RangeSet = plan::to_dump(&full)?.iter().map(|run| run.range).collect();
    let mut gone = narrowed.clone();
    gone.subtract(&inherited(&full)?);
    gone.subtract(&dumped);
    // The kernel puts the zero page in the place of what is all zeroes, when it splits a huge page (docs/soundness.md, row 36).
    let zero = states.iter().filter(|run| run.flags.contains(PageFlags::ZERO));
    let zeroed = gone.intersection(&zero.map(|run| run.range).collect());
    gone.subtract(&zeroed);
    for range in gone.iter() {
        audit.found(range, Wrong::Dropped);
    }

    // Reading a page that is gone would bring one in.
    let mut rest = narrowed.clone();
    rest.subtract(&dumped);
    rest.subtract(&gone);
    rest.subtract(&zeroed);
    if let Some(parent) = parent {
        // Dirty without a hint is no miss by itself: a VMA that grew or was merged is soft-dirty as a whole
        // (docs/soundness.md, row 15), and its old pages are what they were.
        let unseen = narrowed.intersection(&dumped);
        audit.pages_overstated = unseen.pages();
        compare(&unseen, parent, memory, Wrong::Unseen, &mut audit)?;
        compare(&zeroed, parent, memory, Wrong::Dropped, &mut audit)?;
        compare(&rest, parent, memory, Wrong::Bytes, &mut audit)?;
    }
    if audit.disagreements > 0 { Err(DumpError::Audit(Box::new(audit))) } else { Ok(audit) }
}

/// See [`super::audit_session`].
pub(super) fn session(pid: i32, timeout: Duration) -> Result<Audit, DumpError> {
    let mut tracking = Tracking::find(pid, None)?;
    let layout = Layout::read(pid, tracking.layout(pid)?, tracking.tracker())?;
    let frozen = Frozen::freeze(pid, timeout)?;
    let mut known = tracking.collect(pid)?;
    let mut layout = match known.relayout.take() {
        Some(relayout) => layout.updated(pid, relayout, tracking.tracker())?,
        None => layout,
    };
    layout.look_for_async_io(pid, known.made_io_uring || frozen.has_io_workers(), AsyncIo::None);
    let mut audit = Audit::default();
    check_layout(pid, &layout, &mut audit)?;
    if let (Some(touched), None) = (&known.touched, &known.broken) {
        let registers: Vec<ThreadRegisters> =
            frozen.threads().iter().map(|&tid| frozen.registers(tid)).collect::<Result<_, _>>()?;
        let mut known_of = known.changed;
        known_of.union(touched);
        known_of.union(&known.doubtful);
        known_of.union(&restless::pages(&registers));
        check_hints(pid, &layout, &known_of, tracking.source(), &mut audit)?;
    }
    tracking.keep_epoch()?;
    frozen.thaw();
    if audit.disagreements > 0 { Err(DumpError::Audit(Box::new(audit))) } else { Ok(audit) }
}

/// Every dirty page of tracked memory lies in `known`.
fn check_hints(
    pid: i32,
    layout: &Layout,
    known: &RangeSet,
    source: &mut dyn DirtySource,
    audit: &mut Audit,
) -> Result<(), DumpError> {
    let tracked = layout.areas.iter().filter(|area| area.handling == Handling::Tracked);
    let tracked: RangeSet = tracked.map(|area| area.range).collect();
    let mut entries = PageCount::ZERO;
    let states = source.scan(tracked.as_slice(), &mut entries)?;
    audit.pages_scanned = states.iter().map(|run| run.range.pages()).sum();
    let dirty = states.iter().filter(|run| {
        run.flags.contains(PageFlags::DIRTY)
            && run.flags.intersects(PageFlags::PRESENT | PageFlags::SWAPPED)
            && !run.flags.intersects(PageFlags::FILE | PageFlags::ZERO)
    });
    let mut unseen: RangeSet = dirty.map(|run| run.range).collect();
    unseen.subtract(known);
    if unseen.is_empty() {
        return Ok(());
    }
    // A VMA that grew or was merged is soft-dirty as a whole (docs/soundness.md, row 15): its pages say nothing.
    for (range, flags) in smaps::vm_flags(pid)? {
        if flags.contains(smaps::VmFlags::SOFT_DIRTY) {
            audit.pages_overstated += unseen.within(range).map(AddrRange::pages).sum();
            unseen.remove(range);
        }
    }
    unseen.iter().for_each(|range| audit.found(range, Wrong::Unseen));
    Ok(())
}

fn inherited(evidence: &Evidence<'_>) -> Result<RangeSet, DumpError> {
    let runs = plan::compose(evidence)?;
    Ok(runs.iter().filter(|run| run.action == PageAction::Inherit).map(|run| run.range).collect())
}

fn check_layout(pid: i32, layout: &Layout, audit: &mut Audit) -> Result<(), DumpError> {
    let now = maps::read(pid)?;
    audit.vmas = now.len() as u64;
    let known = |vma: &maps::Vma| {
        let at = layout.vmas.partition_point(|known| known.range.start < vma.range.start);
        layout.vmas.get(at).is_some_and(|known| known.is_alike(vma))
    };
    for vma in now.iter().filter(|vma| !known(vma)) {
        audit.found(vma.range, Wrong::Layout);
    }
    let there = |known: &maps::Vma| now.iter().any(|vma| vma.range == known.range);
    if now.len() != layout.vmas.len() {
        for known in layout.vmas.iter().filter(|known| !there(known)) {
            audit.found(known.range, Wrong::Layout);
        }
    }
    Ok(())
}

fn compare(
    inherited: &RangeSet,
    parent: &Parent,
    memory: &ProcMem,
    what: Wrong,
    audit: &mut Audit,
) -> Result<(), DumpError> {
    let page = PAGE_SIZE as usize;
    let (mut ours, mut theirs) = (vec![0; BATCH as usize], vec![0; BATCH as usize]);
    for run in inherited.iter() {
        let mut start = run.start;
        while start < run.end {
            let batch = AddrRange { start, end: start.saturating_add(BATCH).min(run.end) };
            let (ours, theirs) = (&mut ours[..batch.len() as usize], &mut theirs[..batch.len() as usize]);
            parent.chain.read(batch, ours)?;
            memory.read_at(batch.start, theirs)?;
            audit.pages_compared += batch.pages();
            for (n, (ours, theirs)) in ours.chunks(page).zip(theirs.chunks(page)).enumerate() {
                if ours != theirs {
                    let at = batch.start.saturating_add((n * page) as u64);
                    audit.found(AddrRange::with_len(at, PAGE_SIZE), what);
                }
            }
            start = batch.end;
        }
    }
    Ok(())
}
