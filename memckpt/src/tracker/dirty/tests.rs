//! Each kind of page, seen by each source that this kernel has, in a child process.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use super::*;
use crate::addr::{Addr, CHUNK_SIZE, PAGE_SIZE};
use crate::kernel::features::{self, take_userfaultfd};
use crate::kernel::lru;
use crate::kernel::maps;
use crate::kernel::puppet::{Puppet, skip};
use crate::tracker::uffd::WriteProtect;

const PRESENT: PageFlags = PageFlags::PRESENT;
const DIRTY: PageFlags = PageFlags::DIRTY;
const FILE: PageFlags = PageFlags::FILE;
const ZERO: PageFlags = PageFlags::ZERO;
const NONE: PageFlags = PageFlags::empty();
const MADV_GUARD_INSTALL: u64 = 102;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    SoftDirty,
    SoftDirtyReading,
    UffdWp,
    Untracked,
    UntrackedReading,
}

const TRACKING: [Way; 3] = [Way::SoftDirty, Way::SoftDirtyReading, Way::UffdWp];
const ALL: [Way; 5] =
    [Way::SoftDirty, Way::SoftDirtyReading, Way::UffdWp, Way::Untracked, Way::UntrackedReading];

/// A child that one source watches.
struct Stage {
    puppet: Puppet,
    source: Box<dyn DirtySource>,
    uffd: Option<WriteProtect>,
    way: Way,
}

impl Stage {
    /// Runs `test` with every one of `ways` that works here; says which do not.
    fn each(name: &str, ways: &[Way], test: impl Fn(&mut Self)) {
        for &way in ways {
            let works = match way {
                Way::SoftDirty | Way::SoftDirtyReading => features::soft_dirty(),
                Way::UffdWp => features::uffd_wp(),
                Way::Untracked | Way::UntrackedReading => Ok(()),
            };
            match works {
                Ok(()) => test(&mut Self::new(way)),
                Err(reason) => skip(&format!("{name}[{way:?}]"), &reason),
            }
        }
    }

    fn new(way: Way) -> Self {
        let puppet = Puppet::start().unwrap();
        let pid = puppet.pid();
        let uffd = (way == Way::UffdWp)
            .then(|| WriteProtect::adopt(take_userfaultfd(&puppet).unwrap(), pid).unwrap());
        let source: Box<dyn DirtySource> = match way {
            Way::SoftDirty => Box::new(SoftDirty::open(pid).unwrap()),
            Way::SoftDirtyReading => Box::new(SoftDirty::open_reading(pid).unwrap()),
            Way::UffdWp => Box::new(UffdWp::open(pid).unwrap()),
            Way::Untracked => Box::new(Untracked::open(pid).unwrap()),
            Way::UntrackedReading => Box::new(Untracked::open_reading(pid).unwrap()),
        };
        Self { puppet, source, uffd, way }
    }

    /// Tracks `range` where tracking asks for that, and begins an epoch.
    fn track(&mut self, ranges: &[AddrRange]) {
        if let Some(uffd) = &mut self.uffd {
            ranges.iter().for_each(|&range| uffd.register(range).unwrap());
        }
        self.source.clear(ranges).unwrap();
    }

    /// The flags of every page of `range`, in order; nothing for a page without content.
    fn pages(&mut self, range: AddrRange) -> Vec<PageFlags> {
        let mut entries = PageCount::ZERO;
        let runs = self.source.scan(&[range], &mut entries).unwrap();
        assert!(entries >= range.pages(), "{entries} entries for {range}");
        let mut pages = BTreeMap::new();
        for run in runs {
            let mut at = run.range.start;
            while at < run.range.end {
                assert_eq!(pages.insert(at, run.flags), None, "{at} is in two runs");
                at = at.saturating_add(PAGE_SIZE);
            }
        }
        let count = range.pages().get();
        (0..count).map(|i| pages.remove(&page(range, i).start).unwrap_or(NONE)).collect()
    }

    fn madvise(&self, range: AddrRange, advice: u64) -> std::io::Result<u64> {
        // Pages that another CPU still keeps apart are passed over by MADV_FREE and MADV_PAGEOUT.
        lru::drain().unwrap();
        self.puppet.syscall(libc::SYS_madvise, &[range.start.get(), range.len(), advice])
    }

    fn file(&self, pages: u64) -> (tempfile::NamedTempFile, AddrRange) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![9; (pages * PAGE_SIZE) as usize]).unwrap();
        let range = self.puppet.map_file(file.path(), pages * PAGE_SIZE).unwrap();
        // Otherwise one read maps the pages around it too.
        self.madvise(range, libc::MADV_RANDOM as u64).unwrap();
        (file, range)
    }
}

fn page(range: AddrRange, i: u64) -> AddrRange {
    AddrRange::with_len(range.start.saturating_add(i * PAGE_SIZE), PAGE_SIZE)
}

#[test]
fn anonymous_pages_read_written_and_untouched() {
    Stage::each("anonymous_pages_read_written_and_untouched", &TRACKING, |stage| {
        let range = stage.puppet.map(8 * PAGE_SIZE).unwrap();
        stage.puppet.fill(page(range, 0), 1).unwrap();
        stage.puppet.fill(page(range, 1), 1).unwrap();
        stage.puppet.load(page(range, 2)).unwrap();
        stage.puppet.load(page(range, 3)).unwrap();
        let before = stage.pages(range);
        assert_eq!(before[0], PRESENT | DIRTY, "{:?}: an untracked page is dirty", stage.way);
        stage.track(&[range]);
        assert_eq!(
            stage.pages(range),
            [PRESENT, PRESENT, PRESENT | ZERO, PRESENT | ZERO, NONE, NONE, NONE, NONE],
            "{:?}",
            stage.way
        );
        stage.puppet.fill(page(range, 1), 2).unwrap();
        stage.puppet.fill(page(range, 3), 2).unwrap();
        stage.puppet.fill(page(range, 5), 2).unwrap();
        stage.puppet.load(page(range, 6)).unwrap();
        let after = stage.pages(range);
        assert_eq!(
            after[..6],
            [PRESENT, PRESENT | DIRTY, PRESENT | ZERO, PRESENT | DIRTY, NONE, PRESENT | DIRTY],
            "{:?}",
            stage.way
        );
        // A hole that was read: a zero page, whether it counts as changed or not.
        assert_eq!(after[6] - DIRTY, PRESENT | ZERO, "{:?}", stage.way);
        stage.source.clear(&[range]).unwrap();
        assert!(stage.pages(range).iter().all(|p| !p.contains(DIRTY)), "{:?}", stage.way);
    });
}

#[test]
fn without_a_tracker_all_that_is_there_is_dirty() {
    Stage::each(
        "without_a_tracker_all_that_is_there_is_dirty",
        &[Way::Untracked, Way::UntrackedReading],
        |stage| {
            let range = stage.puppet.map(4 * PAGE_SIZE).unwrap();
            stage.puppet.fill(page(range, 0), 1).unwrap();
            stage.puppet.load(page(range, 1)).unwrap();
            stage.source.clear(&[range]).unwrap();
            assert_eq!(stage.pages(range), [PRESENT | DIRTY, PRESENT | ZERO | DIRTY, NONE, NONE]);
        },
    );
}

#[test]
fn file_pages_until_they_are_copied() {
    Stage::each("file_pages_until_they_are_copied", &TRACKING, |stage| {
        let (_file, range) = stage.file(6);
        stage.puppet.load(page(range, 0)).unwrap();
        stage.puppet.load(page(range, 1)).unwrap();
        stage.puppet.fill(page(range, 2), 1).unwrap();
        stage.track(&[range]);
        assert_eq!(stage.pages(range)[..3], [PRESENT | FILE, PRESENT | FILE, PRESENT], "{:?}", stage.way);
        stage.puppet.fill(page(range, 1), 1).unwrap();
        stage.puppet.fill(page(range, 4), 1).unwrap();
        let now = stage.pages(range);
        assert_eq!(now[..3], [PRESENT | FILE, PRESENT | DIRTY, PRESENT], "{:?}", stage.way);
        assert_eq!(now[4], PRESENT | DIRTY, "{:?}", stage.way);
    });
}

#[test]
fn a_dropped_page_has_no_content() {
    Stage::each("a_dropped_page_has_no_content", &ALL, |stage| {
        let anonymous = stage.puppet.map(4 * PAGE_SIZE).unwrap();
        let (file, copied) = stage.file(4);
        for range in [anonymous, copied] {
            stage.puppet.fill(range, 1).unwrap();
        }
        let both = if anonymous.start < copied.start { [anonymous, copied] } else { [copied, anonymous] };
        stage.track(&both);
        for range in both {
            stage.madvise(page(range, 1), libc::MADV_DONTNEED as u64).unwrap();
            let pages = stage.pages(range);
            assert_eq!(pages[1], NONE, "{:?}: {pages:?}", stage.way);
            assert!(pages[0].contains(PRESENT) && pages[2].contains(PRESENT));
            // Back again with what the mapping holds, and never clean content of its own.
            stage.puppet.load(page(range, 1)).unwrap();
            let again = stage.pages(range)[1];
            assert!(again.contains(PRESENT) && again.intersects(ZERO | FILE), "{:?}: {again:?}", stage.way);
            stage.puppet.fill(page(range, 1), 3).unwrap();
            assert_eq!(stage.pages(range)[1], PRESENT | DIRTY, "{:?}", stage.way);
        }
        // Truncation takes copied pages away without a system call in the target.
        file.as_file().set_len(PAGE_SIZE).unwrap();
        assert_eq!(stage.pages(copied)[1..], [NONE; 3], "{:?}", stage.way);
    });
}

#[test]
fn protection_hides_nothing() {
    Stage::each("protection_hides_nothing", &TRACKING, |stage| {
        let range = stage.puppet.map(4 * PAGE_SIZE).unwrap();
        stage.puppet.fill(range, 1).unwrap();
        stage.track(&[range]);
        stage.puppet.fill(page(range, 1), 2).unwrap();
        stage.puppet.syscall(libc::SYS_mprotect, &[range.start.get(), range.len(), 0]).unwrap();
        let pages = stage.pages(range);
        assert_eq!(pages, [PRESENT, PRESENT | DIRTY, PRESENT, PRESENT], "{:?}", stage.way);
        // Writes from outside go through the protection, and are seen.
        let mem = crate::kernel::memory::ProcMem::open(stage.puppet.pid()).unwrap();
        mem.write_at(page(range, 3).start, &[7]).unwrap();
        assert_eq!(stage.pages(range)[3], PRESENT | DIRTY, "{:?}", stage.way);
    });
}

#[test]
fn the_kernel_writing_into_a_buffer_is_seen() {
    Stage::each("the_kernel_writing_into_a_buffer_is_seen", &TRACKING, |stage| {
        let range = stage.puppet.map(4 * PAGE_SIZE).unwrap();
        stage.puppet.fill(range, 1).unwrap();
        stage.track(&[range]);
        let fd = stage.puppet.open(Path::new("/dev/zero")).unwrap();
        stage.puppet.syscall(libc::SYS_read, &[fd as u64, page(range, 2).start.get(), 8]).unwrap();
        assert_eq!(stage.pages(range), [PRESENT, PRESENT, PRESENT | DIRTY, PRESENT], "{:?}", stage.way);
    });
}

#[test]
fn shared_memory_is_file() {
    Stage::each("shared_memory_is_file", &ALL, |stage| {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let range =
            stage.puppet.mmap(Addr(0), 2 * PAGE_SIZE, libc::PROT_READ | libc::PROT_WRITE, flags, -1).unwrap();
        stage.puppet.fill(page(range, 0), 1).unwrap();
        assert_eq!(stage.pages(range), [PRESENT | FILE | DIRTY, NONE], "{:?}", stage.way);
    });
}

#[test]
fn a_new_mapping_is_dirty() {
    Stage::each("a_new_mapping_is_dirty", &TRACKING, |stage| {
        let old = stage.puppet.map(2 * PAGE_SIZE).unwrap();
        stage.puppet.fill(old, 1).unwrap();
        stage.track(&[old]);
        // In the same place, so that stale state would show.
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let new =
            stage.puppet.mmap(old.start, old.len(), libc::PROT_READ | libc::PROT_WRITE, flags, -1).unwrap();
        stage.puppet.fill(page(new, 0), 2).unwrap();
        assert_eq!(stage.pages(new), [PRESENT | DIRTY, NONE], "{:?}", stage.way);
        stage.track(&[new]);
        assert_eq!(stage.pages(new), [PRESENT, NONE], "{:?}", stage.way);
    });
}

#[test]
fn one_untracked_vma_leaves_its_neighbours_exact() {
    Stage::each("one_untracked_vma_leaves_its_neighbours_exact", &[Way::UffdWp], |stage| {
        let range = stage.puppet.map(6 * PAGE_SIZE).unwrap();
        stage.puppet.fill(range, 1).unwrap();
        let (low, high) = (
            AddrRange { end: page(range, 2).start, ..range },
            AddrRange { start: page(range, 4).start, ..range },
        );
        stage.track(&[low, high]);
        stage.puppet.fill(page(range, 5), 2).unwrap();
        let dirty = PRESENT | DIRTY;
        assert_eq!(stage.pages(range), [PRESENT, PRESENT, dirty, dirty, PRESENT, dirty]);
    });
}

#[test]
fn a_moved_mapping_is_dirty_and_tracked_anew() {
    Stage::each("a_moved_mapping_is_dirty_and_tracked_anew", &[Way::UffdWp], |stage| {
        let old = stage.puppet.map(4 * PAGE_SIZE).unwrap();
        stage.puppet.fill(old, 1).unwrap();
        stage.track(&[old]);
        let target = stage.puppet.map(4 * PAGE_SIZE).unwrap();
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        let arguments = [old.start.get(), old.len(), old.len(), flags, target.start.get()];
        stage.puppet.syscall(libc::SYS_mremap, &arguments).unwrap();
        assert_eq!(stage.pages(target), [PRESENT | DIRTY; 4]);
        // Writable PTEs with an old protection bit would miss writes from here on.
        stage.puppet.fill(page(target, 0), 2).unwrap();
        stage.track(&[target]);
        assert_eq!(stage.pages(target), [PRESENT; 4]);
        stage.puppet.fill(page(target, 0), 3).unwrap();
        stage.puppet.fill(page(target, 2), 3).unwrap();
        assert_eq!(stage.pages(target), [PRESENT | DIRTY, PRESENT, PRESENT | DIRTY, PRESENT]);
    });
}

#[test]
fn guard_regions_have_no_content() {
    const NAME: &str = "guard_regions_have_no_content";
    Stage::each(NAME, &ALL, |stage| {
        let range = stage.puppet.map(4 * PAGE_SIZE).unwrap();
        stage.puppet.fill(range, 1).unwrap();
        if let Err(e) = stage.madvise(page(range, 1), MADV_GUARD_INSTALL) {
            return skip(&format!("{NAME}[{:?}]", stage.way), &format!("no guard regions (Linux 6.13): {e}"));
        }
        stage.track(&[range]);
        let pages = stage.pages(range);
        assert_eq!(pages[1], PageFlags::GUARD, "{:?}", stage.way);
        assert!([0, 2, 3].iter().all(|&i| pages[i].contains(PRESENT)), "{:?}: {pages:?}", stage.way);
    });
}

#[test]
fn huge_pages_and_the_huge_zero_page() {
    const NAME: &str = "huge_pages_and_the_huge_zero_page";
    Stage::each(NAME, &ALL, |stage| {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let area = stage
            .puppet
            .mmap(Addr(0), 6 * CHUNK_SIZE, libc::PROT_READ | libc::PROT_WRITE, flags, -1)
            .unwrap();
        if let Err(e) = stage.madvise(area, libc::MADV_HUGEPAGE as u64) {
            return skip(&format!("{NAME}[{:?}]", stage.way), &format!("no huge pages: {e}"));
        }
        let start = Addr(area.start.get().next_multiple_of(CHUNK_SIZE));
        let range = AddrRange::with_len(start, 4 * CHUNK_SIZE);
        let chunk = |i| AddrRange::with_len(start.saturating_add(i * CHUNK_SIZE), CHUNK_SIZE);
        stage.puppet.load(page(chunk(0), 0)).unwrap();
        stage.puppet.fill(page(chunk(1), 0), 1).unwrap();
        stage.puppet.load(page(chunk(2), 0)).unwrap();
        let pages = stage.pages(range);
        let of = |i: usize| &pages[i * 512..(i + 1) * 512];
        if !of(1)[511].contains(PRESENT) {
            return skip(&format!("{NAME}[{:?}]", stage.way), "the kernel gave no huge page");
        }
        for zero in [0, 2] {
            assert!(
                of(zero).iter().all(|p| *p - DIRTY == PRESENT | ZERO),
                "{:?}: {:?}",
                stage.way,
                &of(zero)[..2]
            );
        }
        assert!(of(1).iter().all(|p| *p - DIRTY == PRESENT), "{:?}: {:?}", stage.way, &of(1)[..2]);
        assert!(of(3).iter().all(|p| *p == NONE), "{:?}", stage.way);
        if !TRACKING.contains(&stage.way) {
            return;
        }
        stage.track(&[range]);
        stage.puppet.fill(page(chunk(1), 7), 2).unwrap();
        let pages = stage.pages(range);
        assert_eq!(pages[512 + 7], PRESENT | DIRTY, "{:?}", stage.way);
        assert!(pages[..512].iter().all(|p| *p == PRESENT | ZERO), "{:?}: {:?}", stage.way, pages[0]);
    });
}

#[test]
fn swapped_pages_stay_what_they_were() {
    const NAME: &str = "swapped_pages_stay_what_they_were";
    Stage::each(NAME, &TRACKING, |stage| {
        let range = stage.puppet.map(4 * PAGE_SIZE).unwrap();
        stage.puppet.fill(range, 1).unwrap();
        stage.track(&[range]);
        stage.puppet.fill(page(range, 1), 2).unwrap();
        stage.madvise(range, libc::MADV_PAGEOUT as u64).unwrap();
        let pages = stage.pages(range);
        if !pages[0].contains(PageFlags::SWAPPED) {
            return skip(&format!("{NAME}[{:?}]", stage.way), "no swap space");
        }
        let swapped = PageFlags::SWAPPED;
        assert_eq!(pages, [swapped, swapped | DIRTY, swapped, swapped], "{:?}", stage.way);
        stage.puppet.load(range).unwrap();
        assert_eq!(stage.pages(range), [PRESENT, PRESENT | DIRTY, PRESENT, PRESENT], "{:?}", stage.way);
    });
}

#[test]
fn sparse_memory_costs_no_page_tables() {
    Stage::each("sparse_memory_costs_no_page_tables", &[Way::UffdWp], |stage| {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let range =
            stage.puppet.mmap(Addr(0), 64 << 30, libc::PROT_READ | libc::PROT_WRITE, flags, -1).unwrap();
        stage.puppet.fill(page(range, 1 << 20), 1).unwrap();
        let tables = |stage: &Stage| {
            let status = std::fs::read_to_string(format!("/proc/{}/status", stage.puppet.pid())).unwrap();
            let line = status.lines().find(|l| l.starts_with("VmPTE:")).unwrap().to_owned();
            line.split_ascii_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
        };
        let before = tables(stage);
        stage.track(&[range]);
        assert!(tables(stage) <= before + 16, "{} KiB of page tables, {before} before", tables(stage));
        let mut entries = PageCount::ZERO;
        let runs = stage.source.scan(&[range], &mut entries).unwrap();
        assert!(runs.iter().all(|run| run.flags == PRESENT), "{runs:?}");
        assert_eq!(entries, range.pages());
    });
}

#[test]
fn entries_are_counted_alike() {
    Stage::each("entries_are_counted_alike", &ALL, |stage| {
        let range = stage.puppet.map(100 * PAGE_SIZE).unwrap();
        stage.puppet.fill(page(range, 50), 1).unwrap();
        stage.track(&[range]);
        let mut entries = PageCount(7);
        let asked = [
            AddrRange { end: page(range, 10).start, ..range },
            AddrRange { start: page(range, 40).start, ..range },
        ];
        let runs = stage.source.scan(&asked, &mut entries).unwrap();
        assert_eq!(entries, PageCount(7 + 10 + 60), "{:?}", stage.way);
        assert_eq!(runs.len(), 1);
        assert_eq!(runs[0].range, page(range, 50));
    });
}

#[test]
fn a_process_that_ended_is_an_error_and_not_an_empty_scan() {
    Stage::each("a_process_that_ended_is_an_error_and_not_an_empty_scan", &ALL, |stage| {
        let range = stage.puppet.map(4 * PAGE_SIZE).unwrap();
        stage.puppet.fill(range, 1).unwrap();
        stage.track(&[range]);
        let ended = std::mem::replace(&mut stage.puppet, Puppet::start().unwrap());
        drop(ended);
        let result = stage.source.scan(&[range], &mut PageCount(0));
        assert!(matches!(result, Err(DirtyError::Gone { .. })), "{:?}: {result:?}", stage.way);
    });
}

#[test]
fn random_writes_are_exactly_what_is_found() {
    Stage::each("random_writes_are_exactly_what_is_found", &TRACKING, |stage| {
        const PAGES: u64 = 2000;
        let range = stage.puppet.map(PAGES * PAGE_SIZE).unwrap();
        stage.puppet.fill(range, 1).unwrap();
        stage.track(&[range]);
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        for round in 0..3 {
            let mut expected = vec![PRESENT; PAGES as usize];
            for _ in 0..250 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let i = (state >> 33) % PAGES;
                stage.puppet.fill(page(range, i), round).unwrap();
                expected[i as usize] = PRESENT | DIRTY;
            }
            assert_eq!(stage.pages(range), expected, "{:?} in round {round}", stage.way);
            stage.source.clear(&[range]).unwrap();
        }
    });
}

#[test]
fn the_witness_notices_another_clear() {
    const NAME: &str = "the_witness_notices_another_clear";
    Stage::each(NAME, &[Way::SoftDirty], |stage| {
        let pid = stage.puppet.pid();
        let page = stage.puppet.map(PAGE_SIZE).unwrap();
        stage.puppet.fill(page, 1).unwrap();
        let read_only = libc::PROT_READ as u64;
        stage.puppet.syscall(libc::SYS_mprotect, &[page.start.get(), PAGE_SIZE, read_only]).unwrap();
        let vmas = maps::read(pid).unwrap();
        stage.track(&[]);
        let witness = Witness::arm(pid, &vmas).unwrap().expect("a page to be the witness");
        assert_eq!(witness.verdict().unwrap(), Verdict::Undisturbed);
        stage.puppet.fill(stage.puppet.map(PAGE_SIZE).unwrap(), 1).unwrap();
        assert_eq!(witness.verdict().unwrap(), Verdict::Undisturbed);
        stage.source.clear(&[]).unwrap();
        assert_eq!(witness.verdict().unwrap(), Verdict::Cleared);
        let at = witness.addr().get();
        stage.puppet.syscall(libc::SYS_munmap, &[at, PAGE_SIZE]).unwrap();
        assert_eq!(witness.verdict().unwrap(), Verdict::Lost);
    });
}

#[test]
fn trackers_have_names() {
    for kind in [TrackerKind::SoftDirty, TrackerKind::UffdWp] {
        assert_eq!(kind.name().parse(), Ok(kind));
        assert_eq!(serde_json::to_value(kind).unwrap(), kind.to_string());
    }
    assert!("softdirty".parse::<TrackerKind>().is_err());
}

/// Why the agent need not tell of madvise where this source is used.
#[test]
fn with_write_protection_a_dropped_page_never_looks_like_what_it_was() {
    use std::os::unix::fs::FileExt;
    const NAME: &str = "with_write_protection_a_dropped_page_never_looks_like_what_it_was";
    const MADV_PAGEOUT: u64 = 21;
    Stage::each(NAME, &[Way::UffdWp], |stage| {
        let small = stage.puppet.map(8 * PAGE_SIZE).unwrap();
        let wide = stage.puppet.map(3 * CHUNK_SIZE).unwrap();
        let huge = AddrRange::with_len(Addr(wide.start.get().next_multiple_of(CHUNK_SIZE)), CHUNK_SIZE);
        let _ = stage.madvise(huge, libc::MADV_HUGEPAGE as u64);
        let (_file, file) = stage.file(4);
        for range in [small, huge, file] {
            stage.puppet.fill(range, 7).unwrap();
        }
        stage.track(&[small, wide, file]);
        assert_eq!(stage.pages(file), [PRESENT; 4]);
        let mem = std::fs::File::open(format!("/proc/{}/mem", stage.puppet.pid())).unwrap();
        let mut dropped = 0;
        for (range, advices) in [
            (page(small, 0), &[libc::MADV_DONTNEED as u64][..]),
            (page(small, 1), &[libc::MADV_FREE as u64, MADV_PAGEOUT]),
            (page(file, 0), &[libc::MADV_DONTNEED as u64]),
            (huge, &[libc::MADV_FREE as u64, MADV_PAGEOUT]),
        ] {
            for &advice in advices {
                stage.madvise(range, advice).unwrap();
            }
            // As it is, and again as it is once somebody has looked at it.
            for look in [false, true] {
                let mut byte = [7];
                if look {
                    mem.read_exact_at(&mut byte, range.start.get()).unwrap();
                    dropped += u32::from(byte != [7]);
                }
                let flags = stage.pages(range);
                let kept = |f: &PageFlags| {
                    f.intersects(PRESENT | PageFlags::SWAPPED) && !f.intersects(DIRTY | FILE | ZERO)
                };
                let looks_the_same = flags.first().is_some_and(kept);
                assert!(!looks_the_same || byte == [7], "{range} after {advices:?}, {look}: {flags:?}");
            }
        }
        // Reclaim may decline; DONTNEED may not.
        assert!(dropped >= 2, "{dropped}");
        if dropped < 4 {
            skip(&format!("{NAME} (MADV_FREE)"), "reclaim did not take the pages");
        }
    });
}
