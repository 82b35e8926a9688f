//! Why a dump did not happen. In each case the target lives on and the parent is intact.

use std::io;

use crate::image::{Audit, ChainError, DirError};
use crate::kernel::SyscallError;
use crate::kernel::maps::MapsError;
use crate::kernel::process::ProcessError;
use crate::plan::PlanError;
use crate::target::{CommandError, CureError, FreezeError, GrabError, InfectError};
use crate::tracker::control::ControlError;
use crate::tracker::dirty::DirtyError;

use super::refuse::Refusal;

/// Why a dump failed.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The target, or the way it was asked for, is something memckpt does not do. The target was not touched.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The parent does not belong to the epoch being tracked.
    #[error(
        "an incremental checkpoint on top of {parent} would be wrong: {reason}. Take a full one: leave \
         --prev-images-dir out, or add --or-full"
    )]
    Epoch {
        /// The parent, as the user named it.
        parent: String,
        /// What broke the chain.
        reason: String,
    },
    /// The audit found pages that would have been inherited wrongly. No checkpoint was taken.
    #[error(
        "the audit found {} disagreements, and no checkpoint was taken; the first: {}", .0.disagreements,
        .0.told.first().map_or_else(String::new, |d| format!("{}: {}", d.range, d.what))
    )]
    Audit(Box<Audit>),
    /// The threads could not all be stopped.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// The target could not be infected, and may have been touched.
    #[error("infecting the target: {0}")]
    Infect(#[from] InfectError),
    /// The parasite could not bring the pages.
    #[error("taking pages: {0}")]
    Grab(#[from] GrabError),
    /// The parasite did not make the system calls that it was given.
    #[error("asking the target: {0}")]
    Ask(#[from] CommandError),
    /// The parasite did not leave as it should.
    #[error("curing the target: {0}")]
    Cure(#[from] CureError),
    /// The session that tracks the target did not answer as it should.
    #[error(transparent)]
    Session(#[from] ControlError),
    /// Reading or clearing the dirty state failed.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    /// The images could not be written.
    #[error(transparent)]
    Images(#[from] DirError),
    /// The parent could not be read.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The layout could not be read.
    #[error(transparent)]
    Maps(#[from] MapsError),
    /// The process could not be looked at.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A mistake of ours: the evidence does not allow a decision. Nothing was inherited wrongly.
    #[error("memckpt contradicts itself, please report this: {0}")]
    Plan(#[from] PlanError),
    /// A state cannot be put into an image.
    #[error("{image}: {reason}")]
    Encode {
        /// The image file.
        image: String,
        /// Why.
        reason: String,
    },
    /// A system call failed.
    #[error(transparent)]
    Syscall(#[from] SyscallError),
}

impl DumpError {
    pub(super) fn random(source: io::Error) -> Self {
        SyscallError::new("getrandom", "a checkpoint's name", source).into()
    }

    pub(super) fn encode(image: impl Into<String>, reason: impl ToString) -> Self {
        Self::Encode { image: image.into(), reason: reason.to_string() }
    }
}
