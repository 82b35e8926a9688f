//! Page-wise memory for the demo and the benchmarks: mapped directly, and, but where it is asked for, without huge pages, so
//! that what is dirtied is pages.

use std::io;
use std::ptr::{self, NonNull};

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// 64-bit words of a page.
pub const WORDS: usize = PAGE / 8;

/// A private anonymous mapping, unmapped when dropped.
#[derive(Debug)]
pub struct Pages {
    start: NonNull<u64>,
    count: usize,
}

// SAFETY: the mapping belongs to this value alone; threads that share it only read (`&self`).
unsafe impl Send for Pages {}

impl Pages {
    /// Maps `count` pages of zeroes, none of them huge.
    ///
    /// # Errors
    ///
    /// When mmap(2) fails.
    pub fn map(count: usize) -> io::Result<Self> {
        Self::map_advised(count, libc::MADV_NOHUGEPAGE)
    }

    /// Maps `count` pages of zeroes, of which as many as can be come as huge ones.
    ///
    /// # Errors
    ///
    /// When mmap(2) fails.
    pub fn map_huge(count: usize) -> io::Result<Self> {
        Self::map_advised(count, libc::MADV_HUGEPAGE)
    }

    fn map_advised(count: usize, advice: libc::c_int) -> io::Result<Self> {
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new anonymous mapping at a place of the kernel's choice touches no memory of ours.
        let start = unsafe { libc::mmap(ptr::null_mut(), count * PAGE, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the range is the mapping just made; the advice changes no content.
        unsafe { libc::madvise(start, count * PAGE, advice) };
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { start, count })
    }

    /// How many pages.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// The words of page `index`.
    ///
    /// # Panics
    ///
    /// When there is no such page.
    #[must_use]
    pub fn page(&self, index: usize) -> &[u64; WORDS] {
        assert!(index < self.count);
        // SAFETY: inside the mapping, aligned, always initialised (zeroes at first), borrowed as long as `self` is.
        unsafe { self.start.add(index * WORDS).cast().as_ref() }
    }

    /// The words of page `index`, to write.
    ///
    /// # Panics
    ///
    /// When there is no such page.
    #[must_use]
    pub fn page_mut(&mut self, index: usize) -> &mut [u64; WORDS] {
        assert!(index < self.count);
        // SAFETY: as in `page`, and `&mut self` makes it the only borrow.
        unsafe { self.start.add(index * WORDS).cast().as_mut() }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing borrows from it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.count * PAGE) };
    }
}

/// Random numbers that a seed decides (splitmix64).
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        // A modulus as small as ours leaves no bias worth a thought.
        usize::try_from(self.word() % end as u64).unwrap_or(0)
    }
}
