//! The parent of an incremental checkpoint, and whether it may be inherited from.

use crate::image::Chain;
use crate::image::meta::AsyncIo;
use crate::range_set::RangeSet;
use crate::tracker::epoch::CheckpointId;

use super::error::DumpError;
use super::request::Request;
use super::tracking::{Known, Tracking};

/// A process's memory in the parent, which belongs to the epoch being tracked.
pub(super) struct Parent {
    pub(super) id: CheckpointId,
    /// Asynchronous I/O of the process at the time.
    pub(super) async_io: AsyncIo,
    /// The pages that it and its own parents really hold.
    pub(super) held: RangeSet,
    /// Its guard regions at the time.
    pub(super) guards: RangeSet,
    /// It and its own parents.
    pub(super) chain: Chain,
}

impl Parent {
    /// The parent, if it belongs to the epoch being tracked (design invariant 4); refuses another one, or takes none
    /// where the user prefers a full checkpoint.
    pub(super) fn of(
        chain: Option<Chain>,
        request: &Request,
        tracking: &Tracking,
        notes: &mut Vec<String>,
    ) -> Result<Option<Self>, DumpError> {
        let Some(chain) = chain else { return Ok(None) };
        let reason = match chain.youngest().meta() {
            None => "it was not written by memckpt: nothing says which epoch it belongs to".to_owned(),
            Some(meta) => {
                let Some(then) = meta.process(chain.pid()) else {
                    // The root may have a namesake only; a descendant is younger than the parent.
                    return match chain.pid() == request.pid {
                        true => without(chain.pid(), request, "it is of another process", notes),
                        false => Ok(None),
                    };
                };
                match tracking.mismatch(meta, &then) {
                    None => {
                        return Ok(Some(Self {
                            id: meta.id.clone(),
                            async_io: then.async_io,
                            held: chain.held(),
                            guards: then.space.guards.into_iter().collect(),
                            chain,
                        }));
                    }
                    Some(reason) => reason,
                }
            }
        };
        without(chain.pid(), request, &reason, notes)
    }

    /// The final word, in the freeze: nothing broke the epoch up to now.
    pub(super) fn keep(
        parent: Option<Self>,
        request: &Request,
        known: &Known,
        notes: &mut Vec<String>,
    ) -> Result<Option<Self>, DumpError> {
        match (&parent, &known.broken) {
            (Some(parent), Some(reason)) => without(parent.chain.pid(), request, reason, notes),
            _ => Ok(parent),
        }
    }
}

/// Process `pid` without a parent. A descendant is taken whole then, and that is said: processes of a tree come and go, and call
/// exec, without the user's doing. The root is what the user named, and refused unless asked for.
fn without(
    pid: i32,
    request: &Request,
    reason: &str,
    notes: &mut Vec<String>,
) -> Result<Option<Parent>, DumpError> {
    let parent = request.prev_images_dir.as_ref().map(|p| p.display().to_string()).unwrap_or_default();
    if pid != request.pid {
        notes.push(format!("process {pid} is taken whole, not on top of {parent}: {reason}"));
        return Ok(None);
    }
    if !request.or_full {
        return Err(DumpError::Epoch { parent, reason: reason.to_owned() });
    }
    notes.push(format!("full, not on top of {parent}: {reason}"));
    Ok(None)
}
