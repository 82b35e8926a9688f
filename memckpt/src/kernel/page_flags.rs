//! `/proc/kpageflags` (Documentation/admin-guide/mm/pagemap.rst): a 64-bit word for every page frame.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use super::SyscallError;
use super::pagemap::{Pagemap, PagemapEntry};
use crate::addr::{AddrRange, PAGE_SIZE};
use crate::range_set::RangeSet;

const PATH: &str = "/proc/kpageflags";
/// Bits of linux/kernel-page-flags.h: anonymous, and to be swapped rather than dropped.
const ANON: u64 = 1 << 12;
const SWAPBACKED: u64 = 1 << 14;
/// Pages looked at in one go.
const BATCH: usize = 4096;

/// The pages of `pid` in `ranges` that the kernel may drop without a word: MADV_FREE, and no write since, as
/// [`super::smaps::lazily_freed`] tells by VMA. Pages that cannot be told count too: those that move meanwhile, and before Linux 6.9 all
/// but the first of a huge page.
///
/// # Errors
/// Frames or their flags cannot be seen: that needs CAP_SYS_ADMIN.
pub fn lazily_freed(pid: i32, ranges: &[AddrRange]) -> Result<RangeSet, SyscallError> {
    let mut found = RangeSet::new();
    if ranges.is_empty() {
        return Ok(found);
    }
    let pagemap = Pagemap::open(pid)?;
    let flags = File::open(PATH).map_err(|e| SyscallError::new("open", PATH, e))?;
    let (mut before, mut after) =
        (vec![PagemapEntry::default(); BATCH], vec![PagemapEntry::default(); BATCH]);
    let mut freed = vec![false; BATCH];
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let wanted = ((range.end.get() - at.get()) / PAGE_SIZE).min(BATCH as u64) as usize;
            let count = pagemap.read(at, &mut before[..wanted])?;
            for (freed, entry) in freed.iter_mut().zip(&before[..count]) {
                *freed = may_be_dropped(&flags, *entry)?;
            }
            // A page that has moved was judged by what is in its old frame now.
            let again = pagemap.read(at, &mut after[..count])?;
            for page in 0..count {
                let moved = page >= again || before[page].frame() != after[page].frame();
                if freed[page] || moved {
                    let start = at.get() + page as u64 * PAGE_SIZE;
                    found.insert(AddrRange::new(start, start + PAGE_SIZE));
                }
            }
            if count < wanted {
                break;
            }
            at = at.saturating_add(count as u64 * PAGE_SIZE);
        }
    }
    Ok(found)
}

fn may_be_dropped(flags: &File, entry: PagemapEntry) -> Result<bool, SyscallError> {
    // Under way to another frame, or swapped: the kernel does not swap what it may drop, but these are not told apart.
    if entry.has(PagemapEntry::SWAPPED) {
        return Ok(!entry.is_marker());
    }
    if !entry.has(PagemapEntry::PRESENT) || entry.has(PagemapEntry::FILE) {
        return Ok(false);
    }
    if entry.frame() == 0 {
        let hidden = std::io::Error::from_raw_os_error(libc::EPERM);
        return Err(SyscallError::new("pread", "page frames in pagemap", hidden));
    }
    let mut word = [0; 8];
    flags.read_exact_at(&mut word, entry.frame() * 8).map_err(|e| SyscallError::new("pread", PATH, e))?;
    Ok(u64::from_ne_bytes(word) & (ANON | SWAPBACKED) == ANON)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::puppet::{self, Puppet};
    use crate::kernel::{lru, smaps};

    #[test]
    fn freed_pages_are_told_from_their_neighbours() {
        if !nix::unistd::geteuid().is_root() {
            return puppet::skip("freed_pages_are_told_from_their_neighbours", "not root");
        }
        let puppet = Puppet::start().unwrap();
        let range = puppet.map(16 << 12).unwrap();
        let advise = |advice| puppet.syscall(libc::SYS_madvise, &[range.start.get(), range.len(), advice]);
        advise(libc::MADV_NOHUGEPAGE as u64).unwrap();
        puppet.fill(range, 1).unwrap();
        let start = range.start.get() + 4 * PAGE_SIZE;
        let part = AddrRange::new(start, start + 3 * PAGE_SIZE);
        // What another CPU than the one that advises still keeps apart, it cannot mark.
        lru::drain().unwrap();
        puppet.syscall(libc::SYS_madvise, &[start, part.len(), libc::MADV_FREE as u64]).unwrap();
        lru::drain().unwrap();
        let vmas = smaps::lazily_freed(puppet.pid()).unwrap();
        let found = lazily_freed(puppet.pid(), &vmas).unwrap();
        assert_eq!(found.within(range).collect::<Vec<_>>(), [part]);
    }
}
