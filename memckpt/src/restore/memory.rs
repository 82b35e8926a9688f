//! What is to be done to make the memory of a process: a pure plan, from what there is and what there shall be.

use crate::addr::AddrRange;
use crate::image::Chain;
use crate::image::proto::VmaEntry;
use crate::plan::classify::VmaStatus;
use crate::range_set::RangeSet;

use super::checkpoint::range;

/// The areas that there are, or shall be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Space<'a> {
    pub(super) vmas: &'a [VmaEntry],
    /// Where a touch is a fault.
    pub(super) guards: &'a RangeSet,
    /// Where pages are locked as they come, if at all.
    pub(super) locked_on_fault: &'a RangeSet,
}

/// What is to be done: steps, then the pages that are to come into place, then steps again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) before: Vec<Step>,
    /// From where they are held; can be written until the later steps.
    pub(super) pages: RangeSet,
    pub(super) after: Vec<Step>,
}

/// A step towards it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// munmap(2)
    Unmap(AddrRange),
    /// mmap(2) of anonymous memory, or of what a file or shared object holds.
    Map { range: AddrRange, prot: u32, flags: u32, source: Source },
    /// shmat(2) of the System V segment with the content of a shared object.
    Attach { range: AddrRange, object: u32 },
    /// madvise(2)
    Advise { range: AddrRange, advice: i32 },
    /// mprotect(2)
    Protect { range: AddrRange, prot: u32 },
    /// mlock2(2), touching what is not there, or not.
    Lock { range: AddrRange, on_fault: bool },
}

/// How an area comes about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// By mmap(2).
    Mapped(Source),
    /// With a System V segment that has the content of a shared object: the part of it from this offset on.
    Segment { object: u32, offset: u64 },
}

/// What a mapping maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Nothing.
    Anonymous,
    /// A file of `files.img`, from this offset on, opened with these flags.
    File { id: u32, offset: u64, flags: u32 },
    /// A shared object of `pagemap-shmem-ID.img`, from this offset on.
    Shared { id: u32, offset: u64 },
}

const MAP_SHARED: u32 = libc::MAP_SHARED as u32;
/// What shmat(2) gives its mapping.
const ATTACHED: u32 = (libc::PROT_READ | libc::PROT_WRITE) as u32;
/// Flags of mmap(2) that a mapping keeps.
const KEPT: u32 = (libc::MAP_SHARED
    | libc::MAP_PRIVATE
    | libc::MAP_ANONYMOUS
    | libc::MAP_GROWSDOWN
    | libc::MAP_NORESERVE
    | MAP_DROPPABLE) as u32;
/// Private memory that the kernel may drop (Linux 6.11).
const MAP_DROPPABLE: i32 = 0x08;
/// Advice that says what becomes of the pages that are about to come.
const EARLY: [i32; 2] = [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE];
/// Advice of madvise(2) (Linux 6.13; 6.15 for mappings of files).
const GUARD_INSTALL: i32 = 102;
const GUARD_REMOVE: i32 = 103;

/// Whether mmap(2) makes it: not the kernel's own areas.
pub(super) fn is_made(vma: &VmaEntry) -> bool {
    let own = VmaStatus::VSYSCALL | VmaStatus::VDSO | VmaStatus::VVAR | VmaStatus::UPROBES;
    !status(vma).intersects(own)
}

pub(super) fn status(vma: &VmaEntry) -> VmaStatus {
    VmaStatus::from_bits_retain(vma.status)
}

/// How it comes about.
pub(super) fn origin(vma: &VmaEntry) -> Origin {
    if status(vma).contains(VmaStatus::SYSVIPC) {
        return Origin::Segment { object: vma.shmid as u32, offset: vma.pgoff };
    }
    Origin::Mapped(source(vma))
}

fn source(vma: &VmaEntry) -> Source {
    let (id, offset) = (vma.shmid as u32, vma.pgoff);
    if status(vma).contains(VmaStatus::ANON_SHARED) {
        return Source::Shared { id, offset };
    }
    if status(vma).intersects(VmaStatus::FILE_PRIVATE | VmaStatus::FILE_SHARED | VmaStatus::MEMFD) {
        let writes = vma.flags & MAP_SHARED != 0 && vma.prot & libc::PROT_WRITE as u32 != 0;
        let least = if writes { libc::O_RDWR } else { libc::O_RDONLY } as u32;
        let flags = vma.fdflags.unwrap_or(least) & libc::O_ACCMODE as u32;
        return Source::File { id, offset, flags };
    }
    Source::Anonymous
}

/// Makes the areas of `space` with the pages of `memory`, in an empty address space.
pub(super) fn build(space: Space<'_>, memory: &Chain) -> Plan {
    let mut plan = Plan::default();
    for vma in space.vmas.iter().filter(|vma| is_made(vma)) {
        make(vma, space, memory, &mut plan);
    }
    plan
}

/// Makes `vma`, one of `space`.
fn make(vma: &VmaEntry, space: Space<'_>, memory: &Chain, plan: &mut Plan) {
    match origin(vma) {
        Origin::Mapped(source) => {
            // What is shared its object holds.
            let private = vma.flags & MAP_SHARED == 0;
            let held: Vec<AddrRange> =
                memory.within(range(vma)).filter(|_| private).map(|run| run.range).collect();
            let prot = if held.is_empty() { vma.prot } else { vma.prot | libc::PROT_WRITE as u32 };
            plan.before.push(Step::Map { range: range(vma), prot, flags: map_flags(vma), source });
            plan.pages.extend(held);
            finish(vma, space, prot, plan);
        }
        Origin::Segment { object, offset } => {
            // All of it is attached at once, with the first of its areas; several they are by what was done to some of its pages.
            if offset == 0 {
                plan.before.push(Step::Attach { range: attachment(vma, space.vmas), object });
            }
            finish(vma, space, ATTACHED, plan);
        }
    }
}

/// The flags that mmap(2) takes. Droppable memory is private, and a type of its own to it.
fn map_flags(vma: &VmaEntry) -> u32 {
    let flags = vma.flags & KEPT;
    if flags & MAP_DROPPABLE as u32 == 0 { flags } else { flags & !(libc::MAP_PRIVATE as u32) }
}

/// The addresses of a segment that is attached with `vma`, one of `vmas`, as its first area.
fn attachment(vma: &VmaEntry, vmas: &[VmaEntry]) -> AddrRange {
    let mut whole = range(vma);
    for next in vmas.iter().filter(|next| next.start >= vma.end) {
        let follows = range(next).start == whole.end && next.shmid == vma.shmid && next.pgoff == whole.len();
        if !(follows && is_segment(next)) {
            break;
        }
        whole.end = range(next).end;
    }
    whole
}

fn is_segment(vma: &VmaEntry) -> bool {
    matches!(origin(vma), Origin::Segment { .. })
}

/// What `vma`, which has protection `prot` so far, has besides its pages.
fn finish(vma: &VmaEntry, space: Space<'_>, prot: u32, plan: &mut Plan) {
    let range = range(vma);
    let (early, late): (Vec<i32>, Vec<i32>) = advice(vma).partition(|advice| EARLY.contains(advice));
    plan.before.extend(early.into_iter().map(|advice| Step::Advise { range, advice }));
    if prot != vma.prot {
        plan.after.push(Step::Protect { range, prot: vma.prot });
    }
    plan.after.extend(late.into_iter().map(|advice| Step::Advise { range, advice }));
    // What is locked takes none any more.
    plan.after.extend(space.guards.within(range).map(|range| Step::Advise { range, advice: GUARD_INSTALL }));
    lock(vma, space, &mut plan.after);
}

/// The advice of madvise(2) that is in force.
fn advice(vma: &VmaEntry) -> impl Iterator<Item = i32> {
    let bits = vma.madv.unwrap_or(0);
    (0..64).filter(move |n| bits & (1 << n) != 0)
}

/// Turns the address space of a parent, as a fork has left it, into that of its child. What both have alike stays shared until it
/// is written; `differs` tells which pages of a range do not.
pub(super) fn adapt<E>(
    Space { vmas: parent, guards: inherited, .. }: Space<'_>,
    space: Space<'_>,
    memory: &Chain,
    mut differs: impl FnMut(AddrRange) -> Result<Difference, E>,
) -> Result<Plan, E> {
    let mut plan = Plan::default();
    let child = space.vmas;
    // What is attached as a whole stays or goes so.
    let segments = |vmas: &[VmaEntry]| vmas.iter().filter(|vma| is_segment(vma)).cloned().collect::<Vec<_>>();
    let attached = segments(parent);
    let attached_alike = attached == segments(child) && attached.iter().all(survives_fork);
    let stays = |vma: &VmaEntry, others: &[VmaEntry]| {
        survives_fork(vma)
            && (attached_alike || !is_segment(vma))
            && others.binary_search_by_key(&vma.start, |v| v.start).is_ok_and(|at| alike(&others[at], vma))
    };
    for vma in parent.iter().filter(|vma| is_made(vma) && !stays(vma, child)) {
        plan.before.push(Step::Unmap(range(vma)));
    }
    for vma in child.iter().filter(|vma| is_made(vma)) {
        if !stays(vma, parent) {
            make(vma, space, memory, &mut plan);
            continue;
        }
        plan.before.extend(advised(GUARD_REMOVE, inherited, space.guards, range(vma)));
        if vma.flags & MAP_SHARED == 0 {
            let Difference { gone, other } = differs(range(vma))?;
            let prot = if other.is_empty() { vma.prot } else { vma.prot | libc::PROT_WRITE as u32 };
            if prot != vma.prot {
                plan.before.push(Step::Protect { range: range(vma), prot });
                plan.after.push(Step::Protect { range: range(vma), prot: vma.prot });
            }
            let advice = libc::MADV_DONTNEED;
            plan.before.extend(gone.into_iter().map(|range| Step::Advise { range, advice }));
            plan.pages.extend(other);
        }
        plan.after.extend(advised(GUARD_INSTALL, space.guards, inherited, range(vma)));
        lock(vma, space, &mut plan.after);
    }
    Ok(plan)
}

/// Advice for the guard regions in `range` that are of the ones and not of the others.
fn advised(advice: i32, of: &RangeSet, but: &RangeSet, range: AddrRange) -> impl Iterator<Item = Step> {
    let mut advised: RangeSet = of.within(range).collect();
    advised.subtract(but);
    let ranges: Vec<AddrRange> = advised.iter().collect();
    ranges.into_iter().map(move |range| Step::Advise { range, advice })
}

/// In which a child's pages are not its parent's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Difference {
    /// The child has none here.
    pub(super) gone: Vec<AddrRange>,
    /// The child has these.
    pub(super) other: Vec<AddrRange>,
}

/// Whether a child has it as its parent does. Locks are never inherited.
fn survives_fork(vma: &VmaEntry) -> bool {
    advice(vma).all(|advice| advice != libc::MADV_DONTFORK && advice != libc::MADV_WIPEONFORK)
}

/// Whether two areas differ in nothing that a fork keeps.
fn alike(a: &VmaEntry, b: &VmaEntry) -> bool {
    let unlocked = |vma: &VmaEntry| VmaEntry { flags: vma.flags & !(libc::MAP_LOCKED as u32), ..vma.clone() };
    unlocked(a) == unlocked(b)
}

fn lock(vma: &VmaEntry, space: Space<'_>, steps: &mut Vec<Step>) {
    let range = range(vma);
    if vma.flags & libc::MAP_LOCKED as u32 != 0 {
        // What cannot be touched cannot be there.
        let closed = vma.prot & libc::PROT_READ as u32 == 0 || space.guards.overlaps(range);
        steps.push(Step::Lock { range, on_fault: closed || space.locked_on_fault.overlaps(range) });
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    const PAGE: u64 = 4096;

    /// An area of a System V segment: pages, from this page of it on.
    fn segment(start: u64, pages: u64, page: u64, prot: i32) -> VmaEntry {
        VmaEntry {
            start: start * PAGE,
            end: (start + pages) * PAGE,
            pgoff: page * PAGE,
            shmid: 3,
            prot: prot as u32,
            flags: MAP_SHARED | libc::MAP_ANONYMOUS as u32,
            status: (VmaStatus::REGULAR | VmaStatus::ANON_SHARED | VmaStatus::SYSVIPC).bits(),
            ..VmaEntry::default()
        }
    }

    static NONE: RangeSet = RangeSet::new();

    /// Without guard regions.
    fn space(vmas: &[VmaEntry]) -> Space<'_> {
        Space { vmas, guards: &NONE, locked_on_fault: &NONE }
    }

    fn pages(start: u64, count: u64) -> AddrRange {
        AddrRange::new(start * PAGE, (start + count) * PAGE)
    }

    const WRITABLE: i32 = libc::PROT_READ | libc::PROT_WRITE;

    /// Attached twice; once with a page in the middle that cannot be written.
    fn attached() -> Vec<VmaEntry> {
        vec![
            segment(16, 1, 0, WRITABLE),
            segment(17, 1, 1, libc::PROT_READ),
            segment(18, 2, 2, WRITABLE),
            segment(20, 4, 0, WRITABLE),
        ]
    }

    #[test]
    fn a_segment_is_attached_whole_and_once_an_attachment() {
        let plan = build(space(&attached()), &Chain::empty());
        let protect = Step::Protect { range: pages(17, 1), prot: libc::PROT_READ as u32 };
        let attach = |start| Step::Attach { range: pages(start, 4), object: 3 };
        assert_eq!(plan.before, [attach(16), attach(20)]);
        assert_eq!(plan.after, [protect]);
    }

    #[test]
    fn a_child_keeps_what_is_attached_or_attaches_all_of_it_again() {
        let adapted = |child: &[VmaEntry]| {
            let same = |_| Ok::<_, Infallible>(Difference::default());
            let Ok(plan) = adapt(space(&attached()), space(child), &Chain::empty(), same);
            plan
        };
        assert_eq!(adapted(&attached()), Plan::default());
        let mut other = attached();
        other[1].prot = WRITABLE as u32;
        let steps = adapted(&other).before;
        let count = |is: fn(&Step) -> bool| steps.iter().filter(|step| is(step)).count();
        assert_eq!(count(|step| matches!(step, Step::Unmap(_))), 4, "{steps:?}");
        assert_eq!(count(|step| matches!(step, Step::Attach { .. })), 2, "{steps:?}");
    }

    #[test]
    fn guard_regions_are_installed_and_a_childs_are_its_own() {
        let area = |start| VmaEntry {
            status: (VmaStatus::REGULAR | VmaStatus::ANON_PRIVATE).bits(),
            flags: libc::MAP_PRIVATE as u32 | libc::MAP_ANONYMOUS as u32,
            ..segment(start, 8, 0, WRITABLE)
        };
        let (vmas, other) = (vec![area(16), area(32)], vec![area(16), area(40)]);
        let guards: RangeSet = [pages(16, 1), pages(20, 2), pages(32, 1)].into_iter().collect();
        let others: RangeSet = [pages(21, 2), pages(40, 1)].into_iter().collect();
        let advised = |plan: &Plan| -> Vec<(AddrRange, i32)> {
            let advised = plan.before.iter().chain(&plan.after).filter_map(|step| match step {
                Step::Advise { range, advice } => Some((*range, *advice)),
                _ => None,
            });
            advised.collect()
        };
        let parent = Space { guards: &guards, ..space(&vmas) };
        let plan = build(parent, &Chain::empty());
        let all: Vec<_> = guards.iter().map(|range| (range, GUARD_INSTALL)).collect();
        assert_eq!(advised(&plan), all);
        let same = |_| Ok::<_, Infallible>(Difference::default());
        let Ok(plan) = adapt(parent, Space { guards: &others, ..space(&other) }, &Chain::empty(), same);
        let expected = [
            (pages(16, 1), GUARD_REMOVE),
            (pages(20, 1), GUARD_REMOVE),
            (pages(22, 1), GUARD_INSTALL),
            (pages(40, 1), GUARD_INSTALL),
        ];
        assert_eq!(advised(&plan), expected);
        assert!(matches!(plan.after[..], [Step::Advise { advice: GUARD_INSTALL, .. }, ..]));
    }

    #[test]
    fn locked_or_not_an_area_stays_and_is_touched_if_all_of_it_was_locked() {
        let area = |start, locked: bool| VmaEntry {
            status: (VmaStatus::REGULAR | VmaStatus::ANON_PRIVATE).bits(),
            flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | if locked { libc::MAP_LOCKED } else { 0 })
                as u32,
            ..segment(start, 8, 0, WRITABLE)
        };
        let parent = vec![area(16, true), area(32, true), area(48, false)];
        let child = vec![area(16, false), area(32, true), area(48, true)];
        let on_fault: RangeSet = [pages(48, 8)].into_iter().collect();
        let same = |_| Ok::<_, Infallible>(Difference::default());
        let shall = Space { locked_on_fault: &on_fault, ..space(&child) };
        let Ok(plan) = adapt(space(&parent), shall, &Chain::empty(), same);
        let lock = |start, on_fault| Step::Lock { range: pages(start, 8), on_fault };
        assert_eq!(plan.before, []);
        assert_eq!(plan.after, [lock(32, false), lock(48, true)]);
    }
}
