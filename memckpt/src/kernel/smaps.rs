//! What `/proc/PID/smaps` tells beyond maps. Reading smaps walks every page table: O(resident), never inside a freeze.

use std::io::{BufRead, BufReader};

use bitflags::bitflags;

use super::SyscallError;
use super::maps::{MapsError, parse_line};
use crate::addr::AddrRange;

bitflags! {
    /// What smaps says of a VMA, by the kernel's two letters (show_smap_vma_flags in fs/proc/task_mmu.c).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct VmFlags: u64 {
        /// `gd`: grows down (a stack).
        const GROWS_DOWN = 1 << 0;
        /// `pf`: raw page frames, no struct page.
        const PFN_MAP = 1 << 1;
        /// `lo`: mlocked.
        const LOCKED = 1 << 2;
        /// `io`: memory-mapped I/O.
        const IO = 1 << 3;
        /// `dc`: MADV_DONTFORK.
        const DONT_COPY = 1 << 4;
        /// `de`: cannot grow by mremap.
        const DONT_EXPAND = 1 << 5;
        /// `ht`: huge pages of hugetlbfs.
        const HUGETLB = 1 << 6;
        /// `nl`: non-linear (kernels before 4.0).
        const NON_LINEAR = 1 << 7;
        /// `wf`: MADV_WIPEONFORK.
        const WIPE_ON_FORK = 1 << 8;
        /// `dd`: MADV_DONTDUMP.
        const DONT_DUMP = 1 << 9;
        /// `sd`: the whole VMA counts as soft-dirty.
        const SOFT_DIRTY = 1 << 10;
        /// `mm`: may hold pages with and without a struct page.
        const MIXED_MAP = 1 << 11;
        /// `hg`: MADV_HUGEPAGE.
        const HUGE_PAGE = 1 << 12;
        /// `nh`: MADV_NOHUGEPAGE.
        const NO_HUGE_PAGE = 1 << 13;
        /// `mg`: MADV_MERGEABLE, KSM may replace its pages.
        const MERGEABLE = 1 << 14;
        /// `um`: a userfaultfd waits for missing pages.
        const UFFD_MISSING = 1 << 15;
        /// `uw`: a userfaultfd write-protects.
        const UFFD_WP = 1 << 16;
        /// `ui`: a userfaultfd waits for minor faults.
        const UFFD_MINOR = 1 << 17;
        /// `ss`: a user shadow stack.
        const SHADOW_STACK = 1 << 18;
        /// `sl`: sealed by mseal(2).
        const SEALED = 1 << 19;
        /// `dp`: MAP_DROPPABLE, the kernel may drop its pages.
        const DROPPABLE = 1 << 20;
        /// `ac`: accountable.
        const ACCOUNT = 1 << 21;
        /// `nr`: MAP_NORESERVE.
        const NO_RESERVE = 1 << 22;
        /// `sr`: MADV_SEQUENTIAL.
        const SEQUENTIAL_READ = 1 << 23;
        /// `rr`: MADV_RANDOM.
        const RANDOM_READ = 1 << 24;
        /// `me`: may be made executable.
        const MAY_EXEC = 1 << 25;
        /// `mw`: may be made writable.
        const MAY_WRITE = 1 << 26;
        /// `mr`: may be made readable.
        const MAY_READ = 1 << 27;
        /// `ms`: may be shared.
        const MAY_SHARE = 1 << 28;
        /// `gu`: may hold guard regions.
        const MAYBE_GUARD = 1 << 29;
        /// `lf`: its pages are locked as they come (mlock2(2), MLOCK_ONFAULT).
        const LOCKED_ON_FAULT = 1 << 30;
        /// Letters that this program does not know.
        const UNKNOWN = 1 << 63;
    }
}

impl VmFlags {
    /// The flags behind the letters of one VmFlags line.
    fn from_letters(line: &[u8]) -> Self {
        line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).map(Self::from_word).collect()
    }

    fn from_word(word: &[u8]) -> Self {
        match word {
            b"gd" => Self::GROWS_DOWN,
            b"pf" => Self::PFN_MAP,
            b"lo" => Self::LOCKED,
            b"lf" => Self::LOCKED.union(Self::LOCKED_ON_FAULT),
            b"io" => Self::IO,
            b"dc" => Self::DONT_COPY,
            b"de" => Self::DONT_EXPAND,
            b"ht" => Self::HUGETLB,
            b"nl" => Self::NON_LINEAR,
            b"wf" => Self::WIPE_ON_FORK,
            b"dd" => Self::DONT_DUMP,
            b"sd" => Self::SOFT_DIRTY,
            b"mm" => Self::MIXED_MAP,
            b"hg" => Self::HUGE_PAGE,
            b"nh" => Self::NO_HUGE_PAGE,
            b"mg" => Self::MERGEABLE,
            b"um" => Self::UFFD_MISSING,
            b"uw" => Self::UFFD_WP,
            b"ui" => Self::UFFD_MINOR,
            b"ss" => Self::SHADOW_STACK,
            b"sl" => Self::SEALED,
            b"dp" => Self::DROPPABLE,
            b"ac" => Self::ACCOUNT,
            b"nr" => Self::NO_RESERVE,
            b"sr" => Self::SEQUENTIAL_READ,
            b"rr" => Self::RANDOM_READ,
            b"me" => Self::MAY_EXEC,
            b"mw" => Self::MAY_WRITE,
            b"mr" => Self::MAY_READ,
            b"ms" => Self::MAY_SHARE,
            b"gu" => Self::MAYBE_GUARD,
            // maps says these.
            b"rd" | b"wr" | b"ex" | b"sh" => Self::empty(),
            _ => Self::UNKNOWN,
        }
    }
}

/// The VmFlags of every VMA of `pid`, in order of addresses.
///
/// # Errors
/// smaps cannot be opened or read, or is not understood.
pub fn vm_flags(pid: i32) -> Result<Vec<(AddrRange, VmFlags)>, MapsError> {
    let (text, path) = open(pid)?;
    parse(text, &path)
}

fn open(pid: i32) -> Result<(impl BufRead, String), SyscallError> {
    let path = format!("/proc/{pid}/smaps");
    let file = std::fs::File::open(&path).map_err(|e| SyscallError::new("open", &path, e))?;
    Ok((BufReader::with_capacity(64 << 10, file), path))
}

/// The VMAs of `pid` that hold pages which the kernel may drop when it likes, without a word: MADV_FREE, and no write since
/// (`LazyFree`, Linux 4.12). In order of addresses. Pages that a CPU keeps apart do not show: [`super::lru::drain`].
///
/// # Errors
/// As [`vm_flags`].
pub fn lazily_freed(pid: i32) -> Result<Vec<AddrRange>, MapsError> {
    let (text, path) = open(pid)?;
    let mut found = Vec::new();
    sections(text, &path, |range, line| {
        let Some(size) = line.strip_prefix(b"LazyFree:") else { return };
        if size.iter().any(|byte| matches!(byte, b'1'..=b'9')) {
            found.push(range);
        }
    })?;
    Ok(found)
}

fn parse(text: impl BufRead, path: &str) -> Result<Vec<(AddrRange, VmFlags)>, MapsError> {
    let mut found: Vec<(AddrRange, VmFlags)> = Vec::new();
    sections(text, path, |range, line| {
        if found.last().is_none_or(|(last, _)| *last != range) {
            found.push((range, VmFlags::empty()));
        }
        if let (Some(letters), Some((_, flags))) = (line.strip_prefix(b"VmFlags:"), found.last_mut()) {
            *flags = VmFlags::from_letters(letters);
        }
    })?;
    Ok(found)
}

/// Hands every line below the line of a VMA to `take`.
fn sections(
    mut text: impl BufRead,
    path: &str,
    mut take: impl FnMut(AddrRange, &[u8]),
) -> Result<(), MapsError> {
    let mut range = None;
    let mut line = Vec::new();
    loop {
        line.clear();
        let n = text.read_until(b'\n', &mut line).map_err(|e| SyscallError::new("read", path, e))?;
        if n == 0 {
            return Ok(());
        }
        let line = line.strip_suffix(b"\n").unwrap_or(&line);
        // Addresses are in lower case and every key starts with an upper-case letter.
        match range {
            Some(range) if line.first().is_some_and(u8::is_ascii_uppercase) => take(range, line),
            _ => {
                let malformed = || MapsError::Malformed { line: String::from_utf8_lossy(line).into_owned() };
                range = Some(parse_line(line).ok_or_else(malformed)?.range);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::puppet::Puppet;

    #[test]
    fn sections_are_told_apart_and_new_letters_noticed() {
        let text = b"\
1000-2000 rw-p 00000000 00:00 0          [heap]
Size:                  4 kB
VmFlags: rd wr mr mw me gd ac sd
abc000-abd000 ---p 00000000 00:00 0
Rss:                   0 kB
VmFlags: mr zz dd
";
        let found = parse(&text[..], "x").unwrap();
        assert_eq!(found.len(), 2);
        assert!(found[0].1.contains(VmFlags::GROWS_DOWN | VmFlags::SOFT_DIRTY | VmFlags::MAY_WRITE));
        assert!(!found[0].1.contains(VmFlags::UNKNOWN));
        assert_eq!(
            found[1],
            (AddrRange::new(0xab_c000, 0xab_d000), VmFlags::MAY_READ | VmFlags::UNKNOWN | VmFlags::DONT_DUMP)
        );
    }

    #[test]
    fn freed_pages_show() {
        let puppet = Puppet::start().unwrap();
        let range = puppet.map(8 << 12).unwrap();
        puppet.fill(range, 1).unwrap();
        assert!(!lazily_freed(puppet.pid()).unwrap().iter().any(|freed| freed.overlaps(range)));
        // What another CPU than the one that advises still keeps apart, it cannot mark (`folio_mark_lazyfree`, mm/swap.c).
        crate::kernel::lru::drain().unwrap();
        let part = [range.start.get() + 4096, 4096, libc::MADV_FREE as u64];
        puppet.syscall(libc::SYS_madvise, &part).unwrap();
        crate::kernel::lru::drain().unwrap();
        assert!(lazily_freed(puppet.pid()).unwrap().iter().any(|freed| freed.overlaps(range)));
    }

    #[test]
    fn advice_shows() {
        let puppet = Puppet::start().unwrap();
        let range = puppet.map(8 << 12).unwrap();
        for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
            puppet.syscall(libc::SYS_madvise, &[range.start.get(), range.len(), advice as u64]).unwrap();
        }
        let found = vm_flags(puppet.pid()).unwrap();
        let (_, flags) = found.iter().find(|(r, _)| *r == range).unwrap();
        assert!(flags.contains(VmFlags::DONT_COPY | VmFlags::DONT_DUMP), "{flags:?}");
        assert_eq!(found.len(), crate::kernel::maps::read(puppet.pid()).unwrap().len());
    }
}
