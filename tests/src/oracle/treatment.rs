//! What a checkpoint did with each page: has it, has it from its parent, or lacks it.

use std::ops::Range;
use std::path::Path;

use anyhow::{Result, ensure};

use super::{Link, PAGE, lookup, read_link};

/// The pages of one process in one checkpoint.
#[derive(Debug)]
pub struct Treatment {
    link: Link,
}

/// Reads what the checkpoint in `images` did with the pages of `pid`.
///
/// # Errors
///
/// When its images cannot be read.
pub fn treatment(images: &Path, pid: i32) -> Result<Treatment> {
    Ok(Treatment { link: read_link(images.to_path_buf(), pid)? })
}

impl Treatment {
    /// The pages of `range` that it has from its parent.
    #[must_use]
    pub fn inherited(&self, range: &Range<u64>) -> Vec<u64> {
        self.pages(range, true)
    }

    /// The pages of `range` that it has itself.
    #[must_use]
    pub fn own(&self, range: &Range<u64>) -> Vec<u64> {
        self.pages(range, false)
    }

    /// The first eight bytes of the page at `address`, which it has itself.
    ///
    /// # Errors
    ///
    /// When it has not.
    pub fn word(&self, address: u64) -> Result<u64> {
        let mut page = vec![0; PAGE as usize];
        ensure!(lookup(std::slice::from_ref(&self.link), address, &mut page)?, "no page {address:x}");
        let mut word = [0; 8];
        word.copy_from_slice(&page[..8]);
        Ok(u64::from_le_bytes(word))
    }

    fn pages(&self, range: &Range<u64>, parent: bool) -> Vec<u64> {
        let entries = self.link.entries.iter().filter(|entry| entry.parent == parent);
        entries
            .flat_map(|entry| (entry.start.max(range.start)..entry.end.min(range.end)).step_by(PAGE as usize))
            .collect()
    }
}
