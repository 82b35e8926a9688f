//! System V segments: processes attach them by their numbers, which they keep.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use crate::image::chain::StoredPages;
use crate::image::meta::MetaSegment;
use crate::kernel::SyscallError;
use crate::kernel::sysv_shm::{self, Attached};
use crate::restore::checkpoint::Checkpoint;
use crate::restore::error::{Refusal, RestoreError};
use crate::restore::memory::{self, Source};

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
        .filter_map(|vma| match memory::source(vma) {
            Source::Segment { object, .. } => Some(object),
            _ => None,
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
            let mut attached = match Attached::new(told.id) {
                Ok(attached) => attached,
                Err(error) => {
                    if is_ours {
                        let _ = sysv_shm::remove(told.id);
                    }
                    return Err(error.into());
                }
            };
            if !is_ours {
                attached.clear();
            }
            let filled = pages.map_or(Ok(()), |pages| {
                each_block(&pages, |at, bytes| {
                    attached.write(at, bytes);
                    Ok(())
                })
            });
            segments
                .by_object
                .insert(told.object, Segment { told, is_ours, attached: RefCell::new(Some(attached)) });
            filled?;
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
            if told.removed {
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

impl Drop for Segments {
    fn drop(&mut self) {
        if self.kept.get() {
            return;
        }
        for Segment { told, attached, .. } in self.by_object.values().filter(|segment| segment.is_ours) {
            let goes_by_itself = told.removed && attached.borrow().is_none();
            if !goes_by_itself && let Err(error) = sysv_shm::remove(told.id) {
                tracing::warn!(%error, "a segment is left of a restore that failed");
            }
        }
    }
}

/// Makes a segment, if there is none that is left of the tree; says whether it did.
fn make(told: &MetaSegment) -> Result<bool, RestoreError> {
    let MetaSegment { id, key, .. } = *told;
    let refused =
        |reason: String| Err(Refusal::Checkpoint(format!("its System V segment {id} {reason}")).into());
    match sysv_shm::stat(id) {
        Ok(is) if (is.key, is.size, is.removed) != (key, told.size, told.removed) => refused(format!(
            "has a number that belongs to another one now (key {:#x}, {} bytes): remove that (ipcrm -m {id})",
            is.key, is.size
        )),
        Ok(is) if is.attached > 0 => refused(format!(
            "is attached {} times, and would change under those processes: end them first",
            is.attached
        )),
        Ok(_) => Ok(false),
        Err(error) if error.errno() != Some(libc::EINVAL) => Err(error.into()),
        Err(_) => match sysv_shm::create(id, key, told.size, told.mode) {
            Ok(()) => match sysv_shm::give(id, told.uid, told.gid) {
                Ok(()) => Ok(true),
                Err(error) => {
                    let _ = sysv_shm::remove(id);
                    Err(error.into())
                }
            },
            Err(error) if error.errno() == Some(libc::EEXIST) => {
                refused(format!("has a key that another one has now: remove that (ipcrm -M {key:#x})"))
            }
            Err(error) => Err(error.into()),
        },
    }
}
