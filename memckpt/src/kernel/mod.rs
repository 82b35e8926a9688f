//! Typed wrappers of what the kernel offers. Nothing here knows what a checkpoint is.

pub mod btf;
pub mod cgroup;
pub mod clear_refs;
pub mod descriptor;
pub mod error;
pub mod fdinfo;
pub mod features;
pub mod file_handle;
pub mod inet;
pub mod kcmp;
pub mod lru;
pub mod map_files;
pub mod maps;
pub mod memory;
mod netlink;
pub mod nftables;
pub mod own_thread;
pub mod page_flags;
pub mod pagemap;
pub mod pagemap_scan;
pub mod pidfd;
pub mod process;
pub mod ptrace;
pub(crate) mod puppet;
pub mod scheduling;
pub mod smaps;
pub mod sock_diag;
pub mod socket_options;
pub mod status;
pub mod sysv_shm;
pub mod tcp;
pub mod terminal;
pub mod userfaultfd;
pub mod zero_page;

pub use error::SyscallError;
