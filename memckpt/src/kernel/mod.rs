//! Typed wrappers of what the kernel offers. Nothing here knows what a checkpoint is.

pub mod btf;
pub mod clear_refs;
pub mod error;
pub mod features;
pub mod map_files;
pub mod maps;
pub mod memory;
pub mod pagemap;
pub mod pagemap_scan;
pub mod pidfd;
pub mod process;
pub mod ptrace;
pub(crate) mod puppet;
pub mod smaps;
pub mod status;
pub mod userfaultfd;
pub mod zero_page;

pub use error::SyscallError;
