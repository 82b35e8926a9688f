//! Comparing pages with their checksums.

use std::collections::HashMap;
use std::path::PathBuf;

use crate::addr::AddrRange;
use crate::image::checksums::{CHECKSUMS, Checksums, ChecksumsError};
use crate::image::magic;
use crate::range_set::RangeSet;

use super::member::read_error;
use super::{Chain, ChainError, Member, StoredPages};

/// What directories tell of the pages in them, each read once for all processes of a tree.
#[derive(Debug, Default)]
pub struct KnownChecksums(HashMap<PathBuf, Option<Checksums>>);

impl KnownChecksums {
    /// Those of the pages in `member`; `None` for a checkpoint made without.
    fn of(&mut self, member: &Member) -> Result<Option<&Checksums>, ChainError> {
        if !self.0.contains_key(member.path()) {
            self.0.insert(member.path().to_owned(), read(member)?);
        }
        Ok(self.0.get(member.path()).and_then(Option::as_ref))
    }
}

fn read(member: &Member) -> Result<Option<Checksums>, ChainError> {
    if !member.meta().is_some_and(|meta| meta.checksums) {
        return Ok(None);
    }
    let missing = || read_error(member.path(), CHECKSUMS, std::io::ErrorKind::NotFound.into());
    let bytes = member.file(CHECKSUMS)?.ok_or_else(missing)?;
    Checksums::decode(&bytes).map(Some).map_err(|source| unusable(member, source))
}

impl Chain {
    /// Compares all pages of the process with their checksums, where the members that hold them have some.
    ///
    /// # Errors
    /// Pages have changed or cannot be read, or the checksums are missing, damaged, or those of other pages.
    pub fn verify(&self, known: &mut KnownChecksums) -> Result<(), ChainError> {
        for (index, member) in self.members.iter().enumerate() {
            let held = self.runs.iter().filter(|run| run.member == index);
            let held: RangeSet = held.map(|run| run.range).collect();
            if held.is_empty() {
                continue;
            }
            if let Some(sums) = known.of(member)? {
                let name = magic::pagemap_name(self.pid);
                verify(member, sums, &name, member.memory(), |range| held.overlaps(range))?;
            }
        }
        Ok(())
    }
}

impl Member {
    /// Compares all objects of shared memory with their checksums, if there are some.
    ///
    /// # Errors
    /// As [`Chain::verify`].
    pub fn verify_shared(&self, known: &mut KnownChecksums) -> Result<(), ChainError> {
        let Some(sums) = known.of(self)? else { return Ok(()) };
        for name in sums.names().filter(|name| name.starts_with("pagemap-shmem-")) {
            let Some(pages) = self.stored(name)? else {
                return Err(read_error(self.path(), name, std::io::ErrorKind::NotFound.into()));
            };
            verify(self, sums, name, &pages, |_| true)?;
        }
        Ok(())
    }
}

fn unusable(member: &Member, source: ChecksumsError) -> ChainError {
    ChainError::Checksums { path: member.path().to_owned(), source }
}

/// Whether `pages`, of pagemap `name`, are still what they were, where they are `needed`.
fn verify(
    member: &Member,
    sums: &Checksums,
    name: &str,
    pages: &StoredPages,
    needed: impl Fn(AddrRange) -> bool,
) -> Result<(), ChainError> {
    let expected = sums.expected(name, pages.pagemap(), needed).map_err(|source| unusable(member, source))?;
    match expected.changed(&|offset, bytes: &mut [u8]| pages.read(offset, bytes))? {
        None => Ok(()),
        Some(range) => {
            let file = magic::pages_name(pages.pagemap().pages_id());
            Err(ChainError::Changed { path: member.path().to_owned(), file, range })
        }
    }
}
