//! The parent of an incremental checkpoint, and whether it may be inherited from.

use crate::image::{Chain, CheckpointMeta};
use crate::range_set::RangeSet;

use super::error::DumpError;
use super::request::Request;
use super::tracking::{Known, Tracking};

/// A parent that belongs to the epoch being tracked.
pub(super) struct Parent {
    pub(super) meta: CheckpointMeta,
    /// The pages that it and its own parents really hold.
    pub(super) held: RangeSet,
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
            Some(meta) => match tracking.mismatch(meta) {
                None => return Ok(Some(Self { meta: meta.clone(), held: chain.held(), chain })),
                Some(reason) => reason,
            },
        };
        without(request, &reason, notes)
    }

    /// The final word, in the freeze: nothing broke the epoch up to now.
    pub(super) fn keep(
        parent: Option<Self>,
        request: &Request,
        known: &Known,
        notes: &mut Vec<String>,
    ) -> Result<Option<Self>, DumpError> {
        match (&parent, &known.broken) {
            (Some(_), Some(reason)) => without(request, reason, notes),
            _ => Ok(parent),
        }
    }
}

fn without(request: &Request, reason: &str, notes: &mut Vec<String>) -> Result<Option<Parent>, DumpError> {
    let parent = request.prev_images_dir.as_ref().map(|p| p.display().to_string()).unwrap_or_default();
    if !request.or_full {
        return Err(DumpError::Epoch { parent, reason: reason.to_owned() });
    }
    notes.push(format!("full, not on top of {parent}: {reason}"));
    Ok(None)
}
