//! Pure decisions: from VMAs, page states, hints and the parent to runs of pages with one action each.

pub mod classify;
pub mod decide;
pub mod pages;

pub use classify::{Refusal, SharedKind, VmaClass, VmaFacts, VmaStatus, classify};
pub use decide::{Evidence, GrabRun, PlanError, compose, guards, must_scan, to_dump};
pub use pages::{Area, Handling, PageAction, PlannedRun};
