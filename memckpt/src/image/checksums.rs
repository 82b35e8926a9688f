//! `memckpt-checksums.json`: what the pages of a checkpoint were when they were written, so that what a disk, a network or a hand has
//! changed since is found before it runs. CRIU has nothing like it, and ignores the file.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use crate::addr::AddrRange;
use crate::kernel::{SyscallError, own_thread};

use super::pagemap::{PagemapFlags, PagemapImage};
use super::pages::PagesFile;

/// The file's name. Not `.img`: it is none of CRIU's.
pub const CHECKSUMS: &str = "memckpt-checksums.json";
/// The version of [`Checksums`] written and read here.
const VERSION: u32 = 1;
/// What a checksum is: XXH3 with 64 bits, without a seed. It finds accidents; it is no signature.
const ALGORITHM: &str = "xxh3-64";
/// The most bytes that one checksum is of: a part of a run can be verified, and an error says where.
pub(super) const BLOCK: u64 = 1 << 20;

/// A checksum; in the file 16 hexadecimal digits, since a JSON number need not hold 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
struct Checksum(u64);

impl Checksum {
    fn of(bytes: &[u8]) -> Self {
        Self(XxHash3_64::oneshot(bytes))
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl From<Checksum> for String {
    fn from(sum: Checksum) -> Self {
        sum.to_string()
    }
}

impl FromStr for Checksum {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let value = digits.then(|| u64::from_str_radix(text, 16).ok()).flatten();
        value.map(Self).ok_or("a checksum has 16 hexadecimal digits")
    }
}

impl TryFrom<String> for Checksum {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

/// The checksums of a checkpoint's own pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checksums {
    version: u32,
    algorithm: String,
    /// By the name of the pagemap image: its runs with bytes here, in order, each cut into MiB.
    pagemaps: BTreeMap<String, Vec<Checksum>>,
}

/// Checksums that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ChecksumsError {
    /// Not the JSON expected.
    #[error("{CHECKSUMS} is damaged: {0}")]
    Json(#[from] serde_json::Error),
    /// Written by a later memckpt.
    #[error(
        "{CHECKSUMS} has version {version} and algorithm {algorithm:?}, this memckpt knows {VERSION} and {ALGORITHM:?}"
    )]
    Version {
        /// What it has.
        version: u32,
        /// What it has.
        algorithm: String,
    },
    /// It is that of another checkpoint, or the pagemap is.
    #[error("{CHECKSUMS} has {found} checksums for {pagemap}, whose pages need {needed}")]
    Count {
        /// The pagemap image.
        pagemap: String,
        /// How many there are.
        found: u64,
        /// How many there would be.
        needed: u64,
    },
}

/// Part of a run of pages, and where its bytes are in the pages file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    range: AddrRange,
    offset: u64,
}

/// The blocks of a pagemap.
fn blocks(pagemap: &PagemapImage) -> impl Iterator<Item = Block> + '_ {
    let present = pagemap.runs().iter().filter(|run| run.flags.contains(PagemapFlags::PRESENT));
    present.flat_map(|run| {
        let offset = |part: AddrRange| run.offset + (part.start.get() - run.range.start.get());
        run.range.parts(BLOCK).map(move |range| Block { range, offset: offset(range) })
    })
}

/// How many blocks there are.
fn count(pagemap: &PagemapImage) -> u64 {
    let present = pagemap.runs().iter().filter(|run| run.flags.contains(PagemapFlags::PRESENT));
    present.map(|run| run.range.len().div_ceil(BLOCK)).fold(0, u64::saturating_add)
}

impl Checksums {
    /// Of no pages yet.
    #[must_use]
    pub fn new() -> Self {
        Self { version: VERSION, algorithm: ALGORITHM.to_owned(), pagemaps: BTreeMap::new() }
    }

    /// Adds those of the pages of `pagemap`, which is called `name`; reads them again.
    ///
    /// # Errors
    /// pread(2) fails.
    pub fn add(
        &mut self,
        name: String,
        pagemap: &PagemapImage,
        pages: &PagesFile,
    ) -> Result<(), SyscallError> {
        let blocks: Vec<Block> = blocks(pagemap).collect();
        let sums = own_thread::each("checksums", &blocks, |buffer, block| {
            buffer.resize(block.range.len() as usize, 0);
            pages.read_at(block.offset, buffer)?;
            Ok(Checksum::of(buffer))
        })?;
        self.pagemaps.insert(name, sums);
        Ok(())
    }

    /// The names of the pagemap images that it is for.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.pagemaps.keys().map(String::as_str)
    }

    /// Those blocks of `pagemap`, which is called `name`, that are `needed`.
    pub(super) fn expected(
        &self,
        name: &str,
        pagemap: &PagemapImage,
        needed: impl Fn(AddrRange) -> bool,
    ) -> Result<Vec<Expected>, ChecksumsError> {
        let sums = self.pagemaps.get(name).map_or(&[][..], Vec::as_slice);
        let (found, should) = (sums.len() as u64, count(pagemap));
        if found != should {
            return Err(ChecksumsError::Count { pagemap: name.to_owned(), found, needed: should });
        }
        let expected = blocks(pagemap).zip(sums).map(|(block, sum)| Expected {
            range: block.range,
            offset: block.offset,
            sum: *sum,
        });
        Ok(expected.filter(|expected| needed(expected.range)).collect())
    }

    /// The file's content.
    ///
    /// # Errors
    /// None in practice: no key or value here can fail to become JSON.
    pub fn encode(&self) -> Result<Vec<u8>, ChecksumsError> {
        let mut text = serde_json::to_vec(self)?;
        text.push(b'\n');
        Ok(text)
    }

    /// Reads the file's content.
    ///
    /// # Errors
    /// It is damaged, or of a later version.
    pub fn decode(bytes: &[u8]) -> Result<Self, ChecksumsError> {
        #[derive(Deserialize)]
        struct Head {
            version: u32,
            algorithm: String,
        }
        let Head { version, algorithm } = serde_json::from_slice(bytes)?;
        if version != VERSION || algorithm != ALGORITHM {
            return Err(ChecksumsError::Version { version, algorithm });
        }
        Ok(serde_json::from_slice(bytes)?)
    }
}

/// Part of a run of pages, and what its bytes were.
#[derive(Clone, Copy, Debug)]
pub(super) struct Expected {
    pub(super) range: AddrRange,
    /// Where its bytes are in the pages file.
    pub(super) offset: u64,
    sum: Checksum,
}

impl Expected {
    /// Whether its bytes are these.
    pub(super) fn matches(&self, bytes: &[u8]) -> bool {
        Checksum::of(bytes) == self.sum
    }
}

impl Default for Checksums {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PAGE_SIZE;

    /// 1 page, a gap, 2.5 MiB, and a run of the parent's.
    fn pagemap() -> PagemapImage {
        let mut pagemap = PagemapImage::new(1);
        for (start, pages, flags) in [
            (0x1000, 1, PagemapFlags::PRESENT),
            (0x10_0000, 640, PagemapFlags::PRESENT | PagemapFlags::LAZY),
            (0x1000_0000, 1 << 30, PagemapFlags::PARENT),
        ] {
            pagemap.push(AddrRange::new(start, start + pages * PAGE_SIZE), flags).unwrap();
        }
        pagemap
    }

    fn sums(pages: &PagesFile) -> Checksums {
        let mut sums = Checksums::new();
        sums.add("p".into(), &pagemap(), pages).unwrap();
        sums
    }

    fn pages() -> PagesFile {
        let pages = PagesFile::new(tempfile::tempfile().unwrap(), "pages-1.img");
        let bytes: Vec<u8> = (0..641 * PAGE_SIZE).map(|i| (i % 251) as u8).collect();
        pages.write_at(0, &bytes).unwrap();
        pages
    }

    fn changed(sums: &Checksums, pages: &PagesFile, needed: AddrRange) -> Option<AddrRange> {
        let expected = sums.expected("p", &pagemap(), |range| range.overlaps(needed)).unwrap();
        let changed = expected.iter().find(|block| {
            let mut bytes = vec![0; block.range.len() as usize];
            pages.read_at(block.offset, &mut bytes).unwrap();
            !block.matches(&bytes)
        });
        changed.map(|block| block.range)
    }

    const ALL: AddrRange = AddrRange::new(0, 1 << 47);

    #[test]
    fn runs_are_cut_into_blocks() {
        let pagemap = pagemap();
        let blocks: Vec<_> =
            blocks(&pagemap).map(|b| (b.range.start.get(), b.range.len(), b.offset)).collect();
        assert_eq!(
            blocks,
            [
                (0x1000, 0x1000, 0),
                (0x10_0000, 1 << 20, 0x1000),
                (0x20_0000, 1 << 20, 0x10_1000),
                (0x30_0000, 1 << 19, 0x20_1000)
            ]
        );
        assert_eq!(count(&pagemap), 4);
    }

    #[test]
    fn what_changed_is_found_where_it_is_looked_for() {
        let pages = pages();
        let sums = Checksums::decode(&sums(&pages).encode().unwrap()).unwrap();
        assert_eq!(changed(&sums, &pages, ALL), None);
        pages.write_at(0x20_1000 + 77, &[0xff]).unwrap();
        let wrong = AddrRange::new(0x30_0000, 0x38_0000);
        assert_eq!(changed(&sums, &pages, ALL), Some(wrong));
        assert_eq!(changed(&sums, &pages, AddrRange::new(0, 0x30_0000)), None);
    }

    #[test]
    fn checksums_of_something_else_are_refused() {
        let mut other = sums(&pages());
        other.pagemaps.get_mut("p").unwrap().pop();
        for (sums, count) in [(other, 3), (Checksums::new(), 0)] {
            let error = sums.expected("p", &pagemap(), |_| true).unwrap_err();
            assert!(
                matches!(error, ChecksumsError::Count { found, needed: 4, .. } if found == count),
                "{error}"
            );
        }
    }

    #[test]
    fn pages_that_cannot_be_read_are_an_error() {
        let short = PagesFile::new(tempfile::tempfile().unwrap(), "pages-1.img");
        let error = Checksums::new().add("p".into(), &pagemap(), &short).unwrap_err();
        assert_eq!(error.source.kind(), std::io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn damage_is_an_error_and_so_is_a_later_version() {
        let bytes = sums(&pages()).encode().unwrap();
        for cut in 0..bytes.len() - 2 {
            assert!(Checksums::decode(&bytes[..cut]).is_err());
        }
        let text = String::from_utf8(bytes).unwrap();
        for (from, to) in [("\"version\":1", "\"version\":2"), (ALGORITHM, "md5")] {
            let later = text.replace(from, to);
            assert!(matches!(Checksums::decode(later.as_bytes()), Err(ChecksumsError::Version { .. })));
        }
        assert!("0123456789abcdef".parse::<Checksum>().is_ok());
        assert!("+123456789abcdef".parse::<Checksum>().is_err());
        assert!("123".parse::<Checksum>().is_err());
    }
}
