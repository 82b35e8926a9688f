//! The memory of a running process, through `/proc/PID/mem` and `/proc/PID/pagemap`.

use crate::addr::{AddrRange, PAGE_SIZE};
use crate::kernel::SyscallError;
use crate::kernel::memory::ProcMem;
use crate::kernel::pagemap::{Pagemap, PagemapEntry};
use crate::tracker::dirty::{PageFlags, PageRun};

use super::Memory;

/// Entries of the pagemap read at a time: 32 MiB of memory.
const ENTRIES: u64 = 8192;

/// The memory of a process.
#[derive(Debug)]
pub struct LiveMemory {
    pagemap: Pagemap,
    memory: ProcMem,
}

impl LiveMemory {
    /// Opens the memory of `pid`.
    ///
    /// # Errors
    /// No such process, or no right to trace it.
    pub fn open(pid: i32) -> Result<Self, SyscallError> {
        Ok(Self { pagemap: Pagemap::open(pid)?, memory: ProcMem::open(pid)? })
    }
}

/// PRESENT, SWAPPED and FILE, or nothing for a page without content of its own.
fn flags(entry: PagemapEntry) -> PageFlags {
    let mut flags = PageFlags::empty();
    if entry.is_marker() || entry.is_guard() {
        return flags;
    }
    flags.set(PageFlags::PRESENT, entry.has(PagemapEntry::PRESENT));
    flags.set(PageFlags::SWAPPED, entry.has(PagemapEntry::SWAPPED));
    flags.set(PageFlags::FILE, entry.has(PagemapEntry::FILE) && !flags.is_empty());
    flags
}

impl Memory for LiveMemory {
    fn pages(&self, range: AddrRange) -> Result<Vec<PageRun>, SyscallError> {
        let mut runs: Vec<PageRun> = Vec::new();
        let mut start = range.start;
        while start < range.end {
            let end = start.saturating_add(ENTRIES * PAGE_SIZE).min(range.end);
            for (n, entry) in (0u64..).zip(self.pagemap.entries(AddrRange { start, end })?) {
                let flags = flags(entry);
                let page = AddrRange::with_len(start.saturating_add(n * PAGE_SIZE), PAGE_SIZE);
                match runs.last_mut() {
                    _ if flags.is_empty() => {}
                    Some(last) if last.range.end == page.start && last.flags == flags => {
                        last.range.end = page.end;
                    }
                    _ => runs.push(PageRun { range: page, flags }),
                }
            }
            start = end;
        }
        Ok(runs)
    }

    fn read(&self, range: AddrRange, buffer: &mut [u8]) -> Result<(), SyscallError> {
        self.memory.read_at(range.start, buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_and_guards_have_no_content() {
        let of = |bits| flags(PagemapEntry(bits));
        assert_eq!(of(PagemapEntry::PRESENT), PageFlags::PRESENT);
        assert_eq!(of(PagemapEntry::PRESENT | PagemapEntry::FILE), PageFlags::PRESENT | PageFlags::FILE);
        assert_eq!(of(PagemapEntry::SWAPPED | 2), PageFlags::SWAPPED);
        assert_eq!(of(PagemapEntry::SWAPPED | 31), PageFlags::empty());
        assert_eq!(of(PagemapEntry::GUARD | PagemapEntry::SWAPPED | 2), PageFlags::empty());
        assert_eq!(of(0), PageFlags::empty());
    }
}
