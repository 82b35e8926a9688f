//! Reading pages, and comparing them with their checksums.

use std::collections::HashMap;
use std::path::PathBuf;

use crate::addr::AddrRange;
use crate::image::checksums::{BLOCK, CHECKSUMS, Checksums, ChecksumsError, Expected};
use crate::image::magic;
use crate::kernel::own_thread;
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
        self.pour(&RangeSet::new(), Some(known), |_, _| Ok(()))
    }

    /// Gives `place` the bytes of all pages of `wanted` that it holds, from several threads and in any order; those of `known` checksums
    /// have been compared with them. So have been all others of the process: it is verified, whatever is wanted.
    ///
    /// # Errors
    /// Those of `place` and [`Self::verify`].
    pub fn pour<E: From<ChainError> + Send>(
        &self,
        wanted: &RangeSet,
        known: Option<&mut KnownChecksums>,
        place: impl Fn(AddrRange, &[u8]) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        let pieces = self.pieces(wanted, known)?;
        own_thread::each("pages", &pieces, |buffer, piece| {
            let member = &self.members[piece.member];
            buffer.resize(piece.range.len() as usize, 0);
            member.read(piece.offset, buffer)?;
            if piece.expected.is_some_and(|expected| !expected.matches(buffer)) {
                return Err(changed(member, member.memory(), piece.range).into());
            }
            for run in self.within(piece.range).filter(|run| run.member == piece.member) {
                for range in wanted.within(run.range) {
                    let from = (range.start.get() - piece.range.start.get()) as usize;
                    place(range, &buffer[from..from + range.len() as usize])?;
                }
            }
            Ok::<_, E>(())
        })?;
        Ok(())
    }

    /// What is to be read: what is compared as a whole, or else what is wanted of it.
    fn pieces(
        &self,
        wanted: &RangeSet,
        mut known: Option<&mut KnownChecksums>,
    ) -> Result<Vec<Piece>, ChainError> {
        let mut pieces = Vec::new();
        for (index, member) in self.members.iter().enumerate() {
            let held = || self.runs.iter().filter(move |run| run.member == index);
            if held().next().is_none() {
                continue;
            }
            let sums = match known.as_mut() {
                Some(known) => known.of(member)?,
                None => None,
            };
            if let Some(sums) = sums {
                let held: RangeSet = held().map(|run| run.range).collect();
                let name = magic::pagemap_name(self.pid);
                let pagemap = member.memory().pagemap();
                let expected = sums.expected(&name, pagemap, |range| held.overlaps(range));
                let expected = expected.map_err(|source| unusable(member, source))?;
                pieces.extend(expected.into_iter().map(|block| Piece {
                    member: index,
                    range: block.range,
                    offset: block.offset,
                    expected: Some(block),
                }));
            } else {
                let parts = held()
                    .flat_map(|run| wanted.within(run.range).filter_map(|range| run.part(range)))
                    .flat_map(|run| run.range.parts(BLOCK).filter_map(move |range| run.part(range)));
                pieces.extend(parts.map(|run| Piece {
                    member: index,
                    range: run.range,
                    offset: run.offset,
                    expected: None,
                }));
            }
        }
        Ok(pieces)
    }
}

/// What is read at once, and what it must be.
#[derive(Debug)]
struct Piece {
    member: usize,
    range: AddrRange,
    offset: u64,
    expected: Option<Expected>,
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
            verify(self, sums, name, &pages)?;
        }
        Ok(())
    }
}

fn unusable(member: &Member, source: ChecksumsError) -> ChainError {
    ChainError::Checksums { path: member.path().to_owned(), source }
}

/// Whether `pages`, of pagemap `name`, are still what they were.
fn verify(member: &Member, sums: &Checksums, name: &str, pages: &StoredPages) -> Result<(), ChainError> {
    let expected =
        sums.expected(name, pages.pagemap(), |_| true).map_err(|source| unusable(member, source))?;
    own_thread::each("verification", &expected, |buffer, block| {
        buffer.resize(block.range.len() as usize, 0);
        pages.read(block.offset, buffer)?;
        if block.matches(buffer) { Ok(()) } else { Err(changed(member, pages, block.range)) }
    })?;
    Ok(())
}

fn changed(member: &Member, pages: &StoredPages, range: AddrRange) -> ChainError {
    let file = magic::pages_name(pages.pagemap().pages_id());
    ChainError::Changed { path: member.path().to_owned(), file, range }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::sync::Mutex;

    use crate::image::PagesFile;

    use super::super::tests::{family, page};
    use super::*;

    /// Checksums of all members.
    fn sums(chain: &Chain) -> KnownChecksums {
        let of = |member: &Member| {
            let pages = PagesFile::new(File::open(member.path().join("pages-1.img")).unwrap(), "pages-1.img");
            let mut sums = Checksums::new();
            sums.add(magic::pagemap_name(chain.pid), member.memory().pagemap(), &pages).unwrap();
            (member.path().to_owned(), Some(sums))
        };
        KnownChecksums(chain.members.iter().map(of).collect())
    }

    /// What comes: pages, and what they are full of.
    fn poured(
        chain: &Chain,
        wanted: &RangeSet,
        known: Option<&mut KnownChecksums>,
    ) -> Result<Vec<(AddrRange, u8)>, ChainError> {
        let poured = Mutex::new(Vec::new());
        chain.pour(wanted, known, |range, bytes| {
            assert_eq!(range.len(), bytes.len() as u64);
            poured.lock().unwrap().push((range, bytes[0]));
            Ok::<_, ChainError>(())
        })?;
        let mut poured = poured.into_inner().unwrap();
        poured.sort_unstable_by_key(|(range, _)| range.start);
        Ok(poured)
    }

    #[test]
    fn what_is_wanted_comes_from_where_it_is_held_compared_or_not() {
        let tmp = family();
        let chain = Chain::open(&tmp.path().join("3")).unwrap();
        let all = chain.held();
        let expected = [(page(1), 11), (page(2), 22), (page(9), 39)];
        assert_eq!(poured(&chain, &all, None).unwrap(), expected);
        assert_eq!(poured(&chain, &all, Some(&mut sums(&chain))).unwrap(), expected);
        // With one that it does not hold.
        let some: RangeSet = [page(2), page(3)].into_iter().collect();
        for known in [None, Some(&mut sums(&chain))] {
            assert_eq!(poured(&chain, &some, known).unwrap(), expected[1..2]);
        }
    }

    #[test]
    fn what_has_changed_is_found_whatever_is_wanted() {
        let tmp = family();
        let chain = Chain::open(&tmp.path().join("3")).unwrap();
        let mut known = sums(&chain);
        let pages = tmp.path().join("1/pages-1.img");
        let mut bytes = fs::read(&pages).unwrap();
        bytes[77] ^= 1;
        fs::write(&pages, bytes).unwrap();
        for wanted in [RangeSet::new(), chain.held()] {
            let error = poured(&chain, &wanted, Some(&mut known)).unwrap_err();
            assert!(matches!(&error, ChainError::Changed { path, .. } if path.ends_with("1")), "{error}");
        }
        assert!(poured(&chain, &chain.held(), None).is_ok());
    }
}
