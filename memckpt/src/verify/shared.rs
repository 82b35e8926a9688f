//! Shared memory without a file: each object must be what the checkpoint holds of it.
//!
//! The object is read, and not the mappings: reading a hole through a mapping would fill it.

use std::collections::HashSet;

use crate::addr::{Addr, AddrRange, PAGE_SIZE};
use crate::image::chain::{Chain, StoredPages};
use crate::image::proto::VmaEntry;
use crate::kernel::map_files::MappedObject;
use crate::kernel::maps::Vma;
use crate::plan::VmaStatus;
use crate::range_set::RangeSet;

use super::{CompareError, Comparison, DifferenceKind, batches_of, bytes_differ, pages_of};

/// Compares every object that process `pid`, laid out as `vmas`, has mapped and that the checkpoint has.
pub(super) fn compare(
    pid: i32,
    vmas: &[Vma],
    chain: &Chain,
    found: &mut Comparison,
) -> Result<(), CompareError> {
    let Some(mm) = chain.youngest().mm()? else { return Ok(()) };
    let memfds = chain.youngest().memfds()?;
    let mut done = HashSet::new();
    for entry in mm.vmas.iter().filter(|entry| is_object(entry)) {
        let range = AddrRange::new(entry.start, entry.end);
        let Some(vma) = vmas.iter().find(|vma| vma.range == range && vma.shared) else {
            found.differs(range.start, DifferenceKind::NotInProcess, "");
            continue;
        };
        let id = u32::try_from(entry.shmid).ok();
        // A memfd's mappings name an opened file, which leads to the object.
        let memfd = VmaStatus::from_bits_truncate(entry.status).contains(VmaStatus::MEMFD);
        let id = if memfd { id.and_then(|file| memfds.get(&file).copied()) } else { id };
        if !done.insert(id) {
            continue;
        }
        match id.map(|id| chain.youngest().shared(id)).transpose()?.flatten() {
            Some(stored) => compare_object(&MappedObject::open(pid, range)?, vma, &stored, found)?,
            None => found.differs(range.start, DifferenceKind::NotInCheckpoint, &vma.name),
        }
    }
    Ok(())
}

fn is_object(entry: &VmaEntry) -> bool {
    let of_an_object = VmaStatus::ANON_SHARED | VmaStatus::MEMFD;
    VmaStatus::from_bits_truncate(entry.status).intersects(of_an_object) && entry.shmid != 0
}

/// `vma` is one mapping of the object, by which differences are named.
fn compare_object(
    object: &MappedObject,
    vma: &Vma,
    stored: &StoredPages,
    found: &mut Comparison,
) -> Result<(), CompareError> {
    let held = stored.pagemap().runs().iter().map(|run| run.range);
    let either: RangeSet = object.extents()?.into_iter().chain(held).collect();
    for batch in either.iter().flat_map(batches_of) {
        let (mut ours, mut theirs) = (vec![0; batch.len() as usize], vec![0; batch.len() as usize]);
        for (page, ours) in pages_of(batch).zip(ours.chunks_mut(PAGE_SIZE as usize)) {
            if let Some(run) = stored.pagemap().find(page.start) {
                stored.read(run.offset + (page.start.get() - run.range.start.get()), ours)?;
            }
        }
        object.read_at(batch.start, &mut theirs)?;
        found.pages_compared += batch.pages();
        // As an address in this mapping, for the reader; it may lie outside it.
        let shown = vma.range.start.get().wrapping_add(batch.start.get()).wrapping_sub(vma.offset);
        bytes_differ(Addr(shown), &ours, &theirs, vma, found);
    }
    Ok(())
}
