//! Directories for a test's images.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A directory on a tmpfs, removed with all it holds when dropped.
#[derive(Debug)]
pub struct Scratch {
    directory: tempfile::TempDir,
}

impl Scratch {
    /// Makes an empty one: in `TMPDIR` if set (the guests' is a tmpfs), else in /dev/shm.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn new() -> Result<Self> {
        let base = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/dev/shm"), PathBuf::from);
        let directory = tempfile::Builder::new().prefix("memckpt-test-").tempdir_in(&base);
        Ok(Self {
            directory: directory.with_context(|| format!("no scratch directory in {}", base.display()))?,
        })
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Makes the empty directory `name` in it.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.path().join(name);
        std::fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(path)
    }
}
