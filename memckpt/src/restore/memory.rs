//! What is to be done to make the memory of a process: a pure plan, from what there is and what there shall be.

use crate::addr::AddrRange;
use crate::image::Chain;
use crate::image::chain::HeldRun;
use crate::image::proto::VmaEntry;
use crate::plan::classify::VmaStatus;

use super::checkpoint::range;

/// A step towards it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// munmap(2)
    Unmap(AddrRange),
    /// mmap(2) of anonymous memory, or of what a file or shared object holds.
    Map { range: AddrRange, prot: u32, flags: u32, source: Source },
    /// madvise(2)
    Advise { range: AddrRange, advice: i32 },
    /// pread(2) of pages into place.
    Read(HeldRun),
    /// mprotect(2)
    Protect { range: AddrRange, prot: u32 },
    /// mlock(2), without touching what is not there (MLOCK_ONFAULT).
    Lock(AddrRange),
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
/// As many bytes as one pread(2) may ask for (MAX_RW_COUNT, include/linux/fs.h), in round numbers.
const READ_MAX: u64 = 1 << 30;

/// Whether mmap(2) makes it: not the kernel's own areas.
pub(super) fn is_made(vma: &VmaEntry) -> bool {
    let own = VmaStatus::VSYSCALL | VmaStatus::VDSO | VmaStatus::VVAR | VmaStatus::UPROBES;
    !status(vma).intersects(own)
}

pub(super) fn status(vma: &VmaEntry) -> VmaStatus {
    VmaStatus::from_bits_retain(vma.status)
}

/// What it maps.
pub(super) fn source(vma: &VmaEntry) -> Source {
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

/// Makes the areas `vmas` with the pages of `memory`, in an empty address space.
pub(super) fn build(vmas: &[VmaEntry], memory: &Chain) -> Vec<Step> {
    let mut steps = Vec::new();
    for vma in vmas.iter().filter(|vma| is_made(vma)) {
        let runs: Vec<HeldRun> = match vma.flags & MAP_SHARED {
            0 => memory.within(range(vma)).collect(),
            // Its object holds them.
            _ => Vec::new(),
        };
        make(vma, runs, &mut steps);
    }
    steps
}

fn make(vma: &VmaEntry, runs: Vec<HeldRun>, steps: &mut Vec<Step>) {
    let range = range(vma);
    let prot = if runs.is_empty() { vma.prot } else { vma.prot | libc::PROT_WRITE as u32 };
    steps.push(Step::Map { range, prot, flags: vma.flags & KEPT, source: source(vma) });
    fill(vma, prot, runs, steps);
}

fn fill(vma: &VmaEntry, prot: u32, runs: Vec<HeldRun>, steps: &mut Vec<Step>) {
    let range = range(vma);
    let (early, late): (Vec<i32>, Vec<i32>) = advice(vma).partition(|advice| EARLY.contains(advice));
    steps.extend(early.into_iter().map(|advice| Step::Advise { range, advice }));
    steps.extend(runs.into_iter().flat_map(pieces).map(Step::Read));
    if prot != vma.prot {
        steps.push(Step::Protect { range, prot: vma.prot });
    }
    steps.extend(late.into_iter().map(|advice| Step::Advise { range, advice }));
    lock(vma, steps);
}

/// The advice of madvise(2) that is in force.
fn advice(vma: &VmaEntry) -> impl Iterator<Item = i32> {
    let bits = vma.madv.unwrap_or(0);
    (0..64).filter(move |n| bits & (1 << n) != 0)
}

/// A run, in pieces that one system call reads.
fn pieces(run: HeldRun) -> impl Iterator<Item = HeldRun> {
    let count = run.range.len().div_ceil(READ_MAX);
    (0..count).map(move |n| {
        let start = run.range.start.saturating_add(n * READ_MAX);
        let end = start.saturating_add(READ_MAX).min(run.range.end);
        HeldRun { range: AddrRange { start, end }, member: run.member, offset: run.offset + n * READ_MAX }
    })
}

/// Turns the address space of a parent, as a fork has left it, into that of its child. What both have alike stays shared until it
/// is written; `differs` tells which pages of a range do not.
pub(super) fn adapt<E>(
    parent: &[VmaEntry],
    child: &[VmaEntry],
    memory: &Chain,
    mut differs: impl FnMut(AddrRange) -> Result<Difference, E>,
) -> Result<Vec<Step>, E> {
    let mut steps = Vec::new();
    let stays = |vma: &VmaEntry, others: &[VmaEntry]| {
        survives_fork(vma)
            && others.binary_search_by_key(&vma.start, |v| v.start).is_ok_and(|at| others[at] == *vma)
    };
    for vma in parent.iter().filter(|vma| is_made(vma) && !stays(vma, child)) {
        steps.push(Step::Unmap(range(vma)));
    }
    for vma in child.iter().filter(|vma| is_made(vma)) {
        let private = vma.flags & MAP_SHARED == 0;
        if !stays(vma, parent) {
            let runs = if private { memory.within(range(vma)).collect() } else { Vec::new() };
            make(vma, runs, &mut steps);
        } else if private {
            let Difference { gone, other } = differs(range(vma))?;
            let prot = if other.is_empty() { vma.prot } else { vma.prot | libc::PROT_WRITE as u32 };
            if prot != vma.prot {
                steps.push(Step::Protect { range: range(vma), prot });
            }
            steps.extend(gone.into_iter().map(|range| Step::Advise { range, advice: libc::MADV_DONTNEED }));
            steps.extend(other.into_iter().flat_map(pieces).map(Step::Read));
            if prot != vma.prot {
                steps.push(Step::Protect { range: range(vma), prot: vma.prot });
            }
            lock(vma, &mut steps);
        } else {
            lock(vma, &mut steps);
        }
    }
    Ok(steps)
}

/// In which a child's pages are not its parent's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Difference {
    /// The child has none here.
    pub(super) gone: Vec<AddrRange>,
    /// The child has these.
    pub(super) other: Vec<HeldRun>,
}

/// Whether a child has it as its parent does. Locks are never inherited.
fn survives_fork(vma: &VmaEntry) -> bool {
    advice(vma).all(|advice| advice != libc::MADV_DONTFORK && advice != libc::MADV_WIPEONFORK)
}

fn lock(vma: &VmaEntry, steps: &mut Vec<Step>) {
    if vma.flags & libc::MAP_LOCKED as u32 != 0 {
        steps.push(Step::Lock(range(vma)));
    }
}
