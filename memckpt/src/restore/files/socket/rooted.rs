//! Work in a root directory of its own, where paths mean other files and have the same names.

use std::fs;
use std::io;
use std::path::{Component, Path};

use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

use crate::kernel::{SyscallError, own_thread};

/// A directory in the place of `/`, with what a path needs. Removed on drop.
#[derive(Debug)]
pub(super) struct InAnotherRoot(TempDir);

impl InAnotherRoot {
    /// With the directory of `path`, empty.
    pub(super) fn with_directory_of(path: &Path) -> Result<Self, SyscallError> {
        let root = TempDir::with_prefix("memckpt-")
            .map_err(|e| SyscallError::new("mkdir", "a directory for temporary files", e))?;
        let inner = path.parent().unwrap_or(path).components();
        let inner = inner.filter(|part| matches!(part, Component::Normal(_)));
        let directory = inner.fold(root.path().to_owned(), |directory, part| directory.join(part));
        fs::create_dir_all(&directory)
            .map_err(|e| SyscallError::new("mkdir", directory.display().to_string(), e))?;
        Ok(Self(root))
    }

    /// Does `work` there, on a thread whose root directory is this one.
    pub(super) fn run<T: Send, E: From<SyscallError> + Send>(
        &self,
        work: impl FnOnce() -> Result<T, E> + Send,
    ) -> Result<T, E> {
        let root = self.0.path();
        let failed = |call, e: io::Error| SyscallError::new(call, root.display().to_string(), e);
        let there = move || {
            // So that only this thread's root changes.
            unshare(CloneFlags::CLONE_FS).map_err(|e| failed("unshare(CLONE_FS)", e.into()))?;
            nix::unistd::chroot(root).map_err(|e| failed("chroot", e.into()))?;
            nix::unistd::chdir("/").map_err(|e| failed("chdir", e.into()))?;
            work()
        };
        own_thread::alone("rooted", there)
    }
}
