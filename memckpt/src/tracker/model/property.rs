//! The model against a reference address space that does random operations and tells of them by events.

use std::collections::BTreeMap;
use std::convert::Infallible;

use proptest::prelude::*;

use super::*;
use crate::kernel::maps::Prot;

const PAGES: u64 = 64;

/// One mapped page of the reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Page {
    /// Which memory this is: another number for every page ever mapped, and for every drop of contents.
    birth: u64,
    prot: Prot,
    /// Inode and page offset, of a file page.
    file: Option<(u64, u64)>,
    lazily_freed: bool,
    nonlinear: bool,
}

/// A page-granular address space; VMAs are what can merge, except at `fences`.
#[derive(Clone, Debug, Default)]
struct Space {
    pages: BTreeMap<u64, Page>,
    fences: Vec<u64>,
    births: u64,
    write_locks: u64,
}

#[derive(Clone, Debug)]
enum Op {
    Map {
        at: u64,
        len: u64,
        file: Option<(u64, u64)>,
    },
    Unmap {
        at: u64,
        len: u64,
    },
    Remap {
        at: u64,
        len: u64,
        new_len: u64,
        to: u64,
        keep: bool,
    },
    Protect {
        at: u64,
        len: u64,
        prot: u8,
    },
    Drop {
        at: u64,
        len: u64,
    },
    Free {
        at: u64,
        len: u64,
    },
    Nonlinear {
        at: u64,
        len: u64,
    },
    Fence {
        at: u64,
    },
    /// An unmap (or map) that no hook sees: only the write-lock count moves.
    Unseen {
        at: u64,
        len: u64,
        map: bool,
    },
    Sync {
        frozen: bool,
    },
    Epoch,
}

fn range(at: u64, len: u64) -> AddrRange {
    AddrRange::new(at << 12, (at + len) << 12)
}

impl Space {
    fn birth(&mut self) -> u64 {
        self.births += 1;
        self.births
    }

    fn map(&mut self, at: u64, len: u64, file: Option<(u64, u64)>) {
        for page in at..at + len {
            let birth = self.birth();
            let file = file.map(|(inode, offset)| (inode, offset + page - at));
            let prot = Prot::READ;
            self.pages.insert(page, Page { birth, prot, file, lazily_freed: false, nonlinear: false });
        }
    }

    fn unmap(&mut self, at: u64, len: u64) {
        (at..at + len).for_each(|page| {
            self.pages.remove(&page);
        });
    }

    /// Does `op` and says what a complete set of hooks would.
    fn run(&mut self, op: &Op) -> Option<(Change, u64)> {
        match *op {
            Op::Map { at, len, file } => {
                self.map(at, len, file);
                self.write_locks += 1;
                Some((Change::Replaced(range(at, len)), 1))
            }
            Op::Unmap { at, len } => {
                self.unmap(at, len);
                self.write_locks += 1;
                Some((Change::Replaced(range(at, len)), 1))
            }
            Op::Remap { at, len, new_len, to, keep } => {
                let old: Vec<_> = (at..at + len).map_while(|p| self.pages.get(&p).copied()).collect();
                let apart = to + new_len <= at || at + len <= to || to == at;
                if old.len() as u64 != len || !apart || (keep && (to == at || new_len != len)) {
                    return None;
                }
                self.write_locks += 1;
                self.unmap(at, len);
                let last = old[old.len() - 1];
                for n in 0..new_len {
                    let mut page = old.get(n as usize).copied().unwrap_or(last);
                    if n >= len {
                        page.birth = self.birth();
                        page.file = last.file.map(|(inode, offset)| (inode, offset + n + 1 - len));
                        page.lazily_freed = false;
                        page.nonlinear = false;
                    }
                    self.pages.insert(to + n, page);
                }
                if keep {
                    for (page, mut what) in (at..).zip(old) {
                        what.birth = self.birth();
                        what.lazily_freed = false;
                        self.pages.insert(page, what);
                    }
                }
                Some((Change::Moved { from: range(at, len), to: range(to, new_len) }, 1))
            }
            Op::Protect { at, len, prot } => {
                let prot = Prot::from_bits_truncate(prot);
                self.pages.range_mut(at..at + len).for_each(|(_, page)| page.prot = prot);
                self.write_locks += 1;
                Some((Change::Attributes(range(at, len)), 1))
            }
            Op::Drop { at, len } => {
                for page in at..at + len {
                    let birth = self.birth();
                    if let Some(page) = self.pages.get_mut(&page) {
                        page.birth = birth;
                        page.lazily_freed = false;
                    }
                }
                Some((Change::Dropped(range(at, len)), 0))
            }
            Op::Free { at, len } => {
                self.pages.range_mut(at..at + len).for_each(|(_, page)| page.lazily_freed = true);
                Some((Change::Freed(range(at, len)), 0))
            }
            Op::Nonlinear { at, len } => {
                for page in at..at + len {
                    let birth = self.birth();
                    if let Some(page) = self.pages.get_mut(&page) {
                        page.birth = birth;
                        page.nonlinear = true;
                    }
                }
                self.write_locks += 2;
                Some((Change::Nonlinear(range(at, len)), 1))
            }
            Op::Fence { at } => {
                // A border that the kernel keeps for a reason of its own, made by a call that has an event.
                self.fences.push(at);
                self.write_locks += 1;
                Some((Change::Attributes(range(at, 1)), 1))
            }
            Op::Unseen { at, len, map } => {
                if map {
                    self.map(at, len, None);
                } else {
                    self.unmap(at, len);
                }
                self.write_locks += 1;
                None
            }
            Op::Sync { .. } | Op::Epoch => None,
        }
    }

    /// The same as told at the mmap lock, where no result is known.
    fn run_by_lock(&mut self, op: &Op) -> Option<(Change, Explains)> {
        let (change, write_locks) = self.run(op)?;
        let explains = if write_locks == 0 { Explains::Nothing } else { Explains::Lock(self.write_locks) };
        let change = match change {
            Change::Replaced(range) => Change::Unclear(range),
            Change::Moved { from, to } if from.start == to.start => {
                Change::Unclear(AddrRange { start: from.end.min(to.end), end: from.end.max(to.end) })
            }
            Change::Moved { from, to } => {
                // Somewhere in what was found, at times.
                let exact = self.births.is_multiple_of(2);
                let end = if exact { to.end } else { to.end.saturating_add(4096) };
                Change::MaybeMoved { from, to: AddrRange { start: to.start, end }, exact }
            }
            other => other,
        };
        Some((change, explains))
    }

    fn vmas(&self) -> Vec<Vma> {
        let mut vmas: Vec<Vma> = Vec::new();
        for (&at, page) in &self.pages {
            let (inode, offset) = page.file.map_or((0, 0), |(inode, offset)| (inode, offset << 12));
            if let Some(last) = vmas.last_mut()
                && last.range.end == range(at, 1).start
                && !self.fences.contains(&at)
                && last.prot == page.prot
                && last.inode == inode
                && (inode == 0 || last.offset + last.range.len() == offset)
            {
                last.range.end = range(at, 1).end;
                continue;
            }
            let dev = (0, u32::from(inode != 0));
            vmas.push(Vma {
                range: range(at, 1),
                prot: page.prot,
                shared: false,
                offset,
                dev,
                inode,
                name: String::new(),
            });
        }
        vmas
    }
}

impl LayoutSource for &Space {
    type Error = Infallible;

    fn query(&mut self, range: AddrRange) -> Result<Vec<Vma>, Infallible> {
        Ok(self.vmas().into_iter().filter(|v| v.range.overlaps(range)).collect())
    }

    fn read_all(&mut self) -> Result<Vec<Vma>, Infallible> {
        Ok(self.vmas())
    }
}

fn op() -> impl Strategy<Value = Op> {
    let at = 0..PAGES - 16;
    let len = 1..16u64;
    let spot = || (at.clone(), len.clone());
    let file = prop::option::of((1..3u64, 0..40u64));
    prop_oneof![
        4 => (spot(), file).prop_map(|((at, len), file)| Op::Map { at, len, file }),
        3 => spot().prop_map(|(at, len)| Op::Unmap { at, len }),
        4 => (spot(), len.clone(), at.clone(), any::<bool>(), any::<bool>()).prop_map(
            |((at, len), new_len, to, keep, in_place)| {
                let to = if in_place { at } else { to };
                Op::Remap { at, len, new_len: if keep { len } else { new_len }, to, keep }
            }
        ),
        3 => (spot(), 0..8u8).prop_map(|((at, len), prot)| Op::Protect { at, len, prot }),
        1 => spot().prop_map(|(at, len)| Op::Drop { at, len }),
        2 => spot().prop_map(|(at, len)| Op::Free { at, len }),
        1 => spot().prop_map(|(at, len)| Op::Nonlinear { at, len }),
        1 => at.clone().prop_map(|at| Op::Fence { at }),
        1 => (spot(), any::<bool>()).prop_map(|((at, len), map)| Op::Unseen { at, len, map }),
        3 => any::<bool>().prop_map(|frozen| Op::Sync { frozen }),
        1 => Just(Op::Epoch),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 600 } else { 4000 }))]

    #[test]
    fn equals_the_kernel_and_misses_no_change(ops in prop::collection::vec(op(), 1..60), by_lock: bool) {
        let mut space = Space::default();
        let mut model = VmaModel::new();
        let _ = model.sync(&mut &space, Some(0), true);
        model.begin_epoch(Some(0));
        let mut at_epoch = space.clone();
        // What a client has, of now and then.
        let mut given = (0, Vec::new());
        // Memory replaced at its place by something alike, with no event: beyond any layout comparison.
        let mut unseen = RangeSet::new();
        for op in ops.iter().chain([&Op::Sync { frozen: true }]) {
            if let Op::Unseen { at, len, .. } = *op {
                unseen.insert(range(at, len));
            }
            let told = if by_lock {
                space.run_by_lock(op)
            } else {
                space.run(op).map(|(change, write_locks)| (change, Explains::Moves(write_locks)))
            };
            if let Some((change, explains)) = told {
                model.apply(change, explains);
            }
            let frozen = match op {
                Op::Sync { frozen } => *frozen,
                Op::Epoch => true,
                _ => continue,
            };
            let Ok(synced) = model.sync(&mut &space, Some(space.write_locks), frozen);
            prop_assert_eq!(model.vmas(), space.vmas(), "asked {:?}", synced.asked);
            let told = model.since(given.0).map_or_else(|| given.1.clone(), |relayout| relayout.apply(&given.1));
            prop_assert_eq!(&told, &space.vmas(), "given {:?}", given);
            if !frozen {
                let (revision, vmas) = model.give();
                given = (revision, vmas.to_vec());
            }
            for (&at, page) in &space.pages {
                let address = range(at, 1).start;
                let kept = at_epoch.pages.get(&at).is_some_and(|then| then.birth == page.birth);
                prop_assert!(
                    kept || model.changed().contains(address) || unseen.contains(address),
                    "page {at} is other memory than at the epoch's start and not marked"
                );
                prop_assert!(!page.lazily_freed || model.doubtful().contains(address), "page {at} not doubtful");
                prop_assert!(!page.nonlinear || model.nonlinear().contains(address), "page {at} not nonlinear");
            }
            if matches!(op, Op::Epoch) {
                model.begin_epoch(Some(space.write_locks));
                at_epoch = space.clone();
                unseen = RangeSet::new();
            }
        }
    }

    #[test]
    fn a_lost_record_makes_everything_changed_until_the_next_epoch(ops in prop::collection::vec(op(), 1..20)) {
        let mut space = Space::default();
        let mut model = VmaModel::new();
        for op in &ops {
            let _ = space.run(op);
        }
        model.forget();
        let Ok(_) = model.sync(&mut &space, Some(space.write_locks), true);
        prop_assert_eq!(model.vmas(), space.vmas());
        prop_assert!(model.changed().overlaps(range(0, 1)) && model.changed().overlaps(range(PAGES, 1)));
        model.begin_epoch(Some(space.write_locks));
        prop_assert!(model.changed().is_empty());
    }
}

#[test]
fn protection_and_in_place_growth_leave_the_rest_inheritable() {
    let mut space = Space::default();
    space.run(&Op::Map { at: 1, len: 8, file: None });
    let mut model = VmaModel::new();
    let Ok(_) = model.sync(&mut &space, Some(space.write_locks), true);
    model.begin_epoch(Some(space.write_locks));
    for op in
        [Op::Protect { at: 2, len: 2, prot: 3 }, Op::Remap { at: 6, len: 3, new_len: 5, to: 6, keep: false }]
    {
        let (change, locks) = space.run(&op).unwrap_or((Change::Everything, 0));
        model.apply(change, Explains::Moves(locks));
    }
    let Ok(synced) = model.sync(&mut &space, Some(space.write_locks), true);
    assert_eq!(model.vmas(), space.vmas());
    assert!(!synced.asked.contains(&EVERYTHING), "events explain both locks: {synced:?}");
    assert_eq!(model.changed().as_slice(), [range(9, 2)]);
}

#[test]
fn a_doubt_ends_with_the_mapping_though_the_result_of_munmap_is_unknown() {
    let mut space = Space::default();
    space.run(&Op::Map { at: 1, len: 8, file: None });
    let mut model = VmaModel::new();
    let Ok(_) = model.sync(&mut &space, Some(space.write_locks), true);
    for (op, left) in [
        (Op::Free { at: 1, len: 8 }, range(1, 8)),
        // It may have failed, as far as the event goes; once everything stands still, the hole is there to see.
        (Op::Unmap { at: 1, len: 4 }, range(5, 4)),
    ] {
        let (change, explains) = space.run_by_lock(&op).unwrap_or((Change::Everything, Explains::Nothing));
        model.apply(change, explains);
        let Ok(_) = model.sync(&mut &space, Some(space.write_locks), true);
        assert_eq!(model.doubtful().as_slice(), [left]);
        model.begin_epoch(Some(space.write_locks));
    }
}

#[test]
fn an_unexplained_write_lock_reads_everything_and_again_once_frozen() {
    let space = Space::default();
    let mut model = VmaModel::new();
    let Ok(_) = model.sync(&mut &space, Some(5), true);
    let Ok(quiet) = model.sync(&mut &space, Some(5), true);
    assert_eq!(quiet.asked, []);
    let Ok(live) = model.sync(&mut &space, Some(6), false);
    assert_eq!(live.asked, [EVERYTHING]);
    let Ok(frozen) = model.sync(&mut &space, Some(6), true);
    assert_eq!(frozen.asked, [EVERYTHING]);
    let Ok(settled) = model.sync(&mut &space, Some(6), true);
    assert_eq!(settled.asked, []);
}
