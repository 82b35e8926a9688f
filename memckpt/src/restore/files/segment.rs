//! System V segments: processes attach them by their numbers, which they keep.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use crate::image::chain::StoredPages;
use crate::image::meta::MetaSegment;
use crate::kernel::SyscallError;
use crate::kernel::sysv_shm::{self, Attached, SegmentStat};
use crate::restore::checkpoint::Checkpoint;
use crate::restore::error::{Refusal, RestoreError};
use crate::restore::memory::{self, Origin};

use super::shared::each_block;

/// Those that are there, by their objects. The ones that we have made go when this is dropped, unless they are kept.
#[derive(Debug, Default)]
pub(super) struct Segments {
    by_object: BTreeMap<u32, Segment>,
    kept: Cell<bool>,
}

#[derive(Debug)]
struct Segment {
    told: MetaSegment,
    is_ours: bool,
    /// Where segments go with their last attachment (sysctl kernel.shm_rmid_forced), this is the first.
    attached: RefCell<Option<Attached>>,
}

/// Reads what a checkpoint tells of its segments, and finds their content.
pub(super) fn read(checkpoint: &Checkpoint) -> Result<Vec<(MetaSegment, Option<StoredPages>)>, RestoreError> {
    let member = checkpoint.member();
    let vmas = checkpoint.alive().flat_map(|(_, alive)| &alive.mm.vmas);
    let objects: BTreeSet<u32> = vmas
        .filter_map(|vma| match memory::origin(vma) {
            Origin::Segment { object, .. } => Some(object),
            Origin::Mapped(_) => None,
        })
        .collect();
    let told = |object: u32| member.meta()?.segments.iter().find(|told| told.object == object).copied();
    objects
        .into_iter()
        .map(|object| {
            let told = told(object).ok_or_else(|| {
                let what = "it has a System V segment, of which CRIU's images tell only together with an IPC namespace";
                Refusal::Checkpoint(what.into())
            })?;
            Ok((told, member.shared(object)?))
        })
        .collect()
}

impl Segments {
    /// Makes all of a checkpoint, or takes those that are left of its tree.
    pub(super) fn make(checkpoint: &Checkpoint) -> Result<Self, RestoreError> {
        let mut segments = Self::default();
        for (told, pages) in read(checkpoint)? {
            let is_ours = make(&told)?;
            // From here on it goes, if anything fails.
            let segment = Segment { told, is_ours, attached: RefCell::default() };
            segments.by_object.entry(told.object).or_insert(segment).fill(pages)?;
        }
        Ok(segments)
    }

    /// The number of the segment with this content.
    pub(super) fn id(&self, object: u32) -> Option<i32> {
        Some(self.by_object.get(&object)?.told.id)
    }

    /// Their users have attached them: what was removed goes with its last attachment again.
    pub(super) fn detach(&self) -> Result<(), SyscallError> {
        for Segment { told, attached, .. } in self.by_object.values() {
            if told.stat.removed {
                sysv_shm::remove(told.id)?;
            }
            attached.take();
        }
        Ok(())
    }

    /// Their users run: they stay.
    pub(super) fn keep(&self) {
        self.kept.set(true);
    }
}

impl Segment {
    /// Attaches it, and gives it the owner and the content that are told.
    fn fill(&self, pages: Option<StoredPages>) -> Result<(), RestoreError> {
        let MetaSegment { id, stat: SegmentStat { uid, gid, .. }, .. } = self.told;
        if self.is_ours {
            sysv_shm::give(id, uid, gid)?;
        }
        let mut attached = self.attached.borrow_mut();
        let attached = attached.insert(Attached::new(id)?);
        if !self.is_ours {
            attached.clear();
        }
        let Some(pages) = pages else { return Ok(()) };
        each_block(&pages, |at, bytes| {
            attached.write(at, bytes);
            Ok(())
        })
    }
}

impl Drop for Segments {
    fn drop(&mut self) {
        if self.kept.get() {
            return;
        }
        for Segment { told, attached, .. } in self.by_object.values().filter(|segment| segment.is_ours) {
            let goes_by_itself = told.stat.removed && attached.borrow().is_none();
            if !goes_by_itself && let Err(error) = sysv_shm::remove(told.id) {
                tracing::warn!(%error, "a segment is left of a restore that failed");
            }
        }
    }
}

/// Makes a segment, if there is none that is left of the tree; says whether it did.
fn make(told: &MetaSegment) -> Result<bool, RestoreError> {
    let MetaSegment { id, stat: SegmentStat { key, mode, removed, size, .. }, .. } = *told;
    let refused =
        |reason: String| Err(Refusal::Checkpoint(format!("its System V segment {id} {reason}")).into());
    match sysv_shm::stat(id) {
        Ok(is) if (is.key, is.size, is.removed) != (key, size, removed) => refused(format!(
            "has a number that belongs to another one now (key {:#x}, {} bytes): remove that (ipcrm -m {id})",
            is.key, is.size
        )),
        Ok(_) => match sysv_shm::attachments(id)? {
            0 => Ok(false),
            n => refused(format!(
                "is attached {n} times, and would change under those processes: end them first"
            )),
        },
        Err(error) if error.errno() != Some(libc::EINVAL) => Err(error.into()),
        Err(_) => match sysv_shm::create(id, key, size, mode) {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == Some(libc::EEXIST) => {
                refused(format!("has a key that another one has now: remove that (ipcrm -M {key:#x})"))
            }
            Err(error) => Err(error.into()),
        },
    }
}
