//! Addresses, page counts, ranges and chunks of a target's address space.
//!
//! An address, a number of pages and a number of bytes are three types, so that one cannot stand for another.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes in a page. memckpt supports x86-64 only, where base pages are always 4 KiB.
pub const PAGE_SIZE: u64 = 4096;
/// Bytes in a chunk: what one page-table page maps, and the granularity of fault hints.
pub const CHUNK_SIZE: u64 = 2 << 20;
/// One past the highest address a user mapping can have with 4-level page tables. Hints end here; whatever lies
/// above (5-level paging) counts as a loss.
pub const ADDRESS_SPACE_END: Addr = Addr(1 << 47);

/// A virtual address in the target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Addr(pub u64);

/// A number of 4 KiB pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PageCount(pub u64);

/// A 2 MiB chunk of the address space, by number (address >> 21).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Chunk(pub u32);

impl Addr {
    /// The address as a number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The start of the page that holds this address.
    #[must_use]
    pub const fn page_floor(self) -> Self {
        Self(self.0 & !(PAGE_SIZE - 1))
    }

    /// The first page boundary at or above this address; saturates at the last page.
    #[must_use]
    pub const fn page_ceil(self) -> Self {
        Self(self.0.saturating_add(PAGE_SIZE - 1) & !(PAGE_SIZE - 1))
    }

    /// Whether this is the start of a page.
    #[must_use]
    pub const fn is_page_aligned(self) -> bool {
        self.0.is_multiple_of(PAGE_SIZE)
    }

    /// The chunk that holds this address, if it lies below [`ADDRESS_SPACE_END`].
    #[must_use]
    pub fn chunk(self) -> Option<Chunk> {
        (self < ADDRESS_SPACE_END).then_some(Chunk((self.0 / CHUNK_SIZE) as u32))
    }

    /// This address plus `bytes`, saturating.
    #[must_use]
    pub const fn saturating_add(self, bytes: u64) -> Self {
        Self(self.0.saturating_add(bytes))
    }
}

impl PageCount {
    /// No pages.
    pub const ZERO: Self = Self(0);

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// What this many pages hold, in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0 * PAGE_SIZE
    }
}

impl Chunk {
    /// The addresses of this chunk.
    #[must_use]
    pub const fn range(self) -> AddrRange {
        let start = self.0 as u64 * CHUNK_SIZE;
        AddrRange { start: Addr(start), end: Addr(start + CHUNK_SIZE) }
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::LowerHex for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

impl fmt::Display for PageCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl std::ops::Add for PageCount {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl std::ops::AddAssign for PageCount {
    fn add_assign(&mut self, other: Self) {
        self.0 += other.0;
    }
}

impl std::iter::Sum for PageCount {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        Self(iter.map(|p| p.0).sum())
    }
}

/// Addresses from `start` up to, not including, `end`. Empty when `end <= start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AddrRange {
    /// First address.
    pub start: Addr,
    /// One past the last address.
    pub end: Addr,
}

impl AddrRange {
    /// The range from `start` up to `end`.
    #[must_use]
    pub const fn new(start: u64, end: u64) -> Self {
        Self { start: Addr(start), end: Addr(end) }
    }

    /// `len` bytes from `start`; saturates at the top of the address space.
    #[must_use]
    pub const fn with_len(start: Addr, len: u64) -> Self {
        Self { start, end: start.saturating_add(len) }
    }

    /// Whether it holds no address.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.end.0 <= self.start.0
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(self) -> u64 {
        self.end.0.saturating_sub(self.start.0)
    }

    /// Length in pages, of a page-aligned range.
    #[must_use]
    pub const fn pages(self) -> PageCount {
        PageCount(self.len() / PAGE_SIZE)
    }

    /// Whether `addr` lies inside.
    #[must_use]
    pub fn contains(self, addr: Addr) -> bool {
        self.start <= addr && addr < self.end
    }

    /// Whether the two share an address.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end && !self.is_empty() && !other.is_empty()
    }

    /// The addresses in both, if any.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        let both = Self { start: self.start.max(other.start), end: self.end.min(other.end) };
        (!both.is_empty()).then_some(both)
    }

    /// The smallest range of whole pages around this one.
    #[must_use]
    pub const fn page_aligned(self) -> Self {
        Self { start: self.start.page_floor(), end: self.end.page_ceil() }
    }

    /// This range cut into parts of `size` bytes, in order; the last may be shorter.
    pub fn parts(self, size: u64) -> impl Iterator<Item = Self> {
        (self.start.get()..self.end.get())
            .step_by(size as usize)
            .map(move |start| Self::with_len(Addr(start), size.min(self.end.get() - start)))
    }

    /// The chunks that this range touches, below [`ADDRESS_SPACE_END`].
    pub fn chunks(self) -> impl Iterator<Item = Chunk> {
        let end = self.end.min(ADDRESS_SPACE_END).0;
        let first = self.start.0 / CHUNK_SIZE;
        let last = if self.is_empty() { first } else { end.div_ceil(CHUNK_SIZE) };
        (first..last).map(|n| Chunk(n as u32))
    }
}

impl fmt::Display for AddrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}-{:x}", self.start.0, self.end.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_the_range_in_order() {
        let parts = |start, end| AddrRange::new(start, end).parts(0x1000).collect::<Vec<_>>();
        assert_eq!(parts(0x1000, 0x3000), [AddrRange::new(0x1000, 0x2000), AddrRange::new(0x2000, 0x3000)]);
        assert_eq!(parts(0x1800, 0x2900), [AddrRange::new(0x1800, 0x2800), AddrRange::new(0x2800, 0x2900)]);
        assert_eq!(parts(u64::MAX - 1, u64::MAX), [AddrRange::new(u64::MAX - 1, u64::MAX)]);
        assert_eq!(parts(0x2000, 0x1000), []);
    }
}
