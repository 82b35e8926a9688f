//! The CRIU image set: reading, writing, parent chains.
//!
//! Readers are pure functions of bytes and never trust them: an image comes from a disk or a network, and a
//! damaged one is an error that names the file and the record, never a panic and never a large allocation.

mod audit;
pub mod chain;
pub mod checksums;
pub mod core;
#[cfg(test)]
mod crit;
pub mod dir;
mod files;
pub mod inventory;
pub mod magic;
pub mod meta;
pub mod mm;
mod open_files;
pub mod pagemap;
pub mod pages;
pub mod proto;
pub mod pstree;
pub mod record;
pub mod stats;
pub mod summary;

pub use audit::{Audit, Disagreement, Wrong};
pub use chain::{Chain, ChainError};
pub use checksums::Checksums;
pub use dir::{DirError, ImagesDir};
pub use magic::ImageKind;
pub use meta::CheckpointMeta;
pub use open_files::OpenFiles;
pub use pages::PagesFile;
pub use record::{Image, RecordError, Records};
pub use summary::Summary;
