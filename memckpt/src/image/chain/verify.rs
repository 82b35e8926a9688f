//! Comparing pages with their checksums.

use crate::addr::AddrRange;
use crate::image::checksums::{CHECKSUMS, Checksums, ChecksumsError};
use crate::image::magic;
use crate::range_set::RangeSet;

use super::member::read_error;
use super::{Chain, ChainError, Member, StoredPages};

impl Chain {
    /// Compares all pages of the process with their checksums, where the members that hold them have some.
    ///
    /// # Errors
    /// Pages have changed or cannot be read, or the checksums are missing, damaged, or those of other pages.
    pub fn verify(&self) -> Result<(), ChainError> {
        for (index, member) in self.members.iter().enumerate() {
            let held = self.runs.iter().filter(|run| run.member == index);
            let held: RangeSet = held.map(|run| run.range).collect();
            if held.is_empty() {
                continue;
            }
            if let Some(sums) = member.checksums()? {
                let name = magic::pagemap_name(self.pid);
                verify(member, &sums, &name, member.memory(), |range| held.overlaps(range))?;
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
    pub fn verify_shared(&self) -> Result<(), ChainError> {
        let Some(sums) = self.checksums()? else { return Ok(()) };
        for name in sums.names().filter(|name| name.starts_with("pagemap-shmem-")) {
            let Some(pages) = self.stored(name)? else {
                return Err(read_error(self.path(), name, std::io::ErrorKind::NotFound.into()));
            };
            verify(self, &sums, name, &pages, |_| true)?;
        }
        Ok(())
    }

    /// The checksums of the pages that are here; `None` for a checkpoint made without.
    fn checksums(&self) -> Result<Option<Checksums>, ChainError> {
        if !self.meta().is_some_and(|meta| meta.checksums) {
            return Ok(None);
        }
        let bytes = self
            .file(CHECKSUMS)?
            .ok_or_else(|| read_error(self.path(), CHECKSUMS, std::io::ErrorKind::NotFound.into()))?;
        Checksums::decode(&bytes).map(Some).map_err(|source| unusable(self, source))
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
