//! A pagemap and the pages file that goes with it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::image::files;
use crate::image::magic;
use crate::image::pagemap::PagemapImage;

use super::ChainError;
use super::member::read_error;

/// A pagemap of one directory, and its pages: a process's, with addresses; or a shared object's, with offsets.
#[derive(Debug)]
pub struct StoredPages {
    path: PathBuf,
    pagemap: PagemapImage,
    file: Option<File>,
}

impl StoredPages {
    /// Opens the pagemap `name` of the directory `fd`, which messages call `path`; `None` where there is no such file.
    pub(super) fn open(fd: &OwnedFd, path: &Path, name: &str) -> Result<Option<Self>, ChainError> {
        let read = |file: &str| files::read_file(fd, file).map_err(|source| read_error(path, file, source));
        let Some(bytes) = read(name)? else { return Ok(None) };
        let pagemap = PagemapImage::decode(name, &bytes)
            .map_err(|source| ChainError::Damaged { path: path.to_owned(), source })?;
        let pages = magic::pages_name(pagemap.pages_id());
        let (needed, mut has) = (pagemap.bytes(), 0);
        let mut file = None;
        if needed > 0 {
            file = files::open_file(fd, &pages).map_err(|source| read_error(path, &pages, source))?;
            if let Some(file) = &file {
                has = file.metadata().map_err(|source| read_error(path, &pages, source))?.len();
            }
        }
        if has < needed {
            return Err(ChainError::PagesTooShort { path: path.to_owned(), file: pages, needed, has });
        }
        Ok(Some(Self { path: path.to_owned(), pagemap, file }))
    }

    /// No pages at all.
    pub(super) fn none(path: &Path) -> Self {
        Self { path: path.to_owned(), pagemap: PagemapImage::default(), file: None }
    }

    /// What is here, and what is left to a parent.
    #[must_use]
    pub fn pagemap(&self) -> &PagemapImage {
        &self.pagemap
    }

    /// Fills `buffer` from `offset` of the pages file on.
    ///
    /// # Errors
    /// The file ends early, or cannot be read.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ChainError> {
        let failed = |source| read_error(&self.path, &magic::pages_name(self.pagemap.pages_id()), source);
        let file = self.file.as_ref().ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        file.read_exact_at(buffer, offset).map_err(failed)
    }
}
